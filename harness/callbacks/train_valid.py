"""Puts the model into training or evaluation mode."""

from __future__ import annotations

from harness.callback import Callback


class TrainValid(Callback):
    """Switches the model between ``train()`` and ``eval()``.

    References
    ----------
    luz 0.5.0, ``luz_callback_train_valid``. Differs from luz: the loop turns gradients
    off.
    """

    weight = -100

    def on_epoch_begin(self) -> None:
        """Training mode, also after the validation of the epoch before."""
        self.ctx.model.train()

    def on_train_begin(self) -> None:
        """Training mode: dropout is on, batch statistics are updated."""
        self.ctx.model.train()

    def on_valid_begin(self) -> None:
        """Evaluation mode."""
        self.ctx.model.eval()

    def on_predict_begin(self) -> None:
        """Evaluation mode."""
        self.ctx.model.eval()
