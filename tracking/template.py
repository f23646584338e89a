"""A fresh MLflow database, copied from one that was prepared before.

MLflow makes a new sqlite database by running every migration it ever had, which takes
seconds, and two processes that do so at once break each other. Here it is done once
for a version of MLflow, into the user's cache; afterwards a new database is a copy,
put in place whole or not at all.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path


def ensure_database(
    path: Path, cache: Path, version: str, build: Callable[[Path], None]
) -> bool:
    """Make an MLflow database where there is none.

    Parameters
    ----------
    path
        Where the database is to be.
    cache
        Folder of prepared databases, made if need be.
    version
        Of MLflow; a prepared database serves this one only.
    build
        Makes an MLflow database at a path, by MLflow's own means.

    Returns
    -------
    whether this call made it: False if it was there

    Raises
    ------
    OSError
        If it cannot be written.
    """
    if _has_content(path):
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            template = _template(cache, version, build)
        except OSError:  # a cache that cannot be written: prepare it for this once
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            template = _template(folder, version, build)
        return _put(template, path)


def _template(cache: Path, version: str, build: Callable[[Path], None]) -> Path:
    """Prepared database of a version, made at the first call on this machine."""
    cache.mkdir(parents=True, exist_ok=True)
    template = cache / f"mlflow-{version}.db"
    with _locked(cache / "lock"):
        if not template.exists():
            fresh = template.with_suffix(f".{os.getpid()}")
            fresh.unlink(missing_ok=True)
            build(fresh)
            _drop_experiments(fresh)
            fresh.replace(template)
    return template


def _drop_experiments(path: Path) -> None:
    """Drop MLflow's default experiment: its artifacts would lie in the cache.

    MLflow makes it anew, with a folder beside the user's, when it opens the copy.
    """
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("DELETE FROM experiments")


def _put(template: Path, path: Path) -> bool:
    """Copy a database to a place in one step, unless one has appeared there."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        shutil.copyfile(template, fresh)
        if path.exists():  # empty, as tempfile or touch leaves it
            fresh.replace(path)
            return True
        try:
            os.link(fresh, path)
        except FileExistsError:
            return False
        except OSError:  # a filesystem without hard links
            fresh.replace(path)
        return True
    finally:
        fresh.unlink(missing_ok=True)


def _has_content(path: Path) -> bool:
    """Whether a file is there and not empty."""
    with contextlib.suppress(OSError):
        return path.stat().st_size > 0
    return False


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file's lock, waited for; the kernel drops it if the process dies."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
