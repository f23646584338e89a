"""Puts a Slurm job back into the queue when its time ends."""

from __future__ import annotations

import signal
import subprocess
import warnings

from harness.accelerators.distributed.environment import read_slurm_job
from harness.callback import Callback
from harness.callbacks.interrupt import is_free
from harness.callbacks.model_checkpoint import ModelCheckpoint
from harness.callbacks.resuming import AutoResume, ResumeFromCheckpoint
from harness.context import Context

TIMEOUT_S = 60.0
"""Longest time that ``scontrol`` may take."""


class Requeue(Callback):
    """Puts the Slurm job back into the queue after SIGUSR1, when the checkpoint is written.

    Submit the job with ``sbatch --requeue --signal=USR1@120``. Slurm then sends SIGUSR1 two
    minutes before the time limit. The fit ends after the batch and saves, as after Ctrl-C,
    and this callback runs ``scontrol requeue``. When the job starts again, ``AutoResume``
    continues. Outside Slurm nothing happens.

    Raises
    ------
    ValueError
        Before the first epoch, if no callback saves checkpoints or resumes from them, or if
        the program of a Slurm job handles SIGUSR1 itself.

    Notes
    -----
    The signal handler only remembers the signal. If ``scontrol`` fails, there is a warning.

    References
    ----------
    Slurm, ``sbatch --signal`` and ``scontrol requeue``.
    """

    def check(self, ctx: Context) -> None:
        """Refuse a fit that would start anew after the job was put back."""
        kinds = [type(callback) for callback in ctx.callbacks]
        saves = any(issubclass(kind, ModelCheckpoint) for kind in kinds)
        resumes = any(
            issubclass(kind, AutoResume | ResumeFromCheckpoint) for kind in kinds
        )
        if not (saves and resumes):
            missing = "AutoResume" if not resumes else "ModelCheckpoint"
            msg = "Requeue: expected callbacks that save and resume"
            raise ValueError(f"{msg}, got no {missing}. Add AutoResume(folder).")
        number = getattr(signal, "SIGUSR1", None)
        if read_slurm_job() is not None and number is not None and not is_free(number):
            msg = "Requeue: expected SIGUSR1 without a handler, got one of the program"
            advice = "Remove it, such as by faulthandler.unregister(signal.SIGUSR1)"
            raise ValueError(f"{msg} or a library. {advice}.")

    def after_fit(self) -> None:
        """Put the job back, on rank 0."""
        ctx = self.ctx
        job = read_slurm_job()
        is_due = (
            ctx.stop_signal == getattr(signal, "SIGUSR1", None)
            and ctx.accelerator.is_main
        )
        if job is None or not is_due:
            return
        command = ["scontrol", "requeue", job]
        try:
            subprocess.run(
                command, check=True, capture_output=True, text=True, timeout=TIMEOUT_S
            )
        except (OSError, subprocess.SubprocessError) as error:
            said = (getattr(error, "stderr", None) or str(error)).strip()
            msg = f"Requeue: expected 'scontrol requeue {job}' to succeed, got: {said}."
            warnings.warn(f"{msg} Submit the job again.", stacklevel=2)
