"""Writes a fit for TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from harness.callback import MetricsListener
from harness.callbacks.report.machine import import_optional
from harness.checks.values import as_path, check_count
from harness.context import Context
from harness.pytree import StateDict, named_leaves

PLAIN = (str, bool, int, float)
"""Types that TensorBoard shows as hyper-parameters; others are shown as text."""


class TensorBoard(MetricsListener):
    """Writes metrics, weight histograms and hyper-parameters for TensorBoard.

    Metrics are named as in MLflow, such as ``train/loss``, with one curve for each set; the
    step is the epoch, or the optimizer step of a fit that validates by steps.

    Parameters
    ----------
    folder
        Folder of the event files; None: ``tensorboard/`` of the run that records the fit.
    histograms
        Write histograms of weights and gradients every n epochs, or every n validations in
        a fit that validates by steps; 0: none.
    writer
        Object with the methods of torch's ``SummaryWriter``; None: one in `folder`, which
        is closed at the end of the fit.

    Raises
    ------
    ImportError
        Before the first epoch, if ``tensorboard`` is not installed.
    ValueError
        Before the first epoch, if there is no folder, or histograms are asked for on ranks
        that divide the weights.

    Notes
    -----
    The package is imported when the fit begins. A resumed fit writes into the same folder,
    and TensorBoard shows the later values of a repeated epoch.

    References
    ----------
    luz 0.5.0, ``luz_callback_tfevents``. Differs from luz: histograms of gradients too.
    """

    weight = 60

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        histograms: int = 0,
        writer: Any = None,
    ) -> None:
        check_count("TensorBoard(histograms)", histograms, 0, "Use 0 for none.")
        self.folder = None
        if folder is not None:
            self.folder = as_path("TensorBoard(folder)", folder).expanduser()
        self.histograms, self._given, self._writer = histograms, writer, writer
        self._gradients: dict[str, Tensor] = {}
        self._num_written = 0

    def check(self, ctx: Context) -> None:
        """Refuse a fit without the package, or without a folder."""
        if self._given is None:
            import_optional("tensorboard", "TensorBoard", "tensorboard")
            if self.folder is None and ctx.run.path is None:
                msg = "TensorBoard(folder): expected a folder, got None."
                raise ValueError(f"{msg} A fit without a run has no default folder.")
        if self.histograms and any(hasattr(p, "ds_id") for p in ctx.model.parameters()):
            msg = "TensorBoard(histograms): expected whole weights, got ZeRO stage 3."
            raise ValueError(f"{msg} Use stage 0, 1 or 2, or histograms=0.")

    def on_fit_begin(self) -> None:
        """Open the event file."""
        self._gradients, self._num_written = {}, 0
        if not self.ctx.accelerator.is_main:
            return
        if self._given is None:
            torch_board = import_optional(
                "torch.utils.tensorboard", "TensorBoard", "tensorboard"
            )
            run = self.ctx.run
            folder = self.folder or Path(run.path or ".") / "tensorboard"
            if self.folder is None and run.fit > 1:
                folder /= f"fit{run.fit}"
            self._writer = torch_board.SummaryWriter(str(folder))

    def on_train_batch_before_step(self) -> None:
        """Keep the last gradients of an epoch whose histograms are written."""
        if self.ctx.accelerator.is_main and self._has_histograms(1):
            for name, param in self.ctx.model.named_parameters():
                if param.grad is not None and not param.grad.is_sparse:
                    self._gradients[name] = param.grad.detach().clone()

    def _has_histograms(self, num_to_come: int = 0) -> bool:
        """Whether they are written at this epoch, or validation by steps."""
        ctx, count = self.ctx, self.ctx.epoch or 0
        if ctx.pace.unit == "step":
            count = ctx.step // ctx.pace.every + num_to_come
        return bool(self.histograms) and count % self.histograms == 0

    def react(self) -> None:
        """Write the new metrics, and histograms; the first time, earlier metrics too."""
        if not self.ctx.accelerator.is_main:
            return
        index = self.ctx.index or 0
        for at in range(self._num_written + 1, index + 1):
            for split in self.ctx.records["metrics"]:
                metrics = self.ctx.get_metrics(split, at)
                for name, value in named_leaves(metrics, f"{split}/"):
                    if isinstance(value, int | float):
                        self._writer.add_scalar(name, value, at)
        self._num_written = index
        if self._has_histograms():
            for name, param in self.ctx.model.named_parameters():
                self._writer.add_histogram(
                    f"weights/{name}", param.detach().cpu(), index
                )
            for name, grad in self._gradients.items():
                self._writer.add_histogram(f"gradients/{name}", grad.cpu(), index)
        self._writer.flush()

    def on_fit_end(self) -> None:
        """Write hyper-parameters beside the last metrics, and close the file."""
        if not self.ctx.accelerator.is_main:
            return
        ctx = self.ctx
        params = {**{f"opt.{n}": v for n, v in ctx.opt_hparams.items()}, **ctx.hparams}
        shown = {n: v if isinstance(v, PLAIN) else str(v) for n, v in params.items()}
        last = {
            f"last/{name}": float(value)
            for split in ctx.records["metrics"]
            for name, value in named_leaves(ctx.get_metrics(split), f"{split}/")
            if isinstance(value, int | float)
        }
        if shown:
            self._writer.add_hparams(shown, last, run_name=".")
        self._close()

    def on_exception(self) -> None:
        self._close()

    def _close(self) -> None:
        if self._writer is not None and self._given is None:
            self._writer.close()
            self._writer = None
        elif self._writer is not None:
            self._writer.flush()

    def state_dict(self) -> StateDict:
        """Return how many epochs are written."""
        return {"num_written": self._num_written}

    def load_state_dict(self, state: StateDict) -> None:
        """Restore how many epochs are written."""
        self._num_written = state["num_written"]
