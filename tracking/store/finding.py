"""Find the runs of a folder: all of them, newest first, or one by its path, id or name."""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, TypeVar

from tracking.errors import InvalidFileError, RunNotFoundError, describe_path, warn
from tracking.schema import check_path
from tracking.store.folders import check_runs_folder, expand_user, runs_folder
from tracking.store.manifest import Manifest, has_manifest, read_name

SECONDS: Final = len("20261122-235901")
"""Characters of an id that encode its time."""

_T = TypeVar("_T")


def run_paths(runs_dir: str | os.PathLike[str] | None = None) -> list[Path]:
    """Return the folders of all runs, newest first.

    A link to a run that is listed anyway is left out.
    """
    runs = runs_folder(runs_dir)
    if not runs.is_dir():
        return []
    check_runs_folder(runs)
    # Names rather than paths: a path costs more than the look at its run.
    with os.scandir(runs) as entries:
        is_link = {one.name: one.is_symlink() for one in entries}
    folder = os.path.join(runs, "")  # noqa: PTH118
    found = [name for name in is_link if has_manifest(folder + name)]
    links = {name for name in found if is_link[name]}
    if links:
        real = {os.path.realpath(folder + name): name for name in [*links, *found]}
        real |= {
            os.path.realpath(folder + name): name for name in found if name not in links
        }
        found = list(real.values())
    seconds = Counter(name[:SECONDS] for name in found)

    def age(name: str) -> tuple[str, str, str]:
        # An id has whole seconds: only runs of the same second need their manifest.
        second = name[:SECONDS]
        return second, "" if seconds[second] == 1 else _created(runs / name), name

    return [runs / name for name in sorted(found, key=age, reverse=True)]


def _created(path: Path) -> str:
    """Return the creation time in the manifest; empty if it cannot be read."""
    try:
        return Manifest.read(path).created
    except (InvalidFileError, RunNotFoundError):
        return ""


def read_manifests(
    runs_dir: str | os.PathLike[str] | None = None,
) -> Iterator[tuple[Path, Manifest]]:
    """Yield the folder and the manifest of each run, newest first.

    A run whose manifest cannot be read is left out, with a warning.
    """
    return _read_each(run_paths(runs_dir), Manifest.read)


def _read_each(
    paths: list[Path], read: Callable[[Path], _T]
) -> Iterator[tuple[Path, _T]]:
    """Read something of each run; what cannot be read is left out, with a warning."""
    for path in paths:
        try:
            found = read(path)
        except InvalidFileError as error:
            warn(f"{error} The run is skipped.")
        except RunNotFoundError:  # deleted meanwhile
            pass
        else:
            yield path, found


def find_run(
    ref: str | os.PathLike[str], runs_dir: str | os.PathLike[str] | None = None
) -> Path:
    """Find the folder of a run.

    Parameters
    ----------
    ref
        Path, id, name, or any piece of an id or name that is unique among the runs. A
        link to a run is followed.
    runs_dir
        Folder of runs, see ``runs_folder``.

    Raises
    ------
    RunNotFoundError
        If no run matches ``ref``, or several do.
    """
    return find_runs([ref], runs_dir)[0]


def find_runs(
    refs: Iterable[str | os.PathLike[str]],
    runs_dir: str | os.PathLike[str] | None = None,
) -> list[Path]:
    """Find the folders of several runs, as ``find_run``; each manifest is read once."""
    found = find_run_folders(refs, runs_dir)
    return [path.resolve() if path.is_symlink() else path for path in found]


def find_run_folders(
    refs: Iterable[str | os.PathLike[str]],
    runs_dir: str | os.PathLike[str] | None = None,
) -> list[Path]:
    """Find the folders of runs, or the links to them, as ``find_runs``."""
    runs = runs_folder(runs_dir)
    names: dict[Path, str] | None = None
    found = []
    for ref in refs:
        check_path(ref, "open(ref)")
        wanted = os.fspath(ref)
        here, there = expand_user(Path(ref)).absolute(), runs / wanted
        # No manifest is read: a spoilt one must not hide this run or another one.
        if wanted and has_manifest(here):
            found.append(here)
        elif wanted and has_manifest(there):
            found.append(there)
        else:
            if names is None:  # that of a run whose manifest cannot be read is empty
                paths = run_paths(runs)
                names = dict.fromkeys(paths, "") | dict(_read_each(paths, read_name))
            found.append(_find_by_name(wanted, runs, names))
    return found


def _find_by_name(wanted: str, runs: Path, names: dict[Path, str]) -> Path:
    """Find a run by its id, its name, or a unique piece of one of them."""
    found = [path for path, name in names.items() if wanted == name] or [
        path for path, name in names.items() if wanted in path.name or wanted in name
    ]
    if len(found) == 1 and wanted:
        return found[0]
    if found:
        raise RunNotFoundError(
            f"open({wanted!r}): expected the id or name of one run, got a match "
            f"with {len(found)}: {_join_ids(found)}. Give more characters of it."
        )
    got, here = "none with this path, id or name", expand_user(Path(wanted))
    if wanted and here.exists():
        got = describe_path(here)
    raise RunNotFoundError(
        f"open({wanted!r}): expected a run in {runs}, got {got}. "
        f"{_suggest(wanted, names)}"
    )


def _suggest(wanted: str, names: dict[Path, str]) -> str:
    if not names:
        return "The folder has no runs yet: pass runs_dir, or set HARNESS_RUNS."
    known = {name: path.name for path, name in names.items()}
    known |= {path.name: path.name for path in names}
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.4)
    if near:
        return f"Nearest: {', '.join(dict.fromkeys(near))}."
    return f"The latest: {_join_ids([*names][:3])}."


def _join_ids(found: list[Path]) -> str:
    more = ", ..." if len(found) > 10 else ""
    return ", ".join(path.name for path in found[:10]) + more
