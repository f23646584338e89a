"""Puts the model into training or evaluation mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from harness.callback import Callback
from harness.steps import switch_optimizers

Mode = Literal["eval", "train"]
"""A mode of a model: with dropout off, or on."""


class TrainValid(Callback):
    """Switches the model, and a loss that is a module, between ``train()`` and ``eval()``.

    Optimizers that have both methods, as schedule-free ones do, are switched too. They are
    in evaluation mode from the end of an epoch's training until the next epoch, and after
    the fit. Parts of a loss that were put into evaluation mode before the fit, such as a
    teacher, stay in it.

    Parameters
    ----------
    predict_mode
        Mode of the model in ``predict``: ``"eval"`` or ``"train"``.

    References
    ----------
    luz 0.5.0, ``luz_callback_train_valid``. Differs from luz: the loop turns gradients
    off.
    """

    weight = -100
    _evaluated: Sequence[nn.Module] = ()

    def __init__(self, *, predict_mode: Mode = "eval") -> None:
        self.predict_mode = predict_mode

    def on_fit_begin(self) -> None:
        """Note which parts of the loss the user has put into evaluation mode."""
        loss = self.ctx.loss_fn
        self._evaluated = ()
        # A loss that is wholly in this mode comes from an earlier fit.
        if isinstance(loss, nn.Module) and loss.training:
            self._evaluated = [part for part in loss.modules() if not part.training]

    def _switch(self, is_training: bool) -> None:
        self.ctx.model.train(is_training)
        self._switch_loss(is_training)

    def _switch_loss(self, is_training: bool) -> None:
        if isinstance(self.ctx.loss_fn, nn.Module):
            self.ctx.loss_fn.train(is_training)
        for part in self._evaluated:
            part.training = False

    def on_epoch_begin(self) -> None:
        """Training mode, also after the validation of the epoch before."""
        self._switch(True)

    def on_train_begin(self) -> None:
        """Training mode: dropout is on, batch statistics are updated."""
        self._switch(True)
        switch_optimizers(self.ctx, is_training=True)

    def on_train_end(self) -> None:
        """Evaluation mode of the optimizers, for what is validated and saved."""
        switch_optimizers(self.ctx, is_training=False)

    def on_valid_begin(self) -> None:
        self._switch(False)

    def on_fit_end(self) -> None:
        """Evaluation mode of the optimizers, also after an epoch that ended early."""
        switch_optimizers(self.ctx, is_training=False)
        if self._evaluated:  # so that a further fit finds them again
            self._switch_loss(True)

    def on_predict_begin(self) -> None:
        self._switch(self.predict_mode == "train")
