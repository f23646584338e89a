"""What ``harness fit`` is to train, by file and name; checked before torch is imported."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from harness.errors import ExperimentError, unknown_parameter
from harness.events import nearest
from tracking.errors import describe_path


def load_target(target: str) -> Any:
    """Import the object that ``FILE.py:NAME`` or ``package.module:NAME`` names."""
    where, name = _split_target(target)
    module = (
        _import_file(Path(where)) if where.endswith(".py") else _import_module(where)
    )
    if not hasattr(module, name):
        raise _missing_name(where, name, vars(module))
    return getattr(module, name)


def _split_target(target: str) -> tuple[str, str]:
    where, _, name = target.rpartition(":")
    if where and name:
        return where, name
    msg = f"harness fit: expected FILE.py:NAME or MODULE:NAME, got {target!r}."
    raise ExperimentError(
        f"{msg} NAME is an Experiment, or a function that returns one."
    )


def _missing_name(where: str, name: str, known: Iterable[str]) -> ExperimentError:
    names = [key for key in known if not key.startswith("_")]
    msg = f"{where}: expected the name {name!r}, found no such name."
    return ExperimentError(f"{msg}{nearest(name, names)}")


def _import_file(path: Path) -> types.ModuleType:
    """Import a file under its own name, with its folder on the path."""
    _check_file(path)
    name = path.stem
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, ImportError) and "no known parent" in str(error):
            error.add_note(f"hint: {_explain_relative_import(path)}")
        raise
    return module


def _explain_relative_import(path: Path) -> str:
    folder = path.resolve().parent
    if not (folder / "__init__.py").exists():
        return (
            "A file outside of a package imports others by name: from NAME import ..."
        )
    name = path.stem
    while (folder / "__init__.py").exists():
        name, folder = f"{folder.name}.{name}", folder.parent
    return f"Name a file of a package as a module, in the folder {folder}: {name}:NAME"


def _check_file(path: Path) -> None:
    """Raise unless a file exists and hides no module."""
    if not path.is_file():
        what = describe_path(path)
        msg = f"harness fit: expected a Python file, got {str(path)!r}, {what}."
        raise ExperimentError(f"{msg}{_suggest_file(path)}")
    name = path.stem
    if name in sys.stdlib_module_names or hasattr(sys.modules.get(name), "__path__"):
        msg = f"harness fit: expected a unique file name, got {path.name!r}."
        raise ExperimentError(f"{msg} It hides the module {name!r}: rename the file.")


def _import_module(name: str) -> types.ModuleType:
    """Import a module, also from the working folder."""
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as exc:
        if exc.name is None or not name.startswith(exc.name):
            raise
        raise _missing_module(name) from exc
    if getattr(module, "__file__", "") is None:  # a folder without __init__.py
        raise _missing_module(name)
    return module


def _missing_module(name: str) -> ExperimentError:
    path = Path(name)
    what = f", {describe_path(path)}" if path.exists() else ""
    msg = f"harness fit: expected a module or FILE.py:NAME, got {name!r}{what}."
    return ExperimentError(f"{msg}{_suggest_file(path)}")


def _suggest_file(path: Path) -> str:
    """Offer the Python file of a folder, or the one with the nearest name."""
    folder = path if path.is_dir() else path.parent
    found = [str(item) for item in folder.glob("*.py") if item.is_file()]
    if path.is_dir() and len(found) == 1:
        return f" Did you mean {found[0]!r}?"
    return nearest(str(path), found)


# ------------------------------------------------------------- before torch is imported

_DYNAMIC = frozenset({"exec", "globals", "setattr", "vars", "__getattr__"})
"""A file that uses one of these may define names that it does not show."""


def check_source(
    target: str, settings: Iterable[str], places: Mapping[str, str]
) -> None:
    """Look for mistakes in what is to be trained, as far as they show without an import.

    Parameters
    ----------
    target
        ``FILE.py:NAME`` or ``package.module:NAME``; only files are read.
    settings
        Names of the arguments of the function NAME.
    """
    where, name = _split_target(target)
    if not where.endswith(".py"):
        return
    _check_file(Path(where))
    tree = ast.parse(Path(where).read_bytes(), where)
    names = set(_list_names(tree))
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    if "*" in names or not _DYNAMIC.isdisjoint(names | used):
        return
    if name not in names:
        raise _missing_name(where, name, names)
    found = [node for node in tree.body if name in _list_names(node)]
    if len(found) == 1 and isinstance(found[0], ast.FunctionDef):
        _check_parameters(found[0], settings, places)


def _list_names(tree: ast.AST) -> Iterator[str]:
    """All names that a piece of a program defines; ``*`` for an import of all."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.alias):
            yield node.asname or node.name.partition(".")[0]
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def _check_parameters(
    function: ast.FunctionDef, settings: Iterable[str], places: Mapping[str, str]
) -> None:
    given = function.args
    if function.decorator_list or given.kwarg or given.posonlyargs:
        return
    names = [item.arg for item in (*given.args, *given.kwonlyargs)]
    for key in settings:
        if key not in names:
            place = places.get(key, f"--set {key}")
            raise unknown_parameter(place, function.name, key, names)
