"""The metrics of one split: updated batch by batch, computed once an epoch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import (
    MulticlassConfusionMatrix,
    MulticlassExactMatch,
    MulticlassStatScores,
)

from harness.data.batch import detach
from harness.errors import CheckpointError
from harness.metrics.loss import LossAverage
from harness.metrics.sets import MAX_NAMED
from harness.metrics.state import (
    attributes_of,
    join_states,
    joins_not,
    lists_samples,
    parts_of,
    put_changed,
    put_states,
    take_changed,
    take_states,
)
from harness.pytree import map_tensors

if TYPE_CHECKING:
    from harness.accelerators.base import Accelerator

GROUP = 32
"""Batches whose predictions are given to a metric at once, where the result is equal."""

GROUP_NUMEL = 1 << 22
"""Numbers in predictions that wait for their group at most."""


class FunctionAverage(Metric):
    """Mean of ``f(pred, target)`` over samples, each batch weighted by its rows."""

    full_state_update = False
    total: Tensor
    rows: Tensor

    def __init__(self, function: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.function = function
        zero = torch.zeros((), dtype=torch.float64)
        self.add_state("total", zero.clone(), dist_reduce_fx="sum")
        self.add_state("rows", zero.clone(), dist_reduce_fx="sum")

    def update(self, pred: Any, target: Any) -> None:
        """Add the value of one batch."""
        rows = len(target) if isinstance(target, Tensor) and target.dim() else 1
        value = torch.as_tensor(self.function(pred, target), device=self.total.device)
        self.total += value.detach().double() * rows
        self.rows += rows

    def compute(self) -> Tensor:
        """The mean; NaN without samples."""
        return self.total / self.rows


BY_LABEL = (MulticlassStatScores, MulticlassConfusionMatrix, MulticlassExactMatch)
"""Classification metrics that look at each sample alone: the largest outputs decide."""


def takes_groups(metric: Metric) -> bool:
    """True if one update on several batches gives what an update on each would give.

    Holds for torchmetrics' own regression metrics that sum over or list samples, and for
    multiclass ones that compare labels; nothing is assumed of others. Binary and
    multilabel metrics and those on probabilities guess from the whole batch whether they
    were given logits (torchmetrics 1.9, ``normalize_logits_if_needed``).
    """
    home = type(metric).__module__
    own = home.startswith("torchmetrics.classification.") and isinstance(
        metric, BY_LABEL
    )
    own = own or home.startswith("torchmetrics.regression.")
    by_sample = metric.full_state_update is False
    reductions = metric._reductions.values()  # torchmetrics 1.9: no public way to ask
    names = {getattr(fn, "__name__", None) for fn in reductions}
    return own and by_sample and names <= {"dim_zero_sum", "dim_zero_cat"}


def _alone() -> bool:
    """Answer to torchmetrics whether there are other ranks: no."""
    return False


class SplitMetrics:
    """The metrics of one split while it runs.

    Parameters
    ----------
    metrics
        Metric objects and functions by name; copied, so that splits do not mix.
    accelerator
        Gives the device, and sums losses over ranks.
    """

    def __init__(self, metrics: Mapping[str, Any], accelerator: Accelerator) -> None:
        self.loss = LossAverage()
        self._accelerator = accelerator
        self._metrics = {
            name: _own_copy(item).to(accelerator.device)
            for name, item in metrics.items()
        }
        if accelerator.world_size == 1:
            # A process group that others left behind is none of this fit's business.
            for part in nn.ModuleList(self._metrics.values()).modules():
                if isinstance(part, Metric):
                    part.distributed_available_fn = _alone
        self._before = {n: attributes_of(item) for n, item in self._metrics.items()}
        self._grouped = [n for n, item in self._metrics.items() if takes_groups(item)]
        self._each = [n for n in self._metrics if n not in self._grouped]
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._waiting_numel = 0

    def reset(self) -> None:
        """Start an epoch."""
        self.loss.reset()
        self._waiting.clear()
        self._waiting_numel = 0
        for metric in self._metrics.values():
            metric.reset()

    def update(self, pred: Any, target: Any, losses: Any, rows: int) -> None:
        """Take in one batch; predictions are kept off the graph."""
        if losses is not None and losses != {}:
            self.loss.update(losses, rows)
        if not self._metrics:
            return
        pred, target = detach(pred), detach(target)
        if rows == 0:
            self._take_nothing(pred, target)
            return
        for name in self._each:
            self._update_one(name, pred, target)
        if self._grouped:
            self._collect(pred, target)

    def _take_nothing(self, pred: Any, target: Any) -> None:
        """Let metrics that list samples know of their form on a rank that has none.

        Ranks exchange lists tensor by tensor: one without any would leave the others waiting.
        """
        for name, metric in self._metrics.items():
            if lists_samples(metric):
                pred, target = (
                    map_tensors(pred, _no_rows),
                    map_tensors(target, _no_rows),
                )
                self._update_one(name, pred, target)

    def _collect(self, pred: Any, target: Any) -> None:
        """Let a batch wait for its group; what cannot be joined goes by itself."""
        if not (isinstance(pred, Tensor) and isinstance(target, Tensor)):
            self._flush()
            for name in self._grouped:
                self._update_one(name, pred, target)
            return
        if self._waiting and _form(*self._waiting[-1]) != _form(pred, target):
            self._flush()
        self._waiting.append((pred, target))
        self._waiting_numel += pred.numel()
        if len(self._waiting) >= GROUP or self._waiting_numel >= GROUP_NUMEL:
            self._flush()

    def _flush(self) -> None:
        """Give the waiting batches to the metrics, joined."""
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

    def _update_one(self, name: str, pred: Any, target: Any) -> None:
        """One update; an error gains the metric's name."""
        try:
            self._metrics[name].update(pred, target)
        except Exception as exc:
            exc.add_note(f"in metric {name!r}")
            raise

    def compute(self) -> dict[str, Any]:
        """The loss and every metric, as numbers; read from the device here."""
        self._flush()
        values: dict[str, Any] = {}
        loss = self.loss.compute(self._accelerator)
        if loss != {}:
            values["loss"] = loss
        for name, metric in self._metrics.items():
            try:
                values[name] = plain(metric.compute())
            except Exception as exc:
                exc.add_note(f"in metric {name!r}")
                raise
        return values

    def state_dict(self, *, is_running: bool = True) -> dict[str, Any]:
        """What an epoch has counted, the batches that wait, and what outlasts epochs.

        Parameters
        ----------
        is_running
            False leaves out what the next epoch resets.
        """
        changed = {
            name: take_changed(metric, self._before[name])
            for name, metric in self._metrics.items()
        }
        outlasting = {"changed": {n: found for n, found in changed.items() if found}}
        if not is_running:
            return outlasting
        return {
            **outlasting,
            "loss": self.loss.state_dict(),
            "metrics": {n: take_states(metric) for n, metric in self._metrics.items()},
            "waiting": [list(pair) for pair in self._waiting],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave, on this device.

        Raises
        ------
        CheckpointError
            If an epoch was under way with other metrics.
        """
        self.reset()
        state = self._accelerator.to_device(state)
        for name, metric in self._metrics.items():
            put_changed(metric, state["changed"].get(name, {}))
        if "loss" not in state:
            return
        self.loss.load_state_dict(state["loss"])
        check_saved(self._metrics, state["metrics"])
        for name, metric in self._metrics.items():
            put_states(metric, state["metrics"][name])
        self._take_waiting(state["waiting"])

    def _take_waiting(self, pairs: Iterable[Any]) -> None:
        """Let saved batches wait for their group."""
        for pred, target in pairs:
            self._collect(pred, target)

    def join(self, state: Mapping[str, Any]) -> None:
        """Take in what another rank's ``state_dict`` gave, as well as what is there."""
        if "loss" not in state:
            return
        state = self._accelerator.to_device(state)
        self.loss.join(state["loss"])
        for name, metric in self._metrics.items():
            join_states(metric, state["metrics"][name])
        self._take_waiting(state["waiting"])


def check_saved(
    metrics: Mapping[str, Any],
    saved: Mapping[str, Mapping[str, Any]],
    *,
    is_joined: bool = False,
) -> None:
    """Raise unless metrics can take what was saved in the middle of an epoch.

    Parameters
    ----------
    metrics
        Metric objects and functions by name.
    saved
        What ``take_states`` gave, by name.
    is_joined
        Whether states of several ranks are to become one.

    Raises
    ------
    CheckpointError
        If the metrics are others, or one does not say how states of ranks are joined.
    """
    objects = {
        name: item if isinstance(item, Metric) else FunctionAverage(item)
        for name, item in metrics.items()
    }
    then = {name: sorted(parts) for name, parts in saved.items()}
    now = {name: sorted(parts_of(item)) for name, item in objects.items()}
    if then != now:
        msg = f"resume: expected the metrics {then} in the middle of an epoch"
        advice = "Resume with these, or from the end of an epoch."
        raise CheckpointError(f"{msg}, got {now}. {advice}")
    for name, item in objects.items() if is_joined else ():
        reductions = joins_not(item)
        if reductions:
            msg = f"resume: expected metric {name!r} to sum or list its states"
            raise CheckpointError(
                f"{msg}, got {reductions}. Resume from the end of an epoch, or on as many "
                "ranks as it was saved on."
            )


def _own_copy(item: Any) -> Metric:
    """A fresh metric of the user's object or function."""
    if isinstance(item, Metric):
        metric = copy.deepcopy(item)
        metric.reset()
        return metric
    return FunctionAverage(item)


def _form(pred: Tensor, target: Tensor) -> Iterable[Any]:
    """What two batches must share to be joined."""
    return pred.shape[1:], target.shape[1:], pred.dtype, target.dtype, pred.dim()


def _no_rows(tensor: Tensor) -> Tensor:
    """The tensor's form without its rows."""
    return tensor[:0] if tensor.dim() else tensor


def plain(value: Any) -> Any:
    """A metric's value as numbers: a float, a dict by name or place, or nested lists."""
    if isinstance(value, Tensor):
        if value.dim() == 1 and len(value) <= MAX_NAMED:
            return {str(place): item for place, item in enumerate(value.tolist())}
        return value.tolist()
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return {str(place): plain(item) for place, item in enumerate(value)}
    return value
