"""Describe where a run was started: code, command line, machine and packages.

No secret is captured: environment variables are left out, URLs lose their credentials,
secret arguments are masked, and files that look like secrets are left out of the diff.
"""

from __future__ import annotations

import getpass
import platform
import re
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

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
GIT_TIMEOUT_S: Final = 1.0
"""Time for all git commands together; what they have not answered by then is left out."""

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
    """State of the git repository around a folder.

    Attributes
    ----------
    summary
        ``commit``, ``branch`` (None when detached), ``dirty`` and ``remote``. Each is
        None if git did not answer in time. None outside a repository.
    diff
        Uncommitted changes to tracked files, cut at 1 MiB, and the names of untracked
        files. Empty if nothing differs from the commit. Secrets are masked, and files
        of settings that hold some are left out.
    """

    summary: dict[str, Any] | None
    diff: str


def code_state(folder: Path) -> CodeState:
    """State of the code. It takes about 10 ms, and never more than about a second.

    Parameters
    ----------
    folder
        Any folder of the repository.
    """
    hidden = [f":(exclude,icase,glob)**/{name}" for name in _HIDDEN_FILES]
    questions = {
        "commit": ["rev-parse", "HEAD"],
        "branch": ["symbolic-ref", "--short", "-q", "HEAD"],
        "status": ["status", "--porcelain=v1", "-z"],
        "remote": ["config", "--get", "remote.origin.url"],
        "diff": ["diff", *_PLAIN_DIFF, "HEAD", "--", ":/", *hidden],
    }
    answers = _ask_git(folder, questions, _turn_off_programs(folder))
    if answers["commit"] is None and answers["status"] is None:
        return CodeState(None, "")
    status = answers["status"]
    changes = [] if status is None else [line for line in status.split("\0") if line]
    remote = answers["remote"]
    summary = {
        "commit": (answers["commit"] or "").strip() or None,
        "branch": (answers["branch"] or "").strip() or None,
        "dirty": None if status is None else bool(changes),
        "remote": strip_url(remote.strip()) if remote else None,
    }
    untracked = [line[3:] for line in changes if line.startswith("?? ")]
    return CodeState(summary, _format_diff(answers["diff"] or "", untracked))


_PLAIN_DIFF: Final = ("--no-color", "--no-ext-diff", "--no-textconv")


def _turn_off_programs(folder: Path) -> list[str]:
    """Options of git that keep it from the programs in its settings.

    Filters of files, such as those of Git LFS, may be slow, ask for a password, or write.
    """
    pattern = r"^filter\..*\.(clean|process|required)$"
    lines = _ask_git(folder, {"filters": ["config", "--get-regexp", pattern]})
    names = [line.partition(" ")[0] for line in (lines["filters"] or "").splitlines()]
    settings = ["core.fsmonitor=false"]
    for name in names:
        settings.append(f"{name}=false" if name.endswith(".required") else f"{name}=")
    return [word for setting in settings for word in ("-c", setting)]


def command() -> list[str]:
    """The command that started this process, with secrets masked."""
    return mask_arguments([*sys.orig_argv] or [sys.executable], read_secrets())


def machine() -> dict[str, Any]:
    """Host, user, Python, operating system, and the GPUs that torch has initialized."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # in a container the user may have no name
        user = "unknown"
    return {
        "host": socket.gethostname(),
        "user": user,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": _devices(),
    }


def packages() -> dict[str, str]:
    """Versions of the installed distributions, by name.

    Notes
    -----
    Read from the names of their folders. ``importlib.metadata`` opens every one of them
    and takes a hundred times as long.
    """
    found: dict[str, str] = {}
    for folder in sys.path:
        path = Path(folder)
        if not path.is_dir():
            continue
        for info in path.glob("*.dist-info"):
            name, _, version = info.name.removesuffix(".dist-info").rpartition("-")
            found.setdefault(name.replace("_", "-").lower(), version)
    return dict(sorted(found.items()))


def _ask_git(
    folder: Path, questions: Mapping[str, Sequence[str]], options: Sequence[str] = ()
) -> dict[str, str | None]:
    """Run several git commands at once; None for each that fails or is too slow."""
    deadline = time.monotonic() + GIT_TIMEOUT_S
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
    """Remove secrets, cut the diff to its size, and add the list of untracked files."""
    diff = _redact_diff(diff)
    data = diff.encode(errors="replace")
    if len(data) > MAX_DIFF_BYTES:
        cut = data[:MAX_DIFF_BYTES].decode(errors="ignore")
        diff = f"{cut}\n# cut here: {len(data)} bytes in all\n"
    if untracked:
        diff += "".join(f"# untracked: {name}\n" for name in untracked[:MAX_UNTRACKED])
        if len(untracked) > MAX_UNTRACKED:
            diff += f"# and {len(untracked) - MAX_UNTRACKED} more\n"
    return diff


def _redact_diff(diff: str) -> str:
    """Mask the secrets in a diff, and leave out files of settings that hold some."""
    secrets = read_secrets()
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
