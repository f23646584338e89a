"""State of a torchmetrics object, as tensors and plain values.

``Metric.state_dict`` has only states that were made persistent, and no update counts. A
wrapper or a sum of metrics keeps its state in the metrics below it.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from harness.errors import CheckpointError
from harness.metrics.type_checks import as_metric, is_metric
from harness.pytree import StateDict

if TYPE_CHECKING:
    from torchmetrics import Metric

_KEPT_TYPES = (bool, int, float, str, Tensor)
"""Attributes beside states are kept if a metric changes them, as ``MinMaxMetric`` does."""


@functools.cache
def list_common_attributes() -> frozenset[str]:
    """Attributes of every metric: torchmetrics' caches, the update count and the like."""
    from torchmetrics import SumMetric  # noqa: PLC0415  slow to import

    return frozenset(vars(SumMetric()))


def submetrics_of(metric: Metric) -> dict[str, Metric]:
    """The metric and all metrics below it, by path; its own path is empty."""
    return {
        path: submetric
        for path, submetric in metric.named_modules()
        if is_metric(submetric)
    }


def plain_attributes(metric: Metric) -> dict[str, StateDict]:
    """Plain attributes that are not states, of the metric and those below, by path and name."""
    return {
        path: {
            name: value.clone() if isinstance(value, Tensor) else value
            for name, value in vars(submetric).items()
            if isinstance(value, _KEPT_TYPES)
            and name not in {*submetric._defaults, *list_common_attributes()}
        }
        for path, submetric in submetrics_of(metric).items()
    }


def get_changed_attributes(
    metric: Metric, before: Mapping[str, StateDict]
) -> dict[str, StateDict]:
    """Attributes that differ from those that ``plain_attributes`` gave before."""
    found = {}
    for path, own in plain_attributes(metric).items():
        old = before.get(path, {})
        changed = {
            name: value
            for name, value in own.items()
            if not _is_equal(value, old.get(name))
        }
        if changed:
            found[path] = changed
    return found


def _is_equal(value: object, old: object) -> bool:
    if isinstance(value, Tensor) and isinstance(old, Tensor):
        return torch.equal(value, old)
    return type(value) is type(old) and bool(value == old)


def set_attributes(metric: Metric, saved: Mapping[str, StateDict]) -> None:
    """Set attributes from ``get_changed_attributes``; those that no longer exist are skipped."""
    submetrics, known = submetrics_of(metric), plain_attributes(metric)
    for path in saved.keys() & submetrics.keys():
        for name in saved[path].keys() & known[path].keys():
            setattr(submetrics[path], name, saved[path][name])


def get_states(metric: Metric) -> dict[str, StateDict]:
    """States and number of updates, by path; not copied."""
    return {
        path: {
            "state": {key: getattr(submetric, key) for key in _states_of(submetric)},
            "updates": submetric._update_count,
        }
        for path, submetric in submetrics_of(metric).items()
    }


def set_states(metric: Metric, saved: Mapping[str, StateDict]) -> None:
    """Replace the states by those from ``get_states`` or ``drop_samples``."""
    for path, submetric in submetrics_of(metric).items():
        state = saved[path]["state"]  # from ``drop_samples``: lists alone
        for key in state.keys() & set(_states_of(submetric)):
            _check_state_value(state[key], submetric._defaults[key], f"{path}/{key}")
            setattr(submetric, key, state[key])
        submetric._update_count = saved[path]["updates"]
        submetric._computed = None


def _check_state_value(value: object, default: object, place: str) -> None:
    """Raise unless a state is a tensor where the metric's is, or a list of one kind."""
    items = value if isinstance(value, list) else [value]
    has_tensors = {isinstance(item, Tensor) for item in items}
    if len(has_tensors) > 1 or (isinstance(default, Tensor) and has_tensors != {True}):
        raise TypeError(
            f"metric state {place}: expected tensors, got {value!r:.80}. The file is "
            "damaged."
        )


def merge_states(metric: Metric, saved: Mapping[str, StateDict]) -> None:
    """Add the states that ``get_states`` gave on another rank."""
    for path, submetric in submetrics_of(metric).items():
        for key, value in saved[path]["state"].items():
            merge = _MERGES[_reduction_of(submetric, key)]
            setattr(submetric, key, merge(getattr(submetric, key), value))
        submetric._update_count += saved[path]["updates"]


def combine_states(
    metric: Metric, of_ranks: Sequence[Mapping[str, StateDict]], rank: int
) -> dict[str, StateDict]:
    """Combine the states that ``get_states`` gave on all ranks, as one process has them.

    Lists may differ in length and be empty on some ranks. Other states are reduced as
    torchmetrics does; a rank without an update is left out. A metric that combines its
    states itself keeps those of this rank.

    References
    ----------
    torchmetrics 1.9, ``Metric._sync_dist``. Differs from torchmetrics: lists stay lists.
    """
    found = {}
    for path, submetric in submetrics_of(metric).items():
        if syncs_itself(submetric):
            found[path] = of_ranks[rank][path]
            continue
        items = [states[path] for states in of_ranks]
        used = [item["state"] for item in items if item["updates"]]
        used = used or [items[0]["state"]]
        found[path] = {
            "state": {
                key: _combine(submetric._reductions[key], [own[key] for own in used])
                for key in used[0]
            },
            "updates": sum(item["updates"] for item in items),
        }
    return found


def _combine(reduction: Any, values: list[Any]) -> Any:
    """One state of several ranks."""
    is_list = any(isinstance(value, list) for value in values)
    if is_list:
        lists = (value if isinstance(value, list) else [value] for value in values)
        whole = [item for items in lists for item in items]
        name = getattr(reduction, "__name__", None)
        is_left = reduction is None or name == "dim_zero_cat" or not whole
        return whole if is_left else reduction(whole)
    if len(values) == 1:
        return values[0]
    stacked = torch.stack(values)
    return stacked if reduction is None else reduction(stacked)


def syncs_itself(submetric: Metric) -> bool:
    """True if a metric combines its states over ranks in a way of its own, or not at all."""
    from torchmetrics import Metric  # noqa: PLC0415  slow to import

    kind = type(submetric)
    has_own = any(
        getattr(kind, name) is not getattr(Metric, name)
        for name in ("_sync_dist", "sync")
    ) and not kind.__module__.startswith("torchmetrics.")
    return (
        has_own
        or submetric.dist_sync_fn is not None
        or submetric.sync_on_compute is False
    )


def unmergeable(metric: Metric) -> list[str]:
    """Reductions of a metric's states that cannot merge the states of two ranks."""
    found = {
        _reduction_of(submetric, key)
        for submetric in submetrics_of(metric).values()
        for key in _states_of(submetric)
    }
    return sorted(found - _MERGES.keys())


def _reduction_of(submetric: Metric, key: str) -> str:
    """Name of the function by which torchmetrics reduces a state over ranks."""
    return getattr(submetric._reductions[key], "__name__", "none")


def _concatenate(one: object, other: object) -> Any:
    """Samples of two ranks; torchmetrics keeps them as a list, or as one tensor."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.cat([one, other])
    lists = (state if isinstance(state, list) else [state] for state in (one, other))
    return [tensor for state in lists for tensor in state]


_MERGES: dict[str, Callable[[Any, Any], object]] = {
    "dim_zero_sum": operator.add,
    "dim_zero_cat": _concatenate,
    "dim_zero_max": torch.maximum,
    "dim_zero_min": torch.minimum,
}
"""How the states of two ranks are merged, by torchmetrics' reduction."""


def drop_samples(saved: Mapping[str, StateDict]) -> dict[str, StateDict]:
    """States from ``get_states`` for a rank without rows: only lists, of empty tensors.

    Ranks exchange lists tensor by tensor: a rank with an empty list would block the others.
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


def check_saved_metrics(
    metrics: Mapping[str, object],
    saved: Mapping[str, StateDict],
    *,
    is_merged: bool = False,
) -> None:
    """Raise unless metrics can load the states that were saved in the middle of an epoch.

    Parameters
    ----------
    metrics
        Metric objects and functions by name.
    saved
        States from ``get_states``, by name.
    is_merged
        Whether the states of several ranks will be merged.
    """
    objects = {name: as_metric(item) for name, item in metrics.items()}
    then = {name: sorted(states) for name, states in saved.items()}
    now = {name: sorted(submetrics_of(item)) for name, item in objects.items()}
    if then != now:
        msg = (
            f"resume: expected the metrics {then} in the middle of an epoch, got {now}."
        )
        raise CheckpointError(f"{msg} Use these metrics, or the end of an epoch.")
    for name, item in objects.items() if is_merged else ():
        reductions = unmergeable(item)
        if reductions:
            msg = f"resume: expected metric {name!r} to sum or list its states"
            raise CheckpointError(
                f"{msg}, got {reductions}. Resume from the end of an epoch, or on the "
                "number of ranks that saved the checkpoint."
            )


def reset(metric: Metric) -> None:
    """Reset a metric and all metrics below it, which not every class of a user's resets."""
    metric.reset()
    for submetric in submetrics_of(metric).values():
        if submetric._update_count:
            submetric.reset()


def find_uncounted(metric: Metric) -> list[Metric]:
    """Find wrappers with states of their own, such as ``Running``, which count no updates.

    torchmetrics 1.9: ``WrapperMetric._wrap_update`` leaves the count to the metric below.
    """
    from torchmetrics import Metric  # noqa: PLC0415  slow to import

    return [
        submetric
        for submetric in submetrics_of(metric).values()
        if _states_of(submetric)
        and type(submetric)._wrap_update is not Metric._wrap_update
    ]


def is_updated(metric: Metric) -> bool:
    """True if the metric or one below it was updated since the last reset."""
    return any(submetric._update_count for submetric in submetrics_of(metric).values())


def has_sample_lists(metric: Metric) -> bool:
    """True if the metric or one below it keeps its samples in lists."""
    return any(
        isinstance(default, list)
        for submetric in submetrics_of(metric).values()
        for default in submetric._defaults.values()
    )


def _states_of(submetric: Metric) -> list[str]:
    """Names of a metric's own states; some wrappers also show states of the metric below."""
    return [key for key in submetric._defaults if key in vars(submetric)]
