"""Variables that code keeps its state in: of objects, functions, modules and classes."""

from __future__ import annotations

import ast
import functools
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from harness.pytree import cache_by_identity, is_installed, is_proxy

FUNCTIONS = (functools.partial, types.FunctionType, types.MethodType)


@dataclass(frozen=True, eq=False)
class Variables:
    """Variables of a function, a module or a class.

    Attributes
    ----------
    read
        Returns the present values by name.
    write
        Sets one of them.
    """

    read: Callable[[], dict[str, Any]]
    write: Callable[[str, Any], None]


def fields_of(owner: object) -> dict[str, Any]:
    """Fields of an object by name, those in slots too; or the values of `Variables`."""
    if isinstance(owner, Variables):
        return owner.read()
    found = dict(getattr(owner, "__dict__", {}))
    for name in _slots_of(type(owner)):
        if name not in found and hasattr(owner, name):
            found[name] = getattr(owner, name)
    return found


def set_field(owner: object, name: str, value: object) -> None:
    """Set one of ``fields_of``, past a ``__setattr__`` of the user's own."""
    if isinstance(owner, Variables):
        owner.write(name, value)
    elif name in _slots_of(type(owner)):
        object.__setattr__(owner, name, value)
    else:
        vars(owner)[name] = value


@cache_by_identity
def _slots_of(kind: type) -> tuple[str, ...]:
    """Names in the slots of a class of the user's own and its bases."""
    if is_installed(kind.__module__):
        return ()
    found: list[str] = []
    for base in kind.__mro__:
        names = vars(base).get("__slots__", ())
        for name in [names] if isinstance(names, str) else names:
            is_private = name.startswith("__") and not name.endswith("__")
            found.append(f"_{base.__name__.lstrip('_')}{name}" if is_private else name)
    return tuple(name for name in found if name not in {"__dict__", "__weakref__"})


def of_function(function: types.FunctionType) -> Variables:
    """Variables of its closure, its default arguments, and its attributes."""
    cells = dict(
        zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    )
    code, defaults = function.__code__, function.__defaults__ or ()
    arguments = code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount]

    def read() -> dict[str, Any]:
        found = {**vars(function), **dict(zip(arguments, defaults, strict=True))}
        for name, cell in cells.items():
            try:
                found[name] = cell.cell_contents
            except ValueError:  # a variable without a value
                continue
        return found

    def write(name: str, value: object) -> None:
        if name in cells:
            cells[name].cell_contents = value
        elif name in arguments:
            own = dict(zip(arguments, function.__defaults__ or (), strict=True))
            function.__defaults__ = tuple({**own, name: value}.values())
        else:
            setattr(function, name, value)

    return Variables(read, write)


def of_container(value: Any) -> Variables:
    """Items of a dict or list, by key; by position where a text cannot tell the key."""

    def items() -> dict[str, tuple[Any, Any]]:
        # At once: a thread may change it. `__getitem__` may be the user's own.
        own = list(value.items() if isinstance(value, dict) else enumerate(value))
        return {_name_key(n, key): (key, item) for n, (key, item) in enumerate(own)}

    def write(name: str, item: object) -> None:
        known = items()
        if name in known:
            value[known[name][0]] = item
        elif not isinstance(value, dict):  # the fit added it, as what follows
            value.append(item)
        elif not name.startswith(_AT):
            value[ast.literal_eval(name[1:]) if name[:1] == "#" else name] = item

    return Variables(lambda: {name: item for name, (_, item) in items().items()}, write)


_AT = "# "
"""Begins the name of an item whose key cannot be written as text; its position follows."""


def _name_key(position: int, key: object) -> str:
    if isinstance(key, str) and key[:1] != "#":
        return key
    parts = key if type(key) is tuple else (key,)
    is_literal = {int, str}.issuperset(map(type, parts))
    return f"#{key!r}" if is_literal else f"{_AT}{position}"


def of_module(names: set[str], values: dict[str, Any]) -> Variables:
    """Global variables of a module, as far as code of the fit names them."""
    return Variables(
        lambda: {n: _read_cached(values[n]) for n in sorted(names) if n in values},
        values.__setitem__,
    )


def _read_cached(value: Any) -> object:
    if type(value) is functools._lru_cache_wrapper:
        return Cached(value.cache_info().currsize)
    return value


def of_class(kind: type) -> Variables:
    """Attributes of a class itself."""
    return Variables(
        lambda: {
            name: _read_cached(value)
            for name, value in vars(kind).copy().items()
            if not name.startswith("__")
        },
        functools.partial(type.__setattr__, kind),
    )


def is_of_user(function: types.FunctionType) -> bool:
    """Whether code of the user defines a function; a decorator copies the module's name."""
    return not is_installed(function.__globals__.get("__name__", function.__module__))


def is_function(value: object) -> bool:
    """Whether a value is a function, a method or a class."""
    return isinstance(value, (*FUNCTIONS, types.BuiltinFunctionType, type))


def find_functions(kind: type) -> list[types.FunctionType]:
    """Functions that the user's own classes among a class and its bases define."""
    return [own for ref in _refer_to_functions(kind) if (own := ref()) is not None]


@cache_by_identity
def _refer_to_functions(kind: type) -> tuple[weakref.ref[types.FunctionType], ...]:
    # Functions that call super() hold their class, which has to die when it is not used.
    found: list[types.FunctionType] = []
    own: tuple[types.FunctionType | None, ...]
    for base in kind.__mro__:
        if is_installed(base.__module__):
            continue
        for value in vars(base).copy().values():
            if issubclass(type(value), property):
                own = (unwrap(value.fget), unwrap(value.fset))
            else:
                own = (unwrap(value),)
            found += [function for function in own if function is not None]
    return tuple(map(weakref.ref, found))


def unwrap(value: Any) -> types.FunctionType | None:
    """The plain function behind a method, a decorator or a partial; None if there is none."""
    for _ in range(_MAX_WRAPPERS):
        if is_proxy(value):
            return None
        if isinstance(value, types.FunctionType):
            return value
        if isinstance(value, (staticmethod, classmethod, types.MethodType)):
            value = value.__func__
        elif isinstance(value, functools.partial):
            value = value.func
        else:
            fields = getattr(value, "__dict__", {})
            value = fields.get("__wrapped__", fields.get("func"))
    return None


_MAX_WRAPPERS = 5


@dataclass(frozen=True)
class Cached:
    """How many results a cached function keeps; a change tells that it was called."""

    num_results: int


@dataclass(frozen=True, eq=False)
class Identity:
    """Which object a variable refers to, where only that is compared."""

    thing: object

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and other.thing is self.thing

    def __hash__(self) -> int:
        return id(self.thing)


def find_globals(
    function: types.FunctionType,
) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Find the global variables that a function names, in its module and in others.

    Yields
    ------
    name of the module, all of its variables, and the name of one of them
    """
    names = _names_of(function.__code__)
    values = function.__globals__
    modules = {function.__module__: values}
    for name in names:
        found = values.get(name)
        if is_proxy(found) or not isinstance(found, types.ModuleType):
            continue  # a module that is loaded later is a proxy
        if not is_installed(found.__name__):
            modules[found.__name__] = vars(found)
    for place, own in modules.items():
        for name in names:
            if name in own and not name.startswith("__"):
                yield place, own, name


@cache_by_identity
def _names_of(code: types.CodeType) -> tuple[str, ...]:
    """Names of global variables and attributes in code, and in functions inside of it."""
    found = dict.fromkeys(code.co_names)
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            found |= dict.fromkeys(_names_of(inner))
    return tuple(found)
