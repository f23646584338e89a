"""Remove secrets from text: the only place that decides what a secret is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final
from urllib.parse import urlsplit, urlunsplit

MASK: Final = "***"

_SECRET_NAME: Final = re.compile(
    r"(?i)(secret|token|passw|credential|api[-_]?key|access[-_]?key|private[-_]?key)"
)
_USER_INFO: Final = re.compile(r"(?<=://)[^/\s'\"]*@")
_MIN_LENGTH: Final = 6
"""Shorter values are not masked: they occur by chance in ordinary text."""


def is_secret_name(name: str) -> bool:
    """Whether an argument or environment variable of this name holds a secret."""
    return _SECRET_NAME.search(name) is not None


def collect_secrets(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Values of the environment variables that hold secrets, longest first."""
    found = {
        value
        for name, value in environment.items()
        if is_secret_name(name) and len(value) >= _MIN_LENGTH
    }
    return tuple(sorted(found, key=len, reverse=True))


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """Remove user names and passwords from all URLs in a text, and mask the secrets.

    Parameters
    ----------
    text
        Any text, such as an error message.
    secrets
        Values to mask, longest first, as from ``collect_secrets``.

    Examples
    --------
    >>> redact("POST https://me:pw@example.org/api: token hunter22", ["hunter22"])
    'POST https://example.org/api: token ***'
    """
    for secret in secrets:
        text = text.replace(secret, MASK)
    return _USER_INFO.sub("", text)


def strip_url(text: str) -> str:
    """Remove user name, password, query and fragment if the whole text is a URL.

    Examples
    --------
    >>> strip_url("https://me:pw@example.org/x.git?token=1#f")
    'https://example.org/x.git'
    >>> strip_url("git@example.org:me/x.git")
    'git@example.org:me/x.git'
    """
    if "://" not in text:
        return text
    try:
        parts = urlsplit(text)
    except ValueError:
        return MASK
    if not parts.netloc:
        return text
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


def mask_arguments(arguments: Sequence[str]) -> list[str]:
    """Mask the values of secret arguments and strip the URLs in a command line.

    Examples
    --------
    >>> mask_arguments(["train.py", "--token", "abc", "--api-key=xyz", "--lr=0.1"])
    ['train.py', '--token', '***', '--api-key=***', '--lr=0.1']
    """
    shown: list[str] = []
    is_value_secret = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        is_option = argument.startswith("-")
        if is_value_secret and not is_option:
            shown.append(MASK)
        elif equals and is_secret_name(name):
            shown.append(f"{name}={MASK}")
        else:
            shown.append(strip_url(argument))
        is_value_secret = is_option and not equals and is_secret_name(argument)
    return shown
