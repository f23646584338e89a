"""A fresh MLflow database, copied from one that was prepared before.

MLflow makes a new sqlite database by running every migration it ever had, which takes
seconds, and two processes that do so at once break each other. Here it is done once
for a version of MLflow, into the user's cache; afterwards a new database is a copy,
put in place whole or not at all.
"""

from __future__ import annotations

import contextlib
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tracking.durable import copy_if_absent, has_content, hold_lock, replace_file


def ensure_database(
    path: Path, cache: Path, version: str, build: Callable[[Path], None]
) -> bool:
    """Make an MLflow database where there is none.

    Parameters
    ----------
    path
        Where the database is to be.
    cache
        Folder of prepared databases.
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
    if has_content(path):
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    template = cache / f"mlflow-{version}.db"
    if not template.exists():
        with replace_file(template) as fresh:
            fresh.unlink(missing_ok=True)
            build(fresh)
            _drop_experiments(fresh)
    return copy_if_absent(template, path)


@contextlib.contextmanager
def alone(cache: Path) -> Iterator[Path]:
    """Be the one process of this user that makes a database.

    Yields
    ------
    folder for prepared databases: ``cache``, or a temporary one if that cannot be had
    """
    with contextlib.ExitStack() as stack:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            stack.enter_context(hold_lock(cache / "lock"))
            folder = cache
        except OSError:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        yield folder


def _drop_experiments(path: Path) -> None:
    """Drop MLflow's default experiment: its artifacts would lie in the cache.

    MLflow makes it anew, with a folder beside the user's, when it opens the copy.
    """
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("DELETE FROM experiments")
