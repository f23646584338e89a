"""Restores the weights and the loss of the best epoch at the end of the fit."""

from __future__ import annotations

import copy
import warnings

from torch import Tensor

from harness.callbacks.monitor import Monitor
from harness.checkpoint.held.objects import get_extra_states, set_extra_states
from harness.checkpoint.state import copy_loss_state, restore_loss_state
from harness.errors import CheckpointError
from harness.pytree import StateDict, map_tensors
from harness.reshard.model_part import (
    MODEL_PART,
    check_model_part,
    match_buffers,
    take_model_part,
)


class KeepBestModel(Monitor):
    """Restores the weights, and the state of the loss, of the best epoch at the end of the fit.

    ``fitted.best_epoch`` is that epoch, and ``print(fitted)`` shows its metrics. In a fit that
    validates by steps, the best validation decides, at ``fitted.best_step``.

    Parameters
    ----------
    monitor, mode, min_delta
        Metric that decides which epoch is best; see ``Monitor``.

    Notes
    -----
    The best weights are kept in the memory of the host. On several ranks, each keeps the part
    that it would save in a checkpoint: at ZeRO 3 its share of each weight.

    References
    ----------
    luz 0.5.0, ``luz_callback_keep_best_model``.
    """

    weight = 40

    def reset(self) -> None:
        """Forget the best value and its weights."""
        super().reset()
        self.model_part: StateDict = {}
        self.extra: StateDict = {}
        self.loss: StateDict = {}
        self.best_epoch: int | None = None
        self.best_step: int | None = None

    def on_fit_begin(self) -> None:
        self.reset()

    def react(self) -> None:
        """Copy the weights if the value is the best so far."""
        if self.is_measured() and self.update_best():
            self.best_epoch, self.best_step = self.ctx.epoch, self.ctx.step
            part = take_model_part(self.ctx.accelerator.state_dict())
            self.model_part = map_tensors(part, _copy_to_host)
            self.extra = copy.deepcopy(get_extra_states(self.ctx.model))
            self.loss = copy_loss_state(self.ctx)

    def on_fit_end(self) -> None:
        """Restore the best weights, and the loss as it was with them."""
        if self.model_part:
            best = match_buffers(self.model_part, self.ctx.model)
            try:
                self.ctx.accelerator.load_state_dict(best, ["model"])
            except CheckpointError as error:  # a callback has changed layers since
                msg = "KeepBestModel: expected the weights that the best epoch had"
                advice = "The fit returns the last ones. Change layers before the fit."
                warnings.warn(f"{msg}, got: {error} {advice}", stacklevel=2)
                return
            set_extra_states(self.ctx.model, self.extra)
            if self.loss:
                restore_loss_state(self.ctx, self.loss)
            self.ctx.buffers["best_epoch"] = self.best_epoch
            self.ctx.buffers["best_step"] = self.best_step

    def state_dict(self) -> StateDict:
        """Return the best value, its epoch, and this rank's part of its weights."""
        best = {MODEL_PART: self.model_part, "extra": self.extra, "loss": self.loss}
        place = {"best_epoch": self.best_epoch, "best_step": self.best_step}
        return super().state_dict() | best | place

    def load_state_dict(self, state: StateDict) -> None:
        """Restore the best value, its epoch, and this rank's part of its weights."""
        super().load_state_dict(state)
        # Older checkpoints have only the weights.
        self.best_epoch, self.extra = state.get("best_epoch"), state.get("extra", {})
        self.best_step = state.get("best_step")
        self.loss = state.get("loss", {})
        self.model_part = state.get(MODEL_PART, {})
        model, live = self.ctx.model, self.ctx.accelerator.state_dict()
        if self.model_part:
            check_model_part(self.model_part, take_model_part(live), model)


def _copy_to_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
