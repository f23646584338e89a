"""Metrics of one split: updated after each batch, computed once an epoch."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from harness.checks.hints import add_hint, find_metric_hint
from harness.data.batch import copy_by_value, detach, missing_target_error, move
from harness.metrics.loss import LossAverage, Sums, compute_means
from harness.metrics.plots import MAX_NUMBERS, is_curve, is_matrix
from harness.metrics.sets import MAX_NAMED
from harness.metrics.state import (
    check_saved_metrics,
    combine_states,
    find_uncounted,
    get_changed_attributes,
    get_states,
    has_sample_lists,
    is_updated,
    merge_states,
    plain_attributes,
    reset,
    set_attributes,
    set_states,
    submetrics_of,
    syncs_itself,
)
from harness.metrics.type_checks import as_metric, is_metric
from harness.pytree import StateDict

if TYPE_CHECKING:
    from torchmetrics import Metric

    from harness.accelerators.base import Accelerator
    from harness.context import Context

GROUP_BATCHES = 32
"""Batches that a metric gets in one update, if the result is the same."""

GROUP_NUMEL = 1 << 22
"""Elements in the waiting predictions at most."""


BY_LABEL = frozenset(
    {"MulticlassStatScores", "MulticlassConfusionMatrix", "MulticlassExactMatch"}
)
"""Classification metrics that look at each row alone: the largest outputs decide."""


def can_group(metric: Metric) -> bool:
    """True if one update with several batches equals an update with each of them.

    This holds for torchmetrics' own regression metrics that sum or list rows, and for
    multiclass metrics that compare labels; nothing is assumed of others. Binary and
    multilabel metrics and those on probabilities guess from the whole batch whether it
    contains logits (torchmetrics 1.9, ``normalize_logits_if_needed``).
    """
    module = type(metric).__module__
    is_known = module.startswith("torchmetrics.regression.") or (
        module.startswith("torchmetrics.classification.")
        and not BY_LABEL.isdisjoint(kind.__name__ for kind in type(metric).mro())
    )
    reductions = metric._reductions.values()  # torchmetrics 1.9: no public way to ask
    names = {getattr(function, "__name__", None) for function in reductions}
    is_by_row = metric.full_state_update is False
    return is_known and is_by_row and names <= {"dim_zero_sum", "dim_zero_cat"}


def _no_other_ranks() -> bool:
    return False


class SplitMetrics:
    """The loss average and the metrics of one split during a fit.

    Parameters
    ----------
    metrics
        Metric objects and functions by name; copied, because each split needs its own.
    accelerator
        Its device is used, and it sums losses over ranks.

    Attributes
    ----------
    plotted : dict
        By name, metrics whose last value is a curve or a matrix, and that value.
    """

    def __init__(self, metrics: Mapping[str, object], accelerator: Accelerator) -> None:
        self.loss = LossAverage()
        self._means: dict[str, LossAverage] = {}
        self._accelerator = accelerator
        self._metrics = {
            name: _fresh_copy(metrics[name]).to(accelerator.device)
            for name in _agree_on_names(list(metrics), accelerator)
        }
        self._has_warned: set[tuple[str, str]] = set()
        for metric in self._metrics.values():
            for submetric in submetrics_of(metric).values():
                # The states of ranks are combined here. With one rank, a process group
                # that another library made must not be used.
                if accelerator.world_size == 1 or not syncs_itself(submetric):
                    submetric.distributed_available_fn = _no_other_ranks
        self._attributes_at_start = {
            name: plain_attributes(item) for name, item in self._metrics.items()
        }
        self._grouped = [
            name for name, item in self._metrics.items() if can_group(item)
        ]
        self._ungrouped = [name for name in self._metrics if name not in self._grouped]
        self._uncounted = {n: find_uncounted(item) for n, item in self._metrics.items()}
        self._due = list(self._metrics)
        self._keeps_samples = any(map(has_sample_lists, self._metrics.values()))
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._waiting_numel = 0
        self._waiting_shape: tuple[object, ...] = ()
        self.plotted: dict[str, tuple[Metric, Any]] = {}

    def bind(self, ctx: Context) -> None:
        """Set ``ctx`` of each metric object that has room for it: no ``ctx`` of its own.

        A function's object is the user's own, so its class must declare ``ctx``.
        """
        for metric in self._metrics.values():
            for part in metric.modules():
                if getattr(part, "averages_function", False):
                    if _declares_ctx(type(part.function)):
                        _bind(part.function, ctx)
                elif is_metric(part):
                    _bind(part, ctx)

    def reset(self, due: Collection[str] | None = None) -> None:
        """Start an epoch, with the metrics that are computed in it (None: all)."""
        self._due = [name for name in self._metrics if due is None or name in due]
        self.loss.reset()
        self._means.clear()
        self.plotted.clear()
        self._waiting.clear()
        self._waiting_numel = 0
        for metric in self._metrics.values():
            reset(metric)

    def add_values(self, values: Iterable[tuple[str, Any]], rows: int) -> None:
        """Add values that a batch of `rows` rows logged, each a dict by optimizer name."""
        for name, value in values:
            if name in self._metrics:
                msg = (
                    f"ctx.log_metric: expected a name that no metric has, got {name!r}."
                )
                raise ValueError(f"{msg} It is one of setup(metrics=...). Use another.")
            self._means.setdefault(name, LossAverage()).update(value, rows)

    def update(
        self, pred: object, target: object, losses: object, rows: int
    ) -> bool | None:
        """Add one batch; what metrics keep of it are detached copies.

        Returns
        -------
        Whether a loss is NaN, as ``LossAverage.update``.
        """
        is_nan: bool | None = False
        if losses is not None and losses != {}:
            is_nan = self.loss.update(losses, rows)
        if not self._due or rows == 0:
            return is_nan
        waits = bool(self._grouped) and not _is_used_at_once(pred, target)
        take = copy_by_value if self._keeps_samples or waits else detach
        pred, target = take(pred), take(target)
        for name in self._ungrouped:
            self._update_one(name, pred, target, rows)
        if self._grouped:
            self._enqueue(pred, target)
        return is_nan

    def _enqueue(self, pred: object, target: object) -> None:
        """Keep a batch for the next group, unless it is used at once."""
        if _is_used_at_once(pred, target):
            self._flush()
            for name in self._grouped:
                self._update_one(name, pred, target)
            return
        assert isinstance(pred, Tensor)
        assert isinstance(target, Tensor)
        shape = _shape_of(pred, target)
        if self._waiting and self._waiting_shape != shape:
            self._flush()
        self._waiting_shape = shape
        self._waiting.append((pred, target))
        self._waiting_numel += pred.numel()
        if len(self._waiting) >= GROUP_BATCHES or self._waiting_numel >= GROUP_NUMEL:
            self._flush()

    def _flush(self) -> None:
        """Update the metrics with the waiting batches as one."""
        if not self._waiting:
            return
        preds, targets = zip(*self._waiting, strict=True)
        pred, target = (preds[0], targets[0])
        if len(preds) > 1:
            pred, target = torch.cat(preds), torch.cat(targets)
        self._waiting.clear()
        self._waiting_numel = 0
        for name in self._grouped:
            self._update_one(name, pred, target)

    def _update_one(
        self, name: str, pred: object, target: object, rows: int = 0
    ) -> None:
        """Update one metric, if it is due; an exception gets a note with its name."""
        if name not in self._due:
            return
        metric = self._metrics[name]
        try:
            if getattr(metric, "averages_function", False):
                metric.update(pred, target, rows)
            else:
                metric.update(pred, target)
        except Exception as exc:
            exc.add_note(f"in metric {name!r}")
            if target is None and "NoneType" in str(exc):
                raise missing_target_error(f"metric {name!r}") from exc
            add_hint(exc, find_metric_hint, metric, pred, target)
            raise
        for submetric in self._uncounted[name]:
            submetric._update_count += 1

    def compute(self, pred: object = None, target: object = None) -> StateDict:
        """The loss and every metric as numbers, read from the device, over all ranks.

        Curves are in `plotted` alone. Metrics of an epoch in which no batch counted have no value.

        Parameters
        ----------
        pred, target
            Those of a batch, for the hint of an error that a metric raises only here.
        """
        self._flush()
        averages = {"loss": self.loss, **self._means}
        sums = {name: average.get_sums() for name, average in averages.items()}
        of_ranks = self._accelerator.gather_objects(sums)
        self._warn_of_names(of_ranks)
        values: StateDict = compute_means(of_ranks)
        if not self._accelerator.any(any(map(is_updated, self._metrics.values()))):
            return values
        with self._states_of_all_ranks():
            for name in self._due:
                try:
                    value = self._metrics[name].compute()
                except Exception as exc:
                    exc.add_note(f"in metric {name!r}")
                    if pred is not None:
                        metric = self._metrics[name]
                        add_hint(exc, find_metric_hint, metric, pred, target)
                    raise
                if self._keep_plotted(name, value):
                    values[name] = as_numbers(value)
        return values

    def _keep_plotted(self, name: str, value: object) -> bool:
        """Keep a curve or a matrix to be drawn; whether the value is recorded as a metric."""
        metric = self._metrics[name]
        is_line = is_curve(metric, value)
        if not is_line and not is_matrix(metric, value):
            return True
        self.plotted[name] = (metric, value)
        if is_line:
            return False
        assert isinstance(value, Tensor)
        return value.numel() <= MAX_NUMBERS

    def peek(self) -> dict[str, float]:
        """The loss and metrics so far on this rank, for a display; what is kept stays as it is.

        Only torchmetrics' own metrics of a single number are asked, which are cheap: those
        that sum up tensors, and that need no other rank. Batches that wait for a grouped
        update are not in it.
        """
        means = self.loss.peek()
        found = {
            "loss" if len(means) == 1 else f"loss/{name}": mean
            for name, mean in means.items()
        }
        for name in self._due:
            metric = self._metrics[name]
            if not _can_peek(metric):
                continue
            with suppress(Exception):  # a display never ends a fit
                value = metric.compute()
                metric._computed = None  # torchmetrics 1.9: keep none for the epoch
                if isinstance(value, Tensor) and value.numel() == 1:
                    found[name] = float(value)
        return found

    def _warn_of_names(self, of_ranks: Sequence[Sums]) -> None:
        """Warn once of each name that not every rank has logged."""
        names = [
            {(name, key) for name, inner in sums.items() for key in inner}
            for sums in of_ranks
        ]
        known = names[0].intersection(*names) | self._has_warned
        new = sorted(names[0].union(*names) - known)
        self._has_warned.update(new)
        if new and self._accelerator.is_main:
            got = ", ".join(
                f"{name if key in {'', 'opt'} else f'{name}/{key}'} on ranks "
                f"{[rank for rank, found in enumerate(names) if (name, key) in found]}"
                for name, key in new
            )
            msg = f"ctx.loss, ctx.log_metric: expected the same names on {len(names)} ranks"
            advice = "Each mean is over the rows of the ranks that have the name."
            warnings.warn(f"{msg}, got {got}. {advice}", stacklevel=3)

    @contextmanager
    def _states_of_all_ranks(self) -> Iterator[None]:
        """Give the metrics the states of all ranks inside."""
        if self._accelerator.world_size == 1 or not self._metrics:
            yield
            return
        own = {name: get_states(metric) for name, metric in self._metrics.items()}
        of_ranks = self._accelerator.gather_objects(own)
        for name, metric in self._metrics.items():
            states = [states[name] for states in of_ranks]
            whole = combine_states(metric, states, self._accelerator.rank)
            set_states(metric, self._accelerator.to_device(whole))
        try:
            yield
        finally:
            for name, metric in self._metrics.items():
                set_states(metric, own[name])

    def state_dict(self, *, is_running: bool = True) -> StateDict:
        """States of this epoch, waiting batches, and attributes that outlast epochs.

        Parameters
        ----------
        is_running
            False omits what the next epoch resets.
        """
        changed = {
            name: get_changed_attributes(metric, self._attributes_at_start[name])
            for name, metric in self._metrics.items()
        }
        state = {"changed": {name: found for name, found in changed.items() if found}}
        if not is_running:
            return state
        states = {name: get_states(metric) for name, metric in self._metrics.items()}
        return {
            **state,
            "due": list(self._due),
            "loss": self.loss.state_dict(),
            "means": {name: mean.state_dict() for name, mean in self._means.items()},
            "metrics": states,
            "waiting": [list(pair) for pair in self._waiting],
        }

    def load_state_dict(self, state: StateDict) -> None:
        """Load a ``state_dict``; tensors of metrics are moved to this device."""
        self.reset()
        state = self._move(state)
        for name, metric in self._metrics.items():
            set_attributes(metric, state["changed"].get(name, {}))
        if "loss" not in state:
            return
        self._due = state.get("due", self._due)  # missing in older checkpoints
        self.loss.load_state_dict(state["loss"])
        for name, mean in state.get("means", {}).items():
            self._means.setdefault(name, LossAverage()).load_state_dict(mean)
        check_saved_metrics(self._metrics, state["metrics"])
        for name, metric in self._metrics.items():
            set_states(metric, state["metrics"][name])
        self._enqueue_all(state["waiting"])

    def _move(self, state: StateDict) -> StateDict:
        """The state on this device; averages are in float64, which not every device has."""
        averages = {name: state[name] for name in ("loss", "means") if name in state}
        rest = {name: own for name, own in state.items() if name not in averages}
        return {**move(rest, self._accelerator.device), **averages}

    def _enqueue_all(self, pairs: Iterable[Any]) -> None:
        for pred, target in pairs:
            self._enqueue(pred, target)

    def merge(self, state: StateDict) -> None:
        """Add the ``state_dict`` of another rank."""
        if "loss" not in state:
            return
        state = self._move(state)
        self.loss.merge(state["loss"])
        for name, mean in state.get("means", {}).items():
            self._means.setdefault(name, LossAverage()).merge(mean)
        for name, metric in self._metrics.items():
            merge_states(metric, state["metrics"][name])
        self._enqueue_all(state["waiting"])


def _agree_on_names(names: list[str], accelerator: Accelerator) -> list[str]:
    """The names in the order of rank 0; raise if another rank has other metrics."""
    first, *others = accelerator.gather_objects(names)
    for rank, other in enumerate(others, start=1):
        if set(other) != set(first):
            msg = f"metrics: expected the same on every rank, got {sorted(first)}"
            advice = "Start every rank with the same learner."
            raise ValueError(
                f"{msg} on rank 0 and {sorted(other)} on rank {rank}. {advice}"
            )
    return first


def _fresh_copy(item: object) -> Metric:
    metric = copy.deepcopy(item) if is_metric(item) else as_metric(item)
    reset(metric)
    return metric


def _bind(metric: object, ctx: Context) -> None:
    found = inspect.getattr_static(metric, "ctx", None)
    is_free = found is None or hasattr(found, "call_callbacks")
    if is_free and getattr(metric, "ctx", found) is found:  # no submodule either
        setattr(metric, "ctx", ctx)  # noqa: B010  no class declares it


def _declares_ctx(kind: type) -> bool:
    return any(
        "ctx" in {**vars(cls), **inspect.get_annotations(cls)} for cls in kind.__mro__
    )


def count_batch_values(ctx: Context) -> None:
    """Add the values that were logged in this batch to the means of the epoch."""
    values = ctx.batch_values
    if not values or ctx.metrics is None:
        return
    split = ctx.metrics[ctx.split]
    is_counted = ctx.accelerator is None or ctx.accelerator.counted != 0
    split.add_values(values, ctx.rows if is_counted else 0)
    values.clear()


def _is_used_at_once(pred: object, target: object) -> bool:
    """Whether a batch has no tensors to join, or fills a group, so that no copy is needed."""
    if not (isinstance(pred, Tensor) and isinstance(target, Tensor)):
        return True
    return pred.numel() >= GROUP_NUMEL


def _shape_of(pred: Tensor, target: Tensor) -> tuple[object, ...]:
    """What two batches must have in common to be concatenated."""
    return pred.shape[1:], target.shape[1:], pred.dtype, target.dtype, pred.dim()


def as_numbers(value: object) -> Any:
    """The value of a metric: a number, a dict by name or position, or nested lists."""
    if isinstance(value, Tensor):
        if value.dim() == 1 and len(value) <= MAX_NAMED:
            return {str(position): item for position, item in enumerate(value.tolist())}
        return value.tolist()
    if isinstance(value, Mapping):
        return {name: as_numbers(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return {str(position): as_numbers(item) for position, item in enumerate(value)}
    return value


def _can_peek(metric: Metric) -> bool:
    """Whether a metric tells its value so far cheaply, and on this rank alone."""
    is_plain = type(metric).__module__.startswith("torchmetrics.")
    is_sum = bool(metric._defaults) and not has_sample_lists(metric)
    is_alone = not any(map(syncs_itself, submetrics_of(metric).values()))
    return is_plain and is_sum and is_alone and metric.update_called
