"""Resume a fit from a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.callback import Callback
from harness.callbacks.model_checkpoint import ModelCheckpoint
from harness.checkpoint.format import list_checkpoints, remove_checkpoint
from harness.checkpoint.ranks.choose import choose_checkpoint
from harness.checkpoint.resume import PARTS, Resume
from harness.checks.values import as_path, check_flags
from harness.context import Context
from harness.errors import CheckpointError
from tracking.errors import describe_path

if TYPE_CHECKING:
    from harness.accelerators.base import Accelerator


class ResumeFromCheckpoint(Callback):
    """Resumes from a checkpoint, or restores parts of it.

    Parameters
    ----------
    path
        A checkpoint, or a folder of checkpoints, of which the newest undamaged one is used.
    restore_model, restore_optimizers, restore_records, restore_callbacks
        What is restored. If all are, the fit continues exactly where it stopped. Otherwise
        it starts at epoch 1 with what was restored.
    missing_ok
        Start from the beginning if `path` has no undamaged checkpoint.
    strict
        Refuse differences in code, data, versions and devices. Otherwise they are reported.

    Raises
    ------
    CheckpointError
        Before the first epoch, if there is no undamaged checkpoint and `missing_ok` is
        False.

    References
    ----------
    luz 0.5.0, ``luz_callback_resume_from_checkpoint``.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        restore_model: bool = True,
        restore_optimizers: bool = True,
        restore_records: bool = True,
        restore_callbacks: bool = True,
        missing_ok: bool = False,
        strict: bool = False,
    ) -> None:
        self.path = as_path(f"{type(self).__name__}(path)", path)
        self.missing_ok = missing_ok
        self.strict = strict
        flags = {
            "restore_model": restore_model,
            "restore_optimizers": restore_optimizers,
            "restore_records": restore_records,
            "restore_callbacks": restore_callbacks,
        }
        name = type(self).__name__
        check_flags(name, missing_ok=missing_ok, strict=strict, **flags)
        self.parts = [part for part in PARTS if flags[f"restore_{part}"]]

    def find(self, ranks: Accelerator | None = None) -> Resume | None:
        """Find the checkpoint to resume from; None to start from the beginning.

        Parameters
        ----------
        ranks
            The ranks that look for it together, all of which must call this; None: this
            process alone.

        Raises
        ------
        CheckpointError
            If there is none and `missing_ok` is False.
        """
        found = _open_newest(self.path, ranks, parts=self.parts, strict=self.strict)
        if found is None and not self.missing_ok:
            place = f"{type(self).__name__}({str(self.path)!r})"
            msg = f"{place}: expected an undamaged checkpoint, or"
            got = f"a folder of them, got {describe_path(self.path)}"
            advice = "For a run, pass its folder 'checkpoints', or set missing_ok=True."
            if list_checkpoints(self.path):
                got += ", all of them damaged"
                advice = (
                    "Train from the beginning: do not resume, or set missing_ok=True."
                )
            raise CheckpointError(f"{msg} {got}. {advice}")
        return found


class AutoResume(ModelCheckpoint):
    """Saves checkpoints, and resumes from them when the same script runs again.

    Parameters
    ----------
    path
        Folder of the checkpoints; emptied when the fit has finished.
    every_n_steps
        Also save every n optimizer steps.
    **options
        As in ``ModelCheckpoint``.

    Notes
    -----
    The folder is emptied just before ``fit`` returns, when every rank has gathered its
    result. If the fit is killed before that, or gathering the weights fails, the
    checkpoints are still there. The next start then resumes the finished fit: it trains
    nothing more (or only what came after the last checkpoint), returns the same result,
    and empties the folder.

    After ``fit`` has returned, the result exists in memory only. Save it, or use a
    ``ModelCheckpoint`` as well to keep checkpoints of a finished fit.

    References
    ----------
    luz 0.5.0, ``luz_callback_auto_resume``. Differs from luz: at any batch.
    """

    def __init__(
        self, path: str | Path, every_n_steps: int | None = None, **options: Any
    ) -> None:
        super().__init__(path, every_n_steps=every_n_steps, **options)

    def _fill_path(self, ctx: Context) -> Path | None:
        """Return the path as it is: it is searched before there is a model."""
        return self.path

    def find(self, ranks: Accelerator | None = None) -> Resume | None:
        """Find the newest undamaged checkpoint of the folder; None if there is none.

        Parameters
        ----------
        ranks
            As in ``ResumeFromCheckpoint.find``.
        """
        assert self.path is not None
        return _open_newest(self.path, ranks)

    def after_fit(self) -> None:
        """Empty the folder on rank 0, unless a signal interrupted the fit.

        The newest checkpoint goes last: if this is killed, a fit can still resume from it.
        """
        accelerator = self.ctx.accelerator
        assert self.writer is not None
        if self.ctx.stop_signal is None and accelerator.is_main:
            for path in reversed(list_checkpoints(self.writer.folder)):
                remove_checkpoint(path)


def _open_newest(
    path: Path, ranks: Accelerator | None, **options: Any
) -> Resume | None:
    """Open the checkpoint at a path, or the newest undamaged one in it, if there is any."""
    found = choose_checkpoint(path, ranks)
    if found is None:
        return None
    place, manifest = found
    return Resume(path=place, manifest=manifest, **options)


def find_resume(
    callbacks: Iterable[Callback], ranks: Accelerator | None = None
) -> Resume | None:
    """Find the checkpoint of the first callback that resumes; None if no callback does.

    Every rank must call it; see ``choose_checkpoint``.
    """
    for callback in callbacks:
        if isinstance(callback, AutoResume | ResumeFromCheckpoint):
            found = callback.find(ranks)
            if found is not None:
                return found
    return None
