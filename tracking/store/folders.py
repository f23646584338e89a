"""The folders of runs: where they are, what is in them, and how a new one is made.

A run is ``<runs>/<id>/``: ``run.json`` (its manifest), ``records/<rank>/`` (journal),
``artifacts/``, ``checkpoints/``, ``delivery/``. The id sorts by time and ends in a
readable name: ``20261122-235901-digits-amber-fox-3f2a``.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import unicodedata
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from tracking.errors import describe_path
from tracking.schema import check_path

_MAX_RANK: Final = 2**31 - 1
_RANK: Final = re.compile("0|[1-9][0-9]{0,9}")

_ADJECTIVES: Final = """
amber azure bold brave brisk bright calm clear clever cosy crisp dapper deft
eager early fair fleet fond frank fresh gentle glad golden grand green happy
hardy honest jolly keen kind lively lucid lucky mellow merry mild misty neat
nimble noble placid plucky polite prompt proud quick quiet rapid ready rosy rustic
sharp silent silver smooth snug solar steady still sturdy sunny swift tidy warm
"""
_ANIMALS: Final = """
ant badger bat bear beaver bee bison crane crow deer dove duck eagle eel egret elk
falcon ferret finch fox frog gecko goose hare hawk heron horse ibex ibis jay kite
koala lark lemur lion llama lynx magpie marten mole moose moth newt ocelot orca
osprey otter owl panda perch pike plover puffin quail raven robin salmon seal shark
snail sparrow stoat stork swan tapir tern toad trout turtle vole walrus weasel wolf
"""


def runs_folder(runs_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder of runs: the argument, else ``HARNESS_RUNS``, else ``./runs``."""
    # The only place that reads this variable.
    if runs_dir is not None:
        check_path(runs_dir, "runs_dir")
    chosen = runs_dir or os.environ.get("HARNESS_RUNS") or "runs"  # noqa: TID251
    try:
        return expand_user(Path(chosen)).absolute()
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"runs_dir={str(chosen)!r}: expected a working folder that exists, got one that "
            "was removed. Change to another folder, or pass an absolute path."
        ) from error


def check_runs_folder(runs: Path) -> None:
    """Check that a folder of runs is not a run itself."""
    if (runs / "run.json").is_file():
        what = describe_path(runs)
        msg = f"runs_dir={str(runs)!r}: expected a folder of runs, got {what}."
        raise NotADirectoryError(f"{msg} Pass the folder that it is in.")


def expand_user(path: Path) -> Path:
    """Replace a leading ``~``; left as it is where there is no such home folder."""
    with contextlib.suppress(RuntimeError):
        return path.expanduser()
    return path


def get_working_folder() -> Path:
    """Return the working folder, or the root if it was removed."""
    try:
        return Path.cwd()
    except OSError:
        return Path("/")


def results_path(run_path: Path) -> Path:
    """File with the results of an ended run, in Markdown for its description in MLflow."""
    return run_path / "delivery" / "results.md"


def get_rank_dir(run_path: Path, rank: int) -> Path:
    """Return the folder of one rank's records."""
    return run_path / "records" / str(rank)


def list_rank_dirs(run_path: Path) -> dict[int, Path]:
    """Return the folders of a run's records by rank, in order."""
    records = run_path / "records"
    if not records.is_dir():
        return {}
    with os.scandir(records) as entries:  # anything else there is not ours
        found = [e.name for e in entries if _RANK.fullmatch(e.name) and e.is_dir()]
    ranks = sorted(rank for rank in map(int, found) if rank <= _MAX_RANK)
    return {rank: get_rank_dir(run_path, rank) for rank in ranks}


def create_run_dir(
    runs: Path, experiment: str | None, name: str | None, now: datetime | None = None
) -> tuple[Path, str]:
    """Make the folder of a new run.

    Parameters
    ----------
    runs
        Folder of runs, made if absent.
    experiment
        Begins the readable name if ``name`` is None.
    name
        Readable name; None: two random words.
    now
        Start time, UTC; None: the present.

    Raises
    ------
    OSError
        If the folder cannot be made.
    """
    if name is None:
        words = (
            f"{secrets.choice(_ADJECTIVES.split())}-{secrets.choice(_ANIMALS.split())}"
        )
        name = f"{experiment}-{words}" if experiment else words
    stamp = (now or datetime.now(UTC)).strftime("%Y%m%d-%H%M%S")
    check_runs_folder(runs)
    try:
        runs.mkdir(parents=True, exist_ok=True)
        while True:
            path = runs / f"{stamp}-{_slug(name)}-{secrets.token_hex(2)}"
            try:
                path.mkdir()
            except FileExistsError:
                if not path.is_dir():
                    raise
                continue
            return path, name
    except OSError as error:
        raise type(error)(
            error.errno,
            f"start(runs_dir={str(runs)!r}): expected a writable folder, got "
            f"{error.strerror}. Pass another one, or set HARNESS_RUNS.",
        ) from error


def _slug(name: str) -> str:
    """Turn a name into letters, digits and dashes for a folder's name."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")[:48].strip("-") or "run"
