"""Text without what should not be told: credentials in URLs, values of secrets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final

_USER_INFO: Final = re.compile(r"(?<=://)[^/@\s'\"]*@")
_SECRET_NAME: Final = re.compile(
    r"(?i)(secret|token|passw|credential|api[-_]?key|access[-_]?key|private[-_]?key)"
)
_MIN_LENGTH: Final = 6


def secrets_in(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Values of the variables that are named like a secret, longest first."""
    found = {
        value
        for name, value in environment.items()
        if _SECRET_NAME.search(name) and len(value) >= _MIN_LENGTH
    }
    return tuple(sorted(found, key=len, reverse=True))


def redacted(text: str, secrets: Iterable[str] = ()) -> str:
    """Text with URLs' credentials taken out, and secrets masked.

    Examples
    --------
    >>> redacted("POST https://me:pw@example.org/api: token hunter22", ["hunter22"])
    'POST https://example.org/api: token ***'
    """
    for secret in secrets:
        text = text.replace(secret, "***")
    return _USER_INFO.sub("", text)
