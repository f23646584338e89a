"""Takes one run's rows to MLflow, from the first to the last, and sets its status."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
import pyarrow as pa
from pyarrow import compute as pc

from tracking.delivery.cursor import Cursor
from tracking.delivery.reconcile import (
    Comparison,
    StalePoints,
    compare_points,
    expected_points,
    point_list,
    thinning_mask,
)
from tracking.delivery.retry import LONGEST_DELAY_S, RetryPolicy
from tracking.delivery.scan import ControlRows, JournalScan
from tracking.delivery.state import DeliveryState
from tracking.delivery.thinning import sent_at_once
from tracking.journal.reader import JournalReader
from tracking.mlflow_store.client import GoneError, Point, UnreachableError
from tracking.mlflow_store.points import UniqueTimestamps, points_table
from tracking.mlflow_store.runs import RunResolver
from tracking.mlflow_store.tags import STATUSES, as_ms
from tracking.mlflow_store.writer import BATCH, RunWriter
from tracking.store import get_rank_dir, get_status, is_being_written

STAMPED_ROWS: Final = 1 << 16
"""Rows before the last one sent whose times are looked at for repetitions."""

POLL_S: Final = 0.25
LONGEST_POLL_S: Final = 1.0
STEP_ROWS: Final = 4 * BATCH
"""Rows sent before the journal is looked at again for what supersedes them."""

T = TypeVar("T")


class DeliveryWorker:
    """Delivers one run; made for one process, which does nothing else.

    Parameters
    ----------
    run_path
        Folder of the run.
    resolver
        Finds and makes runs in MLflow.
    patience_s : seconds
        How long a server that does not answer is waited for, once the trainer is gone.
    is_thorough
        Whether all that MLflow has is compared with the journal in the end, as `sync`
        does; else only where there is a reason to.
    write_summaries
        Makes files that the MLflow run is to have once the run has ended.
    redact
        Takes secrets out of a text.
    log
        Writes a line to the log.
    """

    def __init__(
        self,
        run_path: Path,
        resolver: RunResolver,
        *,
        patience_s: float,
        is_thorough: bool = False,
        write_summaries: Callable[[Path], list[Path]] = lambda path: [],
        redact: Callable[[str], str] = str,
        log: Callable[[str], None] = print,
    ) -> None:
        self.run_path = run_path
        state = DeliveryState.read(run_path)
        if state is None or state.tracking_uri != resolver.uri:
            state = DeliveryState(tracking_uri=resolver.uri)
        self.state = state
        self.num_sent = 0
        self.num_present = 0
        self._resolver = resolver
        self._is_thorough = is_thorough
        self._write_summaries = write_summaries
        self._retry = RetryPolicy(
            run_path,
            state,
            limit_s=patience_s,
            rows_behind=self._rows_behind,
            redact=redact,
            log=log,
        )
        self._rank_dir = get_rank_dir(run_path, 0)
        self._scan = JournalScan(self._rank_dir)
        self._cursor = Cursor(JournalReader(self._rank_dir))
        self._gauge = JournalReader(self._rank_dir)
        self._per_key = resolver.manifest.delivery.get("per_key")
        self._is_unsettled = is_thorough or self._per_key is not None
        self._must_reconcile = False
        self._next_artifact_at = 0.0
        self._writer: RunWriter

    def deliver(self, on_page: Callable[[], None] = lambda: None) -> None:
        """Deliver all rows; while the trainer lives, those to come as well.

        Parameters
        ----------
        on_page
            Called once when the run's page in MLflow is there.

        Raises
        ------
        GaveUpError
            If MLflow could not be reached, or does not take the run.
        """
        self._retry.enter("connecting")
        for attempt in range(5):
            try:
                self._connect()
                if attempt == 0:
                    on_page()
                self._loop()
                return
            except GoneError as error:
                if error.is_binned or attempt == 4:
                    raise self._retry.give_up(error) from error
                self._retry.log(
                    f"the run is gone from MLflow; making it anew ({error})"
                )
                self.state.mlflow_run_id = None

    # ------------------------------------------------------------------ the loop

    def _loop(self) -> None:
        """Send what comes until the trainer has ended and all is sent."""
        self._retry.enter("delivering")
        poll_s = POLL_S
        while True:
            is_live = is_being_written(self._rank_dir)
            is_busy = self._step(is_live)
            self._retry.save()
            if is_busy:
                poll_s = POLL_S
                continue
            if is_live:
                time.sleep(poll_s)
                poll_s = min(1.2 * poll_s, LONGEST_POLL_S)
            elif self._end():
                return

    def _step(self, is_live: bool) -> bool:
        """Send the next rows; whether there were any."""
        self._consider(self._scan.look())
        if is_live and self._writer.status != "RUNNING":
            self._retry.try_(lambda: self._set_status("RUNNING"))
        self._retry.try_(self._send_properties)
        if self._must_reconcile:
            self._retry.try_(self._reconcile)
        is_busy = self._send_rows()
        self._try_artifact()
        return is_busy

    def _consider(self, news: ControlRows) -> None:
        """Find out whether what MLflow has already is superseded."""
        for _, position in news.rewinds:
            if position < self._cursor.tail.after:
                self._must_reconcile = True
        for _, place in news.overwrites:
            if self._cursor.touches(place):
                self._cursor.held.add(place)
                self._is_unsettled = True

    def _send_rows(self) -> bool:
        """Send the points of the next rows, as far as they have been read them."""
        cursor = self._cursor
        before = cursor.tail.after
        if before >= self._scan.last:
            return False
        table = cursor.tail.read(STEP_ROWS)
        table = table.filter(pa.array(table["seq"].to_numpy() <= self._scan.last))
        if not table.num_rows:
            cursor.tail.after = before
            return False
        cursor.tail.after = last = table["seq"][-1].as_py()
        alive = table.filter(pa.array(self._scan.tombstones.mask_live(table)))
        cursor.note_indices(alive)
        points = points_table(self._not_held(alive), self._scan.keys)
        points = cursor.stamps.settled(points)
        wanted = self._not_left_over(self._thinned(points))
        if wanted is None:
            return True
        seqs = points["seq"].to_numpy()
        for start in range(0, max(len(wanted), 1), BATCH):
            some = wanted[start : start + BATCH]
            is_last = start + BATCH >= len(wanted)
            upto = last if is_last else int(seqs[some[-1][0]])
            self._send([point for _, point in some], upto)
        return True

    def _send(self, points: list[Point], upto: int | None) -> None:
        """Send a batch, however long it takes."""
        self._retry.try_(lambda: self._writer.send_points(points, upto))
        self.num_sent += len(points)
        if upto is not None:
            self.state.delivered = upto
        self._retry.save()

    def _not_held(self, table: pa.Table) -> pa.Table:
        """Rows without those whose places wait for the end."""
        held = self._cursor.held
        if not held:
            return table
        columns = (table[name].to_pylist() for name in ("what", "set", "index"))
        free = [place not in held for place in zip(*columns, strict=True)]
        self._cursor.num_held += len(free) - sum(free)
        return table.filter(pa.array(free, pa.bool_()))

    def _thinned(self, points: pa.Table) -> list[tuple[int, Point]]:
        """Points that are sent at once, with their places in the table."""
        found = list(enumerate(point_list(points)))
        if self._per_key is None:
            return found
        counts = self._cursor.counts
        ordinals = np.empty(len(found), np.int64)
        for i, point in found:
            ordinals[i] = counts.get(point.key, 0)
            counts[point.key] = int(ordinals[i]) + 1
        chosen = sent_at_once(ordinals, self._per_key)
        return [found[i] for i in np.flatnonzero(chosen)]

    def _not_left_over(
        self, points: list[tuple[int, Point]]
    ) -> list[tuple[int, Point]] | None:
        """Points that MLflow lacks; None if a fresh run had to be made for them."""
        leftovers = self._cursor.leftovers
        if not leftovers:
            return points
        lacking = []
        for i, point in points:
            stands_for = leftovers.take(point)
            if stands_for is False and not self._resolver.is_borrowed:
                self._retry.log(
                    f"{point.key} at {point.step} differs from what MLflow has"
                )
                self._retry.try_(self._move)
                return None
            if not stands_for:
                lacking.append((i, point))
        return lacking

    # -------------------------------------------------------- properties, artifacts

    def _send_properties(self) -> None:
        """Send params, tags and inputs, and the tags that describe the run."""
        keys = self._scan.keys
        self.state.names = {key: list(one) for key, one in keys.mapped().items()}
        self.state.flags = self._writer.flags(self._scan.properties())
        more = self._resolver.tags(self.state.names)
        self._writer.send_properties(self._scan.properties(), more)

    def _try_artifact(self) -> None:
        """Upload one artifact, if one is waiting and the store takes it."""
        if time.monotonic() < self._next_artifact_at:
            return
        try:
            self._upload(1)
        except UnreachableError as error:
            self._retry.log(f"an artifact is waiting: {error}")
            self._next_artifact_at = time.monotonic() + LONGEST_DELAY_S

    def _upload(self, count: int | None = None) -> None:
        """Upload artifacts that MLflow lacks."""
        wanted, folder = self._scan.properties(), self.run_path / "artifacts"
        for name in self._writer.missing_artifacts(wanted, folder)[:count]:
            self._writer.send_artifact(wanted, folder, name)

    def _send_summaries(self) -> None:
        """Make and upload what an ended run shows of itself."""
        try:
            made = self._write_summaries(self.run_path)
        except (ImportError, OSError, ValueError, RuntimeError) as error:
            self._retry.log(f"no picture or Parquet file of the run: {error}")
            return
        for path in made:
            self._resolver.remote.send_artifact(self._writer.run_id, path, None)

    # ------------------------------------------------------------- the end of a run

    def _end(self) -> bool:
        """Close the MLflow run; False if there is more to be done after all."""
        is_unsettled = self._is_unsettled or bool(self._cursor.leftovers)
        if is_unsettled and self._retry.try_(self._settle):
            return False
        if is_being_written(self._rank_dir):
            return False
        manifest = self._resolver.read_manifest()
        status = get_status(self.run_path, manifest)
        if status == "running":
            return False
        if self._is_thorough:
            self._retry.try_(
                lambda: self._writer.note_artifacts(self._scan.properties())
            )
        self._retry.try_(self._send_properties)
        ended = as_ms(manifest.ended) or self._scan.last_time_ms
        if not self._resolver.is_borrowed:
            self._retry.try_(lambda: self._set_status(STATUSES[status], ended))
        self._retry.try_(self._upload)
        if self.num_sent or not self._is_thorough:
            self._retry.try_(self._send_summaries)
        self._retry.try_(self._send_properties)
        if is_being_written(self._rank_dir):
            return False
        self._retry.enter("done")
        return True

    def _set_status(self, status: str, end_ms: int | None = None) -> None:
        """Set the MLflow run's status, unless it is the caller's own run."""
        if not self._resolver.is_borrowed:
            self._writer.set_status(status, end_ms)

    def _settle(self) -> bool:
        """Make MLflow equal to the journal; whether a fresh run had to be made."""
        # A killed run may be resumed, and its leftovers then be replaced by equals.
        is_open = not self._is_thorough and self._has_been_killed()
        found = self._difference(is_final=not is_open)
        self.num_present = found.num_present
        leftovers, lacking, differs = found.leftovers, [], False
        for point in point_list(found.missing):
            stands_for = leftovers.take(point)
            differs |= stands_for is False
            if not stands_for:
                lacking.append(point)
        if (leftovers or differs) and not self._resolver.is_borrowed:
            if is_open:
                self._cursor.leftovers = leftovers
                self._is_unsettled = False
                return False
            self._retry.log(f"{len(leftovers)} points in MLflow have no row any more")
            self._move()
            return True
        for start in range(0, len(lacking), BATCH):
            self._send(lacking[start : start + BATCH], None)
        self.num_present += len(lacking)
        self._is_unsettled = False
        self._cursor.leftovers = StalePoints()
        self._cursor.held.clear()
        self._cursor.num_held = 0
        return False

    def _has_been_killed(self) -> bool:
        """Whether the run ended without saying so, or saying that it was stopped."""
        manifest = self._resolver.read_manifest()
        return get_status(self.run_path, manifest) == "killed"

    # ------------------------------------------------------------ runs that differ

    def _reconcile(self) -> None:
        """After a rewind: learn what MLflow has that no row stands for any more."""
        found = self._difference(is_final=False)
        self._cursor.leftovers = found.leftovers
        self._must_reconcile = False
        if self._cursor.held:
            return
        lacking = self._not_left_over(list(enumerate(point_list(found.missing))))
        for start in range(0, len(lacking or []), BATCH):
            some = (lacking or [])[start : start + BATCH]
            self._send([point for _, point in some], None)

    def _difference(self, *, is_final: bool) -> Comparison:
        """Compare MLflow with the rows that have been sent."""
        cursor = self._cursor
        cursor.stamps = UniqueTimestamps()  # all are given anew
        points = expected_points(
            self._rank_dir, self._scan, cursor.tail.after, cursor.stamps
        )
        if self._per_key is not None:
            counted = pc.value_counts(points["key"]).to_pylist()
            cursor.counts = {one["values"]: one["counts"] for one in counted}
        chosen = thinning_mask(points, self._per_key, is_final=is_final)
        history = self._resolver.remote.history(self._writer.run_id)
        return compare_points(points, chosen, history, self._scan)

    def _move(self) -> None:
        """Go on with a fresh MLflow run, from the first row."""
        old = self._writer.run_id
        fresh = self._resolver.replace(old)
        self._retry.log(f"{old} is superseded by {fresh.run_id}")
        self._begin_with(fresh.run_id, self._resolver.writer(fresh))
        self.state.superseded.append(old)

    # ---------------------------------------------------------------- connecting

    def _connect(self) -> None:
        """Find or make the MLflow run, and the place where to go on."""
        self._scan.look()
        writer = self._retry.try_(self._resolver.connect)
        self._begin_with(writer.run_id, writer)
        self._retry.save(at_once=True)

    def _begin_with(self, run_id: str, writer: RunWriter) -> None:
        """Go on where an MLflow run ends."""
        self._writer = writer
        if self._is_thorough:
            writer.refused.clear()  # all is tried once more
        self._cursor = Cursor(JournalReader(self._rank_dir))
        self._must_reconcile = False
        self.state.mlflow_run_id = run_id
        self.state.experiment_id = writer.experiment_id
        self.state.page = self._resolver.page_url(writer)
        self.state.delivered = writer.delivered
        if writer.delivered >= 0:
            self._pass_over(writer.delivered)

    def _pass_over(self, last: int) -> None:
        """Come to the position that MLflow says it has been sent all rows to."""
        cursor, tombstones = self._cursor, self._scan.tombstones
        while cursor.tail.after < last:
            table = cursor.tail.read(1 << 14)
            table = table.filter(pa.array(table["seq"].to_numpy() <= last))
            if not table.num_rows:
                break
            cursor.note_indices(table)  # what is dead now may have been sent
            is_far = table["seq"][-1].as_py() < last - STAMPED_ROWS
            if is_far and self._per_key is None:
                continue
            alive = table.filter(pa.array(tombstones.mask_live(table)))
            points = cursor.stamps.settled(points_table(alive, self._scan.keys))
            if self._per_key is not None:
                for key in points["key"].to_pylist():
                    cursor.counts[key] = cursor.counts.get(key, 0) + 1
        cursor.tail.after = last
        # Which of the control rows an earlier process knew of is not known here.
        self._must_reconcile = bool(tombstones.rewinds)
        for _, place in tombstones.overwrites:
            if cursor.touches(place):
                cursor.held.add(place)
                self._is_unsettled = True

    def _rows_behind(self) -> int:
        """Rows that MLflow lacks."""
        count, last = self._cursor.num_held, self._scan.last
        # Reading the open block takes milliseconds: not where none are known of.
        is_idle = self.state.phase == "delivering" and 0 <= last <= self.state.delivered
        if not is_idle:
            self._gauge.after = self.state.delivered
            count += self._gauge.count_unread()
        return count
