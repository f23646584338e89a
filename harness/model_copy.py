"""Copy a model that something else holds, so that a fit trains its own."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from types import CellType, FunctionType, MethodType
from typing import Any
from weakref import ref

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from harness.pytree import iter_tensors


def build_unshared(build: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """Build a model, and copy it if it or a part of it belongs to somebody else.

    Parameters
    ----------
    build
        Returns a model. Parts with parameters that it does not make itself, and that
        something else refers to, belong to somebody else.

    Returns
    -------
    The model, and what it is a copy of; the same twice if it is none.
    """
    new: set[tuple[int, str]] = set()
    handle = register_module_parameter_registration_hook(
        lambda module, name, param: new.add((id(module), name))
    )
    try:
        made = [build()]
    finally:
        handle.remove()
    is_new = all(
        (id(module), name) in new
        for module in made[0].modules()
        for name, param in module._parameters.items()
        if param is not None
    )
    if is_new or not _has_other_references(made):
        return made[0], made[0]
    return copy_model(made[0]), made[0]


def copy_model(model: nn.Module) -> nn.Module:
    """Copy a model that somebody else holds, with the hooks of its weights."""
    msg = "setup(module): expected a new model for each fit, got one that is held"
    advice = "Build the model inside the function."
    try:
        copied: nn.Module = copy_with_hooks(model, [model])
    except Exception as error:
        raise TypeError(
            f"{msg} elsewhere and cannot be copied: {error!r}. {advice}"
        ) from error
    pairs = [*zip(model.parameters(), copied.parameters(), strict=True)]
    for source, target in pairs:
        if target.requires_grad != source.requires_grad:  # of a scripted copy
            target.requires_grad_(source.requires_grad)
    if any(hasattr(own, "ds_id") > hasattr(other, "ds_id") for own, other in pairs):
        got = "elsewhere and divided by deepspeed.zero.Init"
        raise TypeError(f"{msg} {got}. {advice}")
    return copied


def copy_with_hooks(value: Any, modules: Iterable[nn.Module]) -> Any:
    """Copy a value with modules in it, so that their hooks work on the copies.

    torch 2.13: a copied tensor has none of its hooks, and a copied module has the same
    functions, whose closures refer to the original.
    """
    own = [inner for module in modules for inner in module.modules()]
    parts = {*map(id, own), *(id(p) for inner in own for p in inner.parameters(False))}
    hooks = [hook for inner in own for hook in _list_hooks(inner)]
    functions = {id(hook): hook for hook in hooks if _is_function(hook)}
    memo: dict[int, Any] = {
        id(thing): thing  # not copied: the user reads what it collects
        for hook in hooks
        if id(hook) not in functions
        for thing in _list_collectors(_get_holder(hook))
        if parts.isdisjoint([id(thing), *_list_held(thing)])
    }
    memo |= functions
    for inner in own:
        for tensor in iter_tensors([*vars(inner).values()]):
            if tensor.grad_fn is not None:  # torch copies none with a graph
                memo[id(tensor)] = tensor.detach().clone()
    with torch.no_grad():  # else the weights of a scripted copy have a graph
        copied = copy.deepcopy(value, memo)
    for key in functions:
        del memo[key]
    for inner in own:
        if id(inner) in memo:  # else reached by a function, which is not copied
            _move_hooks(inner, memo[id(inner)], memo)
    return copied


def _move_hooks(source: nn.Module, target: nn.Module, memo: dict[int, Any]) -> None:
    """Let the hooks and functions of a copied module refer to copies."""
    for name, item in vars(target).items():
        if isinstance(item, FunctionType):
            vars(target)[name] = _move_function(item, memo)
        elif name.endswith("_hooks") and isinstance(item, dict):
            item.update({n: _move_function(hook, memo) for n, hook in item.items()})
    for name, param in source._parameters.items():
        if param is not None:
            _copy_tensor_hooks(param, target._parameters[name], memo)


def _list_hooks(module: nn.Module) -> list[object]:
    fields = [item for name, item in vars(module).items() if name.endswith("_hooks")]
    return [hook for item in fields if isinstance(item, dict) for hook in item.values()]


def _get_holder(hook: object) -> object:
    return getattr(hook, "__self__", hook)


def _list_collectors(holder: object) -> list[object]:
    """An object, and the lists and dicts that it has as attributes."""
    items = getattr(holder, "__dict__", {}).values()
    return [holder, *(item for item in items if isinstance(item, list | dict | set))]


def _list_held(thing: object) -> list[int]:
    """Ids of what an object has as attributes, or a list or dict as items."""
    items: Iterable[object] = getattr(thing, "__dict__", {}).values()
    if isinstance(thing, list | dict | set):
        items = thing.values() if isinstance(thing, dict) else thing
    return [id(item() if isinstance(item, ref) else item) for item in items]


def _is_function(hook: object) -> bool:
    """Whether a hook is a function, or one with given arguments."""
    function = hook.func if isinstance(hook, partial) else hook
    return isinstance(function, FunctionType)


def _copy_tensor_hooks(source: Any, target: Any, memo: dict[int, Any]) -> None:
    """Register the hooks of one weight at its copy."""
    if target._backward_hooks or target._post_accumulate_grad_hooks:
        return  # of a weight that is tied to another
    for hook in (source._backward_hooks or {}).values():
        target.register_hook(_move_function(hook, memo))
    for hook in (source._post_accumulate_grad_hooks or {}).values():
        target.register_post_accumulate_grad_hook(_move_function(hook, memo))


def _move_function(item: Any, memo: dict[int, Any]) -> Any:
    """Return a function that refers to copies where this one refers to the originals.

    Of anything else its copy, or itself if it has none. What functions share stays shared.
    """
    if id(item) in memo:
        return memo[id(item)]
    if isinstance(item, MethodType) and id(item.__self__) in memo:
        return MethodType(item.__func__, memo[id(item.__self__)])
    had = _list_parts(item)
    memo[id(item)] = item  # it may refer to itself
    now = [_move_function(part, memo) for part in had]
    if any(part is not moved for part, moved in zip(had, now, strict=True)):
        memo[id(item)] = _build_function(item, now)
    return memo[id(item)]


def _list_parts(item: Any) -> list[Any]:
    """What a function refers to by its variables and given arguments."""
    if isinstance(item, FunctionType):
        named = (item.__kwdefaults__ or {}).values()
        return [*(item.__closure__ or ()), *(item.__defaults__ or ()), *named]
    if isinstance(item, CellType):
        with suppress(ValueError):  # a variable without a value
            return [item.cell_contents]
    if isinstance(item, partial) and _is_function(item):
        return [item.func, *item.args, *item.keywords.values()]
    return []


def _build_function(item: Any, parts: list[Any]) -> Any:
    """A function as another one, with other parts, as ``_list_parts`` lists them."""
    if isinstance(item, CellType):
        return CellType(parts[0])
    given = iter(parts)
    if isinstance(item, partial):
        function, args = next(given), [*islice(given, len(item.args))]
        return partial(function, *args, **dict(zip(item.keywords, given, strict=True)))
    cells = tuple(islice(given, len(item.__closure__ or ())))
    defaults = tuple(islice(given, len(item.__defaults__ or ())))
    moved = FunctionType(
        item.__code__, item.__globals__, item.__name__, defaults, cells
    )
    moved.__kwdefaults__ = dict(zip(item.__kwdefaults__ or (), given, strict=True))
    moved.__qualname__, moved.__dict__ = item.__qualname__, item.__dict__
    return moved


@contextmanager
def keep_buffers(model: nn.Module, mode: str) -> Iterator[None]:
    """Put the buffers back that a prediction in training mode changes, also after an error."""
    if mode == "eval":
        yield
        return
    places = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, name, buffer, kept in places:
            buffer.data = kept
            module._buffers[name] = buffer


def _has_other_references(made: list[nn.Module]) -> bool:
    """Whether a module of a model may be held by something else than the model."""
    counts, fresh = _count_references(made), _count_references(_FRESH)
    return counts[0] > fresh[0] or any(count > fresh[1] for count in counts[1:])


_FRESH: list[nn.Module] = [nn.Sequential(nn.Identity())]
"""A model that nobody else holds, for comparison: counts differ between Pythons."""


def _count_references(made: list[nn.Module]) -> list[int]:
    """References to each module of a model beside those of the modules that contain it."""
    modules = list(made[0].modules())
    inner = Counter(id(child) for m in modules for child in m._modules.values())
    return [
        sys.getrefcount(modules[n]) - inner[id(modules[n])] for n in range(len(modules))
    ]
