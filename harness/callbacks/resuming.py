"""Goes on from a checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from harness.callback import Callback
from harness.callbacks.model_checkpoint import ModelCheckpoint
from harness.checkpoint.format import MANIFEST, checkpoints, newest, remove
from harness.checkpoint.resume import Resume
from harness.errors import CheckpointError


class ResumeFromCheckpoint(Callback):
    """Goes on from a checkpoint, or takes parts of it.

    Parameters
    ----------
    path
        A checkpoint, or a folder of them (the newest whole one is taken).
    restore_model, restore_optimizers, restore_records, restore_callbacks
        What is taken. With all of them the fit goes on exactly where it was, else it
        begins at epoch 1 with what was taken.
    missing_ok
        Begin anew where `path` holds no whole checkpoint.
    strict
        Refuse differences in code, data, versions and devices instead of telling them.

    Raises
    ------
    CheckpointError
        Before any epoch, if there is no whole checkpoint and `missing_ok` is False.

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
        self.path, self.missing_ok = Path(path), missing_ok
        self._options = {
            "restore_model": restore_model,
            "restore_optimizers": restore_optimizers,
            "restore_records": restore_records,
            "restore_callbacks": restore_callbacks,
            "strict": strict,
        }

    def find(self) -> Resume | None:
        """The checkpoint to go on from.

        Raises
        ------
        CheckpointError
            If there is none and `missing_ok` is False.
        """
        return find(self.path, self.missing_ok, type(self).__name__, **self._options)


class AutoResume(ModelCheckpoint):
    """Save checkpoints, and resume from them when the same script runs again.

    Parameters
    ----------
    path
        Folder of the checkpoints; emptied when the fit has finished.
    every_n_steps
        Also save after every so many optimizer steps.
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

    def find(self) -> Resume | None:
        """The newest whole checkpoint of the folder; None the first time."""
        assert self.path is not None
        return find(self.path, True, "AutoResume")

    def after_fit(self) -> None:
        """Empty the folder on rank 0, unless a signal interrupted the fit.

        The newest checkpoint goes last: if this is killed, a fit can still resume from it.
        """
        accelerator = self.ctx.accelerator
        assert accelerator is not None and self.saver is not None
        if self.ctx.stop_signal is None and accelerator.is_main:
            for place in reversed(checkpoints(self.saver.folder)):
                remove(place)


def find(path: Path, missing_ok: bool, place: str, **options: Any) -> Resume | None:
    """The checkpoint at a path, or the newest whole one in it.

    Raises
    ------
    CheckpointError
        If there is none and `missing_ok` is False.
    """
    if (path / MANIFEST).is_file():
        return Resume.of(path, **options)
    found, faults = newest(path)
    for fault in faults:
        warnings.warn(f"passed over: {fault}", stacklevel=2)
    if found is not None:
        return Resume.of(found, **options)
    if missing_ok:
        return None
    msg = f"{place}({str(path)!r}): expected a whole checkpoint, found none."
    raise CheckpointError(f"{msg} Check the path, or set missing_ok=True.")


def resume_of(callbacks: Iterable[Callback]) -> Resume | None:
    """What the first of the callbacks that resume goes on from.

    Raises
    ------
    CheckpointError
        If there is no whole checkpoint where there must be one.
    """
    for callback in callbacks:
        if isinstance(callback, AutoResume | ResumeFromCheckpoint):
            found = callback.find()
            if found is not None:
                return found
    return None
