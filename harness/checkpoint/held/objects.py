"""Capture and restore objects with state that hang on the loss, the model or a callback."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from harness.accelerators.base import list_parameters
from harness.accelerators.single import (
    get_optimizer_state,
    list_all_state,
    load_optimizer_state,
    named_tensors,
)
from harness.checkpoint.held.search import (
    PASSIVE,
    Search,
    has_extra_state,
)
from harness.checkpoint.held.values import PLAIN_TYPES
from harness.checkpoint.param_groups import name_groups, regroup
from harness.errors import CheckpointError
from harness.metrics.state import get_states, set_states
from harness.metrics.type_checks import is_metric
from harness.pytree import StateDict, flatten
from harness.reshard.consolidated import (
    copy_tensors,
    shape_buffers,
    shape_lazy_parameters,
)

if TYPE_CHECKING:
    from torchmetrics import Metric

States = dict[str, dict[str, StateDict]]
"""States of objects by root and path."""


Marks = dict[str, list[tuple[int, int]]]
"""Address and number of changes of each tensor of a module, by name of the module."""


def mark_modules(search: Search) -> Marks:
    """Mark modules that may have nothing to do with the fit, to see whether they change."""
    return {
        f"{root}{path}": mark_tensors(thing)
        for root, path, thing in search.iter_objects()
        if root in PASSIVE and isinstance(thing, nn.Module) and not _metrics_of(thing)
    }


def mark_tensors(module: nn.Module) -> list[tuple[int, int]]:
    """Address and number of changes of each weight and buffer, to see a change."""
    return [
        (tensor.data_ptr(), tensor._version)
        for tensor in (*module.parameters(), *module.buffers())
        # DeepSpeed moves the weights of stage 3; a lazy layer has none yet.
        if not (hasattr(tensor, "ds_id") or is_lazy(tensor) or tensor.is_inference())
    ]


def capture_objects(
    search: Search,
    params: Mapping[str, Tensor],
    callbacks: Mapping[str, StateDict],
    marks: Marks | None = None,
) -> tuple[States, dict[str, str]]:
    """Capture the states of the objects that a search found; tensors are live.

    Parameters
    ----------
    callbacks
        States of callbacks by name; what they contain is not captured again.
    marks
        From ``mark_modules``; modules that are as they were then are left out.

    Returns
    -------
    states, and why others are not kept, by name
    """
    states: States = {}
    left_out: dict[str, str] = {}
    known = marks or {}
    for root, path, thing in search.iter_objects():
        if f"{root}{path}" in known and known[f"{root}{path}"] == mark_tensors(thing):
            continue
        try:
            if _is_in(callbacks.get(root, {}), _public_state(thing)):
                continue
            state = _capture(thing, params, search)
            flatten(state, f"{root}{path}")
        except Exception as error:  # noqa: BLE001  a user's object; a save goes on
            # The text of a KeyError is the key alone.
            left_out[f"{root}{path}"] = (
                repr(error) if isinstance(error, KeyError) else str(error)
            )
        else:
            if not isinstance(thing, nn.Module) or _has_content(state):
                states.setdefault(root, {})[path] = state
    return states, left_out


def capture_before_validation(search: Search) -> States:
    """Capture the states that validation may change: not those of averages and optimizers."""
    found: States = {}
    for root, path, thing in search.iter_objects():
        is_module = isinstance(thing, nn.Module)
        is_fixed = is_module and root != "loss" and not _metrics_of(thing)
        if not is_fixed and not isinstance(thing, Tensor | Optimizer):
            with contextlib.suppress(Exception):  # a save tells why
                found.setdefault(root, {})[path] = _capture(thing, {}, search)
    return found


def _capture(thing: Any, params: Mapping[str, Tensor], search: Search) -> StateDict:
    if isinstance(thing, Tensor):
        return {"value": thing.detach()}
    state: StateDict = {"class": _class_of(thing)}
    if isinstance(thing, nn.Module):
        return state | _capture_module(thing, search.saved)
    if isinstance(thing, Optimizer):
        state["groups"] = name_groups(thing, params)
        with list_all_state(thing):
            return state | {"state": get_optimizer_state(thing)}
    return state | {"state": thing.state_dict()}


def _has_content(state: StateDict) -> bool:
    return any(value for key, value in state.items() if key != "class")


def _class_of(thing: object) -> str:
    return f"{type(thing).__module__}:{type(thing).__qualname__}"


def _capture_module(module: nn.Module, saved: frozenset[int]) -> StateDict:
    """Tensors, which are live, gradients, frozen parameters, metrics and extra states.

    Parameters
    ----------
    saved
        Ids of tensors that are saved elsewhere.
    """
    named = {n: p for n, p in module.named_parameters() if id(p) not in saved}
    return {
        "tensors": _tensors_of(module, saved),
        "grads": {n: p.grad for n, p in named.items() if p.grad is not None},
        "frozen": [n for n, p in named.items() if not p.requires_grad],
        "metrics": capture_metrics(module),
        "extra": get_extra_states(module),
    }


def _restore_module(module: nn.Module, state: StateDict, saved: frozenset[int]) -> None:
    shape_lazy_parameters(module, state["tensors"])
    shape_buffers(module, state["tensors"])
    copy_tensors(_tensors_of(module, saved), state["tensors"])
    for name, param in module.named_parameters():
        if id(param) not in saved:
            grad = state["grads"].get(name)
            param.grad = None if grad is None else grad.to(param.device, copy=True)
            param.requires_grad_(name not in state["frozen"])
    restore_metrics(module, state["metrics"])
    set_extra_states(module, state["extra"])


def _tensors_of(module: nn.Module, saved: frozenset[int]) -> dict[str, Tensor]:
    return {
        name: tensor
        for name, tensor in named_tensors(module).items()
        if id(tensor) not in saved and not tensor.is_meta
    }


def get_extra_states(model: nn.Module) -> StateDict:
    """State of modules beside tensors, by module name: their ``get_extra_state``."""
    modules = model.named_modules()
    return {
        name: own.get_extra_state() for name, own in modules if has_extra_state(own)
    }


def set_extra_states(model: nn.Module, state: StateDict) -> None:
    """Restore what ``get_extra_states`` returned."""
    for name, module in model.named_modules():
        if name in state and has_extra_state(module):
            module.set_extra_state(state[name])


def capture_metrics(module: nn.Module) -> StateDict:
    """Capture the states of the metrics in a module, which its ``state_dict`` leaves out."""
    return {name: get_states(metric) for name, metric in _metrics_of(module)}


def restore_metrics(module: nn.Module, saved: StateDict) -> None:
    """Restore what ``capture_metrics`` returned."""
    for name, metric in _metrics_of(module):
        if name in saved:
            set_states(metric, saved[name])


def _metrics_of(module: nn.Module) -> list[tuple[str, Metric]]:
    """Metrics in a module that are not part of another metric."""
    found: list[tuple[str, Metric]] = []
    for name, inner in module.named_modules():
        is_below = any(not top or name.startswith(f"{top}.") for top, _ in found)
        if is_metric(inner) and not is_below:
            found.append((name, inner))
    return found


def _public_state(thing: Any) -> object:
    """What the ``state_dict`` of a callback would contain of an object."""
    if isinstance(thing, Tensor):
        return thing.detach()
    if isinstance(thing, nn.Module):
        return named_tensors(thing)  # buffers that are not persistent too
    if isinstance(thing, Optimizer) and thing.state and not list_parameters(thing):
        # Another optimizer holds it. DeepSpeed fills its groups inside a step only.
        raise ValueError("has no parameters between steps at ZeRO 3: use ZeRO 2")
    return thing.state_dict()


def _is_in(tree: object, state: object) -> bool:
    """Whether a state, which is not empty, is part of another one."""
    if isinstance(state, Mapping) and not state:
        return False
    if _is_same(tree, state):
        return True
    if isinstance(tree, Mapping):
        return any(_is_in(item, state) for item in tree.values())
    return isinstance(tree, list | tuple) and any(_is_in(item, state) for item in tree)


def _is_same(one: Any, two: Any) -> bool:
    """Whether two states have the same values; tensors must share their memory."""
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        is_alike = one.shape == two.shape and one.layout == two.layout
        return is_alike and one.data_ptr() == two.data_ptr()
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        return one.keys() == two.keys() and all(_is_same(one[k], two[k]) for k in one)
    if isinstance(one, list | tuple) and isinstance(two, list | tuple):
        return len(one) == len(two) and all(map(_is_same, one, two))
    return type(one) is type(two) and isinstance(one, PLAIN_TYPES) and one == two


def restore_objects(
    search: Search, saved: States, params: Mapping[str, Tensor]
) -> None:
    """Restore what ``capture_objects`` returned, as far as ``list_missing`` names nothing."""
    for root, states in saved.items():
        for path, state in states.items():
            thing = search.objects.get(root, {}).get(path)
            if thing is not None:
                _restore(f"{root}{path}", thing, state, params, search)


def list_missing(
    found: Mapping[str, Mapping[str, object]], saved: States
) -> dict[str, str]:
    """List what was saved and is not found, both by root and path: name, and why."""
    return {
        f"{root}{path}": "was saved, but this fit has none"
        for root, states in saved.items()
        for path in states
        if path not in found.get(root, {})
    }


def _restore(
    name: str,
    thing: Any,
    state: StateDict,
    params: Mapping[str, Tensor],
    search: Search,
) -> None:
    if isinstance(thing, Tensor) and "value" in state:
        copy_tensors({name: thing}, {name: state["value"]})
        return
    if _class_of(thing) != state.get("class"):
        got = f"got {state.get('class')}"
        msg = f"resume: expected {name} of the class {_class_of(thing)}, {got}."
        raise CheckpointError(f"{msg} Resume with the code that was saved.")
    if isinstance(thing, nn.Module):
        _restore_module(thing, state, search.saved)
    elif isinstance(thing, Optimizer):
        regroup(thing, state["groups"], params, name)
        own = state["state"]
        if search.saved.issuperset(map(id, thing.param_groups)):
            # The groups of an optimizer of the fit, which have their options already.
            pairs = zip(thing.param_groups, own["param_groups"], strict=False)
            groups = [{**live, "params": saved["params"]} for live, saved in pairs]
            groups += own["param_groups"][len(groups) :]  # of what is no longer stepped
            own = {**own, "param_groups": groups}
        load_optimizer_state(thing, own, name)
    else:
        thing.load_state_dict(state["state"])
