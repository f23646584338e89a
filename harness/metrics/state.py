"""What a torchmetrics object has counted so far, as tensors and plain values.

``Metric.state_dict`` leaves out states unless each was asked to be kept, and update counts.
A wrapper, or a sum of metrics, counts in the metrics below it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, SumMetric

_KINDS = (bool, int, float, str, Tensor)
"""Attributes beside states that are kept where a metric changes them, as ``MinMaxMetric`` does."""

_OF_ALL = frozenset(vars(SumMetric()))
"""Attributes of every metric; torchmetrics keeps its caches and the update count there."""


def parts_of(metric: Metric) -> dict[str, Metric]:
    """The metric and those below it, by path; its own path is empty."""
    return {
        path: part for path, part in metric.named_modules() if isinstance(part, Metric)
    }


def attributes_of(metric: Metric) -> dict[str, dict[str, Any]]:
    """Plain attributes of each part that are no states, by path and name."""
    return {
        path: {
            name: value.clone() if isinstance(value, Tensor) else value
            for name, value in vars(part).items()
            if isinstance(value, _KINDS) and name not in {*part._defaults, *_OF_ALL}
        }
        for path, part in parts_of(metric).items()
    }


def take_changed(
    metric: Metric, before: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Attributes of each part that are others than ``attributes_of`` gave before."""
    found = {}
    for path, own in attributes_of(metric).items():
        old = before.get(path, {})
        changed = {name: v for name, v in own.items() if not _same(v, old.get(name))}
        if changed:
            found[path] = changed
    return found


def _same(value: Any, old: Any) -> bool:
    """True if an attribute is what it was."""
    if isinstance(value, Tensor) and isinstance(old, Tensor):
        return torch.equal(value, old)
    return type(value) is type(old) and bool(value == old)


def put_changed(metric: Metric, saved: Mapping[str, Mapping[str, Any]]) -> None:
    """Take back what ``take_changed`` gave; parts that are gone are passed over."""
    parts, known = parts_of(metric), attributes_of(metric)
    for path in saved.keys() & parts.keys():
        for name in saved[path].keys() & known[path].keys():
            setattr(parts[path], name, saved[path][name])


def take_states(metric: Metric) -> dict[str, dict[str, Any]]:
    """States and number of updates of each part, by path; live."""
    return {
        path: {
            "state": {key: getattr(part, key) for key in _states_of(part)},
            "updates": part._update_count,
        }
        for path, part in parts_of(metric).items()
    }


def put_states(metric: Metric, saved: Mapping[str, Mapping[str, Any]]) -> None:
    """Take back what ``take_states`` gave."""
    for path, part in parts_of(metric).items():
        state = saved[path]["state"]  # of an ``emptied`` one the lists alone
        for key in state.keys() & set(_states_of(part)):
            setattr(part, key, state[key])
        part._update_count = saved[path]["updates"]
        part._computed = None


def join_states(metric: Metric, saved: Mapping[str, Mapping[str, Any]]) -> None:
    """Take in what ``take_states`` gave on another rank, as well as what is there."""
    for path, part in parts_of(metric).items():
        for key, value in saved[path]["state"].items():
            join = _JOINS[_reduction(part, key)]
            setattr(part, key, join(getattr(part, key), value))
        part._update_count += saved[path]["updates"]


def joins_not(metric: Metric) -> list[str]:
    """Reductions of a metric's states by which those of two ranks cannot be joined."""
    found = {
        _reduction(part, key)
        for part in parts_of(metric).values()
        for key in _states_of(part)
    }
    return sorted(found - _JOINS.keys())


def _reduction(part: Metric, key: str) -> str:
    """Name of what torchmetrics brings a state of all ranks together by."""
    return getattr(part._reductions[key], "__name__", "none")


def _listed(one: Any, other: Any) -> Any:
    """Two lists of samples as one; either may be a tensor."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.cat([one, other])
    lists = (state if isinstance(state, list) else [state] for state in (one, other))
    return [tensor for state in lists for tensor in state]


_JOINS: dict[str, Callable[[Any, Any], Any]] = {
    "dim_zero_sum": operator.add,
    "dim_zero_cat": _listed,
    "dim_zero_max": torch.maximum,
    "dim_zero_min": torch.minimum,
}
"""How states of two ranks become one, by torchmetrics' reduction."""


def emptied(saved: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What ``take_states`` gave, as lists of samples without their samples.

    Ranks exchange lists tensor by tensor: one without any would leave the others waiting.
    """
    found = {}
    for path, item in saved.items():
        lists = {
            key: [tensor[:0] for tensor in value[:1]]
            for key, value in item["state"].items()
            if isinstance(value, list)
        }
        found[path] = {"state": lists, "updates": int(bool(lists))}
    return found


def lists_samples(metric: Metric) -> bool:
    """True if the metric, or one below it, keeps lists of samples."""
    return any(
        isinstance(default, list)
        for part in parts_of(metric).values()
        for default in part._defaults.values()
    )


def _states_of(part: Metric) -> list[str]:
    """Names of the states of a part's own; some wrappers show those of the metric below."""
    return [key for key in part._defaults if key in vars(part)]
