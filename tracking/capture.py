"""Describe where a run was started: code, command line, machine and packages.

No secret is captured: environment variables are left out, URLs lose their credentials,
secret arguments are masked, and files that look like secrets are left out of the diff.
"""

from __future__ import annotations

import contextlib
import dataclasses
import getpass
import json
import platform
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tracking.durable import write_atomically
from tracking.redaction import (
    has_secret_settings,
    mask_arguments,
    redact,
    redact_code,
    strip_url,
)
from tracking.settings import read_secrets

MAX_DIFF_BYTES: Final = 1 << 20
MAX_UNTRACKED: Final = 200
GIT_TIMEOUT_S: Final = 10.0
"""Time for all git commands together; what they have not answered by then is left out."""

ENVIRONMENT: Final = "environment.json"
"""File in a run's folder with what was captured, until the run's manifest has it."""

_BOOT: Final = (
    "import sys; sys.path.append(sys.argv.pop(1)); "
    "from tracking.capture import main; main()"
)
_PACKAGES: Final = str(Path(__file__).resolve().parents[1])

_HIDDEN_FILES: Final = tuple(
    str.split(
        "*.env .env* *.pem *.key *.pfx *.p12 *.jks *.kdbx *.tfvars id_rsa* id_ed25519* "
        ".netrc .npmrc .pypirc .htpasswd .pgpass kubeconfig *secret* *credential* "
        "*password*"
    )
)
_SETTINGS_FILES: Final = frozenset(
    str.split(".cfg .conf .config .ini .json .properties .toml .xml .yaml .yml")
)
"""A file of these that assigns a value to a name of a secret is left out whole."""


@dataclass(frozen=True)
class CodeState:
    """State of the git repository around a folder."""

    #: ``commit``, ``branch`` (None when detached), ``dirty`` and ``remote``. Each is
    #: None if git did not answer in time. None outside a repository.
    summary: dict[str, Any] | None
    #: Uncommitted changes to tracked files, cut at 1 MiB, and the names of untracked
    #: files. Empty if nothing differs from the commit. Secrets are masked, and files of
    #: settings that hold some are left out.
    diff: str


def code_state(
    folder: Path,
    secrets: Sequence[str] | None = None,
    timeout_s: float = GIT_TIMEOUT_S,
    runs: Path | None = None,
) -> CodeState:
    """State of the code. It takes about 10 ms in a small repository.

    Parameters
    ----------
    secrets
        To mask; None: those of this process.
    timeout_s : seconds
        Time for all git commands together.
    runs
        Folder of runs, which is no change of the code.
    """
    deadline = time.monotonic() + timeout_s
    hidden = [f":(exclude,icase,glob)**/{name}" for name in _HIDDEN_FILES]
    shown = [":/"]
    if runs is not None and folder in runs.parents:
        shown.append(f":(exclude,literal){runs.relative_to(folder)}")
    plain = ("--no-color", "--no-ext-diff", "--no-textconv")
    questions = {
        "commit": ["rev-parse", "HEAD"],
        "branch": ["symbolic-ref", "--short", "-q", "HEAD"],
        "status": ["status", "--porcelain=v1", "-z", "--", *shown],
        "remote": ["config", "--get", "remote.origin.url"],
        "diff": ["diff", *plain, "HEAD", "--", ":/", *hidden],
    }
    options = _turn_off_programs(folder, deadline)
    answers = _ask_git(folder, questions, deadline, options)
    status, remote = answers["status"], answers["remote"]
    if answers["commit"] is None and status is None:
        return CodeState(None, "")
    changes = [] if status is None else [line for line in status.split("\0") if line]
    summary = {
        "commit": (answers["commit"] or "").strip() or None,
        "branch": (answers["branch"] or "").strip() or None,
        "dirty": None if status is None else bool(changes),
        "remote": strip_url(remote.strip()) if remote else None,
    }
    untracked = [line[3:] for line in changes if line.startswith("?? ")]
    secrets = read_secrets() if secrets is None else secrets
    diff = _redact_diff(answers["diff"] or "", secrets)
    return CodeState(summary, _format_diff(diff, untracked))


def _turn_off_programs(folder: Path, deadline: float) -> list[str]:
    """Options of git that keep it from the programs in its settings.

    Filters of files, such as those of Git LFS, may be slow, ask for a password, or write.
    """
    pattern = r"^filter\..*\.(clean|process|required)$"
    question = {"filters": ["config", "--get-regexp", pattern]}
    lines = _ask_git(folder, question, deadline)
    names = [line.partition(" ")[0] for line in (lines["filters"] or "").splitlines()]
    settings = ["core.fsmonitor=false"]
    for name in names:
        settings.append(f"{name}=false" if name.endswith(".required") else f"{name}=")
    return [word for setting in settings for word in ("-c", setting)]


def command() -> list[str]:
    """The command that started this process, with secrets masked."""
    return mask_arguments([*sys.orig_argv] or [sys.executable], read_secrets())


def machine() -> dict[str, Any]:
    """Host, user, Python, and the GPUs that torch has initialized."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # in a container the user may have no name
        user = "unknown"
    return {
        "host": socket.gethostname(),
        "user": user,
        "python": platform.python_version(),
        "devices": _devices(),
    }


def packages(folders: Sequence[str]) -> dict[str, str]:
    """Versions of the installed distributions, by name.

    Parameters
    ----------
    folders
        Where modules are found, first to last; ``sys.path`` of a process.

    Notes
    -----
    Read from the names of their folders. ``importlib.metadata`` opens every one of them
    and takes a hundred times as long.
    """
    found: dict[str, str] = {}
    for folder in folders:
        path = Path(folder)
        if not path.is_dir():
            continue
        for info in path.glob("*.dist-info"):
            name, _, version = info.name.removesuffix(".dist-info").rpartition("-")
            found.setdefault(name.replace("_", "-").lower(), version)
    return dict(sorted(found.items()))


def _ask_git(
    folder: Path,
    questions: Mapping[str, Sequence[str]],
    deadline: float,
    options: Sequence[str] = (),
) -> dict[str, str | None]:
    """Run several git commands at once; None for each that fails or is too slow."""
    running = {}
    for word, arguments in questions.items():
        # With optional locks, "git status" could write the index while the user's git does.
        line = ["git", "--no-optional-locks", "-C", str(folder), *options, *arguments]
        try:
            running[word] = subprocess.Popen(
                line,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except OSError:  # no git here
            return dict.fromkeys(questions)
    answers: dict[str, str | None] = {}
    for word, process in running.items():
        with process:
            try:
                left_s = max(deadline - time.monotonic(), 0.01)
                answer, _ = process.communicate(timeout=left_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                answers[word] = None
                continue
        has_answer = process.returncode == 0
        answers[word] = answer.decode(errors="replace") if has_answer else None
    return answers


def _format_diff(diff: str, untracked: Sequence[str]) -> str:
    """Cut the diff to its size, and add the list of untracked files."""
    data = diff.encode(errors="replace")
    if len(data) > MAX_DIFF_BYTES:
        cut = data[:MAX_DIFF_BYTES].decode(errors="ignore")
        diff = f"{cut}\n# cut here: {len(data)} bytes in all\n"
    if untracked:
        diff += "".join(f"# untracked: {name}\n" for name in untracked[:MAX_UNTRACKED])
        if len(untracked) > MAX_UNTRACKED:
            diff += f"# and {len(untracked) - MAX_UNTRACKED} more\n"
    return diff


def _redact_diff(diff: str, secrets: Sequence[str]) -> str:
    """Mask the secrets in a diff, and leave out files of settings that hold some."""
    kept = []
    for part in re.split(r"(?m)^(?=diff --git )", diff):
        name = part.partition("\n")[0].rpartition(" b/")[2].strip('"')
        is_settings = Path(name).suffix.lower() in _SETTINGS_FILES
        if is_settings and (has_secret_settings(part) or redact(part, secrets) != part):
            kept.append(f"# left out, it seems to hold secrets: {name}\n")
        else:
            kept.append(redact_code(part, secrets))
    return "".join(kept)


def _devices() -> list[str]:
    """Names of the GPUs, if the caller has imported torch and initialized CUDA."""
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    # Asking for a name creates a CUDA context, which would break a later fork of the
    # caller's process.
    if cuda is None or not cuda.is_initialized():
        return []
    return [cuda.get_device_name(i) for i in range(cuda.device_count())]


# --------------------------------------------------------------- beside training


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What a run was started on."""

    started: str  #: when the run was started or resumed, as its manifest has it
    platform: str = ""  #: operating system
    #: versions of the installed distributions, by name
    packages: dict[str, str] = field(default_factory=dict)
    #: as ``CodeState``; the diff is empty if it is not to be kept
    git: dict[str, Any] | None = None
    diff: str = ""


class Capture:
    """Captures the environment of a run in a short process beside training.

    It takes some tens of milliseconds, more in a large repository, and is on record even
    if this process is killed meanwhile.

    Parameters
    ----------
    run_path
        Folder of the run; the process writes `ENVIRONMENT` into it.
    on_end
        Called from another thread with what was found.
    """

    def __init__(
        self,
        run_path: Path,
        started: str,
        folder: Path,
        *,
        save_diff: bool,
        on_end: Callable[[Environment], None],
    ) -> None:
        self.found: Environment | None = None
        self._file = run_path / ENVIRONMENT
        self._on_end = on_end
        request = {
            "file": str(self._file),
            "started": started,
            "folder": str(folder),
            "modules": [entry for entry in sys.path if isinstance(entry, str)],
            "save_diff": save_diff,
            "secrets": read_secrets(),
        }
        self._thread = threading.Thread(
            target=self._wait, name="tracking-capture", daemon=True
        )
        with contextlib.suppress(OSError, RuntimeError):  # no more processes or threads
            self._process = subprocess.Popen(
                [sys.executable or "", "-I", "-S", "-c", _BOOT, _PACKAGES],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,
            )
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(request))
            self._process.stdin.close()
            self._thread.start()

    def wait(self, timeout_s: float) -> Environment | None:
        """Wait for what is found; None if it takes longer."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return self.found

    def remove_file(self) -> None:
        """Remove the file, once the run's manifest has what is in it."""
        with contextlib.suppress(OSError):
            self._file.unlink(missing_ok=True)

    def _wait(self) -> None:
        self._process.wait()
        with contextlib.suppress(OSError, ValueError, TypeError):
            self.found = Environment(**json.loads(self._file.read_bytes()))
            self._on_end(self.found)


_summaries: Final[dict[Path, dict[str, Any] | None]] = {}
_captures: Final[dict[tuple[Path, bool], Capture]] = {}
"""Latest one by working folder, and whether it keeps the changes of the code."""


def recall(folder: Path, *, save_diff: bool) -> Environment | None:
    """What this process has captured already; None if it is to be captured anew.

    A program runs the code that it was started with, so its first run tells the state for
    all. At a prompt or in a notebook, code may be edited and loaded again between runs.
    """
    if is_prompt():
        return None
    for has_diff in (True, save_diff):
        capture = _captures.get((folder, has_diff))
        if capture is not None and capture.found is not None:
            return capture.found
    return None


def begin(run_path: Path, started: str, folder: Path, **options: Any) -> Capture:
    """Start to capture the environment of a run; arguments as of `Capture`."""
    capture = Capture(run_path, started, folder, **options)
    _captures[folder, options["save_diff"]] = capture
    return capture


def code_summary(folder: Path) -> dict[str, Any] | None:
    """As ``code_state(folder).summary``, captured once for a program."""
    if is_prompt():
        return code_state(folder).summary
    for save_diff in (True, False):
        capture = _captures.get((folder, save_diff))
        found = capture.wait(GIT_TIMEOUT_S) if capture else None
        if found is not None:
            return found.git
    if folder not in _summaries:
        _summaries[folder] = code_state(folder).summary
    return _summaries[folder]


def is_prompt() -> bool:
    """Whether a person types in the code: at a prompt, or in a notebook."""
    return hasattr(sys, "ps1") or bool(sys.flags.interactive)


def main() -> None:
    """Capture the environment that a line of JSON on stdin asks for; see `Capture`."""
    request = json.loads(sys.stdin.read())
    file = Path(request["file"])
    code = code_state(Path(request["folder"]), request["secrets"], runs=file.parents[1])
    found = Environment(
        started=request["started"],
        platform=platform.platform(),
        packages=packages(request["modules"]),
        git=code.summary,
        diff=code.diff if request["save_diff"] else "",
    )
    text = json.dumps(dataclasses.asdict(found))
    write_atomically(file, text.encode(errors="replace"))
