"""What a run ran on: code state, command, machine and package versions.

Nothing here is secret by design: no environment variables, no credentials in URLs, no
values of arguments that are named like a secret, no diff of files named like one.
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
from urllib.parse import urlsplit, urlunsplit

MAX_DIFF_BYTES: Final = 1 << 20
MAX_UNTRACKED: Final = 200
GIT_TIMEOUT_S: Final = 1.0
"""For all that is asked of git together; what is slower is left out."""

_SECRET: Final = re.compile(
    r"(?i)(secret|token|passw|credential|api[-_]?key|access[-_]?key|private[-_]?key)"
)
_HIDDEN_FILES: Final = ("*.env", ".env*", "*.pem", "*.key", "*secret*", "*credential*")


@dataclass(frozen=True)
class CodeState:
    """State of the git repository around a folder.

    Attributes
    ----------
    summary
        ``commit``, ``branch`` (None when detached), ``dirty`` and ``remote``, as far
        as git told them in time; None outside a repository.
    diff
        Uncommitted changes to tracked files, cut at 1 MiB, and a list of untracked
        ones; empty if the state is that of the commit.
    """

    summary: dict[str, Any] | None
    diff: str


def code_state(folder: Path) -> CodeState:
    """State of the code; takes some 10 ms, and never more than about a second.

    Parameters
    ----------
    folder
        Any folder of the repository.
    """
    hidden = [f":(exclude,icase,glob)**/{name}" for name in _HIDDEN_FILES]
    asked = {
        "commit": ["rev-parse", "HEAD"],
        "branch": ["symbolic-ref", "--short", "-q", "HEAD"],
        "status": ["status", "--porcelain=v1", "-z"],
        "remote": ["config", "--get", "remote.origin.url"],
        "diff": ["diff", "--no-color", "--no-ext-diff", "HEAD", "--", ":/", *hidden],
    }
    told = _ask_git(folder, asked)
    if told.get("commit") is None and told.get("status") is None:
        return CodeState(None, "")
    status = told["status"]
    changes = [] if status is None else [line for line in status.split("\0") if line]
    remote = told["remote"]
    summary = {
        "commit": _first_line(told["commit"]),
        "branch": _first_line(told["branch"]),
        "dirty": None if status is None else bool(changes),
        "remote": without_credentials(remote.strip()) if remote else None,
    }
    untracked = [line[3:] for line in changes if line.startswith("?? ")]
    return CodeState(summary, _described(told["diff"] or "", untracked))


def command() -> list[str]:
    """The command that started this process, with secrets masked."""
    return masked([*sys.orig_argv] or [sys.executable])


def masked(arguments: Sequence[str]) -> list[str]:
    """Command line with the values of secret arguments, and URLs' credentials, gone.

    Examples
    --------
    >>> masked(["train.py", "--token", "abc", "--api-key=xyz", "--lr=0.1"])
    ['train.py', '--token', '***', '--api-key=***', '--lr=0.1']
    """
    shown: list[str] = []
    is_secret = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if is_secret and not argument.startswith("-"):
            shown.append("***")
        elif equals and _SECRET.search(name):
            shown.append(f"{name}=***")
        else:
            shown.append(without_credentials(argument))
        is_secret = (
            argument.startswith("-") and not equals and bool(_SECRET.search(argument))
        )
    return shown


def machine() -> dict[str, Any]:
    """Host, user, Python and system; devices too, if torch is there already."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
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
    From the names of their folders: ``importlib.metadata`` opens each of them and takes
    a hundred times as long.
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


def without_credentials(text: str) -> str:
    """Text with user name and password taken out of the URL that it is, if it is one.

    Examples
    --------
    >>> without_credentials("https://me:pw@example.org/x.git?token=1#f")
    'https://example.org/x.git'
    >>> without_credentials("git@example.org:me/x.git")
    'git@example.org:me/x.git'
    """
    if "://" not in text:
        return text
    try:
        parts = urlsplit(text)
    except ValueError:
        return "***"
    if not parts.netloc:
        return text
    return urlunsplit(
        (parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", "")
    )


def _ask_git(folder: Path, asked: Mapping[str, Sequence[str]]) -> dict[str, str | None]:
    """What git answers to several questions at once; None where it does not."""
    deadline = time.monotonic() + GIT_TIMEOUT_S
    running = {}
    for word, arguments in asked.items():
        # Optional locks would let a status write the index under the user's own git.
        line = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
        try:
            running[word] = subprocess.Popen(
                line,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except OSError:  # no git here
            return dict.fromkeys(asked)
    told: dict[str, str | None] = {}
    for word, process in running.items():
        with process:
            try:
                left_s = max(deadline - time.monotonic(), 0.01)
                answer, _ = process.communicate(timeout=left_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                told[word] = None
                continue
        is_told = process.returncode == 0
        told[word] = answer.decode(errors="replace") if is_told else None
    return told


def _first_line(text: str | None) -> str | None:
    return text.strip() if text else None


def _described(diff: str, untracked: Sequence[str]) -> str:
    """Diff of bounded size, with a list of untracked files."""
    data = diff.encode(errors="replace")
    if len(data) > MAX_DIFF_BYTES:
        cut = data[:MAX_DIFF_BYTES].decode(errors="ignore")
        diff = f"{cut}\n# cut here: {len(data)} bytes in all\n"
    if untracked:
        diff += "".join(f"# untracked: {name}\n" for name in untracked[:MAX_UNTRACKED])
        if len(untracked) > MAX_UNTRACKED:
            diff += f"# and {len(untracked) - MAX_UNTRACKED} more\n"
    return diff


def _devices() -> list[str]:
    """Names of the accelerators that a torch imported already can use."""
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    # Asking for a name makes a CUDA context, which a fork would break: not ours to do.
    if cuda is None or not cuda.is_initialized():
        return []
    return [cuda.get_device_name(i) for i in range(cuda.device_count())]
