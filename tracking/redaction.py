"""Remove secrets from text: the only place that decides what a secret is."""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final
from urllib.parse import quote, urlsplit, urlunsplit

MASK: Final = "***"

_WORDS: Final = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_SECRET_WORDS: Final = frozenset(
    str.split(
        "secret secrets token password passwd passwords passphrase passcode pwd "
        "credential credentials apikey accesskey secretkey authorization bearer auth "
        "cookie"
    )
)
_KEY_OWNERS: Final = frozenset(
    str.split("api access private secret signing encryption account auth ssh master")
)
"""Words that make a following ``key`` a secret."""

_MEASURES: Final = frozenset(
    str.split(
        "dim dims count size len length limit type file path dir folder name class url uri "
        "enabled mode index idx id ids rate dropout weight loss level"
    )
)
"""A name that ends so says something about a secret, or about words of a language."""

_LANGUAGE: Final = frozenset(
    str.split(
        "num n max min pad eos bos mask unk sep cls special start end per word sub image "
        "vocab tokens tokenizer"
    )
)
"""Beside these words a token is a piece of text."""

_NO_VALUES: Final = frozenset(["", "none", "null", "true", "false", MASK])

_USER_INFO: Final = re.compile(r"(?<=://)[^/\s'\"]*@")
# Only whole names match, and the search never goes back into one. So its time grows with the
# length of a text and not with the square of it.
_NAME: Final = r"(?<![\w.-])(?P<name>-*+\w[\w.-]*+)"
_ASSIGNMENT: Final = re.compile(
    rf"{_NAME}"
    r"(?P<sign>=|['\"]\s*+[=:]\s*+|\s*+[=:]\s*+(?=['\"]))"
    r"(?P<value>'[^'\n]*'|\"[^\"\n]*\"|[^\s'\"&,;)}\]#]+)"
)
_LITERAL: Final = re.compile(
    rf"{_NAME}(?P<sign>['\"]?\s*+[=:]\s*+)(?P<value>'[^'\n]+'|\"[^\"\n]+\")"
)
_SETTING: Final = re.compile(
    rf"{_NAME}['\"]?[ \t]*+[:=>][ \t]*+['\"]?(?P<value>[^\s'\"#<,]+)"
)
_OPTION: Final = re.compile(
    r"(?P<name>(?<![\w-])--?[A-Za-z][\w-]*+)(?P<sign>\s++)"
    r"(?P<value>[^\s'\"-][^\s'\"]*)"
)
_HEADER: Final = re.compile(
    r"(?i)\b((?:proxy-)?authorization|(?<![\w-])x-[\w-]*(?:key|token|secret)"
    r"|(?:set-)?cookie|password|passwd|passphrase)(['\"]?\s*+:\s*+['\"]?)[^'\"\n]+"
)
_KNOWN_FORMS: Final = re.compile(
    r"\b(?:gh[pousr]_|github_pat_|glpat-|hf_|sk-|xox[abprs]-|AKIA)[\w-]{16,}"
    r"|(?<=\b[Bb]earer )[\w.~+/=-]{8,}"
)
_LONGEST_NAME: Final = 200
_MIN_LENGTH: Final = 6
"""Shorter values are masked only as whole words: they occur by chance in other text."""


@functools.lru_cache(maxsize=4096)
def is_secret_name(name: str) -> bool:
    """Whether an argument or variable of this name holds a secret.

    Examples
    --------
    >>> [is_secret_name(name) for name in ("API_KEY", "hubToken", "num_tokens")]
    [True, True, False]
    """
    words = [word.lower() for word in _WORDS.findall(name.removeprefix("-D"))]
    if not words or words[-1] in _MEASURES:
        return False
    found = _SECRET_WORDS.intersection(words)
    if found == {"token"} and not _LANGUAGE.isdisjoint(words):
        return False
    is_key = any(
        key in ("key", "keys") and owner in _KEY_OWNERS
        for owner, key in itertools.pairwise(words)
    )
    return bool(found) or is_key


def is_secret(name: str, value: str) -> bool:
    """Whether a value that is assigned to this name is, or has in it, a secret."""
    return redact(f"{name}={value}") != f"{name}={value}"


def collect_secrets(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Values of the environment variables that hold secrets, longest first.

    A value that is a path is no secret: it says where one is kept.
    """
    return _sort(
        value
        for name, value in environment.items()
        if is_secret_name(name) and len(value) >= _MIN_LENGTH and not _is_path(value)
    )


def collect_argument_secrets(arguments: Sequence[str]) -> tuple[str, ...]:
    """Values that ``mask_arguments`` masks in a command line, longest first."""
    found: list[str] = []
    _mask(arguments, found.append)
    return _sort(value for value in found if len(value) >= 3 and not _is_path(value))


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """Mask the secrets in a text, and remove user names and passwords from its URLs.

    Masked are the given values, values that are assigned to a name of a secret
    (``api_key=...``, ``?password=...``), and headers such as ``Authorization: ...``.

    Parameters
    ----------
    secrets
        Values to mask, longest first, as from ``collect_secrets``.

    Examples
    --------
    >>> redact("POST https://me:pw@example.org/api: token hunter22", ["hunter22"])
    'POST https://example.org/api: token ***'
    """
    text = _HEADER.sub(rf"\1\2{MASK}", _redact_values(text, secrets))
    return _OPTION.sub(_mask_value, _ASSIGNMENT.sub(_mask_value, text))


def redact_value(name: str, value: object, secrets: Iterable[str] = ()) -> object:
    """Mask the secrets in a named value: texts, and those in its lists and dictionaries.

    Examples
    --------
    >>> redact_value("db", {"password": "hunter2", "num_tokens": 8})
    {'password': '***', 'num_tokens': 8}
    """
    if isinstance(value, str):
        return MASK if _is_secret_text(name, value) else redact(value, secrets)
    if isinstance(value, Mapping):
        return {
            key: redact_value(f"{name}/{key}", item, secrets)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        is_command = all(isinstance(item, str) for item in value) and any(
            item.startswith("-") for item in value
        )
        if is_command and not is_secret_name(name):
            return mask_arguments(value, secrets)
        items = [redact_value(name, item, secrets) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    return value


def _is_secret_text(name: str, value: str) -> bool:
    """Whether a text under this name is a secret; the name of a token's kind is none."""
    bare = value.strip("<>[]| ").lower()
    return is_secret_name(name) and bare not in _NO_VALUES | _LANGUAGE


def redact_code(text: str, secrets: Iterable[str] = ()) -> str:
    """Mask the secrets in source code: the given values, and texts in quotes."""
    return _LITERAL.sub(_mask_value, _redact_values(text, secrets))


def has_secret_settings(text: str) -> bool:
    """Whether lines of a settings file give a value to a name of a secret."""
    return any(
        is_secret_name(match["name"])
        and match["value"].lower() not in _NO_VALUES
        and not match["value"].startswith(("$", "{", "["))
        for match in _SETTING.finditer(text)
    )


def redact_address(uri: str, secrets: Iterable[str] = ()) -> str:
    """Redact the address of a store; one that is a path stays as it is."""
    scheme = uri.partition(":")[0]
    return uri if scheme in ("sqlite", "file") else redact(uri, secrets)


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


def mask_arguments(arguments: Sequence[str], secrets: Iterable[str] = ()) -> list[str]:
    """Mask the secrets in a command line, to show it.

    Examples
    --------
    >>> mask_arguments(["train.py", "--token", "abc", "--api-key=xyz", "--lr=0.1"])
    ['train.py', '--token', '***', '--api-key=***', '--lr=0.1']
    """
    secrets = tuple(secrets)
    shown = _mask(arguments, lambda _: None)
    return [redact(word, secrets) for word in shown]


def _mask(arguments: Sequence[str], report: Callable[[str], None]) -> list[str]:
    """Mask the values of secret arguments, and report each one."""
    shown: list[str] = []
    option = ""
    for argument in arguments:
        name, equals, value = argument.partition("=")
        is_option = argument.startswith("-")
        if not is_option and _has_secret_value(option, argument):
            report(argument)
            shown.append(MASK)
        elif (
            equals
            and "://" not in name
            and is_secret_name(name)
            and value.lower() not in _NO_VALUES
        ):
            report(value)
            shown.append(f"{name}={MASK}")
        else:
            for found in _find_values(argument):
                report(found)
            shown.append(argument)
        option = argument if is_option and not equals else ""
    return shown


def _has_secret_value(option: str, value: str) -> bool:
    """Whether the word after an option is a secret."""
    if option == "-p":  # "password" of many programs, "port" of others
        return not value.isdigit() and not _is_path(value)
    if option in ("-u", "--user"):
        return ":" in value
    return is_secret_name(option) and value.lower() not in _NO_VALUES


def _find_values(argument: str) -> list[str]:
    """Secrets inside one word of a command line: of its URL, query and headers."""
    found = [value.strip("@") for value in _USER_INFO.findall(argument)]
    found = [part for value in found for part in (value, value.partition(":")[2])]
    for match in _ASSIGNMENT.finditer(argument):
        if _mask_value(match) != match.group():
            found.append(match["value"].strip("'\""))
    for match in _HEADER.finditer(argument):
        value = match.group().partition(":")[2].strip()
        found += [value, value.rpartition(" ")[2]]
    return found


def _redact_values(text: str, secrets: Iterable[str]) -> str:
    for secret in secrets:
        if secret not in text and not _has_escapes(secret):
            continue
        for form in _list_forms(secret):
            if len(secret) < _MIN_LENGTH:
                text = re.sub(rf"(?<!\w){re.escape(form)}(?!\w)", MASK, text)
            else:
                text = text.replace(form, MASK)
    return _USER_INFO.sub("", _KNOWN_FORMS.sub(MASK, text))


def _has_escapes(secret: str) -> bool:
    return any(not (char.isalnum() or char in "-_.~") for char in secret)


def _list_forms(secret: str) -> list[str]:
    """A secret as it is, and as Python, JSON and URLs quote it."""
    forms = {secret, repr(secret)[1:-1], json.dumps(secret)[1:-1], quote(secret, "")}
    return sorted(forms, key=len, reverse=True)


def _mask_value(match: re.Match[str]) -> str:
    """Replace the value of a match whose name is one of a secret."""
    value = match["value"]
    mark = value[0] if value[0] in "'\"" else ""
    bare = value.strip("'\"").lower()
    is_value = bare not in _NO_VALUES and any(map(str.isalnum, bare))
    if not is_value or not is_secret_name(match["name"][-_LONGEST_NAME:]):
        return match.group()
    return f"{match['name']}{match['sign']}{mark}{MASK}{mark}"


def _is_path(value: str) -> bool:
    """Whether a value is a path of this machine."""
    if not value.startswith(("/", "~", "./", "../")):
        return False
    parts = Path(value).parts
    try:
        return parts[0] != "/" or Path(*parts[:2]).exists()
    except OSError:
        return False


def _sort(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(values), key=lambda value: (-len(value), value)))
