"""Find what holds state beside parameters and buffers: the one place that looks for it.

A model may hold an optimizer or a scaler, a callback an average of the model, a loss its
own weights. What is found here is saved in a checkpoint, or named there as not kept.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler

from harness.accelerators.single import SingleDevice
from harness.callback import Callback
from harness.context import Context
from harness.metrics.type_checks import is_metric
from harness.pytree import has_state, is_installed

MAX_ITEMS = 1000
"""Longer containers are data, and are not searched."""

MAX_DEPTH = 6
"""How deep objects inside objects are searched."""

_MODULE_FIELDS = frozenset(vars(nn.Module())) | {"ctx"}
_OPTIMIZER_FIELDS = frozenset({"defaults", "param_groups", "state", "_opt_called"})

OPTIMIZERS = "optimizers"
"""How roots of optimizers begin."""

PLAIN_TYPES = (bool, int, float, complex, str, type(None))
SCALARS = frozenset(PLAIN_TYPES)
"""The same, to look a type up quickly: most attributes are of one of them."""

_PASSED_OVER = (
    *(*PLAIN_TYPES, type, types.ModuleType, Context, DataLoader, Dataset, Sampler),
)
_FUNCTIONS = (functools.partial, types.FunctionType, types.MethodType)
_FOREIGN = frozenset(
    {"torch", "numpy", "builtins", "threading", "_thread", "tracking", "harness"}
    | {"deepspeed"}
)
"""Packages whose objects are searched only if they have a ``state_dict``."""


class Search:
    """What holds state below some roots: the model, the loss, functions and callbacks.

    Parameters
    ----------
    saved
        Objects that are saved elsewhere. They and what they hold are passed over.

    Attributes
    ----------
    objects
        Modules, leaf tensors and objects with ``state_dict``, by root and path.
    owners
        Modules, and the user's own objects and callbacks without ``state_dict``, whose plain
        attributes belong to the fit, by root and path.
    stateless
        Roots of callbacks that return no state.
    """

    def __init__(self, saved: Iterable[object] = ()) -> None:
        self.objects: dict[str, dict[str, Any]] = {}
        self.owners: dict[str, dict[str, object]] = {}
        self.stateless: set[str] = set()
        self._seen: dict[int, object] = {}  # keeps them, so that no id is used again
        for thing in saved:
            self._mark_seen(thing)
        self.saved = frozenset(self._seen)

    def add(self, root: str, value: object) -> None:
        """Search below a root."""
        self.objects[root], self.owners[root] = {}, {}
        if isinstance(value, nn.Module):
            if self._mark_seen(value) or isinstance(value, Callback):
                self.objects[root][""] = value
            self._search_modules(root, "", value, 0)
        elif isinstance(value, Callback):
            # The callbacks of this package return all of their state.
            if not _is_library(value):
                if type(value).state_dict is Callback.state_dict:
                    self.stateless.add(root)
                    self.owners[root][""] = value
                self._search_fields(root, "", value, 0)
        else:
            self._search(root, "", value, 0)

    def add_optimizer(self, root: str, opt: object) -> None:
        """Search the attributes of an optimizer, which are no part of its ``state_dict``."""
        self.objects[root], self.owners[root] = {}, {"": opt}
        self._search_fields(root, "", opt, 0)

    def iter_objects(self) -> Iterator[tuple[str, str, Any]]:
        """Yield root, path and object of each of `objects`."""
        for root, found in self.objects.items():
            for path, thing in found.items():
                yield root, path, thing

    def _mark_seen(self, value: object) -> bool:
        """Whether a value is met for the first time."""
        is_new = id(value) not in self._seen
        self._seen[id(value)] = value
        return is_new

    def _search(self, root: str, path: str, value: Any, depth: int) -> None:
        is_passed = type(value) in SCALARS or isinstance(value, _PASSED_OVER)
        if is_passed or depth > MAX_DEPTH or not self._mark_seen(value):
            return
        is_trained = isinstance(value, Tensor) and is_trained_leaf(value)
        if is_trained or isinstance(value, nn.Module) or has_state(value):
            self.objects[root][path] = value
        if isinstance(value, nn.Module):
            self._search_modules(root, path, value, depth)
        elif isinstance(value, _FUNCTIONS):
            for name, item in _parts_of_function(value):
                self._search(root, f"{path}.{name}", item, depth + 1)
        elif isinstance(value, Mapping | list | tuple | set):
            for key, item in _items_of(value):
                self._search(root, f"{path}[{key!r}]", item, depth + 1)
        elif not has_state(value) and not _is_library(value):
            if path and not is_installed(type(value).__module__):
                self.owners[root][path] = value
            self._search_fields(root, path, value, depth)

    def _search_modules(self, root: str, path: str, top: nn.Module, depth: int) -> None:
        """Search the attributes of a module and of those below it."""
        inner = dict(top.named_modules())
        for thing in iter_parts(inner.values()):
            self._mark_seen(thing)
        for name, module in inner.items():
            if not has_extra_state(module) and not is_metric(module):
                place = f"{path}.{name}" if name else path
                self.owners[root][place] = module
                self._search_fields(root, place, module, depth)

    def _search_fields(self, root: str, path: str, owner: object, depth: int) -> None:
        skipped = list_library_fields(owner)
        for name, value in list(getattr(owner, "__dict__", {}).items()):
            if name not in skipped and type(value) not in SCALARS:
                self._search(root, f"{path}.{name}", value, depth + 1)


def search_fit(ctx: Context, callbacks: Mapping[str, Callback]) -> Search:
    """Search all that belongs to a fit."""
    saved: list[Any] = [ctx.accelerator, ctx.run, *ctx.callbacks]
    saved += iter_parts(ctx.model.modules())
    is_single = isinstance(ctx.accelerator, SingleDevice)  # engines wrap optimizers
    own = {
        name: opt if is_single else getattr(opt, "unwrapped", opt)
        for name, opt in ctx.optimizers.items()
    }
    for name, opt in ctx.optimizers.items():
        saved += [opt, own[name]]
        saved += [] if is_single else [getattr(opt, "optimizer", opt)]
        saved += getattr(opt, "param_groups", [])
    search = Search(saved)
    for name, opt in own.items():
        if not _is_library(opt):
            search.add_optimizer(f"{OPTIMIZERS}.{name}", opt)
    search.add("loss", ctx.loss_fn)
    search.add("model", ctx.model)
    search.add("backward", ctx.backward)
    search.add("step_opt", ctx.step_opt)
    for name, callback in callbacks.items():
        search.add(name, callback)
    return search


def find_loss_modules(loss: object, model: nn.Module) -> list[nn.Module]:
    """Modules with the state of a loss: itself, or what it holds; not those of the model."""
    found = search_loss(loss, model).objects["loss"].values()
    return [thing for thing in found if isinstance(thing, nn.Module)]


def search_loss(loss: object, model: nn.Module) -> Search:
    """Search a loss alone; what belongs to the model is passed over."""
    search = Search(iter_parts(model.modules()))
    search.add("loss", loss)
    return search


def name_parameters(model: nn.Module, search: Search) -> dict[str, Tensor]:
    """All parameters that an optimizer may step, by name."""
    found: dict[str, Tensor] = {}
    for root, path, thing in search.iter_objects():
        if isinstance(thing, nn.Module):
            inner = thing.named_parameters()
            found |= {f"{root}{path}/{name}": param for name, param in inner}
        elif isinstance(thing, Tensor):
            found[f"{root}{path}"] = thing
    return found | dict(model.named_parameters())


def iter_parts(modules: Iterable[nn.Module]) -> Iterator[object]:
    """Yield modules, and their own weights and buffers, which may come more than once."""
    for module in modules:
        yield module
        yield from module._parameters.values()
        yield from module._buffers.values()


def has_extra_state(module: nn.Module) -> bool:
    """Whether a module saves state beside its tensors by itself."""
    return type(module).get_extra_state is not nn.Module.get_extra_state


def is_trained_leaf(tensor: Tensor) -> bool:
    """Whether a tensor is one that is trained, not one that is computed from others."""
    try:
        return tensor.requires_grad and tensor.is_leaf
    except RuntimeError:  # a view from no_grad of a weight that was changed since
        return False


def list_library_fields(owner: object) -> frozenset[str]:
    """Attributes of an object that are not its own."""
    if isinstance(owner, Optimizer):
        return _OPTIMIZER_FIELDS
    return _MODULE_FIELDS if isinstance(owner, nn.Module) else frozenset({"ctx"})


def _is_library(value: object) -> bool:
    return type(value).__module__.partition(".")[0] in _FOREIGN


def _items_of(value: Any) -> list[tuple[object, object]]:
    """Keys and values of a container that is no data."""
    if len(value) > MAX_ITEMS:
        return []
    return list(value.items() if isinstance(value, Mapping) else enumerate(value))


def _parts_of_function(value: Any) -> Iterator[tuple[str, object]]:
    """What a function, partial or method holds: arguments, closure, its object."""
    if isinstance(value, functools.partial):
        yield from (("func", value.func), ("args", value.args))
        yield "keywords", value.keywords
        return
    if isinstance(value, types.MethodType):
        yield "self", value.__self__
        value = value.__func__
    if not isinstance(value, types.FunctionType):
        return
    cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
    for name, cell in cells:
        try:
            yield name, cell.cell_contents
        except ValueError:  # a variable without a value
            continue
    for name in value.__code__.co_names:
        found = value.__globals__.get(name)
        if isinstance(found, nn.Module) or has_state(found):
            yield name, found
    yield "defaults", value.__defaults__
