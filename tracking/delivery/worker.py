"""Deliver one run to MLflow: read its journal, send the rows, set the run's status."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import logging
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import pyarrow as pa

from tracking.delivery.cursor import Cursor
from tracking.delivery.models import send_models
from tracking.delivery.options import read_options
from tracking.delivery.process import handover_path, set_group_niceness
from tracking.delivery.reconcile import Reconciler, Stage
from tracking.delivery.retry import LONGEST_DELAY_S, GaveUpError, RetryPolicy
from tracking.delivery.scan import JournalScan
from tracking.delivery.state import DeliveryState, StateFile, rows_behind
from tracking.delivery.thinning import THINNED
from tracking.errors import DeliveryError
from tracking.mlflow_store.client import (
    GoneError,
    MlflowRun,
    Point,
    RefusedError,
    UnreachableError,
)
from tracking.mlflow_store.points import point_list
from tracking.mlflow_store.properties import RunProperties
from tracking.mlflow_store.runs import RunResolver
from tracking.mlflow_store.tags import STATUSES, to_ms
from tracking.mlflow_store.writer import BATCH, RunWriter
from tracking.store import get_rank_dir, get_status, has_live_writer

_RESUMABLE: Final = ("killed", "unknown")
"""Statuses of a run that may be continued, and then replace what MLflow has."""

POLL_S: Final = 0.25
LONGEST_POLL_S: Final = 1.0

STEP_ROWS: Final = 4 * BATCH
"""Rows to send before new rows are read, which may supersede the next ones."""

ARTIFACTS_S: Final = 0.25
"""Time to upload artifacts before new rows are sent; the last one may take longer."""

LOOKAHEAD_ROWS: Final = 1 << 20
"""Rows to read ahead of sending, so that superseded rows are not sent.

A row takes about 60 bytes of memory. If a rewind goes back further, the comparison after
it finds the superseded rows in MLflow.
"""

MAX_ATTEMPTS: Final = 5
"""MLflow runs to create for a run that keeps being deleted from MLflow."""

_log = logging.getLogger(__name__)


def lower_priority(niceness: int) -> None:
    """Let other processes go first, and spend less time on garbage collection.

    On Linux the niceness is that of the calling thread, and within a session of its own it
    counts only if the session's group of processes is nice too.
    """
    _tune_process(niceness)
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, 0, min(_first_niceness() + niceness, 19))


@functools.cache
def _tune_process(niceness: int) -> None:
    # A quarter of the time that MLflow takes for a batch is garbage collection, which
    # looks through all imported modules again and again.
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)
    if niceness and os.getsid(0) == os.getpid():
        set_group_niceness(os.getpid(), niceness)


@functools.cache
def _first_niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, 0)


class DeliveryWorker:
    """Delivers one run, in a process that does nothing else.

    Parameters
    ----------
    resolver
        Finds and creates runs in MLflow.
    patience_s : seconds
        How long to wait for a server that does not answer, once training has ended.
    is_sync
        Whether to compare all of MLflow's points with the journal at the end; else only
        where the journal gives a reason.
    write_summaries
        Writes files that the MLflow run gets once the run has ended.
    lookahead_rows
        Rows to read ahead of sending.
    pause
        Waits some seconds before new rows are looked for; may return earlier.

    Attributes
    ----------
    state
        As last written to ``state.json``.
    num_sent
        Points that were sent.
    """

    def __init__(
        self,
        run_path: Path,
        resolver: RunResolver,
        *,
        patience_s: float,
        is_sync: bool = False,
        write_summaries: Callable[[Path], list[Path]] = lambda path: [],
        lookahead_rows: int = LOOKAHEAD_ROWS,
        pause: Callable[[float], object] = time.sleep,
    ) -> None:
        self.run_path = run_path
        state = DeliveryState.read_or_new(run_path, resolver.uri)
        state.run_path = str(run_path)
        self.state = state
        self.num_sent = 0
        self._resolver = resolver
        self._is_sync = is_sync
        self._write_summaries = write_summaries
        self._lookahead_rows = lookahead_rows
        self._pause = pause
        self._rank_dir = get_rank_dir(run_path, 0)
        self._state_file = StateFile(run_path, state, self._count_behind)
        self._retry = RetryPolicy(
            self._state_file,
            isolate=self._isolate,
            is_replaced=lambda: not is_sync and handover_path(run_path).exists(),
            limit_s=patience_s,
            is_being_written=lambda: has_live_writer(self._rank_dir),
            redact=resolver.settings.redact,
        )
        self._next_artifact_at = 0.0
        self._writer: RunWriter
        self._scan = JournalScan(self._rank_dir)
        self._start_reading(-1)

    @property
    def num_present(self) -> int:
        """Points that MLflow has as it should, by the last comparison."""
        return self._reconciler.num_present

    def deliver(self, on_page: Callable[[], None] = lambda: None) -> None:
        """Deliver all rows; while the run is being written, also those to come.

        Parameters
        ----------
        on_page
            Called once, when the run's page in MLflow exists.
        """
        self._state_file.set_phase("connecting")
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                known_id = self.state.mlflow_run_id
                self._use(self._retry.run(partial(self._resolver.connect, known_id)))
                self._state_file.set_phase("delivering")
                if attempt == 1:
                    on_page()
                self._follow()
                return
            except GoneError as error:
                if error.is_restorable or attempt == MAX_ATTEMPTS:
                    raise self._retry.give_up(error) from error
                _log.warning("the run is not in MLflow any more (%s)", error)
                self.state.mlflow_run_id = None

    # ---------------------------------------------------------------- the MLflow run

    def _isolate(self) -> bool:
        """Look for the item that keeps failing; False if MLflow takes nothing at all."""
        writer = getattr(self, "_writer", None)
        if writer is None or not writer.can_write():
            return False
        writer.is_isolating = True
        return True

    def _use(self, writer: RunWriter) -> None:
        """Write into an MLflow run, from the first row that it does not have."""
        self._writer = writer
        if self._is_sync:
            writer.refused.clear()  # all of it is tried again
        self.state.mlflow_run_id = writer.run_id
        self.state.experiment_id = writer.experiment_id
        self.state.page = self._resolver.page_url(writer)
        self.state.delivered = writer.delivered
        _log.info(
            "delivering to MLflow run %s in %s", writer.run_id, self.state.tracking_uri
        )
        if max(writer.delivered, self._scan.last_seq) >= 0:
            self._start_reading(writer.delivered)

    def _start_reading(self, position: int) -> None:
        """Read the journal from its first row; send what comes after a position."""
        per_key = read_options(self._resolver.manifest).per_key
        # A new MLflow run has none of the rows that are known to be superseded. What an
        # existing one has is found by comparing the control rows as they are read.
        known = self._scan if position < 0 else None
        self._scan = JournalScan(self._rank_dir, known)
        self._cursor = Cursor(position, per_key)
        self._reconciler = Reconciler(
            self._scan,
            self._cursor,
            is_required=self._is_sync,
            can_replace=not self._resolver.is_borrowed,
        )

    def _replace_run(self) -> None:
        """Continue with a new MLflow run, from the first row."""
        old_id = self._writer.run_id
        fresh: MlflowRun = self._retry.run(lambda: self._resolver.replace(old_id))
        _log.info("MLflow run %s is superseded by %s", old_id, fresh.run_id)
        self._use(self._resolver.open_writer(fresh))
        self.state.superseded.append(old_id)

    # ---------------------------------------------------------------------- the loop

    def _follow(self) -> None:
        """Send new rows until the run is not written any more and all are sent."""
        poll_s = POLL_S
        shown = self.state.delivered
        while True:
            is_live = has_live_writer(self._rank_dir)
            is_busy = self._step(is_live)
            # Training that ends waits for the last position: it is shown at once.
            self._state_file.save(at_once=not is_busy and self.state.delivered != shown)
            shown = shown if is_busy else self.state.delivered
            if is_live and not is_busy:
                self._pause(poll_s)  # also after rows: a call takes as long for a few
                poll_s = min(1.2 * poll_s, LONGEST_POLL_S)
            elif not is_busy and self._finish():
                return

    def _step(self, is_live: bool) -> bool:
        """Read new rows and send the next ones; whether there may be more to send."""
        is_at_end = self._read_ahead()
        if is_live and self._writer.status != "RUNNING":
            self._retry.run(lambda: self._writer.set_status("RUNNING"))
        if self._reconciler.is_requested:
            if is_live and not self._reconciler.is_due():
                self._send_properties()
                return False
            if self._reconcile("live"):
                return True
        is_busy = self._send_next()
        self._send_artifact()
        return is_busy or not is_at_end

    def _read_ahead(self) -> bool:
        """Read new rows, and check what they supersede; whether those were all."""
        while self._cursor.num_pending < self._lookahead_rows:
            rows = self._scan.read()
            if not rows.num_rows:
                return True
            self._cursor.push(rows, self._scan)
            self._reconciler.check_control_rows()
        return False

    def _send_next(self) -> bool:
        """Send the next points, and what is new besides; whether more can be sent now."""
        rows = self._cursor.peek(STEP_ROWS)
        if rows is None:
            self._send_properties()
            return False
        live = rows.filter(pa.array(self._scan.tombstones.mask_live(rows)))
        self._cursor.note_places(live)
        wanted = self._reconciler.remove_deferred(live)
        points = self._cursor.next_points(wanted, self._scan.keys)
        missing = self._reconciler.remove_present(points)
        if missing is None:
            self._replace_run()
            return True
        self._send_points(missing, rows["seq"][-1].as_py())
        return self._cursor.num_pending > 0

    def _send_points(self, points: pa.Table, upto: int | None = None) -> None:
        """Send points in batches; MLflow is told the position with the last one.

        A tag takes a transaction of its own. A delivery that is killed in between sends
        the batches again, and MLflow has each point once by its time.

        Parameters
        ----------
        points
            In the order of the journal.
        upto
            ``seq`` up to which all rows are sent with them; None: the position stays.
        """
        for start in range(0, points.num_rows or (upto is not None), BATCH):
            batch = points.slice(start, BATCH)
            is_last = start + BATCH >= points.num_rows
            some, watermark = point_list(batch), upto if is_last else None
            if start == 0:
                self._send_properties(some, watermark)
            else:
                self._retry.run(partial(self._writer.send_points, some, watermark))
            self.num_sent += batch.num_rows
            if upto is not None:
                position = upto if is_last else batch["seq"][-1].as_py()
                self._cursor.advance(position)
                self.state.delivered = position
            self._state_file.save()

    def _send_properties(
        self, points: Sequence[Point] = (), position: int | None = None
    ) -> None:
        """Send params, tags, inputs and what describes the run; with them some points."""
        properties = self._properties()
        self.state.names = self._scan.keys.renamed()
        self.state.flags = self._writer.flags(properties)
        per_key = self._cursor.per_key if THINNED in properties.flags else None
        tags = self._resolver.tags(self.state.names, per_key)
        send = partial(self._writer.send, properties, tags, points, position)
        self._retry.run(send)

    def _properties(self) -> RunProperties:
        """What MLflow should have besides metrics, and what it does not have of those."""
        found = self._scan.properties()
        if not (keys := self._cursor.list_thinned()):
            return found
        thinned = dict.fromkeys(keys, self._cursor.per_key)
        return dataclasses.replace(found, flags={**found.flags, THINNED: thinned})

    def _send_artifact(self) -> None:
        """Upload a few artifacts, if some are missing and the store takes them now."""
        if time.monotonic() < self._next_artifact_at:
            return
        try:
            self._upload_artifacts(ARTIFACTS_S)
        except UnreachableError as error:
            # The next one is tried soon, and then again this one.
            _log.warning("an artifact is waiting: %s", error)
            self._next_artifact_at = time.monotonic() + LONGEST_DELAY_S

    def _upload_artifacts(self, limit_s: float | None = None) -> None:
        folder = self.run_path / "artifacts"
        self._writer.upload_artifacts(self._scan.properties(), folder, limit_s)

    def _reconcile(self, stage: Stage) -> bool:
        """Compare MLflow with the journal and mend it; whether by a new MLflow run."""
        run_id = self._writer.run_id
        history = self._retry.run(lambda: self._resolver.client.history(run_id))
        missing = self._reconciler.compare(history, stage)
        if missing is None:
            self._replace_run()
            return True
        self._send_points(missing)
        return False

    # ------------------------------------------------------------- the end of a run

    def _finish(self) -> bool:
        """Close the MLflow run; False if there is more to deliver after all."""
        may_resume = not self._is_sync and self._read_status() in _RESUMABLE
        is_incomplete = self._cursor.is_thinned and not may_resume
        is_required = self._reconciler.is_required_at_end or is_incomplete
        if is_required and self._reconcile("killed" if may_resume else "ended"):
            return False
        status = self._read_status()
        if status == "running":
            return False
        if self._is_sync:
            self._retry.run(
                lambda: self._writer.recognize_artifacts(self._scan.properties())
            )
        self._send_properties()
        ended_ms = to_ms(self._resolver.manifest.ended) or self._scan.last_time_ms
        if status in STATUSES:  # a run of which it is not known has no end
            self._retry.run(lambda: self._writer.set_status(STATUSES[status], ended_ms))
        refused = dict(self._writer.refused)
        self._retry.run(self._upload_artifacts)
        self._retry.run(lambda: send_models(self._writer, self.run_path))
        if self._writer.refused != refused:
            self._send_properties()
        if self._read_status() == "running":
            return False
        self._state_file.set_phase("done")
        _log.info("all rows are delivered; %d points were sent", self.num_sent)
        return True

    def _read_status(self) -> str:
        """Status of the run as it is now; ``running`` while it is being written."""
        if has_live_writer(self._rank_dir):
            return "running"
        return get_status(self.run_path, self._resolver.reload_manifest())

    def send_summaries(self) -> None:
        """Write and upload the files that summarize a run that was delivered.

        Nothing happens if a comparison found all of it in MLflow, or it has been resumed.
        """
        if self._is_sync and not self.num_sent:
            return
        if self._read_status() == "running" or self._scan.count_unread():
            return
        try:
            files = self._write_summaries(self.run_path)
        except (ImportError, OSError, ValueError, DeliveryError) as error:
            _log.warning("no curves.png or records.parquet: %s", error)
            return
        send = self._resolver.client.send_artifact
        for path in files:
            try:
                self._retry.run(partial(send, self._writer.run_id, path, None))
            except (GaveUpError, GoneError, RefusedError) as error:
                _log.warning("%s is not in MLflow: %s", path.name, error)
                break
        with contextlib.suppress(GaveUpError, GoneError):
            self._send_properties()  # the description has the results
        if self.state.phase != "done":  # whatever came of the pictures
            self._state_file.set_phase("done")

    def _count_behind(self) -> int:
        """Rows that MLflow does not have yet, as far as is known."""
        if getattr(self, "_writer", None) is None:  # nothing is compared yet
            return rows_behind(self.run_path, self.state)
        count = self._reconciler.num_deferred + self._cursor.num_pending
        # Counting costs milliseconds; while all is well, new rows are read soon anyway.
        is_idle = self.state.phase == "delivering" and count == 0
        return count if is_idle else count + self._scan.count_unread()
