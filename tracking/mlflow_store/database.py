"""Create MLflow's sqlite database in a new place, by copying a prepared one.

MLflow creates a database by running all its migrations, which takes seconds, and two
processes that do so at once break each other. Here they run once for each version of
MLflow, into the user's cache folder. Afterwards a new database is a copy of that file.
"""

from __future__ import annotations

import contextlib
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tracking.durable import (
    LockHeldError,
    copy_if_absent,
    has_content,
    hold_lock,
    replace_file,
)


def create_database(
    path: Path, cache: Path, version: str, migrate: Callable[[Path], None]
) -> bool:
    """Create an MLflow database if there is none.

    Parameters
    ----------
    version
        Of MLflow; each version has its own prepared database.
    migrate
        Creates a database at a path with MLflow.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    if has_content(path):
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    prepared = cache / f"mlflow-{version}.db"
    if not prepared.exists():
        with replace_file(prepared) as temporary:
            temporary.unlink(missing_ok=True)  # of a killed process
            migrate(temporary)
            _drop_experiments(temporary)
    return copy_if_absent(prepared, path)


@contextlib.contextmanager
def lock_cache(cache: Path) -> Iterator[Path]:
    """Let one process of this user at a time create databases.

    Yields
    ------
    folder for prepared databases: ``cache``, or a temporary one if it cannot be written
    """
    with contextlib.ExitStack() as stack:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            stack.enter_context(hold_lock(cache / "lock"))
        except (OSError, LockHeldError):
            cache = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        yield cache


def _drop_experiments(path: Path) -> None:
    """Delete MLflow's default experiment: its artifacts would be stored in the cache.

    MLflow creates it again when it opens the copy, with a folder beside the copy.
    """
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("DELETE FROM experiments")
