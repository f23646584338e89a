"""What one record is: its columns, its kinds, and how a value becomes rows.

A logged value becomes one row or, for a dictionary, one row per leaf, whose name is
the path to it joined by ``/``. Numbers and booleans go into ``value``, exact as
float64; an integer that float64 cannot hold keeps its digits in ``payload``. All else
is JSON in ``payload``, where NaN and the infinities, which JSON lacks, are written
``{"$numberDouble": "NaN"}`` as MongoDB's Extended JSON (version 2) does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

import pyarrow as pa

from tracking.tensors import TensorCopy, copy_tensor, is_tensor

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
"""Kind of a leaf whose tensors are still to be read out; never written."""

VALUED: Final = (FLOAT, INT, BOOL, REWIND)
"""Kinds whose ``value`` is not null."""

CONTROL: Final = ("overwrite", "rewind")
"""Kinds that say something about earlier rows and hold no value of the user's."""

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
"""Name, kind, number, payload: JSON text, None, or under DEFERRED what is still to do."""


def flatten_value(value: object, place: str) -> list[Leaf]:
    """Rows that a logged value becomes, the whole value checked.

    Parameters
    ----------
    value
        Number, bool, string, None, tensor or array of at most 1024 elements, or a
        dictionary (string keys), list or tuple of those.
    place
        What messages start with, e.g. ``Run.log('metrics', 'train')``.

    Returns
    -------
    one leaf, or one per leaf of a dictionary; an empty dictionary is a leaf itself

    Raises
    ------
    TypeError
        If something else is found; the message names where.
    ValueError
        If it is too large, too deep or not valid Unicode.
    """
    return list(_walk(value, "", "value", place, 0))


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
    """Leaf of a value whose copies have been read out into ``values``."""
    if not isinstance(value, TensorCopy):
        return name, JSON, 0.0, _json(_filled(value, values), "value", place)
    number = values[id(value)]
    if isinstance(number, list):
        return name, ARRAY, 0.0, _json(_plain(number, "value", place, 0, []), "", place)
    return _scalar(name, number, place)


def find_copies(value: Any) -> Iterator[TensorCopy]:
    """Copies of tensors inside a leaf's payload, in order."""
    if isinstance(value, TensorCopy):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from find_copies(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from find_copies(item)


def parse_value(kind: str, value: float | None, payload: str | None) -> Any:
    """Python value that a row holds; the inverse of ``leaves`` for one leaf.

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
    return None if payload is None else _restored(json.loads(payload))


def _walk(
    value: object, name: str, path: str, place: str, depth: int
) -> Iterator[Leaf]:
    """Leaves of a value, depth first."""
    if not isinstance(value, Mapping):
        yield _leaf(name, value, path, place)
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
        yield from _walk(item, below, f"{path}[{key!r}]", place, depth + 1)


def _leaf(name: str, value: object, path: str, place: str) -> Leaf:
    """One leaf of anything but a dictionary."""
    if value is None or isinstance(value, float | int | str):
        return _scalar(name, value, place)
    if is_tensor(value):
        _check_tensor(value, path, place)
        return name, DEFERRED, 0.0, copy_tensor(value)
    if isinstance(value, list | tuple):
        found: list[TensorCopy] = []
        plain = _plain(value, path, place, 0, found)
        if found:
            return name, DEFERRED, 0.0, plain
        return name, JSON, 0.0, _json(plain, path, place)
    array = _listed(value, path, place)
    if isinstance(array, list):
        plain = _plain(array, path, place, 0, [])
        return name, ARRAY, 0.0, _json(plain, path, place)
    return _scalar(name, array, place)


def _scalar(name: str, value: Any, place: str) -> Leaf:
    """Leaf of a number, bool, string or None; subclasses of them count as they do."""
    if isinstance(value, bool):
        return name, BOOL, float(value), None
    if isinstance(value, float):
        return name, FLOAT, float(value), None
    if isinstance(value, int):
        value = int(value)
        if -EXACT <= value <= EXACT:
            return name, INT, float(value), None
        return name, INT, _nearest(value), _digits(value, place)
    if value is None:
        return name, NONE, 0.0, "null"
    return name, STR, 0.0, _json(str.__str__(value), "value", place)


def _nearest(value: int) -> float:
    """float64 nearest to an integer: an infinity beyond its range, as IEEE 754 has."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _digits(value: int, place: str) -> str:
    """Digits of an integer."""
    try:
        return str(value)
    except ValueError as error:  # sys.set_int_max_str_digits, 4300 by default
        raise ValueError(
            f"{place}: expected an integer that Python writes out, got one of "
            f"{value.bit_length()} bits. Pass it as hex(value)."
        ) from error


def _listed(value: Any, path: str, place: str) -> Any:
    """NumPy's, or a like library's, array or scalar as lists and Python numbers."""
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
    raise _unloggable(value, path, place)


def _plain(
    value: Any, path: str, place: str, depth: int, found: list[TensorCopy]
) -> Any:
    """JSON form of a value; tensors in it are copied, and also added to ``found``."""
    _check_depth(depth, path, place)
    if isinstance(value, float):
        value = float(value)
        return value if math.isfinite(value) else {"$numberDouble": _spelt(value)}
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        _digits(value, place)
        return int(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, list | tuple):
        return [
            _plain(item, f"{path}[{i}]", place, depth + 1, found)
            for i, item in enumerate(value)
        ]
    if isinstance(value, Mapping):
        return _plain_mapping(value, path, place, depth, found)
    if is_tensor(value):
        _check_tensor(value, path, place)
        found.append(copy_tensor(value))
        return found[-1]
    return _plain(_listed(value, path, place), path, place, depth + 1, found)


def _plain_mapping(
    value: Mapping[Any, Any], path: str, place: str, depth: int, found: list[TensorCopy]
) -> dict[str, Any]:
    """JSON form of a dictionary inside a list."""
    plain = {}
    for key, item in value.items():
        if not isinstance(key, str):
            check_name(key, f"key in {path}", place)
        plain[key] = _plain(item, f"{path}[{key!r}]", place, depth + 1, found)
    # A user's own dictionary that looks like our notation is marked as literal.
    if plain.keys() in ({"$numberDouble"}, {"$literal"}):
        return {"$literal": plain}
    return plain


def _filled(value: Any, values: Mapping[int, Any]) -> Any:
    """JSON form in which each copy is replaced by what was read out of it."""
    if isinstance(value, TensorCopy):
        return _plain(values[id(value)], "value", "", 0, [])
    if isinstance(value, list):
        return [_filled(item, values) for item in value]
    if isinstance(value, dict):
        return {key: _filled(item, values) for key, item in value.items()}
    return value


def _restored(plain: Any) -> Any:
    """What JSON in our notation stands for."""
    if isinstance(plain, list):
        return [_restored(item) for item in plain]
    if not isinstance(plain, dict):
        return plain
    if plain.keys() == {"$numberDouble"}:
        return float(plain["$numberDouble"])
    if plain.keys() == {"$literal"}:
        plain = plain["$literal"]
    return {key: _restored(item) for key, item in plain.items()}


def _spelt(value: float) -> str:
    """Extended JSON's name of a value that JSON cannot write."""
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def _json(plain: Any, path: str, place: str) -> str:
    """JSON text, as readable as UTF-8 allows, of bounded size."""
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
    """Raise unless a tensor is small and real."""
    _check_size(int(value.numel()), path, place)
    if value.is_complex():
        raise _unloggable(value, path, place)


def _check_size(num_elements: int, path: str, place: str) -> None:
    """Raise if an array has too many elements for a record."""
    if num_elements > MAX_ELEMENTS:
        raise ValueError(
            f"{place}: expected at most {MAX_ELEMENTS} elements at {path}, "
            f"got {num_elements}. Save it to a file and use log_artifact."
        )


def _check_depth(depth: int, path: str, place: str) -> None:
    """Raise if a value nests too deep, as one that holds itself does."""
    if depth > MAX_DEPTH:
        raise ValueError(
            f"{place}: expected at most {MAX_DEPTH} levels of nesting, got more at "
            f"{path[:60]}... Flatten it, or see whether it holds itself."
        )


def _unloggable(value: object, path: str, place: str) -> TypeError:
    """Error for a value that no record can hold."""
    return TypeError(
        f"{place}: expected a number, bool, string, None, small tensor or array, or a "
        f"dict or list of those, got {value!r:.200} at {path}. "
        "Convert it, or save it to a file and use log_artifact."
    )
