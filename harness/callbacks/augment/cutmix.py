"""Trains on images with a rectangle of another image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.callbacks.augment.mixing import Mixing


class CutMix(Mixing):
    """Puts a rectangle of another image of the batch into each image.

    The rectangle is the same for all images of a batch. The losses for both targets count by
    the areas. Metrics compare with the target of the larger area.

    Parameters
    ----------
    alpha : > 0
        Both parameters of the beta distribution that the areas come from; 1 for uniform.
    run_valid
        Also mix the batches of validation.
    auto_loss
        Wrap the loss of the fit in ``MixupLoss``; otherwise give a ``MixupLoss`` to
        ``setup``.

    Raises
    ------
    ValueError
        Before the first epoch, if the loss cannot take two targets. At the first batch, if
        the input is not a tensor of images.

    References
    ----------
    Yun et al. 2019, "CutMix: Regularization Strategy to Train Strong Classifiers with
    Localizable Features", section 3.1 and appendix A.
    """

    def __init__(
        self, alpha: float = 1.0, *, run_valid: bool = False, auto_loss: bool = False
    ) -> None:
        super().__init__(alpha, run_valid=run_valid, auto_loss=auto_loss)

    def mix(self, input: Any, partners: Tensor) -> tuple[Any, Tensor]:
        """Return the images with rectangles, and the area that is left of each."""
        if not isinstance(input, Tensor) or input.dim() < 3:
            got = f"shape {tuple(input.shape)}" if isinstance(input, Tensor) else None
            msg = "CutMix: expected images of shape (rows, ..., height, width)"
            got = got or type(input).__name__
            raise ValueError(f"{msg}, got {got}. Use Mixup for other inputs.")
        height, width = input.shape[-2:]
        side = (1 - self.draw(1)).sqrt().item()
        top, bottom = _cut(height, side)
        left, right = _cut(width, side)
        mixed = input.clone()
        mixed[..., top:bottom, left:right] = input[partners][
            ..., top:bottom, left:right
        ]
        share = 1 - (bottom - top) * (right - left) / (height * width)
        return mixed, torch.full((len(partners),), share)


def _cut(size: int, side: float) -> tuple[int, int]:
    """Begin and end of a cut of a share of the size around a random place."""
    middle, length = int(torch.randint(size, ())), int(size * side)
    return max(middle - length // 2, 0), min(middle + (length + 1) // 2, size)
