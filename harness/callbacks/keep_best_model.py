"""Restores the weights and the loss of the best epoch at the end of the fit."""

from __future__ import annotations

import copy

from torch import Tensor

from harness.callbacks.monitor import Mode, Monitor
from harness.checkpoint.state import (
    copy_loss_state,
    get_extra_states,
    restore_loss_state,
    set_extra_states,
)
from harness.pytree import StateDict
from harness.reshard.consolidated import shape_buffers
from harness.reshard.convert import convert_weights


class KeepBestModel(Monitor):
    """Restores the weights of the best epoch at the end of the fit, and the state of its loss.

    ``fitted.best_epoch`` is that epoch, and ``print(fitted)`` shows its metrics. In a fit that
    validates by steps, the best validation decides, at ``fitted.best_step``.

    Parameters
    ----------
    monitor, mode, min_delta
        Metric that decides which epoch is best; see ``Monitor``.

    References
    ----------
    luz 0.5.0, ``luz_callback_keep_best_model``.
    """

    weight = 40

    def __init__(
        self,
        monitor: str = "valid/loss",
        mode: Mode = "auto",
        min_delta: float = 0.0,
    ) -> None:
        super().__init__(monitor, mode, min_delta)
        self.weights: dict[str, Tensor] = {}
        self.extra: StateDict = {}
        self.loss: StateDict = {}
        self.best_epoch: int | None = None
        self.best_step: int | None = None

    def on_fit_begin(self) -> None:
        """Reset what an earlier fit left."""
        self.reset()
        self.weights, self.extra, self.loss, self.best_epoch = {}, {}, {}, None
        self.best_step = None

    def react(self) -> None:
        """Copy the weights if the value is the best so far."""
        if self.is_measured() and self.update_best():
            self.best_epoch, self.best_step = self.ctx.epoch, self.ctx.step
            assert self.ctx.accelerator is not None
            state = self.ctx.accelerator.full_state_dict(self.ctx.model)
            self.weights = {
                name: value.clone()
                for name, value in state.items()
                if isinstance(value, Tensor)
            }
            self.extra = copy.deepcopy(get_extra_states(self.ctx.model))
            self.loss = copy_loss_state(self.ctx)

    def on_fit_end(self) -> None:
        """Restore the best weights, and the loss as it was with them."""
        accelerator = self.ctx.accelerator
        assert accelerator is not None
        weights = accelerator.broadcast(self.weights)
        if weights:
            shape_buffers(self.ctx.model, weights)
            state = accelerator.state_dict()
            best = convert_weights(weights, self.ctx.model, state, accelerator.rank)
            accelerator.load_state_dict(best, ["model"])
            set_extra_states(self.ctx.model, self.extra)
            if self.loss:
                restore_loss_state(self.ctx, self.loss)
            self.ctx.buffers["best_epoch"] = self.best_epoch
            self.ctx.buffers["best_step"] = self.best_step

    def state_dict(self) -> StateDict:
        """Return the best value, its epoch and weights."""
        best = {"weights": self.weights, "extra": self.extra, "loss": self.loss}
        place = {"best_epoch": self.best_epoch, "best_step": self.best_step}
        return super().state_dict() | best | place

    def load_state_dict(self, state: StateDict) -> None:
        """Restore the best value, its epoch and weights."""
        super().load_state_dict(state)
        # Older checkpoints have only the weights.
        self.best_epoch, self.extra = state.get("best_epoch"), state.get("extra", {})
        self.best_step = state.get("best_step")
        self.loss = state.get("loss", {})
        self.weights = state["weights"]
