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
from harness.checkpoint.description import read_description
from harness.checkpoint.format import (
    Manifest,
    Phase,
    Position,
    RunRef,
    begin_checkpoint,
    commit_checkpoint,
    get_final_path,
    list_checkpoints,
    mark_failed,
    remove_checkpoint,
    write_rank,
)
from harness.checkpoint.state import (
    FitStart,
    capture_state,
    get_position,
    mark_start,
)
from harness.context import Context
from harness.pytree import flatten
from harness.reshard.convert import is_convertible
from harness.reshard.index import PartSummary, summarize_part

MakeContent = Callable[[], tuple[object, Mapping[str, Tensor]]]
"""Makes the content of a rank's files: plan and tensors, as ``write_rank`` takes them."""


def begin_on_main(
    folder: Path, position: Position, ctx: Context
) -> tuple[Path | None, Exception | None]:
    """Make a temporary folder on rank 0, and tell all ranks; every rank must call it.

    Returns
    -------
    the folder; None on every rank, and the error on rank 0, if it could not be made
    """
    path, error = None, None
    if ctx.accelerator.is_main:
        try:
            path = begin_checkpoint(folder, position)
        except OSError as found:
            error = found
    return ctx.accelerator.broadcast(path), error


def describe_checkpoint(ctx: Context, position: Position) -> Manifest:
    """Make the manifest of a checkpoint of this fit, without its files."""
    run = ctx.run
    path = None if run.path is None else str(Path(run.path).absolute())
    return Manifest(
        world_size=ctx.accelerator.world_size,
        position=position,
        run=RunRef(id=run.id, path=path),
        about=read_description(ctx),
    )


def write_and_commit(
    temporary: Path,
    rank: int,
    manifest: Manifest,
    make: MakeContent,
    summary: PartSummary | None = None,
) -> Exception | None:
    """Write the files of a rank and, on rank 0, commit; return the error of a failure."""
    try:
        write_rank(temporary, rank, *make(), summary)
        if rank == 0:
            commit_checkpoint(temporary, manifest)
    except Exception as error:  # noqa: BLE001  a failed save does not end the fit
        mark_failed(temporary, rank)
        return error
    return None


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
        self._start_of_fit = mark_start(ctx)
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
        position = get_position(self._ctx, phase)
        self._temporary, self._error = begin_on_main(self.folder, position, self._ctx)
        return get_final_path(self._temporary).name if self._temporary else None

    def save(self, phase: Phase) -> None:
        """Save into the folder that ``begin`` made.

        Raises
        ------
        TypeError
            If a callback's state holds what cannot be written; the error names its path.
        """
        state = capture_state(self._ctx, phase, self._start_of_fit)
        manifest = describe_checkpoint(self._ctx, get_position(self._ctx, phase))
        plan, live = flatten(state)
        is_known = is_convertible(state["accelerator"])
        summary = summarize_part(state) if is_known else None
        copies, wait = self._copies.copy(live)

        def make() -> tuple[object, Mapping[str, Tensor]]:
            wait()
            return plan, copies

        self._start(self._write, manifest, make, summary)

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
        self, manifest: Manifest, make: MakeContent, summary: PartSummary | None
    ) -> None:
        """Write the files of this rank, in the background; ``wait`` returns an error."""
        assert self._temporary is not None
        self._error = write_and_commit(
            self._temporary, self._rank, manifest, make, summary
        )
        if self._error is None:
            self._durations.append(monotonic() - self._began_at)

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
        """Give the memory of the copies back, and what they were compared with."""
        self._start_of_fit = FitStart({}, {}, {})
        self._copies = HostCopies()  # a thread that still writes has the earlier ones

    def prune(self, keep_last: int, keep: set[str]) -> None:
        """Remove all but the newest `keep_last` checkpoints and those named; on rank 0."""
        if not self._ctx.accelerator.is_main:
            return
        for path in list_checkpoints(self.folder)[keep_last:]:
            if path.name not in keep:
                remove_checkpoint(path)
