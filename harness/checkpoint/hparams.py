"""Hyper-parameters of any kind as JSON: what can be found again by its name is rebuilt.

A value that JSON cannot hold becomes an object with one key that begins with ``$``. What
cannot be rebuilt is kept as its text, so no value ends a fit or a save.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.pytree import Options
from tracking.redaction import redact_value
from tracking.settings import read_secrets

MAX_ELEMENTS = 10_000
"""Larger tensors and arrays are kept as text."""

_SAFE_MODULES = frozenset({"builtins", "torch", "torch.nn", "torch.optim"})
"""Modules whose names are found without asking, as those in ``torch.nn``, ``torch.optim``
and torchmetrics are."""

_Find = Callable[[object], Any]

_BUILTIN_HOMES = ("torch", "torch.nn.functional", "math")
"""Where functions that are written in C and do not know their module are looked for."""


def encode_hparams(hparams: Mapping[str, object]) -> Options:
    """The hparams as JSON can hold them.

    Examples
    --------
    >>> encode_hparams({"hidden": 8, "act": torch.nn.GELU})
    {'hidden': 8, 'act': {'$import': 'torch.nn.modules.activation:GELU'}}
    """
    may_hide = any(isinstance(value, _HIDING) for value in hparams.values())
    secrets = read_secrets() if may_hide else ()
    return {
        name: _SECRET if _has_secret(name, value, secrets) else _encode_whole(value)
        for name, value in hparams.items()
    }


_HIDING = (str, list, tuple, Mapping)
"""Types of values that may have a secret in them."""

_SECRET = {"$secret": True}
"""In place of an hparam that is, or has in it, a secret."""


def _has_secret(name: str, value: object, secrets: Sequence[str]) -> bool:
    return isinstance(value, _HIDING) and redact_value(name, value, secrets) != value


@dataclass(frozen=True)
class HparamDecoder:
    """Rebuilds the hparams that ``encode_hparams`` wrote.

    Parameters
    ----------
    home
        Module of the model. Classes and functions of its package and of torch are
        rebuilt; others stay text, because a damaged file could name any function.
    trust
        Import and rebuild whatever the hparams name. This runs code.
    """

    home: str = ""
    trust: bool = False

    def decode(self, saved: Mapping[str, object]) -> Options:
        """The hparams; what cannot be rebuilt is its text. A secret is left out."""
        return {
            name: _decode(value, self._find)
            for name, value in saved.items()
            if value != _SECRET
        }

    def list_secrets(self, saved: Mapping[str, object]) -> list[str]:
        """Names of the hparams that were not saved because they are secrets."""
        return [name for name, value in saved.items() if value == _SECRET]

    def list_texts(self, saved: Mapping[str, object]) -> list[str]:
        """Names of the hparams that cannot be rebuilt."""
        return [name for name, value in saved.items() if _has_text(value, self._find)]

    def find_class(self, name: object, base: type) -> Any:
        """The class of that name, if it is imported and derives from `base`; else None."""
        found = self._find_imported(name)
        return found if isinstance(found, type) and issubclass(found, base) else None

    def _find(self, name: object) -> Any:
        """What is called so, if that is its real home and it may be used; else None."""
        found = self._find_imported(name)
        is_known = found is not None and self._is_known(str(name).partition(":")[0])
        return found if self.trust or (is_known and not _runs_text(found)) else None

    def _find_imported(self, name: object) -> Any:
        """What is called so, if that is its real home; only trust imports a module."""
        if not isinstance(name, str) or ":" not in name:
            return None
        if self.trust:
            with contextlib.suppress(ImportError, ValueError):
                importlib.import_module(name.partition(":")[0])
        found = _find(name)
        return found if found is not None and find_import_name(found) == name else None

    def _is_known(self, where: str) -> bool:
        is_home = bool(self.home) and where.split(".")[0] == self.home.split(".")[0]
        inside_torch = where.startswith(("torch.nn.", "torch.optim.", "torchmetrics."))
        return is_home or inside_torch or where in _SAFE_MODULES


def _runs_text(found: object) -> bool:
    """Whether it is a function of Python, such as ``exec``, that may run what it is given."""
    is_builtin = getattr(found, "__module__", None) == "builtins"
    return is_builtin and not isinstance(found, type) and found not in _PURE


_PURE = (abs, all, any, len, max, min, pow, round, sorted, sum)


def _encode_whole(value: object) -> Any:
    try:
        return _encode(value)
    except RecursionError:
        return {"$text": f"{type(value).__name__} that contains itself"}


def _encode(value: object) -> Any:
    if isinstance(value, Enum):
        return _encode_named(value)
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | float):
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return _encode_array(value)
    if isinstance(value, Mapping):
        return _encode_mapping(value)
    for key, (kind, encode, _) in _KINDS.items():
        if type(value) is kind or (kind is PurePath and isinstance(value, kind)):
            return {key: encode(value)}
    if isinstance(value, list):
        return [_encode(item) for item in value]
    return _encode_named(value)


def _encode_mapping(value: Mapping[Any, object]) -> Any:
    if all(isinstance(key, str) and not key.startswith("$") for key in value):
        return {key: _encode(item) for key, item in value.items()}
    return {"$dict": [[_encode(k), _encode(item)] for k, item in value.items()]}


def _encode_array(value: Tensor | np.ndarray[Any, Any] | np.generic) -> Any:
    if isinstance(value, np.generic):
        item = value.item()
        return _as_text(value) if isinstance(item, np.generic) else _encode(item)
    is_tensor = isinstance(value, Tensor)
    try:
        found = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
    except (TypeError, RuntimeError):  # bfloat16, sparse, meta
        return _as_text(value)
    if found.dtype.kind not in "biuf" or found.size > MAX_ELEMENTS:
        return _as_text(value)
    key = "$tensor" if is_tensor else "$array"
    return {key: [found.dtype.str, list(found.shape), found.reshape(-1).tolist()]}


def _decode_array(value: Any, find: _Find) -> Any:
    dtype, shape, items = value
    return np.array(items, dtype=np.dtype(dtype)).reshape(shape)


def _encode_named(value: object) -> Any:
    name = find_import_name(value)
    return {"$import": name} if name is not None else _as_text(value)


def _as_text(value: object) -> dict[str, str]:
    """The text of a value, without addresses, which are others in each process."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001  a user's repr may raise anything
        text = f"<{type(value).__qualname__}>"
    return {"$text": re.sub(r" at 0x[0-9a-fA-F]+", "", text)}


def find_import_name(value: object) -> str | None:
    """``module:qualified.name`` of what is found by it; None for anything else."""
    return next((name for name in _names_of(value) if _find(name) is value), None)


def _names_of(value: object) -> Iterator[str]:
    """Names under which a value may be found."""
    if isinstance(value, Enum):
        yield f"{type(value).__module__}:{type(value).__qualname__}.{value.name}"
    elif isinstance(value, torch.dtype):
        yield str(value).replace(".", ":", 1)
    elif callable(value):
        if isinstance(getattr(value, "__module__", None), str):
            yield f"{value.__module__}:{getattr(value, '__qualname__', '')}"
        for module in _BUILTIN_HOMES:
            yield f"{module}:{getattr(value, '__name__', '')}"


def _find(name: str) -> Any:
    """What a module that is already imported calls by this name; None if nothing."""
    where, _, qualname = name.partition(":")
    found: Any = sys.modules.get(where)
    for part in qualname.split("."):
        # Not getattr: a module may import others, or run code, to find a name.
        found = getattr(found, "__dict__", {}).get(part)
    return found


def _has_text(value: object, find: _Find) -> bool:
    if isinstance(value, list):
        return any(_has_text(item, find) for item in value)
    if not isinstance(value, dict):
        return False
    if "$text" in value and len(value) == 1:
        return True
    if "$import" in value and len(value) == 1:
        return find(value["$import"]) is None
    return any(_has_text(item, find) for item in value.values())


def _decode(value: object, find: _Find) -> Any:
    if isinstance(value, list):
        return [_decode(item, find) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((key, item),) = value.items()
        if key in _DECODERS:
            return _DECODERS[key](item, find)
    return {key: _decode(item, find) for key, item in value.items()}


def _decode_name(value: object, find: _Find) -> Any:
    found = find(value)
    return str(value) if found is None else found


def _decode_partial(value: Any, find: _Find) -> Any:
    function, args, kwargs = (_decode(item, find) for item in value)
    if not callable(function):
        return f"partial({function})"
    return partial(function, *args, **kwargs)


_KINDS: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any, _Find], Any]]] = {
    "$tuple": (
        tuple,
        lambda value: [_encode(item) for item in value],
        lambda value, find: tuple(_decode(value, find)),
    ),
    "$set": (
        set,
        lambda value: [_encode(item) for item in sorted(value, key=repr)],
        lambda value, find: set(_decode(value, find)),
    ),
    "$frozenset": (
        frozenset,
        lambda value: [_encode(item) for item in sorted(value, key=repr)],
        lambda value, find: frozenset(_decode(value, find)),
    ),
    "$path": (PurePath, str, lambda value, find: Path(value)),
    "$device": (torch.device, str, lambda value, find: torch.device(value)),
    "$complex": (
        complex,
        lambda value: [value.real, value.imag],
        lambda value, find: complex(*value),
    ),
    "$bytes": (bytes, bytes.hex, lambda value, find: bytes.fromhex(value)),
    "$range": (
        range,
        lambda value: [value.start, value.stop, value.step],
        lambda value, find: range(*value),
    ),
    "$partial": (
        partial,
        lambda value: [
            _encode(value.func),
            [_encode(item) for item in value.args],
            _encode(value.keywords),
        ],
        _decode_partial,
    ),
}
"""For each ``$`` key its type, what writes the value and what reads it."""

_DECODERS: dict[str, Callable[[Any, _Find], Any]] = {
    **{key: decode for key, (_, _, decode) in _KINDS.items()},
    "$array": _decode_array,
    "$tensor": lambda value, find: torch.from_numpy(_decode_array(value, find)),
    "$dict": lambda value, find: {
        _decode(k, find): _decode(item, find) for k, item in value
    },
    "$import": _decode_name,
    "$text": lambda value, find: value,
}
