"""The folder of runs: where it is, what it contains, how a run is found and how it ended.

A run is ``<runs>/<id>/``: ``run.json`` (its manifest), ``records/<rank>/`` (journal),
``artifacts/``, ``checkpoints/``, ``delivery/``. The id sorts by time and ends in a
readable name: ``20261122-235901-digits-amber-fox-3f2a``.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import functools
import json
import os
import re
import secrets
import stat
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from tracking import durable
from tracking.capture import ENVIRONMENT, Environment
from tracking.errors import (
    InvalidFileError,
    RunNotFoundError,
    describe_mismatch,
    warn,
)
from tracking.redaction import redact
from tracking.schema import check_path
from tracking.settings import read_secrets

FORMAT: Final = 2
"""Version of a run's folder. In version 1 rows of an open block had no check."""

MANIFEST: Final = "run.json"
FAILURE: Final = "failure.json"
"""Written beside the journal of a rank other than 0 that failed."""

SECONDS: Final = len("20261122-235901")
"""Characters of an id that encode its time."""

_MAX_JSON_BYTES: Final = 64 << 20
_MAX_RANK: Final = 2**31 - 1
_RANK: Final = re.compile("0|[1-9][0-9]{0,9}")

_NOT_DECODED: Final = (msgspec.MsgspecError, RecursionError, UnicodeError)
"""What msgspec raises for what is no JSON, or has fields of other types."""

_T = TypeVar("_T")

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


@dataclass
class Manifest:
    """Facts about a run as a whole, stored in its ``run.json``.

    Attributes
    ----------
    created, ended
        UTC, ISO 8601.
    status
        ``running``, ``finished``, ``failed`` or ``killed``, as the run itself wrote.
    error
        ``type`` and ``message`` of the exception that ended a failed run.
    command
        Words of the command line, secrets masked.
    git
        ``commit, branch, dirty, remote``; None outside a repository.
    mlflow
        The caller's own MLflow run that was active at the start: ``run_id``,
        ``borrowed``, ``tracking_uri``. Empty if there was none.
    deliver, delivery
        Whether rows are sent to MLflow, and the options for it.
    resumed
        One entry for each time that the run was resumed.
    extra
        Any JSON value, for packages that build on this one.
    path
        Folder of the run when it started; another one tells that it was moved or copied.
    num_fits
        How many fits it has; None: not noted, as by earlier versions.
    keys
        Layout of the names of its metrics in MLflow; see ``tracking.mlflow_store.keys``.
    """

    id: str
    name: str
    format: int = FORMAT
    experiment: str | None = None
    note: str | None = None
    created: str = ""
    ended: str | None = None
    status: str = "running"
    error: dict[str, str] | None = None
    command: list[str] = field(default_factory=list)
    cwd: str = ""
    host: str = ""
    user: str = ""
    pid: int = 0
    python: str = ""
    platform: str = ""
    devices: list[str] = field(default_factory=list)
    packages: dict[str, str] = field(default_factory=dict)
    git: dict[str, Any] | None = None
    mlflow: dict[str, Any] = field(default_factory=dict)
    deliver: bool = True
    delivery: dict[str, Any] = field(default_factory=dict)
    resumed: list[dict[str, Any]] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    path: str = ""
    keys: int = 1
    num_fits: int | None = None

    def write(self, run_path: Path) -> None:
        """Replace ``run.json`` in a run's folder."""
        fields = vars(self)  # plain JSON values, so no copy is needed
        text = json.dumps(fields, indent=2, ensure_ascii=False)
        data = text.encode(errors="replace") + b"\n"
        try:
            durable.write_atomically(run_path / MANIFEST, data)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._write_in_place(run_path / MANIFEST)

    def _write_in_place(self, path: Path) -> None:
        """Write into the space that the file has already, because the disk is full.

        The text has no blanks. If it is still too long, the packages are left out;
        ``environment.json`` keeps them.
        """
        try:
            durable.overwrite(path, json.dumps(vars(self)).encode())
        except OSError:
            text = json.dumps({**vars(self), "packages": {}})
            durable.overwrite(path, text.encode())

    @classmethod
    def read(cls, run_path: Path) -> Manifest:
        """Read the manifest from a run's folder.

        Raises
        ------
        RunNotFoundError
            If the folder has no ``run.json``.
        InvalidFileError
            If the file is damaged or unreadable, or a later version wrote it.

        Notes
        -----
        A copy of a run's folder beside the original is a run of its own: its id is the
        name of the copy.
        """
        path = run_path / MANIFEST
        advice = "Restore the file; the records beside it can be read without it."
        try:
            manifest = read_json(path, cls, advice=advice, latest_format=FORMAT)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise RunNotFoundError(
                f"run {run_path.name!r}: expected {MANIFEST} in it, got no such file. "
                "Give the folder of a run, or its id."
            ) from error
        except OSError as error:
            raise InvalidFileError(
                f"{path}: expected a readable file, got {error}. {advice}"
            ) from error
        manifest.adopt_environment(run_path)
        for name in ("created", "ended"):
            _check_time(getattr(manifest, name), f"{path}: field {name!r}", advice)
        if _is_copy(run_path, manifest.id):
            manifest.id = run_path.name
        return manifest

    def add_environment(self, found: Environment) -> None:
        """Take over what was captured beside training."""
        if found.started == self.created:
            self.platform, self.packages = found.platform, found.packages
            self.git = found.git
        for resume in self.resumed:
            if resume.get("time") == found.started:
                resume["git"] = found.git

    def adopt_environment(self, run_path: Path) -> Environment | None:
        """Take over what was captured for a run that was killed before it could."""
        if self.packages and all("git" in resume for resume in self.resumed):
            return None
        found = read_environment(run_path)
        if found is not None:
            self.add_environment(found)
        return found


def read_environment(run_path: Path) -> Environment | None:
    """Return what was captured beside training and is not in the manifest yet."""
    with contextlib.suppress(OSError, InvalidFileError):
        return read_json(run_path / ENVIRONMENT, Environment, advice="Delete it.")
    return None


def _check_time(text: str | None, place: str, advice: str) -> None:
    """Raise unless a text is a time with a zone, in ISO 8601, or empty."""
    with contextlib.suppress(ValueError):
        if not text or datetime.fromisoformat(text).tzinfo is not None:
            return
    raise InvalidFileError(
        f"{place}: expected a time with its zone in ISO 8601, got {text!r:.100}. "
        f"{advice}"
    )


def _is_copy(run_path: Path, id_: str) -> bool:
    """Whether the run that a manifest names is another folder beside this one."""
    if id_ in (run_path.name, ".", "..") or Path(id_).name != id_:
        return False
    original = run_path.parent / id_
    try:
        return has_manifest(original) and not original.samefile(run_path)
    except OSError:
        return False


def read_json(
    path: Path, as_type: type[_T], *, advice: str, latest_format: int | None = None
) -> _T:
    """Read a JSON file and check every field against a dataclass.

    Parameters
    ----------
    path
        File to read.
    as_type
        Dataclass or other type that ``msgspec.convert`` knows. Fields of the file that
        it does not have are ignored.
    advice
        What to do when the file is invalid; ends the error message.
    latest_format
        Highest known value of the file's field ``format``; None: it has no such field.

    Raises
    ------
    OSError
        If the file cannot be read.
    InvalidFileError
        If it is not JSON, nests too deeply, has a later format, or has a field of
        another type than the dataclass. The message names the field.
    """
    data = _read_regular(path, advice)
    with contextlib.suppress(*_NOT_DECODED):
        # Four times as fast as the way below, which finds what to say of a wrong file.
        found = msgspec.json.decode(data, type=as_type)
        if latest_format is None or getattr(found, "format", 0) <= latest_format:
            return found
    content = _load_json(path, data, advice)
    if latest_format is not None:
        _check_format(path, content, latest_format)
    try:
        return msgspec.convert(content, as_type)
    except msgspec.ValidationError as error:
        raise InvalidFileError(
            f"{path}: {describe_mismatch(error)}. {advice}"
        ) from error


def _read_regular(path: Path, advice: str) -> bytes:
    """Read a file of JSON; nothing else, and nothing endless."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):  # a pipe would never end
        raise InvalidFileError(f"{path}: expected a file, got something else. {advice}")
    if found.st_size > _MAX_JSON_BYTES:
        raise InvalidFileError(
            f"{path}: expected at most {_MAX_JSON_BYTES} bytes, got {found.st_size}. "
            f"{advice}"
        )
    return path.read_bytes()


def _load_json(path: Path, data: bytes, advice: str) -> object:
    try:
        content: object = json.loads(data)
    except RecursionError as error:
        raise InvalidFileError(
            f"{path}: expected JSON, got values nested too deeply to read. {advice}"
        ) from error
    except ValueError as error:
        raise InvalidFileError(
            f"{path}: expected JSON, got {error}. {advice}"
        ) from error
    return content


def _check_format(path: Path, content: object, latest: int) -> None:
    found = content.get("format") if isinstance(content, dict) else None
    if isinstance(found, int) and found > latest:
        raise InvalidFileError(
            f"{path}: expected format {latest} or less, got {found}. "
            "Install a later version of luz-harness."
        )


def find_start_folder(run_path: Path, manifest: Manifest) -> Path:
    """Return the folder that a run was started in, where it is if the project was moved."""
    started_in = Path(manifest.cwd)
    if manifest.path in ("", str(run_path)):
        return started_in
    moved = run_path / os.path.relpath(started_in, manifest.path)
    moved = Path(os.path.normpath(moved))
    return moved if moved in run_path.parents else started_in


# ----------------------------------------------------------------------- folders


def runs_folder(runs_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder of runs: the argument, else ``HARNESS_RUNS``, else ``./runs``."""
    # The only place that reads this variable.
    if runs_dir is not None:
        check_path(runs_dir, "runs_dir")
    chosen = runs_dir or os.environ.get("HARNESS_RUNS") or "runs"  # noqa: TID251
    return _expand_user(Path(chosen)).absolute()


def _expand_user(path: Path) -> Path:
    """Replace a leading ``~``; left as it is where there is no such home folder."""
    with contextlib.suppress(RuntimeError):
        return path.expanduser()
    return path


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
    # Anything else there is not ours.
    found = [
        p.name for p in records.iterdir() if _RANK.fullmatch(p.name) and p.is_dir()
    ]
    ranks = sorted(rank for rank in map(int, found) if rank <= _MAX_RANK)
    return {rank: get_rank_dir(run_path, rank) for rank in ranks}


def get_lock_path(rank_dir: Path) -> Path:
    """Return the lock file that the writer of a rank's records holds."""
    return rank_dir / "lock"


def find_writer(rank_dir: Path) -> durable.Holder | None:
    """Find the process that writes a rank's records, or may write them; None without one."""
    return durable.find_holder(get_lock_path(rank_dir))


def is_being_written(rank_dir: Path) -> bool:
    """Whether a process writes a rank's records, or may write them."""
    return find_writer(rank_dir) is not None


def has_live_writer(rank_dir: Path) -> bool:
    """Whether a process writes a rank's records for sure."""
    writer = find_writer(rank_dir)
    return writer is not None and writer.state == "live"


def find_writers(run_path: Path) -> dict[int, durable.Holder]:
    """Find the processes that write the records of a run, or may write them, by rank."""
    found = {rank: find_writer(dir_) for rank, dir_ in list_rank_dirs(run_path).items()}
    return {rank: holder for rank, holder in found.items() if holder is not None}


def describe_unknown(holder: durable.Holder, run_id: str) -> str:
    """Say who may still write a run, and what to do; the end of a message."""
    return (
        f"got one that may still be written by {holder}, which cannot be known from here. "
        f"Make sure that the process has ended, then run 'harness runs release {run_id}'."
    )


def release_run(run_path: Path) -> list[int]:
    """Take the writers of which it is not known whether they live for ended; their ranks."""
    found = [r for r, one in find_writers(run_path).items() if one.state == "unknown"]
    for rank in found:
        durable.release_lock(get_lock_path(get_rank_dir(run_path, rank)))
    return found


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

    Returns
    -------
    folder and readable name of the run

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


def has_manifest(path: Path) -> bool:
    """Whether a folder is a run: it has a ``run.json``, if only a spoilt one."""
    try:
        return os.path.lexists(path / MANIFEST)
    except ValueError:  # a null byte in the name
        return False


def run_paths(runs_dir: str | os.PathLike[str] | None = None) -> list[Path]:
    """Return the folders of all runs, newest first.

    A link to a run that is listed anyway is left out.
    """
    runs = runs_folder(runs_dir)
    if not runs.is_dir():
        return []
    with os.scandir(runs) as entries:
        is_link = {Path(one.path): one.is_symlink() for one in entries}
    found = [path for path in is_link if has_manifest(path)]
    links = {path for path in found if is_link[path]}
    if links:
        folders = {path.resolve(): path for path in [*links, *found]}
        folders |= {path.resolve(): path for path in found if path not in links}
        found = list(folders.values())
    seconds = Counter(path.name[:SECONDS] for path in found)

    def age(path: Path) -> tuple[str, str, str]:
        # An id has whole seconds: only runs of the same second need their manifest.
        is_alone = seconds[path.name[:SECONDS]] == 1
        return path.name[:SECONDS], "" if is_alone else _created(path), path.name

    return sorted(found, key=age, reverse=True)


def _created(path: Path) -> str:
    """Return the creation time in the manifest; empty if it cannot be read."""
    try:
        return Manifest.read(path).created
    except (InvalidFileError, RunNotFoundError):
        return ""


def read_manifests(
    runs_dir: str | os.PathLike[str] | None = None,
) -> dict[Path, Manifest]:
    """Read the manifests of all runs, newest first.

    Returns
    -------
    manifest by folder; a run whose manifest cannot be read is left out, with a warning
    """
    return _read_each(run_paths(runs_dir), Manifest.read)


def _read_each(paths: list[Path], read: Callable[[Path], _T]) -> dict[Path, _T]:
    """Read something of each run; what cannot be read is left out, with a warning."""
    found = {}
    for path in paths:
        try:
            found[path] = read(path)
        except InvalidFileError as error:
            warn(f"{error} The run is skipped.")
        except RunNotFoundError:  # deleted meanwhile
            continue
    return found


class _Head(msgspec.Struct):
    """The fields of a manifest that tell its name."""

    name: str
    format: int = 1


def _read_name(path: Path) -> str:
    """Read the name of a run, in a fifth of the time of the whole manifest."""
    with contextlib.suppress(OSError, InvalidFileError, *_NOT_DECODED):
        data = _read_regular(path / MANIFEST, "")
        head = msgspec.json.decode(data, type=_Head)
        if head.format <= FORMAT:
            return head.name
    return Manifest.read(path).name


@dataclass(frozen=True)
class RunNames:
    """The names of the runs of a folder, read once to find several of them.

    Attributes
    ----------
    runs
        The folder.
    names
        Name of each run by its folder, newest first.
    """

    runs: Path
    names: dict[Path, str]

    @classmethod
    def read(cls, runs: Path) -> RunNames:
        """Read the names; a run whose manifest cannot be read has none."""
        return cls(runs, _read_each(run_paths(runs), _read_name))

    @functools.cached_property
    def _by_name(self) -> dict[str, list[Path]]:
        found: dict[str, list[Path]] = {}
        for path, name in self.names.items():
            found.setdefault(name, []).append(path)
        return found

    def find(self, wanted: str) -> Path:
        """Find a run by its id, its name, or a unique piece of one of them.

        Raises
        ------
        RunNotFoundError
            If no run matches, or several do.
        """
        found = self._by_name.get(wanted) or [
            path
            for path, name in self.names.items()
            if wanted in path.name or wanted in name
        ]
        if len(found) == 1 and wanted:
            return found[0]
        if found:
            raise RunNotFoundError(
                f"open({wanted!r}): expected the id or name of one run, got a match "
                f"with {len(found)}: {_join_ids(found)}. Give more of it."
            )
        raise RunNotFoundError(
            f"open({wanted!r}): expected a run in {self.runs}, got none with this path, "
            f"id or name. {_suggest(wanted, self.names)}"
        )


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
    names: RunNames | None = None
    found = []
    for ref in refs:
        check_path(ref, "open(ref)")
        wanted = os.fspath(ref)
        here, there = _expand_user(Path(ref)).absolute(), runs_folder(runs_dir) / wanted
        # No manifest is read: a spoilt one must not hide this run or another one.
        if wanted and has_manifest(here):
            found.append(here)
        elif wanted and has_manifest(there):
            found.append(there)
        else:
            if names is None:
                names = RunNames.read(runs_folder(runs_dir))
            found.append(names.find(wanted))
    return found


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


def _slug(name: str) -> str:
    """Turn a name into letters, digits and dashes for a folder's name."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")[:48].strip("-") or "run"


# ------------------------------------------------------------------ how a run ended


@dataclass
class Failure:
    """Exception that ended one rank, stored in its ``failure.json``.

    Attributes
    ----------
    time
        UTC, ISO 8601.
    """

    type: str
    message: str
    time: str


def describe_error(error: BaseException) -> dict[str, str]:
    """Return type and message of an exception, as a manifest stores them: redacted."""
    message = redact(str(error), read_secrets())[:10_000]
    return {"type": type(error).__name__, "message": message}


def write_failure(rank_dir: Path, error: BaseException, time: str) -> None:
    """Record why a rank failed; rank 0 may be killed before it can do so itself."""
    text = json.dumps(describe_error(error) | {"time": time})
    with contextlib.suppress(OSError):  # a full disk must not hide the error itself
        rank_dir.mkdir(parents=True, exist_ok=True)
        durable.write_atomically(rank_dir / FAILURE, text.encode(errors="replace"))


def remove_failures(run_path: Path) -> None:
    """Remove the failures of all ranks, as a resumed run does first."""
    for rank_dir in list_rank_dirs(run_path).values():
        (rank_dir / FAILURE).unlink(missing_ok=True)


def get_status(run_path: Path, manifest: Manifest) -> str:
    """Return the status of a run.

    A run that says ``running`` although no process writes it has ``failed`` if a rank
    left a failure, since that may have ended rank 0 too; otherwise it was ``killed``. It is
    ``unknown`` if its process was not heard of for long, and may live on another machine.
    """
    if manifest.status == "running":
        writer = find_writer(get_rank_dir(run_path, 0))
        if writer is not None:
            return "running" if writer.state == "live" else "unknown"
        # It may have finished since the caller read the manifest.
        written = Manifest.read(run_path).status
        if written != "running":
            return written
        return "failed" if _read_failures(run_path) else "killed"
    return manifest.status


def get_first_error(run_path: Path, manifest: Manifest) -> dict[str, str] | None:
    """Return ``type`` and ``message`` of the earliest failure on any rank, if any."""
    found = _read_failures(run_path)
    if manifest.error is not None:
        kind, message = (manifest.error.get(key, "") for key in ("type", "message"))
        found.append(Failure(kind, message, manifest.ended or ""))
    if not found:
        return None
    first = min(found, key=lambda failure: failure.time)
    return {"type": first.type, "message": first.message}


def _read_failures(run_path: Path) -> list[Failure]:
    """Read the failures of ranks other than 0; each message names its rank."""
    found = []
    for rank, rank_dir in list_rank_dirs(run_path).items():
        with contextlib.suppress(OSError, InvalidFileError):
            failure = read_json(rank_dir / FAILURE, Failure, advice="Remove the file.")
            failure.message += f" (rank {rank})"
            found.append(failure)
    return found
