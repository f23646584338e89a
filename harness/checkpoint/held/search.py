"""Find what holds state beside parameters and buffers: the one place that looks for it.

A model may hold an optimizer or a scaler, a callback an average of the model, a loss its
own weights. What is found here is saved in a checkpoint, or named there as not kept.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
import types
from collections import UserDict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from itertools import filterfalse
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler

from harness.accelerators.deepspeed.original_model import LEFTOVERS
from harness.accelerators.single import SingleDevice
from harness.callback import Callback
from harness.checkpoint.held.values import (
    PLAIN_TYPES,
    SCALARS,
    is_compared,
    is_plain,
    is_trained_leaf,
)
from harness.context import Context
from harness.data.stateful import walk_parts
from harness.metrics.type_checks import is_metric
from harness.pytree import has_state, is_installed, is_proxy
from harness.rng import Generator, is_generator
from harness.variables import (
    FUNCTIONS,
    Identity,
    Variables,
    fields_of,
    find_functions,
    find_globals,
    is_of_user,
    of_class,
    of_container,
    of_function,
    of_module,
    set_field,
    unwrap,
)

MAX_ITEMS = 1000
"""Longer containers are data, and are not searched."""

MAX_DEPTH = 6
"""How deep objects inside objects are searched."""

_MODULE_FIELDS = frozenset(vars(nn.Module())) | LEFTOVERS | {"ctx"}
_TENSOR_FIELDS = frozenset({"_zero_optimizer", "grad_accum"})
"""Attributes of parameters at ZeRO 1 and 2 of DeepSpeed 0.19.8, which the engine saves."""

_OPTIMIZER_FIELDS = frozenset({"defaults", "param_groups", "state", "_opt_called"})

OPTIMIZERS = "optimizers"
"""How roots of optimizers begin."""

GLOBALS = "globals"
"""Root of what the user's code names: variables of modules and classes."""

DATA = "data"
"""Root of data sets, samplers and what they hold; it is restored with the pass."""

PASSIVE = frozenset({GLOBALS, DATA})
"""Roots of what may have nothing to do with the fit, and is kept only if it changes."""

_PASSED_OVER = (
    *(*PLAIN_TYPES, Enum, type, types.ModuleType),
    *(Context, DataLoader, Dataset, Sampler),
)
_MAPPINGS = (dict, UserDict, types.MappingProxyType)
"""Those that are searched: another one, such as one of files, may read what it is asked for."""

_CONTAINERS = (*_MAPPINGS, list, tuple, set)

_HOOKS = (
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"),
    *("_backward_pre_hooks",),
)
_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_STEP_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
_OF_LOADER = ("collate_fn", "worker_init_fn", "transform", "target_transform")
_FOREIGN = frozenset(
    {"torch", "numpy", "builtins", "threading", "_thread", "tracking", "harness"}
    | {"deepspeed", "logging", "io", "_io", "weakref", "tqdm", "rich"}
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
        attributes belong to the fit, by root and path; also variables of functions, modules
        and classes.
    foreign
        Root and path of those of `owners` that are of an installed package.
    generators
        Random generators that were met, by root and path.
    stateless
        Roots of callbacks that return no state.
    """

    def __init__(self, saved: Iterable[object] = ()) -> None:
        self.objects: dict[str, dict[str, Any]] = {}
        self.owners: dict[str, dict[str, object]] = {}
        self.foreign: set[tuple[str, str]] = set()
        self.generators: dict[str, Generator] = {}
        self._holders: dict[tuple[str, str], tuple[object, str]] = {}
        self._functions: deque[types.FunctionType] = deque()
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
            if _is_library(value):
                # They return all of their state, but not that of functions of the user's.
                for name, own in vars(value).items():
                    self._search_functions(root, f".{name}", own)
            else:
                if type(value).state_dict is Callback.state_dict:
                    self.stateless.add(root)
                    self.owners[root][""] = value
                self._search_fields(root, "", value, 0)
        else:
            self._search(root, "", value, 0)

    def add_fields(self, root: str, owner: object) -> None:
        """Search the attributes of an object, such as an optimizer, and not its own state."""
        self.objects[root], self.owners[root] = {}, {"": owner}
        self._search_fields(root, "", owner, 0)

    @property
    def seen(self) -> frozenset[int]:
        """Ids of all objects that were met."""
        return frozenset(self._seen)

    def iter_objects(self) -> Iterator[tuple[str, str, Any]]:
        """Yield root, path and object of each of `objects`."""
        for root, found in self.objects.items():
            for path, thing in found.items():
                yield root, path, thing

    def iter_held(self) -> Iterator[tuple[str, str, object]]:
        """Yield root, path and object of those of `owners` that another one may replace."""
        for root, found in self.owners.items():
            for path, owner in found.items():
                is_fixed = isinstance(owner, nn.Module | Variables)
                if (root, path) in self._holders and not is_fixed:
                    yield root, path, owner

    def replace(self, places: Iterable[Sequence[str]]) -> None:
        """Put copies into the places of objects, which other code may hold too."""
        copies: dict[int, object] = {}
        for root, path, owner in list(self.iter_held()):
            if [root, path] in places:
                holder, name = self._holders[root, path]
                with contextlib.suppress(Exception):  # an object of the user's
                    copies[id(owner)] = self.owners[root][path] = copy.copy(owner)
                    set_field(copies.get(id(holder), holder), name, copies[id(owner)])

    def _mark_seen(self, value: object) -> bool:
        """Whether a value is met for the first time."""
        is_new = id(value) not in self._seen
        self._seen[id(value)] = value
        return is_new

    def _search(self, root: str, path: str, value: Any, depth: int) -> None:
        if type(value) in SCALARS or is_proxy(value):
            return
        if (
            isinstance(value, _PASSED_OVER)
            or depth > MAX_DEPTH
            or not self._mark_seen(value)
        ):
            return
        is_trained = isinstance(value, Tensor) and is_trained_leaf(value)
        if is_generator(value):
            self.generators[f"{root}{path}"] = value
        elif is_trained or isinstance(value, nn.Module) or has_state(value):
            self.objects[root][path] = value
        self._search_inside(root, path, value, depth)

    def _search_inside(self, root: str, path: str, value: Any, depth: int) -> None:
        """Search what a value holds."""
        if isinstance(value, nn.Module):
            self._search_modules(root, path, value, depth)
        elif isinstance(value, FUNCTIONS):
            self._add_function(root, path, value)
            for name, item in _parts_of_function(value):
                self._search(root, f"{path}.{name}", item, depth + 1)
        elif isinstance(value, _CONTAINERS):
            self._add_items(root, path, value)
            for key, item in _items_of(value):
                self._search(root, f"{path}[{key}]", item, depth + 1)
        elif not has_state(value) and (type(value) in _OPEN or not _is_library(value)):
            if path:
                self.owners[root][path] = value
            if is_installed(type(value).__module__) and type(value) not in _OPEN:
                self.foreign.add((root, path))
            self._search_fields(root, path, value, depth)

    def _add_items(self, root: str, path: str, value: Any) -> None:
        """Add the items of a dict or list that also holds objects, such as modules."""
        if not path or root == DATA or not isinstance(value, dict | list):
            return
        is_mixed = len(value) <= MAX_ITEMS and not (
            is_plain(value) or is_compared(value)
        )
        if is_mixed and not any(
            path.startswith(p) for r, p in self.foreign if r == root
        ):
            self.owners[root][path] = of_container(value)

    def _search_functions(self, root: str, path: str, value: object) -> None:
        """Search functions, also in lists and dicts, and nothing else."""
        if isinstance(value, FUNCTIONS):
            self._search(root, path, value, 0)
        elif type(value) in {dict, list, tuple}:
            for key, item in _items_of(value):
                self._search_functions(root, f"{path}[{key}]", item)

    def _add_function(self, root: str, path: str, value: object) -> None:
        """Add the variables of a function of the user's own."""
        function = unwrap(value)
        if function is not None and is_of_user(function):
            self._functions.append(function)
            if function.__closure__ or function.__defaults__ or vars(function):
                self.owners[root][path] = of_function(function)

    def add_variables(self, root: str, found: Mapping[str, Variables]) -> None:
        """Search variables, by path."""
        self.objects[root], self.owners[root] = {}, dict(found)
        for path, own in found.items():
            self._search_fields(root, path, own, 0)

    def add_data(self, name: str, loader: object) -> None:
        """Search the data sets and samplers of a loader that save no state themselves."""
        root = DATA
        self.objects.setdefault(root, {})
        self.owners.setdefault(root, {})
        for place, part in walk_parts(loader, has_state):
            if has_state(part) or not self._mark_seen(part):
                continue
            path = f".{name}.{place}".rstrip(".")
            if _is_library(part) and not isinstance(part, DataLoader):
                self.owners[root][path] = part
            if is_installed(type(part).__module__):
                for field in _OF_LOADER:
                    own = getattr(part, "__dict__", {}).get(field)
                    self._search(root, f"{path}.{field}", own, 1)
            else:
                self.owners[root][path] = part
                self._search_fields(root, path, part, 0)

    def add_globals(self) -> None:
        """Search the variables of modules and classes that the code met so far names."""
        root = GLOBALS
        self.objects[root], self.owners[root] = {}, {}
        names: dict[str, set[str]] = {}
        kinds, seen = {type(thing) for thing in self._seen.values()}, set[object]()
        while self._functions or kinds:
            for kind in kinds - seen:
                self._add_class(root, kind)
            seen |= kinds
            kinds = set()
            while self._functions:
                function = self._functions.popleft()
                if function in seen or not is_of_user(function):
                    continue
                seen.add(function)
                known = len(self._seen)
                for place, values, name in find_globals(function):
                    own = names.setdefault(place, set())
                    if name in own:
                        continue
                    own.add(name)
                    self.owners[root][f" {place}"] = of_module(own, values)
                    self._search(root, f" {place}.{name}", values[name], 1)
                    if issubclass(type(values[name]), type):
                        kinds.add(values[name])
                kinds |= {type(t) for t in list(self._seen.values())[known:]}

    def _add_class(self, root: str, kind: type) -> None:
        """Add the attributes of a class of the user's own, and search its functions."""
        for function in find_functions(kind):
            place = f" {function.__module__}.{function.__qualname__}"
            self._search(root, place, function, 1)
        if not is_installed(kind.__module__) and not issubclass(kind, Enum):
            path = f" {kind.__module__}.{kind.__qualname__}"
            self.owners[root][path] = variables = of_class(kind)
            self._search_fields(root, path, variables, 1)

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
                self._search_tensors(root, place, module, depth)
                for name in filter(vars(module).get, _HOOKS):  # most have none
                    hooks = vars(module)[name].values()
                    for n, hook in enumerate(filterfalse(_is_of_engine, hooks)):
                        self._search(root, f"{place}.{name}[{n}]", hook, depth + 1)

    def _search_tensors(
        self, root: str, path: str, module: nn.Module, depth: int
    ) -> None:
        """Search attributes and hooks of parameters and buffers."""
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            place = f"{path}.{name}"
            if tensor is None or hasattr(tensor, "ds_id"):  # an engine's
                continue
            if vars(tensor):
                self.owners[root][place] = tensor
                self._search_fields(root, place, tensor, depth)
            for field in _TENSOR_HOOKS:
                hooks = getattr(tensor, field) or {}
                for n, hook in enumerate(filterfalse(_is_of_engine, hooks.values())):
                    self._search(root, f"{place}.{field}[{n}]", hook, depth + 1)

    def add_tensors(self, saved: Mapping[str, Mapping[str, object]]) -> None:
        """Add the parameters and buffers of which attributes are saved, and which have none."""
        for root, states in saved.items():
            owners = self.owners.get(root, {})
            for path in states.keys() - owners.keys():
                place, _, name = path.rpartition(".")
                fields = getattr(owners.get(place), "__dict__", {})
                own = {**fields.get("_parameters", {}), **fields.get("_buffers", {})}
                if own.get(name) is not None:
                    owners[path] = own[name]

    def _search_fields(self, root: str, path: str, owner: object, depth: int) -> None:
        skipped = list_library_fields(owner)
        for name, value in fields_of(owner).items():
            if name not in skipped and type(value) not in SCALARS:
                self._holders.setdefault((root, f"{path}.{name}"), (owner, name))
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
            search.add_fields(f"{OPTIMIZERS}.{name}", opt)
        elif hooks := [h for f in _STEP_HOOKS for h in getattr(opt, f, {}).values()]:
            search.add(f"{OPTIMIZERS}.{name}", hooks)
    search.add("loss", ctx.loss_fn)
    search.add("model", ctx.model)
    search.add("backward", ctx.backward)
    search.add("step_opt", ctx.step_opt)
    search.add("batch", getattr(ctx, "read_batch", None))
    search.add("metrics", _list_functions(callbacks.values()))
    search.add_variables("ctx", _variables_of(ctx))
    search.add_data("train", ctx.train_data)
    for name, loader in ctx.valid_sets.items():
        search.add_data(name, loader)
    for name, callback in callbacks.items():
        search.add(name, callback)
    search.add_globals()
    return search


def _list_functions(callbacks: Iterable[Callback]) -> list[object]:
    """Metrics that are functions; the callback of metrics saves those with a state."""
    sets = [getattr(callback, "metric_set", None) for callback in callbacks]
    return [
        metric
        for own in sets
        if own is not None
        for metric in (*own.train.values(), *own.valid.values())
        if not isinstance(metric, nn.Module)
    ]


def _variables_of(ctx: Context) -> dict[str, Variables]:
    """What callbacks may write on the context."""

    def read(own: Mapping[str, Any]) -> dict[str, Any]:
        return {name: v for name, v in own.items() if name not in _OF_SIGNALS}

    replaced: dict[str, Any] = {"loss_fn": Identity(ctx.loss_fn)}
    found = {"": Variables(lambda: replaced, replaced.__setitem__)}
    for name in ("buffers", "hparams", "opt_hparams"):
        own = getattr(ctx, name)
        found[f".{name}"] = Variables(functools.partial(read, own), own.__setitem__)
    return found


_OF_SIGNALS = frozenset({"signal", "stop_by"})
"""What an interrupt leaves on the context, which ends with it."""

_OPEN = frozenset({types.SimpleNamespace, threading.local})
"""Classes of Python whose objects are the user's own: attributes and nothing else."""


def find_loss_modules(loss: object, model: nn.Module) -> list[nn.Module]:
    """Modules with the state of a loss: itself, or what it holds; not those of the model."""
    found = search_loss(loss, model).objects["loss"].values()
    return [thing for thing in found if isinstance(thing, nn.Module)]


def list_references(user: object) -> frozenset[int]:
    """Ids of the objects that one refers to, by its attributes and its class's methods."""
    search = Search()
    search.add_fields("", user)
    for kind in type(user).__mro__:
        if kind.__module__.partition(".")[0] not in _FOREIGN:
            for function in vars(kind).values():
                search.add("", function)
    return search.seen


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


def list_library_fields(owner: object) -> frozenset[str]:
    """Attributes of an object that are not its own."""
    if isinstance(owner, Optimizer):
        return _OPTIMIZER_FIELDS
    if isinstance(owner, Variables):
        return frozenset()
    if isinstance(owner, Tensor):
        return _TENSOR_FIELDS
    return _MODULE_FIELDS if isinstance(owner, nn.Module) else frozenset({"ctx"})


def _is_library(value: object) -> bool:
    return type(value).__module__.partition(".")[0] in _FOREIGN


def _is_of_engine(hook: object) -> bool:
    """Whether a hook is of an engine, whose state the accelerator saves."""
    package = str(getattr(hook, "__module__", "")).partition(".")[0]
    return package in {"deepspeed", "harness"}


def _items_of(value: Any) -> list[tuple[str, object]]:
    """Items of a container that is no data, by a text that tells the key."""
    if len(value) > MAX_ITEMS:
        return []
    if not isinstance(value, _MAPPINGS):
        return [(str(n), item) for n, item in enumerate(list(value))]
    found: dict[str, object] = {}
    for n, (key, item) in enumerate(list(value.items())):  # a thread may change it
        # The text of a tensor has its numbers, which change; others may have an address.
        name = f"#{n}" if isinstance(key, Tensor) else repr(key)
        found[f"#{n}" if name in found or " at 0x" in name else name] = item
    return [*found.items()]


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
        if issubclass(type(found), nn.Module) or has_state(found):
            yield name, found
    yield "defaults", value.__defaults__
