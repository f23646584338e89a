"""Base of callbacks that mix each row of a batch with another one, and their loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from harness.callback import Callback
from harness.checks.model import get_method
from harness.checks.values import check_flags, check_more_than
from harness.context import Context


class MixedTarget(NamedTuple):
    """Targets of a mixed batch: those of each row, those of its partner, and the weights."""

    #: target of the row, and of the row that was mixed into it
    first: Tensor
    second: Tensor
    weight: Tensor  #: share of the first: (rows,), in [0, 1]

    def get_main(self) -> Tensor:
        """Return the target with the larger share, for metrics."""
        weight = as_column(self.weight, self.first)
        return torch.where(weight >= 0.5, self.first, self.second)


class MixupLoss(nn.Module):
    """Loss of mixed batches: the mean of the losses for both targets, by their shares.

    Any other target is passed on to the loss itself.

    Parameters
    ----------
    loss
        Loss with an attribute ``reduction``, such as ``nn.CrossEntropyLoss``, which is
        ``"none"`` during the call; or a function that returns one loss for each row.

    Raises
    ------
    TypeError
        If `loss` is a module without ``reduction``.
    ValueError
        At the first mixed batch, if a function does not return a loss for each row.

    References
    ----------
    luz 0.5.0, ``nn_mixup_loss``. Differs from luz: a function may be given, and losses for
    each element of a row are averaged first.
    """

    def __init__(self, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        if isinstance(loss, nn.Module) and not hasattr(loss, "reduction"):
            name = type(loss).__name__
            msg = f"MixupLoss(loss): expected a loss with 'reduction', got {name}."
            raise TypeError(f"{msg} Use for example nn.CrossEntropyLoss().")
        if not callable(loss):
            msg = f"MixupLoss(loss): expected a loss, got {loss!r}."
            raise TypeError(f"{msg} Use for example nn.CrossEntropyLoss().")
        self.loss = loss

    def forward(self, pred: Any, target: Any) -> Tensor:
        """Return the mean loss of a batch, mixed or not."""
        if not isinstance(target, MixedTarget):
            return self.loss(pred, target).mean()
        with self._without_reduction():
            first, second = (
                self._mean_by_row(self.loss(pred, one), len(target.weight))
                for one in (target.first, target.second)
            )
        return torch.lerp(second, first, target.weight.to(first.dtype)).mean()

    @contextmanager
    def _without_reduction(self) -> Iterator[None]:
        """Turn the reduction of the loss off inside."""
        loss: Any = self.loss
        before = getattr(loss, "reduction", None)
        if before is not None:
            loss.reduction = "none"
        try:
            yield
        finally:
            if before is not None:
                loss.reduction = before

    def _mean_by_row(self, losses: Tensor, rows: int) -> Tensor:
        if losses.dim() == 0 or len(losses) != rows:
            got = f"shape {tuple(losses.shape)}"
            msg = f"MixupLoss: expected a loss for each of {rows} rows, got {got}."
            raise ValueError(f"{msg} Use a loss that does not reduce its rows.")
        return losses.reshape(rows, -1).mean(1)


class Mixing(Callback):
    """Base of callbacks that mix each row of a batch with another row of it; see ``Mixup``."""

    weight = -50  # before the metrics, which get the target with the larger share

    def __init__(self, alpha: float, *, run_valid: bool, auto_loss: bool) -> None:
        name = type(self).__name__
        check_more_than(f"{name}(alpha)", alpha, 0, "Leave it out for the default.")
        check_flags(name, run_valid=run_valid, auto_loss=auto_loss)
        self.alpha, self.run_valid, self.auto_loss = alpha, run_valid, auto_loss

    def mix(self, input: Any, partners: Tensor) -> tuple[Any, Tensor]:
        """Return the mixed input, and for each row the share of its own.

        Parameters
        ----------
        input
            Input of the batch.
        partners : (rows,), int64
            Row that is mixed into each row.
        """
        raise NotImplementedError

    def draw(self, *shape: int) -> Tensor:
        """Draw shares from the beta distribution, with the CPU's generator."""
        return torch.distributions.Beta(self.alpha, self.alpha).sample(shape)

    def check(self, ctx: Context) -> None:
        """Refuse a loss that cannot take two targets."""
        name, loss = type(self).__name__, ctx.loss_fn
        has_step = get_method(ctx.model, "step") is not None
        if not (self.auto_loss or has_step or isinstance(loss, MixupLoss)):
            kind = getattr(loss, "__name__", type(loss).__name__)
            msg = f"{name}: expected a MixupLoss, got {kind}."
            raise ValueError(
                f"{msg} Use setup(loss=MixupLoss(...)), or auto_loss=True."
            )
        if self.auto_loss and loss is None:
            msg = f"{name}(auto_loss): expected a loss, got a model with its own step."
            raise ValueError(f"{msg} Use MixupLoss in the step.")
        same = [callback for callback in ctx.callbacks if isinstance(callback, Mixing)]
        if len(same) > 1:
            got = " and ".join(type(callback).__name__ for callback in same)
            msg = f"{name}: expected one callback that mixes rows, got {got}."
            raise ValueError(f"{msg} Remove all but one.")

    def on_fit_begin(self) -> None:
        loss = self.ctx.loss_fn
        if self.auto_loss and loss is not None and not isinstance(loss, MixupLoss):
            self.ctx.loss_fn = MixupLoss(loss)

    def _mix_batch(self) -> None:
        target, name = self.ctx.target, type(self).__name__
        if not isinstance(target, Tensor) or not target.dim():
            got = type(target).__name__
            msg = f"{name}: expected a target with a row for each sample, got {got}."
            raise ValueError(f"{msg} Mix the rows in the model's step instead.")
        partners = torch.randperm(len(target)).to(target.device)
        self.ctx.input, weight = self.mix(self.ctx.input, partners)
        self.ctx.target = MixedTarget(
            target, target[partners], weight.to(target.device)
        )

    def _unmix_target(self) -> None:
        target = self.ctx.target
        if isinstance(target, MixedTarget):
            self.ctx.target = target.get_main()

    def on_train_batch_begin(self) -> None:
        self._mix_batch()

    def on_train_batch_end(self) -> None:
        self._unmix_target()

    def on_valid_batch_begin(self) -> None:
        if self.run_valid:
            self._mix_batch()

    def on_valid_batch_end(self) -> None:
        self._unmix_target()


def as_column(weight: Tensor, like: Tensor) -> Tensor:
    """Shares with as many dims as a tensor of rows."""
    return weight.reshape(-1, *[1] * (like.dim() - 1))
