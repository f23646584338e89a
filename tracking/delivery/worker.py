"""Takes one run's rows to MLflow, from the first to the last, and sets its status."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
import pyarrow as pa
from pyarrow import compute as pc

from tracking.delivery.cursor import Progress
from tracking.delivery.reconcile import (
    Difference,
    Leftovers,
    as_points,
    chosen_points,
    difference,
    wanted_points,
)
from tracking.delivery.retry import LONGEST_DELAY_S, Patience
from tracking.delivery.scan import News, Survey
from tracking.delivery.state import State
from tracking.delivery.thinning import sent_at_once
from tracking.ending import get_status
from tracking.journal.reader import JournalReader, is_being_written
from tracking.mlflow_store.client import GoneError, Point, UnreachableError
from tracking.mlflow_store.points import Stamps, points_of
from tracking.mlflow_store.runs import Register
from tracking.mlflow_store.tags import STATUSES, as_ms
from tracking.mlflow_store.writer import BATCH, Sender
from tracking.store import get_rank_dir

STAMPED_ROWS: Final = 1 << 16
"""Rows before the last one sent whose times are looked at for repetitions."""

POLL_S: Final = 0.25
LONGEST_POLL_S: Final = 1.0
STEP_ROWS: Final = 4 * BATCH
"""Rows sent before the journal is looked at again for what supersedes them."""

T = TypeVar("T")


class Courier:
    """Delivers one run; made for one process, which does nothing else.

    Parameters
    ----------
    run_path
        Folder of the run.
    register
        Finds and makes runs in MLflow.
    patience_s : seconds
        How long a server that does not answer is waited for, once the trainer is gone.
    is_thorough
        Whether all that MLflow has is compared with the journal in the end, as `sync`
        does; else only where there is a reason to.
    make_keepsakes
        Makes files that the MLflow run is to have once the run has ended.
    redact
        Takes secrets out of a text.
    log
        Writes a line to the log.
    """

    def __init__(
        self,
        run_path: Path,
        register: Register,
        *,
        patience_s: float,
        is_thorough: bool = False,
        make_keepsakes: Callable[[Path], list[Path]] = lambda path: [],
        redact: Callable[[str], str] = str,
        log: Callable[[str], None] = print,
    ) -> None:
        self.run_path = run_path
        state = State.read(run_path)
        if state is None or state.tracking_uri != register.uri:
            state = State(tracking_uri=register.uri)
        self.state = state
        self.num_sent = 0
        self.num_present = 0
        self._register = register
        self._is_thorough = is_thorough
        self._make_keepsakes = make_keepsakes
        self._patience = Patience(
            run_path,
            state,
            limit_s=patience_s,
            rows_to_go=self._rows_to_go,
            redact=redact,
            log=log,
        )
        self._rank_dir = get_rank_dir(run_path, 0)
        self._survey = Survey(self._rank_dir)
        self._progress = Progress(JournalReader(self._rank_dir))
        self._gauge = JournalReader(self._rank_dir)
        self._per_key = register.manifest.delivery.get("per_key")
        self._is_unsettled = is_thorough or self._per_key is not None
        self._must_reconcile = False
        self._next_artifact_at = 0.0
        self._sender: Sender

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
        self._patience.enter("connecting")
        for attempt in range(5):
            try:
                self._connect()
                if attempt == 0:
                    on_page()
                self._loop()
                return
            except GoneError as error:
                if error.is_binned or attempt == 4:
                    raise self._patience.give_up(error) from error
                self._patience.log(
                    f"the run is gone from MLflow; making it anew ({error})"
                )
                self.state.mlflow_run_id = None

    # ------------------------------------------------------------------ the loop

    def _loop(self) -> None:
        """Send what comes until the trainer has ended and all is sent."""
        self._patience.enter("delivering")
        poll_s = POLL_S
        while True:
            is_live = is_being_written(self._rank_dir)
            is_busy = self._step(is_live)
            self._patience.save()
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
        self._consider(self._survey.look())
        if is_live and self._sender.status != "RUNNING":
            self._patience.try_(lambda: self._set_status("RUNNING"))
        self._patience.try_(self._send_properties)
        if self._must_reconcile:
            self._patience.try_(self._reconcile)
        is_busy = self._send_rows()
        self._try_artifact()
        return is_busy

    def _consider(self, news: News) -> None:
        """Find out whether what MLflow has already is superseded."""
        for _, position in news.rewinds:
            if position < self._progress.tail.after:
                self._must_reconcile = True
        for _, place in news.overwrites:
            if self._progress.touches(place):
                self._progress.held.add(place)
                self._is_unsettled = True

    def _send_rows(self) -> bool:
        """Send the points of the next rows, as far as the survey has seen them."""
        progress = self._progress
        before = progress.tail.after
        if before >= self._survey.last:
            return False
        table = progress.tail.read(STEP_ROWS)
        table = table.filter(pa.array(table["seq"].to_numpy() <= self._survey.last))
        if not table.num_rows:
            progress.tail.after = before
            return False
        progress.tail.after = last = table["seq"][-1].as_py()
        alive = table.filter(pa.array(self._survey.tombstones.mask_live(table)))
        progress.note_indices(alive)
        points = points_of(self._not_held(alive), self._survey.keys)
        points = progress.stamps.settled(points)
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
        self._patience.try_(lambda: self._sender.send_points(points, upto))
        self.num_sent += len(points)
        if upto is not None:
            self.state.delivered = upto
        self._patience.save()

    def _not_held(self, table: pa.Table) -> pa.Table:
        """Rows without those whose places wait for the end."""
        held = self._progress.held
        if not held:
            return table
        columns = (table[name].to_pylist() for name in ("what", "set", "index"))
        free = [place not in held for place in zip(*columns, strict=True)]
        self._progress.num_held += len(free) - sum(free)
        return table.filter(pa.array(free, pa.bool_()))

    def _thinned(self, points: pa.Table) -> list[tuple[int, Point]]:
        """Points that are sent at once, with their places in the table."""
        found = list(enumerate(as_points(points)))
        if self._per_key is None:
            return found
        counts = self._progress.counts
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
        leftovers = self._progress.leftovers
        if not leftovers:
            return points
        lacking = []
        for i, point in points:
            stands_for = leftovers.take(point)
            if stands_for is False and not self._register.is_borrowed:
                self._patience.log(
                    f"{point.key} at {point.step} differs from what MLflow has"
                )
                self._patience.try_(self._move)
                return None
            if not stands_for:
                lacking.append((i, point))
        return lacking

    # -------------------------------------------------------- properties, artifacts

    def _send_properties(self) -> None:
        """Send params, tags and inputs, and the tags that describe the run."""
        keys = self._survey.keys
        self.state.names = {key: list(one) for key, one in keys.mapped().items()}
        self.state.flags = self._sender.flags(self._survey.properties())
        more = self._register.tags(self.state.names)
        self._sender.send_properties(self._survey.properties(), more)

    def _try_artifact(self) -> None:
        """Upload one artifact, if one is waiting and the store takes it."""
        if time.monotonic() < self._next_artifact_at:
            return
        try:
            self._upload(1)
        except UnreachableError as error:
            self._patience.log(f"an artifact is waiting: {error}")
            self._next_artifact_at = time.monotonic() + LONGEST_DELAY_S

    def _upload(self, count: int | None = None) -> None:
        """Upload artifacts that MLflow lacks."""
        wanted, folder = self._survey.properties(), self.run_path / "artifacts"
        for name in self._sender.missing_artifacts(wanted, folder)[:count]:
            self._sender.send_artifact(wanted, folder, name)

    def _send_keepsakes(self) -> None:
        """Make and upload what an ended run shows of itself."""
        try:
            made = self._make_keepsakes(self.run_path)
        except (ImportError, OSError, ValueError, RuntimeError) as error:
            self._patience.log(f"no picture or Parquet file of the run: {error}")
            return
        for path in made:
            self._register.remote.send_artifact(self._sender.run_id, path, None)

    # ------------------------------------------------------------- the end of a run

    def _end(self) -> bool:
        """Close the MLflow run; False if there is more to be done after all."""
        is_unsettled = self._is_unsettled or bool(self._progress.leftovers)
        if is_unsettled and self._patience.try_(self._settle):
            return False
        if is_being_written(self._rank_dir):
            return False
        manifest = self._register.read_manifest()
        status = get_status(self.run_path, manifest)
        if status == "running":
            return False
        if self._is_thorough:
            self._patience.try_(
                lambda: self._sender.note_artifacts(self._survey.properties())
            )
        self._patience.try_(self._send_properties)
        ended = as_ms(manifest.ended) or self._survey.last_time_ms
        if not self._register.is_borrowed:
            self._patience.try_(lambda: self._set_status(STATUSES[status], ended))
        self._patience.try_(self._upload)
        if self.num_sent or not self._is_thorough:
            self._patience.try_(self._send_keepsakes)
        self._patience.try_(self._send_properties)
        if is_being_written(self._rank_dir):
            return False
        self._patience.enter("done")
        return True

    def _set_status(self, status: str, end_ms: int | None = None) -> None:
        """Set the MLflow run's status, unless it is the caller's own run."""
        if not self._register.is_borrowed:
            self._sender.set_status(status, end_ms)

    def _settle(self) -> bool:
        """Make MLflow equal to the journal; whether a fresh run had to be made."""
        # A killed run may be resumed, and its leftovers then be replaced by equals.
        is_open = not self._is_thorough and self._has_been_killed()
        found = self._difference(is_final=not is_open)
        self.num_present = found.num_present
        leftovers, lacking, differs = found.leftovers, [], False
        for point in as_points(found.missing):
            stands_for = leftovers.take(point)
            differs |= stands_for is False
            if not stands_for:
                lacking.append(point)
        if (leftovers or differs) and not self._register.is_borrowed:
            if is_open:
                self._progress.leftovers = leftovers
                self._is_unsettled = False
                return False
            self._patience.log(
                f"{len(leftovers)} points in MLflow have no row any more"
            )
            self._move()
            return True
        for start in range(0, len(lacking), BATCH):
            self._send(lacking[start : start + BATCH], None)
        self.num_present += len(lacking)
        self._is_unsettled = False
        self._progress.leftovers = Leftovers()
        self._progress.held.clear()
        self._progress.num_held = 0
        return False

    def _has_been_killed(self) -> bool:
        """Whether the run ended without saying so, or saying that it was stopped."""
        manifest = self._register.read_manifest()
        return get_status(self.run_path, manifest) == "killed"

    # ------------------------------------------------------------ runs that differ

    def _reconcile(self) -> None:
        """After a rewind: learn what MLflow has that no row stands for any more."""
        found = self._difference(is_final=False)
        self._progress.leftovers = found.leftovers
        self._must_reconcile = False
        if self._progress.held:
            return
        lacking = self._not_left_over(list(enumerate(as_points(found.missing))))
        for start in range(0, len(lacking or []), BATCH):
            some = (lacking or [])[start : start + BATCH]
            self._send([point for _, point in some], None)

    def _difference(self, *, is_final: bool) -> Difference:
        """Compare MLflow with the rows that have been sent."""
        progress = self._progress
        progress.stamps = Stamps()  # all are given anew
        points = wanted_points(
            self._rank_dir, self._survey, progress.tail.after, progress.stamps
        )
        if self._per_key is not None:
            counted = pc.value_counts(points["key"]).to_pylist()
            progress.counts = {one["values"]: one["counts"] for one in counted}
        chosen = chosen_points(points, self._per_key, is_final=is_final)
        history = self._register.remote.history(self._sender.run_id)
        return difference(points, chosen, history, self._survey)

    def _move(self) -> None:
        """Go on with a fresh MLflow run, from the first row."""
        old = self._sender.run_id
        fresh = self._register.replace(old)
        self._patience.log(f"{old} is superseded by {fresh.run_id}")
        self._begin_with(fresh.run_id, self._register.sender(fresh))
        self.state.superseded.append(old)

    # ---------------------------------------------------------------- connecting

    def _connect(self) -> None:
        """Find or make the MLflow run, and the place where to go on."""
        self._survey.look()
        sender = self._patience.try_(self._register.connect)
        self._begin_with(sender.run_id, sender)
        self._patience.save(at_once=True)

    def _begin_with(self, run_id: str, sender: Sender) -> None:
        """Go on where an MLflow run ends."""
        self._sender = sender
        if self._is_thorough:
            sender.refused.clear()  # all is tried once more
        self._progress = Progress(JournalReader(self._rank_dir))
        self._must_reconcile = False
        self.state.mlflow_run_id = run_id
        self.state.experiment_id = sender.experiment_id
        self.state.page = self._register.page(sender)
        self.state.delivered = sender.delivered
        if sender.delivered >= 0:
            self._pass_over(sender.delivered)

    def _pass_over(self, last: int) -> None:
        """Come to the position that MLflow says it has been sent all rows to."""
        progress, tombstones = self._progress, self._survey.tombstones
        while progress.tail.after < last:
            table = progress.tail.read(1 << 14)
            table = table.filter(pa.array(table["seq"].to_numpy() <= last))
            if not table.num_rows:
                break
            progress.note_indices(table)  # what is dead now may have been sent
            is_far = table["seq"][-1].as_py() < last - STAMPED_ROWS
            if is_far and self._per_key is None:
                continue
            alive = table.filter(pa.array(tombstones.mask_live(table)))
            points = progress.stamps.settled(points_of(alive, self._survey.keys))
            if self._per_key is not None:
                for key in points["key"].to_pylist():
                    progress.counts[key] = progress.counts.get(key, 0) + 1
        progress.tail.after = last
        # Which of the control rows an earlier process knew of is not known here.
        self._must_reconcile = bool(tombstones.rewinds)
        for _, place in tombstones.overwrites:
            if progress.touches(place):
                progress.held.add(place)
                self._is_unsettled = True

    def _rows_to_go(self) -> int:
        """Rows that MLflow lacks."""
        count, last = self._progress.num_held, self._survey.last
        # Reading the open block takes milliseconds: not where none are known of.
        is_idle = self.state.phase == "delivering" and 0 <= last <= self.state.delivered
        if not is_idle:
            self._gauge.after = self.state.delivered
            count += self._gauge.count_unread()
        return count
