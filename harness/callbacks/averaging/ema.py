"""Averages the weights exponentially at each optimizer step."""

from __future__ import annotations

from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from harness.callbacks.averaging.averaged_weights import AveragedWeights
from harness.checks.values import check_at_least, check_flags, check_number
from harness.context import Context


class EMA(AveragedWeights):
    """Keeps an exponential moving average of the weights, updated at optimizer steps.

    Validation uses the averages, and the fit returns them. So they are also what
    ``fitted.predict`` uses and ``fitted.save`` writes. Training itself does not change, bit
    for bit.

    Parameters
    ----------
    decay : in [0, 1]
        Share of the earlier average that an update keeps.
    warmup
        Average over fewer steps at first: update number ``n`` keeps at most
        ``(1 + n) / (10 + n)``.
    every : >= 1
        Optimizer steps from one update to the next.
    opt_name
        Optimizer whose weights are averaged; None: all, each at its own steps.
    in_valid
        Whether the averages are validated. They are in the model from ``on_valid_begin``
        until ``on_epoch_end``, or the end of a validation within an epoch, so that
        ``KeepBestModel`` keeps what was validated.
    in_result
        Whether the fit returns the averages. After ``KeepBestModel`` it returns the weights
        of the best epoch.

    Notes
    -----
    ``fitted.predict(data, callbacks=[ema])`` uses the averages where the fit returned the
    weights of training; ``ema.copy_to(model)`` copies them into a model.

    References
    ----------
    torch 2.13, ``torch.optim.swa_utils.get_ema_multi_avg_fn``; like ``AveragedModel``, the
    first update copies the weights. `warmup`: TensorFlow, ``ExponentialMovingAverage`` with
    ``num_updates``.

    Examples
    --------
    >>> ema = EMA(0.99, warmup=True)
    >>> [round(ema.get_decay(count), 3) for count in (1, 10, 1000)]
    [0.182, 0.55, 0.99]
    """

    def __init__(
        self,
        decay: float = 0.999,
        *,
        warmup: bool = False,
        every: int = 1,
        opt_name: str | None = None,
        in_valid: bool = True,
        in_result: bool = True,
    ) -> None:
        super().__init__(opt_name=opt_name, in_result=in_result)
        advice = "Use a value just below 1, such as 0.999."
        check_number("EMA(decay)", decay, advice)
        if not 0 <= decay <= 1:
            msg = f"EMA(decay): expected a number from 0 to 1, got {decay!r}."
            raise ValueError(f"{msg} {advice}")
        check_at_least("EMA(every)", every, 1, "Use 1 to update at every step.")
        check_flags("EMA", warmup=warmup, in_valid=in_valid)
        self.decay, self.warmup, self.every = decay, warmup, every
        self.in_valid = in_valid

    def check(self, ctx: Context) -> None:
        """Refuse what cannot be averaged, and two averages in validation."""
        super().check(ctx)
        given = [c for c in ctx.callbacks if isinstance(c, EMA) and c.in_valid]
        if len(given) > 1 and self in given:
            msg = f"EMA(in_valid): expected one EMA in validation, got {len(given)}."
            raise ValueError(f"{msg} Pass in_valid=False to the others.")

    def get_decay(self, count: int) -> float:
        """Return the decay of the update after `count` others."""
        return (
            min(self.decay, (1 + count) / (10 + count)) if self.warmup else self.decay
        )

    def _average(self, averages: list[Tensor], weights: list[Tensor], n: int) -> None:
        average = get_ema_multi_avg_fn(self.get_decay(n))  # type: ignore[no-untyped-call]
        average(averages, weights, n)

    def on_train_batch_after_step(self) -> None:
        """Update the averages of the optimizer that stepped."""
        name = self.ctx.opt_name
        if name in self._names and self.ctx.steps[name] % self.every == 0:
            self.update(name, self._average)

    def on_valid_begin(self) -> None:
        """Put the averages in; an evaluation uses them too."""
        if self.in_valid:
            self.put_in()

    def on_valid_end(self) -> None:
        """Put the weights back after an evaluation, or a validation within an epoch."""
        if self.ctx.train_pass is None:
            self.put_back()
        super().on_valid_end()

    def react(self) -> None:
        """Put the weights of training back."""
        self.put_back()

    def on_predict_begin(self) -> None:
        self.put_in()

    def on_predict_end(self) -> None:
        self.put_back()
