"""Logs how long each split of an epoch took, and its samples per second."""

from __future__ import annotations

from time import perf_counter

from harness.callback import Callback
from harness.pytree import StateDict


class Profile(Callback):
    """Logs ``profile`` records once an epoch: ``epoch_s``, ``batches``, ``samples_per_s``.

    The sets ``train`` and ``valid`` (or the names of several sets) have the values of a
    split. ``epoch`` has the ``epoch_s`` of the whole epoch, and ``fit`` has ``fit_s``, the
    time of the whole fit so far. ``print(fitted)`` shows the last two.

    Times are wall-clock seconds; work queued on a GPU counts when the program waits for it.
    ``overflows`` is the number of steps since the beginning of the fit, over all optimizers,
    that were skipped because gradients overflowed; it is logged once there is one.

    References
    ----------
    luz 0.5.0, ``luz_callback_profile``. Differs from luz: times of a split, not of events.
    """

    weight = -1000

    def __init__(self) -> None:
        self._fit_began = self._epoch_began = perf_counter()
        self._start()

    def _start(self) -> None:
        self._began, self._batches, self._rows = perf_counter(), 0, 0

    def _log(self, split: str) -> None:
        took_s = perf_counter() - self._began
        rate = self._rows / took_s if took_s > 0 else 0.0
        values = {"epoch_s": took_s, "batches": self._batches, "samples_per_s": rate}
        overflows = getattr(self.ctx.accelerator, "overflows", {})
        if split == "train" and any(overflows.values()):
            values["overflows"] = sum(overflows.values())
        self.ctx.log("profile", split, values, index=self.ctx.index)

    def state_dict(self) -> StateDict:
        """Return what was counted of the training split so far."""
        fit_s = perf_counter() - self._fit_began
        if not self.ctx.training:
            return {"fit_s": fit_s}
        took_s = perf_counter() - self._began
        return {
            "fit_s": fit_s,
            "took_s": took_s,
            "batches": self._batches,
            "rows": self._rows,
        }

    def load_state_dict(self, state: StateDict) -> None:
        """Restore what was counted; the time since the save does not count."""
        self._fit_began = perf_counter() - state.get("fit_s", 0.0)
        if state.keys() - {"fit_s"}:  # saved in training
            self._began = perf_counter() - state["took_s"]
            self._batches, self._rows = state["batches"], state["rows"]

    def on_fit_begin(self) -> None:
        self._fit_began = perf_counter()

    def on_fit_end(self) -> None:
        fit_s = perf_counter() - self._fit_began
        self.ctx.log("profile", "fit", {"fit_s": fit_s}, index=1, append=False)

    def on_epoch_begin(self) -> None:
        self._epoch_began = perf_counter()

    def on_epoch_end(self) -> None:
        epoch_s = perf_counter() - self._epoch_began
        self.ctx.log("profile", "epoch", {"epoch_s": epoch_s}, index=self.ctx.index)

    def on_train_begin(self) -> None:
        self._start()

    def on_train_batch_end(self) -> None:
        self._batches += 1
        self._rows += self.ctx.rows

    def on_train_end(self) -> None:
        self._log("train")

    def on_valid_begin(self) -> None:
        self._start()

    on_valid_batch_end = on_train_batch_end

    def on_valid_end(self) -> None:
        self._log(self.ctx.split)
