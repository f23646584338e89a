"""The manifest of a run: facts about the run as a whole, in its ``run.json``."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import msgspec

from tracking import durable
from tracking.capture import ENVIRONMENT, Environment
from tracking.errors import InvalidFileError, RunNotFoundError
from tracking.store.json_file import NOT_DECODED, read_json, read_regular

FORMAT: Final = 2
"""Version of a run's folder. In version 1 rows of an open block had no check."""

MANIFEST: Final = "run.json"


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
        text = json.dumps(fields, ensure_ascii=False).encode(errors="replace")
        try:
            text = msgspec.json.format(text, indent=2)  # faster than the json module
        except msgspec.DecodeError:  # NaN, which is no JSON
            lines = json.dumps(fields, indent=2, ensure_ascii=False)
            text = lines.encode(errors="replace")
        try:
            durable.write_atomically(run_path / MANIFEST, text + b"\n")
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
        advice = "Restore the file; the records next to it can be read without it."
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
            if not _is_time(getattr(manifest, name)):
                raise InvalidFileError(
                    f"{path}: field {name!r}: expected a time with its zone in ISO 8601, "
                    f"got {getattr(manifest, name)!r:.100}. {advice}"
                )
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


def _is_time(text: str | None) -> bool:
    """Whether a text is a time with a zone, in ISO 8601, or empty."""
    try:
        return not text or datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        return False


def _is_copy(run_path: Path, id_: str) -> bool:
    """Whether the run that a manifest names is another folder beside this one."""
    if id_ in (run_path.name, ".", "..") or Path(id_).name != id_:
        return False
    original = run_path.parent / id_
    try:
        return has_manifest(original) and not original.samefile(run_path)
    except OSError:
        return False


class _Head(msgspec.Struct):
    """The fields of a manifest that tell its name."""

    name: str
    format: int = 1


def read_name(path: Path) -> str:
    """Read the name of a run, in a fifth of the time of the whole manifest."""
    with contextlib.suppress(OSError, InvalidFileError, *NOT_DECODED):
        data = read_regular(path / MANIFEST, "")
        head = msgspec.json.decode(data, type=_Head)
        if head.format <= FORMAT:
            return head.name
    return Manifest.read(path).name


def has_manifest(path: str | Path) -> bool:
    """Whether a folder is a run: it has a ``run.json``, if only a spoilt one."""
    try:
        return os.path.lexists(f"{path}/{MANIFEST}")
    except ValueError:  # a null byte in the name
        return False


def find_start_folder(run_path: Path, manifest: Manifest) -> Path:
    """Return the folder that a run was started in, where it is if the project was moved."""
    started_in = Path(manifest.cwd)
    if manifest.path in ("", str(run_path)):
        return started_in
    moved = run_path / os.path.relpath(started_in, manifest.path)
    moved = Path(os.path.normpath(moved))
    return moved if moved in run_path.parents else started_in
