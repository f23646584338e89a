"""Trains on linear combinations of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.callbacks.augment.mixing import Mixing, as_column
from harness.pytree import iter_tensors, map_tensors


class Mixup(Mixing):
    """Mixes each row of a batch with another one, and the losses for both targets.

    Each row draws its own share. The larger share is always the row's own, so that no pair
    comes twice. Metrics compare with the target of that share.

    Parameters
    ----------
    alpha : > 0
        Both parameters of the beta distribution that the shares come from.
    run_valid
        Also mix the batches of validation.
    auto_loss
        Wrap the loss of the fit in ``MixupLoss``; otherwise give a ``MixupLoss`` to
        ``setup``.

    Raises
    ------
    ValueError
        Before the first epoch, if the loss cannot take two targets.
    TypeError
        At the first batch, if the input has no floating-point tensor of rows.

    References
    ----------
    Zhang et al. 2018, "mixup: Beyond Empirical Risk Minimization"; luz 0.5.0,
    ``luz_callback_mixup``. Differs from luz: several inputs are mixed alike, and training
    metrics get the target with the larger share.
    """

    def __init__(
        self, alpha: float = 0.4, *, run_valid: bool = False, auto_loss: bool = False
    ) -> None:
        super().__init__(alpha, run_valid=run_valid, auto_loss=auto_loss)

    def mix(self, input: Any, partners: Tensor) -> tuple[Any, Tensor]:
        """Return linear combinations of rows, and the share of each row's own."""
        kinds = {tensor.dtype for tensor in iter_tensors(input)}
        if not kinds or not all(kind.is_floating_point for kind in kinds):
            got = ", ".join(map(str, kinds)) or type(input).__name__
            msg = f"Mixup: expected floating-point inputs, got {got}."
            raise TypeError(f"{msg} Mix embeddings in the model's step instead.")
        weight = self.draw(len(partners)).to(partners.device)
        weight = torch.maximum(weight, 1 - weight)

        def combine(rows: Tensor) -> Tensor:
            share = as_column(weight, rows).to(rows.dtype)
            return torch.lerp(rows[partners], rows, share)

        return map_tensors(input, combine), weight
