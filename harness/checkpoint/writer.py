"""Write checkpoints while training continues: copy at once, write in the background."""

from __future__ import annotations

import _thread
import threading
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from time import monotonic

from torch import Tensor

from harness.accelerators.devices import use_in_thread
from harness.accelerators.host_copies import HostCopies
from harness.checkpoint.format import (
    Manifest,
    Phase,
    RunRef,
    begin_checkpoint,
    commit_checkpoint,
    get_final_path,
    list_checkpoints,
    mark_failed,
    remove_checkpoint,
    write_rank,
)
from harness.checkpoint.plain import copy_fields
from harness.checkpoint.state import (
    capture_state,
    get_position,
    read_description,
    search_context,
)
from harness.context import Context
from harness.pytree import flatten
from harness.reshard.convert import is_convertible
from harness.reshard.index import PartSummary, summarize_part


class CheckpointWriter:
    """Writes the checkpoints of one fit into a folder, one at a time.

    Parameters
    ----------
    folder
        Folder of the checkpoints; made if it does not exist.

    Notes
    -----
    ``save`` copies the tensors to the CPU, into memory that it keeps until ``release``, and
    passes them to a thread that writes. Copies from a CUDA device are only asked for, and
    the thread waits for them. ``save`` waits only while an earlier save is still being
    written. ``wait`` returns the error of a failed write, once; the next save tries again.
    """

    def __init__(self, folder: Path, ctx: Context) -> None:
        # A program may change its working directory while it trains.
        self.folder, self._ctx = folder.absolute(), ctx
        self._rank = ctx.accelerator.rank
        ctx.is_saved = True
        self._fields = copy_fields(search_context(ctx))
        self._copies = HostCopies()
        self._temporary: Path | None = None
        self._is_idle: threading.Event | None = None  # while a thread works
        self._error: Exception | None = None
        self._began_at = 0.0
        self._durations: deque[float] = deque(maxlen=3)  # of the last saves, in seconds

    def begin(self, phase: Phase) -> str | None:
        """Make a temporary folder for a checkpoint of this moment.

        Returns
        -------
        name of the checkpoint; None on all ranks if the folder could not be made, see
        ``wait``
        """
        self.wait()
        self._began_at = monotonic()
        ctx, accelerator = self._ctx, self._ctx.accelerator
        path = None
        if accelerator.is_main:
            try:
                path = str(begin_checkpoint(self.folder, get_position(ctx, phase)))
            except OSError as error:
                self._error = error
        path = accelerator.broadcast(path)
        self._temporary = Path(path) if path is not None else None
        return get_final_path(self._temporary).name if self._temporary else None

    def save(self, phase: Phase) -> None:
        """Save into the folder that ``begin`` made.

        Raises
        ------
        TypeError
            If a callback's state holds what cannot be written; the error names its path.
        """
        ctx, accelerator = self._ctx, self._ctx.accelerator
        assert self._temporary is not None
        state = capture_state(ctx, phase, self._fields)
        path = None if ctx.run.path is None else str(Path(ctx.run.path).absolute())
        manifest = Manifest(
            world_size=accelerator.world_size,
            position=get_position(ctx, phase),
            run=RunRef(id=state.pop("run"), path=path),
            about=read_description(ctx),
        )
        plan, live = flatten(state)
        summary = (
            summarize_part(state) if is_convertible(state["accelerator"]) else None
        )
        copies, wait = self._copies.copy(live)
        self._start(self._write, plan, copies, wait, manifest, summary)

    def allocate(self) -> None:
        """Allocate the memory for copies in the background, before the first save."""
        if self._copies or self._is_idle is not None:
            return
        _, live = flatten(self._ctx.accelerator.state_dict(), "state/accelerator")
        shapes = {n: (own.shape, own.dtype, own.is_cuda) for n, own in live.items()}
        self._start(self._copies.allocate, shapes)

    def _start(self, work: Callable[..., None], *args: object) -> None:
        """Call in a thread that does not delay an exit after a second Ctrl-C."""
        assert self._is_idle is None
        is_idle = self._is_idle = threading.Event()
        device = self._ctx.device  # the thread may begin when the fit is over

        def run() -> None:
            try:
                use_in_thread(device)
                work(*args)
            finally:
                is_idle.set()

        # Thread.start() would wait until the thread runs, which takes long on busy cores.
        _thread.start_new_thread(run, ())

    def _write(
        self,
        plan: object,
        tensors: Mapping[str, Tensor],
        wait: Callable[[], None],
        manifest: Manifest,
        summary: PartSummary | None,
    ) -> None:
        """Write the files of this rank and, on rank 0, commit; runs in the background."""
        temporary = self._temporary
        assert temporary is not None
        try:
            wait()
            write_rank(temporary, self._rank, plan, tensors, summary)
            if self._rank == 0:
                commit_checkpoint(temporary, manifest)
            self._durations.append(monotonic() - self._began_at)
        except Exception as error:  # noqa: BLE001  wait() returns it to the training thread
            mark_failed(temporary, self._rank)
            self._error = error

    def estimate_time(self) -> float:
        """Estimate the seconds until another save would be done; 0 if nothing is known.

        It takes as long as the longest of the last three, after the present one.
        """
        longest = max(self._durations, default=0.0)
        if not self.is_busy:
            return longest
        return longest + max(0.0, longest - (monotonic() - self._began_at))

    @property
    def is_busy(self) -> bool:
        """Whether something is being written."""
        return self._is_idle is not None and not self._is_idle.is_set()

    def wait(self, timeout_s: float | None = None) -> Exception | None:
        """Wait until nothing is being written; return the error of a failed write, once.

        Parameters
        ----------
        timeout_s
            Seconds to wait; None: without limit. ``is_busy`` tells whether they were enough.
        """
        if self._is_idle is not None:
            if not self._is_idle.wait(timeout_s):
                return None
            self._is_idle = None
        error, self._error = self._error, None
        return error

    def release(self) -> None:
        """Give the memory of the copies back, because the fit is over."""
        self._copies = HostCopies()  # a thread that still writes has the earlier ones

    def prune(self, keep_last: int, keep: set[str]) -> None:
        """Remove all but the newest `keep_last` checkpoints and those named; on rank 0."""
        if not self._ctx.accelerator.is_main:
            return
        for path in list_checkpoints(self.folder)[keep_last:]:
            if path.name not in keep:
                remove_checkpoint(path)
