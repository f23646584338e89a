"""A live run: what is logged goes to its journal, and from there to MLflow."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal

from tracking import artifacts
from tracking.delivery.process import DeliveryProcess
from tracking.errors import warn
from tracking.journal.row_format import MARK, NO_COUNT, NO_EPOCH, ROW_BYTES
from tracking.journal.segment import CAPACITY
from tracking.journal.writer import Journal
from tracking.read import find_highest_indices
from tracking.schema import (
    DEFERRED,
    FLOAT,
    OVERWRITE,
    REWIND,
    check_name,
    fetch_values,
    find_copies,
    finish_leaf,
    flatten_value,
)
from tracking.store import Manifest, describe_error, get_rank_dir, write_failure

_FLOATS: Final = frozenset([float])
_STATUSES: Final = ("finished", "failed", "killed")
_MAX_COUNT: Final = 2**63 - 1
_MAX_EPOCH: Final = 2**31 - 1


class Run:
    """A run that is being recorded. Made by ``tracking.start``.

    A context manager: leaving it finishes the run as ``finished``, as ``failed`` after
    an exception, as ``killed`` after an interrupt or the exit of a signal's handler.
    A run still open when the interpreter ends is finished then.

    Any thread and any signal handler may log. A number, bool or string whose ``log``
    call has returned survives the death of the process at any later instant; one that
    is a tensor as soon as it is read out, a second later at most.

    Parameters
    ----------
    path
        Folder of the run.
    manifest
        Its manifest; None on a rank that does not write it.
    rank : >= 0
        Of this process.
    durability
        As for ``start``.

    Attributes
    ----------
    id
        Sortable, unique.
    path
        Folder of the run.
    rank
        Of this process.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest | None,
        *,
        rank: int = 0,
        durability: Literal["process", "fsync"] = "process",
    ) -> None:
        self.id = path.name
        self.path = path
        self.rank = rank
        self._manifest = manifest
        self._pid = os.getpid()
        self._status = "running"
        # Rows whose values are still on a device: time, what, set, leaf, counts.
        self._pending: deque[tuple[int, str, str, Any, dict[str, int | None]]] = deque()
        self._reading = threading.RLock()
        self._delivery = DeliveryProcess(path)
        self._journal = Journal(
            get_rank_dir(path, rank), durability=durability, on_tick=self._read_out
        )
        atexit.register(self._finish_at_exit)

    # ------------------------------------------------------------------- logging

    def log(
        self,
        what: str,
        set: str,
        value: object,
        index: int | None = None,
        append: bool = True,
        *,
        epoch: int | None = None,
        step: int | None = None,
    ) -> None:
        """Record a value.

        Parameters
        ----------
        what
            What it is, e.g. ``"metrics"``.
        set
            What it was computed on, e.g. ``"train"``.
        value
            Number, bool, string, None, tensor or array of at most 1024 elements, or a
            dictionary or list of those. Each leaf of a dictionary is a row of its own.
        index
            Position in the series of this ``what`` and ``set``, e.g. the epoch. None:
            the next one; none at all if ``step`` is given.
        append
            False: values already logged at ``index`` are superseded.
        epoch
            Epoch it belongs to, from 1.
        step
            Optimizer steps finished.

        Raises
        ------
        TypeError, ValueError
            If the value, or a part of it, cannot be recorded; nothing of it is, then.
        RunClosedError
            If the run has finished, or belongs to the process this was forked from.

        References
        ----------
        luz 0.5.0, ``ctx$log``.
        """
        if append:
            if type(value) is float:
                if self._log_float(what, set, "", value, index, epoch, step):
                    return
            elif (
                type(value) is dict
                and value
                and _FLOATS.issuperset(map(type, value.values()))
                and self._log_floats(what, set, value, index, epoch, step)
            ):
                return
        self._log_any(what, set, value, index, append, epoch, step)

    def log_metric(
        self,
        name: str,
        value: object,
        *,
        set: str = "train",
        index: int | None = None,
        epoch: int | None = None,
        step: int | None = None,
    ) -> None:
        """Record one metric.

        The same as ``log("metrics", set, {name: value}, index)``.

        Parameters
        ----------
        name
            Name of the metric, e.g. ``"accuracy"``.
        value
            As in ``log``.
        set
            What the metric was computed on, e.g. ``"valid"``.
        index, epoch, step
            As in ``log``.
        """
        if type(value) is not float or not self._log_float(
            "metrics", set, name, value, index, epoch, step
        ):
            self._log_any("metrics", set, {name: value}, index, True, epoch, step)

    def log_step(
        self,
        values: Mapping[str, object],
        step: int,
        *,
        set: str = "train",
        epoch: int | None = None,
    ) -> None:
        """Record values of one optimizer step. They have a step and no index.

        Parameters
        ----------
        values
            Values by name, e.g. ``{"loss": 0.2}``.
        step
            Optimizer steps finished.
        set
            What the values were computed on, e.g. ``"train"``.
        epoch
            Epoch that the step belongs to, from 1.
        """
        self.log("steps", set, values, epoch=epoch, step=step)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record hyper-parameters; the names of nested ones are joined by ``/``."""
        self._record("params", params, "Run.log_params")

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Record tags; a later value of a tag replaces an earlier one."""
        self._record("tags", tags, "Run.set_tags")

    def log_input(self, name: str, context: str, **description: Any) -> None:
        """Record a data set that went in.

        Parameters
        ----------
        name
            Of the data set.
        context
            What it served, e.g. ``"train"``.
        **description
            More about it, e.g. ``num_samples=1797, digest="3f2a"``.
        """
        check_name(context, "context", "Run.log_input")
        described = [{"name": name, **description}]
        self._record("inputs", {context: described}, "Run.log_input")

    def log_artifact(
        self, path: str | os.PathLike[str], name: str | None = None
    ) -> None:
        """Keep a copy of a file, or of all files in a folder.

        Parameters
        ----------
        path
            Of the file or folder.
        name
            Relative name below ``artifacts/``; None: that of ``path``.

        Raises
        ------
        FileNotFoundError
            If there is nothing at ``path``.
        """
        source = Path(path)
        name = artifacts.check_artifact_name(name or source.name, "Run.log_artifact")
        if source.is_file():
            self._keep(name, lambda target: artifacts.copy_artifact(source, target))
            return
        if not source.is_dir():
            raise FileNotFoundError(
                f"Run.log_artifact: expected a file or folder, got {os.fspath(path)!r}, "
                "where there is none. Write it first."
            )
        for file in sorted(file for file in source.rglob("*") if file.is_file()):
            self.log_artifact(file, f"{name}/{file.relative_to(source).as_posix()}")

    def log_figure(self, figure: Any, name: str) -> None:
        """Keep a picture of a figure.

        Parameters
        ----------
        figure
            Of matplotlib, plotly or Pillow, or anything with ``savefig``.
        name
            Relative name below ``artifacts/``; its suffix is the format.
        """
        name = artifacts.check_artifact_name(name, "Run.log_figure")
        self._keep(name, lambda target: artifacts.write_figure_artifact(figure, target))

    def log_text(self, text: str, name: str) -> None:
        """Keep a text as a file below ``artifacts/``."""
        name = artifacts.check_artifact_name(name, "Run.log_text")
        self._keep(name, lambda target: artifacts.write_text_artifact(text, target))

    # ------------------------------------------------------- position and history

    def flush(self) -> None:
        """Read out the tensors that wait for it; all that is logged is durable then."""
        self._read_out()

    def position(self) -> int:
        """``seq`` of the last row; what is logged later has a higher one."""
        self._read_out()
        return self._journal.last_seq()

    def rewind(self, seq: int, rank: int | None = None) -> None:
        """Go back to a position: rows after it are superseded, and stay on record.

        Parameters
        ----------
        seq : >= -1
            What ``position`` gave.
        rank
            Rank whose rows these are, if there is no longer such a rank; None: this one.
        """
        if rank not in (None, self.rank):
            with Run(self.path, None, rank=rank) as other:
                other.rewind(seq)
            return
        if not -1 <= seq <= self.position():
            raise ValueError(
                f"Run.rewind: expected a position from -1 to {self.position()}, got "
                f"{seq!r}. Give what Run.position() gave."
            )
        self._journal.write("", "", [("", REWIND, float(seq), None)])
        self.restore_indices()

    # ---------------------------------------------------------------- the run itself

    @property
    def name(self) -> str:
        """Readable name of the run."""
        return self._manifest.name if self._manifest else self.id

    @property
    def status(self) -> str:
        """``running``, ``finished``, ``failed`` or ``killed``."""
        return self._status

    @property
    def mlflow_run_id(self) -> str:
        """Id of the MLflow run; waits until delivery has made it.

        Raises
        ------
        DeliveryError
            If it does not within 60 s, or the run is not delivered.
        """
        return self._delivery.wait_for_run_id(60.0)

    @property
    def manifest(self) -> Manifest:
        """What is known of the run as a whole; written by ``save_manifest``."""
        if self._manifest is None:
            return Manifest.read(self.path)
        return self._manifest

    def save_manifest(self, **extra: Any) -> None:
        """Write the manifest, with more in its ``extra``; on rank 0 only."""
        if self._manifest is None:
            return
        self._manifest.extra |= extra
        try:
            self._manifest.write(self.path)
        except OSError as error:
            warn(
                f"run {self.id!r}: expected to write its manifest, got {error}. "
                "Training goes on; make space before the run ends."
            )

    def deliver(self) -> None:
        """Start the process that takes the rows to MLflow."""
        self._delivery.start()

    def finish(
        self,
        status: str = "finished",
        error: BaseException | None = None,
        wait_s: float = 10.0,
    ) -> None:
        """End the run; a second call does nothing.

        Parameters
        ----------
        status
            ``finished``, ``failed`` or ``killed``.
        error
            What ended a failed run.
        wait_s : s
            How long to wait for delivery, which goes on afterwards where it must.
        """
        if status not in _STATUSES:
            raise ValueError(
                f"Run.finish: expected one of {', '.join(_STATUSES)}, got {status!r}."
            )
        if self._status != "running" or os.getpid() != self._pid:
            return
        self._status = status
        atexit.unregister(self._finish_at_exit)
        self._read_out()
        if self._manifest is not None:
            self._manifest.status = status
            self._manifest.ended = now()
            if error is not None:
                self._manifest.error = describe_error(error)
            # Before the lock goes: a free lock and "running" would mean killed.
            self.save_manifest()
        elif error is not None:
            write_failure(get_rank_dir(self.path, self.rank), error, now())
        last_seq = self._journal.last_seq()
        self._journal.close()
        if self._pending:
            warn(
                f"run {self.id!r}: expected no logging while it finishes, got "
                f"{len(self._pending)} tensors, which are lost. Log before finish()."
            )
        self._delivery.wait(last_seq, wait_s)

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        status = _status_after(exc)
        self.finish(status, exc if status == "failed" else None)

    def __repr__(self) -> str:
        return f"<Run {self.id} {self._status}>"

    # ------------------------------------------------------------------- internals

    def _log_float(
        self,
        what: str,
        set: str,
        name: str,
        number: float,
        index: int | None,
        epoch: int | None,
        step: int | None,
    ) -> bool:
        """Write a float under a name known to the block; False if it takes more care.

        As ``_log_floats``, at two thirds of the price for the most common call.
        """
        journal = self._journal
        block, slot = journal.block, CAPACITY  # how slots are taken: see Block
        try:
            group = block.groups.get((what, set))
            if group is None or name not in group.ids:
                return False
            at = group.auto_index.choose(index, step)
            now = time.time_ns() // 1000
            after = NO_COUNT if step is None else step
            during = NO_EPOCH if epoch is None else epoch
            for slot in block.slots:  # noqa: B007
                break
            if slot < CAPACITY:
                # fmt: off
                block.put(
                    slot * ROW_BYTES, now, at, after, number, during, group.ids[name],
                    FLOAT, 0, MARK ^ slot,
                )
                # fmt: on
            else:
                leaf = (name, FLOAT, number, None)
                journal.write_row(what, set, leaf, now, at, after, during)
        except BaseException:
            block.void(slot)
            _checked(what, set, index, epoch, step)
            raise
        return True

    def _log_floats(
        self,
        what: str,
        set: str,
        values: dict[str, float],
        index: int | None,
        epoch: int | None,
        step: int | None,
    ) -> bool:
        """Write floats under names known to the block; False if it takes more care."""
        journal = self._journal
        block, slot = journal.block, CAPACITY  # how slots are taken: see Block
        try:
            group = block.groups.get((what, set))
            if group is None:
                return False
            keys = group.ids
            if not values.keys() <= keys.keys():
                return False
            at = group.auto_index.choose(index, step)
            put, now = block.put, time.time_ns() // 1000
            after = NO_COUNT if step is None else step
            during = NO_EPOCH if epoch is None else epoch
            for (name, number), slot in zip(values.items(), block.slots, strict=False):
                if slot < CAPACITY:
                    # fmt: off
                    put(
                        slot * ROW_BYTES, now, at, after, number, during, keys[name],
                        FLOAT, 0, MARK ^ slot,
                    )
                    # fmt: on
                else:
                    leaf = (name, FLOAT, number, None)
                    journal.write_row(what, set, leaf, now, at, after, during)
        except BaseException:
            block.void(slot)
            # Either an argument is at fault, which is told here, or a handler raised.
            _checked(what, set, index, epoch, step)
            raise
        return True

    def _log_any(
        self,
        what: str,
        set: str,
        value: object,
        index: int | None,
        append: bool,
        epoch: int | None,
        step: int | None,
    ) -> None:
        """Check everything, then write it."""
        index, epoch, step = _checked(what, set, index, epoch, step)
        self._journal.check_open()
        is_new = append or index is None
        found = flatten_value(value, _place(what, set))
        at = self._journal.get_auto_index(what, set).choose(index, step)
        counts = {"index": None if at == NO_COUNT else at, "epoch": epoch, "step": step}
        if not is_new:
            self._read_out()  # so that what waits comes before, and is superseded too
            self._journal.write(what, set, [("", OVERWRITE, 0.0, None)], **counts)
        self._write(what, set, found, counts)

    def _record(self, what: str, values: Mapping[str, Any], place: str) -> None:
        """Write what has neither set nor position."""
        if not isinstance(values, Mapping):
            raise TypeError(
                f"{place}: expected a dictionary, got {values!r:.200}. Give each value "
                "a name."
            )
        self._journal.check_open()
        if values:
            self._write(what, "", flatten_value(values, place), {})

    def _write(
        self, what: str, set: str, found: list[Any], counts: dict[str, int | None]
    ) -> None:
        """Write leaves, and set aside those that must be read out first."""
        now = time.time_ns() // 1000
        ready = [leaf for leaf in found if leaf[1] != DEFERRED]
        self._journal.write(what, set, ready, **counts, time_us=now)
        self._pending.extend(
            (now, what, set, leaf, counts) for leaf in found if leaf[1] == DEFERRED
        )

    def _read_out(self) -> None:
        """Write the rows whose values were on a device, all of them read in bulk."""
        if not self._pending:
            return
        with self._reading:
            batch = []
            while self._pending:
                batch.append(self._pending.popleft())
            try:
                values = fetch_values(
                    copy for _, _, _, leaf, _ in batch for copy in find_copies(leaf[3])
                )
            except RuntimeError as error:  # as after an assertion on the device
                names = sorted({f"{w}/{s}/{leaf[0]}" for _, w, s, leaf, _ in batch})
                warn(
                    f"run {self.id!r}: expected to read {len(batch)} tensors from their "
                    f"device, got {error}. Lost: {', '.join(names[:10])}."
                )
                return
            for now, what, set, (name, _, _, value), counts in batch:
                leaf = finish_leaf(name, value, values, _place(what, set))
                self._journal.write(what, set, [leaf], **counts, time_us=now)

    def _keep(self, name: str, place: Callable[[Path], dict[str, Any]]) -> None:
        """Put an artifact in its place and on record; a failing disk is a warning."""
        self._journal.check_open()
        try:
            described = place(self.path / "artifacts" / name)
        except OSError as error:
            warn(
                f"run {self.id!r}: expected to write artifacts/{name}, got {error}. "
                "Training goes on without it; make space."
            )
            return
        self._record("artifacts", {name: [described]}, "Run.log_artifact")

    def restore_indices(self) -> None:
        """Let automatic indices go on from the rows that count."""
        highest = find_highest_indices(get_rank_dir(self.path, self.rank))
        self._journal.reset_indices(highest)

    def _finish_at_exit(self) -> None:
        """Finish as the interpreter's end tells: an exception nobody caught, or none."""
        error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
        status = _status_after(error)
        self.finish(status, error if status == "failed" else None)


def _place(what: object, set: object) -> str:
    """What messages about a logged value start with."""
    return f"Run.log({what!r}, {set!r})"


def _checked(
    what: object, set: object, index: object, epoch: object, step: object
) -> tuple[int | None, int | None, int | None]:
    """Index, epoch and step as ints; raises if an argument cannot be recorded."""
    place = _place(what, set)
    check_name(what, "what", place)
    check_name(set, "set", place)
    return (
        _checked_count(index, "index", _MAX_COUNT, place),
        _checked_count(epoch, "epoch", _MAX_EPOCH, place),
        _checked_count(step, "step", _MAX_COUNT, place),
    )


def _checked_count(count: object, word: str, highest: int, place: str) -> int | None:
    """An index, epoch or step as an int."""
    if count is None:
        return None
    try:
        number = count.__index__()  # type: ignore[attr-defined]
    except AttributeError as error:
        raise TypeError(
            f"{place}: expected an integer or None as {word}, got {count!r}. "
            f"Pass int({word})."
        ) from error
    if not -highest <= number <= highest:
        raise ValueError(
            f"{place}: expected {word} up to {highest}, got {number}. Count in units "
            "that fit."
        )
    return int(number)


def _status_after(error: BaseException | None) -> str:
    """Status of a run that ended with an exception, or with none."""
    if error is None:
        return "finished"
    if isinstance(error, KeyboardInterrupt):
        return "killed"
    if isinstance(error, SystemExit):
        if not error.code:
            return "finished"
        # A shell's code for an end by a signal is 128 and its number.
        is_signal = isinstance(error.code, int) and error.code > 128
        return "killed" if is_signal else "failed"
    return "failed"


def now() -> str:
    """UTC, ISO 8601."""
    return datetime.now(UTC).isoformat()
