"""The schema of records: columns, kinds, and how a logged value becomes rows.

A logged value becomes one row or, for a dictionary, one row per leaf, whose name is
the path to it with ``/`` between the keys. Numbers and booleans go into ``value``,
exact as float64; an integer beyond float64's range of exact integers keeps its digits
in ``payload``. Everything else is JSON in ``payload``. JSON has no NaN and infinities:
they are written as ``{"$numberDouble": "NaN"}``, as in MongoDB's Extended JSON
(version 2).

A tensor is copied on its device when it is logged, and read from there in bulk later.
torch is never imported here: a tensor can only come from a process that has imported it.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa

KINDS: Final = (
    "void",
    "float",
    "int",
    "bool",
    "str",
    "none",
    "array",
    "json",
    "overwrite",
    "rewind",
)
VOID, FLOAT, INT, BOOL, STR, NONE, ARRAY, JSON, OVERWRITE, REWIND = range(len(KINDS))
DEFERRED: Final = -1
"""Kind of a leaf whose tensors have not been read from their device; never written."""

VALUED: Final = (FLOAT, INT, BOOL, REWIND)
"""Kinds whose ``value`` is not null."""

CONTROL: Final = ("overwrite", "rewind")
"""Kinds that change the meaning of earlier rows and have no value of the user's."""

MAX_ELEMENTS: Final = 1024
MAX_PAYLOAD_BYTES: Final = 1 << 20
MAX_DEPTH: Final = 100
EXACT: Final = 2**53

NAMES: Final = pa.dictionary(pa.int32(), pa.string())
SCHEMA: Final = pa.schema(
    [
        pa.field("seq", pa.int64(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("time", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("what", NAMES, nullable=False),
        pa.field("set", NAMES, nullable=False),
        pa.field("name", NAMES, nullable=False),
        pa.field("index", pa.int64()),
        pa.field("epoch", pa.int32()),
        pa.field("step", pa.int64()),
        pa.field("value", pa.float64()),
        pa.field("payload", pa.string()),
        pa.field("kind", NAMES, nullable=False),
    ]
)

Leaf = tuple[str, int, float, Any]
"""Name, kind, number, payload. The payload is JSON text, None, or for ``DEFERRED`` a
``TensorCopy`` or a JSON value that contains some."""


@dataclass(frozen=True, slots=True)
class TensorCopy:
    """A tensor's value when it was logged.

    Attributes
    ----------
    tensor
        The copy, on the device of the original.
    stream
        CUDA stream that makes the copy; None on other devices.
    """

    tensor: Any
    stream: Any


def flatten_value(value: object, place: str) -> list[Leaf]:
    """Check a logged value and turn it into the leaves that become rows.

    Parameters
    ----------
    value
        Number, bool, string, None, tensor or array of at most 1024 elements, or a
        dictionary (string keys), list or tuple of those.
    place
        Start of error messages, e.g. ``Run.log('metrics', 'train')``.

    Returns
    -------
    one leaf, or one per leaf of a dictionary; an empty dictionary is itself a leaf

    Raises
    ------
    TypeError
        If the value contains another type; the message gives the path to it.
    ValueError
        If it is too large, too deep or not valid Unicode.
    """
    return list(_flatten(value, "", "value", place, 0))


def check_name(name: object, word: str, place: str) -> None:
    """Raise unless ``name`` is a string that UTF-8 can hold."""
    if not isinstance(name, str):
        raise TypeError(
            f"{place}: expected a string as {word}, got {name!r}. Pass its name."
        )
    if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
        raise ValueError(
            f"{place}: expected valid Unicode as {word}, got {name!r}. "
            "Replace its lone surrogates."
        )


def finish_leaf(name: str, value: Any, values: Mapping[int, Any], place: str) -> Leaf:
    """Make the leaf of a deferred value from the results of ``fetch_values``."""
    if not isinstance(value, TensorCopy):
        return name, JSON, 0.0, _dump_json(_fill_copies(value, values), "value", place)
    number = values[id(value)]
    if isinstance(number, list):
        plain = _to_plain(number, "value", place, 0, [])
        return name, ARRAY, 0.0, _dump_json(plain, "", place)
    return _make_scalar(name, number, place)


def find_copies(value: Any) -> Iterator[TensorCopy]:
    """Yield the tensor copies in a deferred leaf's payload, in order."""
    if isinstance(value, TensorCopy):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from find_copies(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from find_copies(item)


def parse_value(kind: str, value: float | None, payload: str | None) -> Any:
    """Return the Python value of a row; the inverse of ``flatten_value`` for one leaf.

    Examples
    --------
    >>> parse_value("int", 9007199254740992.0, "9007199254740993")
    9007199254740993
    >>> parse_value("json", None, '[1,{"$numberDouble":"-Infinity"}]')
    [1, -inf]
    """
    if kind == "float":
        return value
    if kind == "bool":
        return bool(value)
    if kind == "int" and payload is None:
        return None if value is None else int(value)
    return None if payload is None else _from_plain(json.loads(payload))


def _flatten(
    value: object, name: str, path: str, place: str, depth: int
) -> Iterator[Leaf]:
    if not isinstance(value, Mapping):
        yield _make_leaf(name, value, path, place)
        return
    _check_depth(depth, path, place)
    if not value:
        yield name, JSON, 0.0, "{}"
    for key, item in value.items():
        if type(item) is float and type(key) is str and key.isascii():
            yield f"{name}/{key}" if name else key, FLOAT, item, None
            continue
        check_name(key, f"key in {path}", place)
        below = f"{name}/{key}" if name else key
        yield from _flatten(item, below, f"{path}[{key!r}]", place, depth + 1)


def _make_leaf(name: str, value: object, path: str, place: str) -> Leaf:
    if value is None or isinstance(value, float | int | str):
        return _make_scalar(name, value, place)
    if is_tensor(value):
        _check_tensor(value, path, place)
        return name, DEFERRED, 0.0, copy_tensor(value)
    if isinstance(value, list | tuple):
        found: list[TensorCopy] = []
        plain = _to_plain(value, path, place, 0, found)
        if found:
            return name, DEFERRED, 0.0, plain
        return name, JSON, 0.0, _dump_json(plain, path, place)
    array = _to_list(value, path, place)
    if isinstance(array, list):
        plain = _to_plain(array, path, place, 0, [])
        return name, ARRAY, 0.0, _dump_json(plain, path, place)
    return _make_scalar(name, array, place)


def _make_scalar(name: str, value: Any, place: str) -> Leaf:
    """Make the leaf of a number, bool, string or None, or of a subclass of those."""
    if isinstance(value, bool):
        return name, BOOL, float(value), None
    if isinstance(value, float):
        return name, FLOAT, float(value), None
    if isinstance(value, int):
        value = int(value)
        if -EXACT <= value <= EXACT:
            return name, INT, float(value), None
        return name, INT, _round_to_float(value), _format_int(value, place)
    if value is None:
        return name, NONE, 0.0, "null"
    return name, STR, 0.0, _dump_json(str.__str__(value), "value", place)


def _round_to_float(value: int) -> float:
    """Round an integer to float64: to an infinity beyond its range, as IEEE 754 says."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _format_int(value: int, place: str) -> str:
    try:
        return str(value)
    except ValueError as error:  # sys.set_int_max_str_digits, 4300 by default
        raise ValueError(
            f"{place}: expected an integer that Python can convert to decimal, got one "
            f"of {value.bit_length()} bits. Pass it as hex(value)."
        ) from error


def _to_list(value: Any, path: str, place: str) -> Any:
    """Convert an array or scalar of NumPy, or of a similar library, to Python values."""
    shape = getattr(value, "shape", None)
    if (
        isinstance(shape, tuple)
        and hasattr(value, "dtype")
        and hasattr(value, "tolist")
    ):
        _check_size(math.prod(shape), path, place)
        listed = value.tolist()
        if listed is None or isinstance(listed, float | int | str | list):
            return listed
    raise _type_error(value, path, place)


def _to_plain(
    value: Any, path: str, place: str, depth: int, found: list[TensorCopy]
) -> Any:
    """Convert a value to JSON types; tensors are copied, and also added to ``found``."""
    _check_depth(depth, path, place)
    if isinstance(value, float):
        value = float(value)
        return (
            value
            if math.isfinite(value)
            else {"$numberDouble": _spell_special_float(value)}
        )
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        _format_int(value, place)
        return int(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, list | tuple):
        return [
            _to_plain(item, f"{path}[{i}]", place, depth + 1, found)
            for i, item in enumerate(value)
        ]
    if isinstance(value, Mapping):
        return _mapping_to_plain(value, path, place, depth, found)
    if is_tensor(value):
        _check_tensor(value, path, place)
        found.append(copy_tensor(value))
        return found[-1]
    return _to_plain(_to_list(value, path, place), path, place, depth + 1, found)


def _mapping_to_plain(
    value: Mapping[Any, Any], path: str, place: str, depth: int, found: list[TensorCopy]
) -> dict[str, Any]:
    """Convert a dictionary inside a list to JSON types."""
    plain = {}
    for key, item in value.items():
        if not isinstance(key, str):
            check_name(key, f"key in {path}", place)
        plain[key] = _to_plain(item, f"{path}[{key!r}]", place, depth + 1, found)
    # Mark a user's dictionary that looks like our notation as literal.
    if plain.keys() in ({"$numberDouble"}, {"$literal"}):
        return {"$literal": plain}
    return plain


def _fill_copies(value: Any, values: Mapping[int, Any]) -> Any:
    """Replace each tensor copy in a JSON value by the value read from it."""
    if isinstance(value, TensorCopy):
        return _to_plain(values[id(value)], "value", "", 0, [])
    if isinstance(value, list):
        return [_fill_copies(item, values) for item in value]
    if isinstance(value, dict):
        return {key: _fill_copies(item, values) for key, item in value.items()}
    return value


def _from_plain(plain: Any) -> Any:
    """Undo ``_to_plain``."""
    if isinstance(plain, list):
        return [_from_plain(item) for item in plain]
    if not isinstance(plain, dict):
        return plain
    if plain.keys() == {"$numberDouble"}:
        return float(plain["$numberDouble"])
    if plain.keys() == {"$literal"}:
        plain = plain["$literal"]
    return {key: _from_plain(item) for key, item in plain.items()}


def _spell_special_float(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def _dump_json(plain: Any, path: str, place: str) -> str:
    """Write JSON text of limited size, unescaped where UTF-8 allows."""
    text = json.dumps(plain, ensure_ascii=False, separators=(",", ":"))
    try:
        size_bytes = len(text.encode())
    except UnicodeEncodeError:  # a lone surrogate: only its escape is valid UTF-8
        text = json.dumps(plain, separators=(",", ":"))
        size_bytes = len(text)
    if size_bytes > MAX_PAYLOAD_BYTES:
        raise ValueError(
            f"{place}: expected at most {MAX_PAYLOAD_BYTES} bytes at {path}, "
            f"got {size_bytes}. Save it to a file and use log_artifact."
        )
    return text


def _check_tensor(value: Any, path: str, place: str) -> None:
    _check_size(int(value.numel()), path, place)
    if value.is_complex():
        raise _type_error(value, path, place)


def _check_size(num_elements: int, path: str, place: str) -> None:
    if num_elements > MAX_ELEMENTS:
        raise ValueError(
            f"{place}: expected at most {MAX_ELEMENTS} elements at {path}, "
            f"got {num_elements}. Save it to a file and use log_artifact."
        )


def _check_depth(depth: int, path: str, place: str) -> None:
    """Raise if a value nests too deeply, as one that contains itself does."""
    if depth > MAX_DEPTH:
        raise ValueError(
            f"{place}: expected at most {MAX_DEPTH} levels of nesting, got more at "
            f"{path[:60]}... Flatten it, or check whether it contains itself."
        )


def _type_error(value: object, path: str, place: str) -> TypeError:
    return TypeError(
        f"{place}: expected a number, bool, string, None, small tensor or array, or a "
        f"dict or list of those, got {value!r:.200} at {path}. "
        "Convert it, or save it to a file and use log_artifact."
    )


# ----------------------------------------------------------------------- tensors


def is_tensor(value: object) -> bool:
    """Whether ``value`` has a tensor's ``detach``, ``clone``, ``numel``, ``tolist``."""
    return all(hasattr(value, name) for name in ("detach", "clone", "numel", "tolist"))


def copy_tensor(tensor: Any) -> TensorCopy:
    """TensorCopy of a tensor on its own device; waits for no device."""
    clone = tensor.detach().clone()
    stream = None
    if getattr(clone, "is_cuda", False):
        stream = sys.modules["torch"].cuda.current_stream(clone.device)
    return TensorCopy(clone, stream)


def fetch_values(copies: Iterable[TensorCopy]) -> dict[int, Any]:
    """Read copies from their devices; the values are keyed by the ``id`` of each copy.

    Notes
    -----
    Scalars of one device, dtype and stream are stacked and fetched together: one wait
    for the device instead of one each. The stream that made a copy also reads it, so
    that no event is needed to order the two.
    """
    groups: defaultdict[Any, list[TensorCopy]] = defaultdict(list)
    values: dict[int, Any] = {}
    for copy in copies:
        if copy.tensor.ndim == 0:
            kind = (copy.tensor.device, copy.tensor.dtype, copy.stream)
            groups[kind].append(copy)
        else:
            with _on_stream(copy.stream):
                values[id(copy)] = copy.tensor.tolist()
    for (_, _, stream), group in groups.items():
        with _on_stream(stream):
            stack = sys.modules["torch"].stack([copy.tensor for copy in group])
            numbers = stack.tolist()
        values |= {
            id(copy): number for copy, number in zip(group, numbers, strict=True)
        }
    return values


def _on_stream(stream: Any) -> contextlib.AbstractContextManager[Any]:
    if stream is None:
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[Any] = sys.modules["torch"].cuda.stream(
        stream
    )
    return context
