"""Write logged values to a run's journal."""

from __future__ import annotations

import json
import threading
import time
import zlib
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, NoReturn

from tracking.errors import warn
from tracking.journal.row_format import FIELDS, MAX_COUNT, NO_COUNT, NO_EPOCH, ROW_BYTES
from tracking.journal.segment import CAPACITY
from tracking.journal.writer import Indices, Journal
from tracking.read import count_fits, find_highest_indices
from tracking.redaction import is_secret_name, redact_value
from tracking.schema import (
    DEFERRED,
    FIT,
    FLOAT,
    JSON,
    OVERWRITE,
    REWIND,
    STR,
    Leaf,
    check_name,
    fetch_values,
    find_copies,
    finish_leaf,
    flatten_params,
    flatten_value,
)
from tracking.settings import read_secrets
from tracking.store import get_rank_dir

_FLOATS: Final = frozenset([float])
_TEXTS: Final = (STR, JSON)
_pack, _crc32, _time_ns = FIELDS.pack, zlib.crc32, time.time_ns
_HIGHEST: Final = {"epoch": 2**31 - 1}
"""Where it is not ``MAX_COUNT``."""

MISSING: Final[Any] = ...
"""Default of required arguments, so that a call without them gets a message of ours."""

Counts = dict[str, int | None]
"""Index, epoch and step of a row, by these words; None, or no such word, is null."""

_DeferredRow = tuple[int, str, str, Leaf, Counts]
"""Time in us, what, set, leaf and counts of a row."""


class RowLogger:
    """Writes values to the journal of one rank; the logging half of ``Run``.

    Its parameters and attributes are those of ``Run``.
    """

    def __init__(
        self, path: Path, rank: int, durability: Literal["process", "fsync"]
    ) -> None:
        self.id = path.name
        self.path = path
        self.rank = rank
        self.fit = 1
        self._rank_dir = get_rank_dir(path, rank)
        self._deferred: deque[_DeferredRow] = deque()
        self._reading = threading.RLock()
        self._begun_at: int | None = None
        # Highest indices of the fits that were left, and how many fits had rows before;
        # None: the records have to be read.
        self._left: dict[int, Indices] = {}
        self._num_fits: int | None = None
        self._fitting: threading.Thread | None = None
        self._secrets = read_secrets()
        self._journal = self._make_journal(durability)
        if self._journal.last_seq() == -1:
            self._num_fits = 0

    def _make_journal(self, durability: Literal["process", "fsync"]) -> Journal:
        return Journal(self._rank_dir, durability=durability, on_tick=self.flush)

    def log(
        self,
        what: str,
        set: str = MISSING,
        value: object = MISSING,
        index: int | None = None,
        append: bool = True,
        *,
        epoch: int | None = None,
        step: int | None = None,
        all_ranks: bool = False,
    ) -> None:
        """Record a value.

        Parameters
        ----------
        what
            Kind of the value, e.g. ``"metrics"``.
        set
            Data that the value was computed on, e.g. ``"train"``.
        value
            Number, bool, string, None, tensor or array of at most 1024 elements, or a
            dictionary or list of those. Each leaf of a dictionary becomes one row.
        index
            Position in the series of this ``what`` and ``set``, e.g. the epoch. None:
            the next position, or no position if ``step`` is given.
        append
            False: the values already logged at ``index`` are superseded.
        epoch
            Epoch of the value, from 1.
        step
            Optimizer steps finished.
        all_ranks
            Whether ranks other than 0 record it too. For values that every rank logs, such
            as an averaged metric, the rows of rank 0 are enough.

        Raises
        ------
        TypeError, ValueError
            If any part of the value cannot be recorded. Nothing is recorded then.
        RunClosedError
            If the run has finished.

        Notes
        -----
        In a forked process, such as a worker of a DataLoader, a warning says once that
        what is logged there is dropped.

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
            elif value is MISSING:
                refuse_missing("log", "what, set and value", what, set)
        self._log_any(what, set, value, append, index=index, epoch=epoch, step=step)

    def log_metric(
        self,
        name: str,
        value: object = MISSING,
        step: int | None = None,
        *,
        set: str = "train",
        index: int | None = None,
        epoch: int | None = None,
        all_ranks: bool = False,
    ) -> None:
        """Record one metric.

        The same as ``log("metrics", set, {name: value}, index, step=step)``.

        Parameters
        ----------
        name
            Name of the metric, e.g. ``"accuracy"``.
        value
            As in ``log``.
        set
            What the metric was computed on, e.g. ``"valid"``.
        step, index, epoch, all_ranks
            As in ``log``.
        """
        if type(value) is not float or not self._log_float(
            "metrics", set, name, value, index, epoch, step
        ):
            if value is MISSING:
                refuse_missing("log_metric", "name and value", name)
            counts = {"index": index, "epoch": epoch, "step": step}
            self._log_any("metrics", set, {name: value}, True, **counts)

    def log_step(
        self,
        values: Mapping[str, object],
        step: int,
        *,
        set: str = "train",
        epoch: int | None = None,
        all_ranks: bool = False,
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
        all_ranks
            As in ``log``.
        """
        if step is None or (
            type(values) is not dict and not isinstance(values, Mapping)
        ):
            raise TypeError(
                f"Run.log_step: expected values by name and a step, got {values!r:.200} and "
                f"step={step!r}. Write for example log_step({{'loss': 0.2}}, step=501)."
            )
        self.log("steps", set, values, epoch=epoch, step=step, all_ranks=all_ranks)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record hyper-parameters; the names of nested ones are joined by ``/``.

        Secrets are masked: texts under a name such as ``api_key``, credentials in URLs,
        and the values of environment variables that hold secrets.

        Values of any kind are recorded. Anything other than a number, string, small array,
        dict or list of those is recorded as text.
        """
        self._log_dict("params", params, "Run.log_params")

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Record tags; a later value of a tag replaces an earlier one."""
        self._log_dict("tags", tags, "Run.set_tags")

    def log_input(self, name: str, context: str, **description: Any) -> None:
        """Record a data set that is used.

        Parameters
        ----------
        name
            Name of the data set.
        context
            What it is used for, e.g. ``"train"``.
        **description
            More about it, e.g. ``num_samples=1797, digest="3f2a"``.
        """
        check_name(name, "name", "Run.log_input")
        check_name(context, "context", "Run.log_input")
        described = [{"name": name, **description}]
        self._log_dict("inputs", {context: described}, "Run.log_input")

    # ------------------------------------------------------- position and history

    def flush(self) -> None:
        """Read all logged tensors from their devices, and write them.

        Afterwards everything that was logged survives if the process is killed.
        """
        if not self._deferred:
            if self._journal.is_in_child:  # where nobody releases the lock
                return
        elif not self._journal.takes_rows():
            return
        with self._reading:  # even if nothing waits: another thread may be reading it
            lost = self._write_deferred()
        if lost:
            names = list(lost)
            warn(
                f"run {self.id!r}: expected to read all tensors that were logged, got "
                f"{lost[names[0]]:.500} Lost: {', '.join(names[:10])}."
            )

    def _write_deferred(self) -> dict[str, str]:
        """Write the tensors that wait; return what could not be read, and why."""
        rows: deque[_DeferredRow] = deque()
        lost: dict[str, str] = {}
        try:
            while self._deferred:
                rows.append(self._deferred.popleft())
            copies = [copy for *_, leaf, _ in rows for copy in find_copies(leaf[3])]
            values = fetch_values(copies) if copies else {}
            while rows:
                now, what, set, (name, _, _, value), counts = rows[0]
                try:
                    leaf = finish_leaf(name, value, values, describe_call(what, set))
                except Exception as error:  # noqa: BLE001  one value takes no other along
                    lost[f"{what}/{set}/{name}"] = str(error)
                else:
                    self._journal.write(what, set, [leaf], **counts, time_us=now)
                rows.popleft()
        except (KeyboardInterrupt, SystemExit):  # the next call writes the others
            self._deferred.extendleft(reversed(rows))
            raise
        return lost

    def position(self) -> int:
        """``seq`` of the last row. Rows that are logged later have a higher one."""
        self.flush()
        return self._journal.last_seq()

    def get_indices(self) -> dict[str, Any] | None:
        """Return the fit and the highest index of each series, for a later ``rewind``.

        They are plain JSON values. None if they were not read since the run was continued.
        """
        self.flush()
        highest = self._journal.get_indices()
        if highest is None:
            return None
        found = [[what, set_, index] for (what, set_), index in highest.items()]
        return {"fit": self.fit, "highest": found}

    def rewind(self, seq: int, *, indices: Mapping[str, Any] | None = None) -> None:
        """Go back to a position: later rows are superseded, and stay on record.

        Parameters
        ----------
        seq : >= -1
            A value that ``position`` returned.
        indices
            What ``get_indices`` returned there; None: found by reading the whole journal.
        """
        _check_count(seq, "seq", "Run.rewind")
        if seq is None or not -1 <= seq <= self.position():
            raise ValueError(
                f"Run.rewind: expected a position from -1 to {self.position()}, got "
                f"{seq!r}. Pass a value that Run.position() returned."
            )
        self._journal.write("", "", [("", REWIND, float(seq), None)])
        if indices is None:
            self.restore_indices()
            return
        self._forget_fits()
        self.fit = indices["fit"]
        highest = {(what, set_): index for what, set_, index in indices["highest"]}
        self._journal.reset_indices(highest)

    def begin_fit(self, number: int | None = None) -> int:
        """Count what is logged from now on as another fit, whose epochs start again at 1.

        Its metrics have rows of their own in ``PastRun.wide``, and names of their own in
        MLflow, such as ``valid/loss_fit2``. ``Learner.fit`` calls this.

        Parameters
        ----------
        number : >= 1
            Which fit of the run it is; None: the next one. It is the first if nothing
            has been logged with an epoch, nor since an earlier call.

        Returns
        -------
        which fit it is, from 1

        Raises
        ------
        RunClosedError
            If the run has finished.
        RuntimeError
            If another thread is in a fit of this run: their rows could not be told apart.
        TypeError, ValueError
            If ``number`` is not a whole number from 1.
        """
        if number is not None:
            number = _check_fit(number, "number", "Run.begin_fit")
        if not self._journal.takes_rows():
            return number or 1
        thread = threading.current_thread()
        if self._fitting not in (None, thread) and self._fitting.is_alive():
            raise RuntimeError(
                f"run {self.id!r}: expected one fit at a time, got one in another thread. "
                "Start a run for each."
            )
        self._fitting = thread
        here = self.position()
        if number is None:
            number = 1 + self._count_fits()
        if self._begun_at is None:
            self._begun_at = here
        self._continue_fit(number)
        return number

    def end_fit(self, outer: int = 1) -> None:
        """Count what is logged from now on as outside any fit, as before the first one.

        Parameters
        ----------
        outer : >= 1
            Fit that continues, if this one was inside of it, as in a callback.
        """
        outer = _check_fit(outer, "outer", "Run.end_fit")
        if outer == 1:
            self._fitting = None
        self._continue_fit(outer)

    def _continue_fit(self, number: int) -> None:
        """Write which fit the next rows belong to, unless they do anyway."""
        if number != self.fit and self._journal.takes_rows():
            self.flush()  # deferred rows are of the fit so far
            highest = self._journal.get_indices()
            if highest is not None:
                self._left[self.fit] = highest
            self._journal.write("", "", [("", FIT, float(number), None)])
            self.fit = number
            if number in self._left:
                self._journal.reset_indices(self._left.pop(number))
            elif self._num_fits is not None and number > max(self._num_fits, 1):
                self._journal.reset_indices({})
            else:
                self._restore_indices_once_needed()

    def _count_fits(self) -> int:
        """Count the fits that have rows, from the records only where it is not known."""
        known = self._left | {self.fit: self._journal.get_indices()}
        newest = max(known)
        # Rows of fit 1 may be from before it began, and rows by steps have no index.
        if self._num_fits is None or newest == 1 or not known[newest]:
            self._num_fits = count_fits(self._rank_dir, self._begun_at)
        else:
            self._num_fits = max(self._num_fits, newest)
        return self._num_fits

    def _forget_fits(self) -> None:
        self._left, self._num_fits = {}, None

    def restore_indices_later(self, num_fits: int) -> None:
        """Continue behind all fits, and read the highest indices once one is needed."""
        if num_fits > 1:
            self._journal.write("", "", [("", FIT, 1.0, None)])
        self._forget_fits()
        self.fit = 1
        self._restore_indices_once_needed()

    def _restore_indices_once_needed(self) -> None:
        rank_dir = self._rank_dir
        self._journal.reset_indices_later(lambda: find_highest_indices(rank_dir)[1])

    def restore_indices(self) -> None:
        """Continue the fit and the automatic indices of the rows that are not superseded."""
        self._forget_fits()
        self.fit, highest = find_highest_indices(self._rank_dir)
        self._journal.reset_indices(highest)

    # ------------------------------------------------------------- writing of rows

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
        """Write a float if the block knows its name; else return False.

        The same as ``_log_floats``, but a third faster for the most common call.
        """
        journal = self._journal
        block, slot = journal.block, CAPACITY  # see Block for how slots are taken
        try:
            entry = block.entries.get((what, set, name))
            if entry is None:
                return False
            key, auto_index = entry
            at = index
            if at is None:
                at = auto_index.next() if step is None else NO_COUNT
            now = _time_ns() // 1000
            after = NO_COUNT if step is None else step
            during = NO_EPOCH if epoch is None else epoch
            for slot in block.slots:  # noqa: B007
                break
            if slot < CAPACITY:
                data = _pack(now, at, after, number, during, key, FLOAT, 0)
                block.put(slot * ROW_BYTES, data, _crc32(data, slot))
            else:
                leaf = (name, FLOAT, number, None)
                journal.write_row(what, set, leaf, (now, at, after, during))
            # As ``AutoIndex.give``, whose call would cost a tenth of this one.
            if index is not None and index > auto_index.given:
                auto_index.given = int(index)
        except BaseException:
            block.void(slot)
            counts = {"index": index, "epoch": epoch, "step": step}
            check_arguments(what, set, describe_call(what, set), **counts)
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
        """Write floats with plain names to a known set; else return False."""
        journal = self._journal
        block, slot = journal.block, CAPACITY  # see Block for how slots are taken
        try:
            group = block.groups.get((what, set))
            if group is None:
                return False
            keys = group.ids
            is_known = values.keys() <= keys.keys()
            if not is_known and not all(map(_is_plain_name, values)):
                return False
            at = index
            if at is None:
                at = group.auto_index.next() if step is None else NO_COUNT
            put, now = block.put, _time_ns() // 1000
            after = NO_COUNT if step is None else step
            during = NO_EPOCH if epoch is None else epoch
            if not is_known:
                leaves = _make_leaves(values)
                journal.write_rows(what, set, leaves, (now, at, after, during))
                values = {}
            for (name, number), slot in zip(values.items(), block.slots, strict=False):
                if slot < CAPACITY:
                    # fmt: off
                    data = _pack(
                        now, at, after, number, during, keys[name], FLOAT, 0
                    )
                    # fmt: on
                    put(slot * ROW_BYTES, data, _crc32(data, slot))
                else:
                    rest = _make_leaves(values)[list(values).index(name) :]
                    journal.write_rows(what, set, rest, (now, at, after, during))
                    break
            if index is not None:
                group.auto_index.give(index)
        except BaseException:
            block.void(slot)
            # Raise a clear error if an argument is wrong. Else a signal handler raised.
            counts = {"index": index, "epoch": epoch, "step": step}
            check_arguments(what, set, describe_call(what, set), **counts)
            raise
        return True

    def _log_any(
        self, what: str, set: str, value: object, append: bool, **counts: int | None
    ) -> None:
        """Check all arguments, then write any kind of value."""
        place = describe_call(what, set)
        counts = check_arguments(what, set, place, **counts)
        if not self._journal.takes_rows():
            return
        leaves = flatten_value(value, place)
        if any(self._may_be_secret(leaf) for leaf in leaves):
            leaves = [self._redact(leaf) for leaf in leaves]
        self._log_leaves(what, set, leaves, counts, append)

    def _log_leaves(
        self,
        what: str,
        set: str,
        leaves: list[Leaf],
        counts: Counts,
        append: bool = True,
    ) -> None:
        """Write leaves at one place of a series."""
        index = counts.get("index")
        at = self._journal.get_auto_index(what, set).choose(index, counts["step"])
        counts = counts | {"index": None if at == NO_COUNT else at}
        if not append and index is not None:
            self.flush()  # deferred rows come first, so that they are superseded too
            self._journal.write(what, set, [("", OVERWRITE, 0.0, None)], **counts)
        self._write(what, set, leaves, counts)

    def _may_be_secret(self, leaf: Leaf) -> bool:
        """Whether a text is worth a closer look."""
        name, kind, _, payload = leaf
        if kind not in _TEXTS:
            return False
        for secret in self._secrets:
            if secret in payload:
                return True
        return is_secret_name(name) or ("://" in payload and "@" in payload)

    def _log_dict(self, what: str, values: Mapping[str, Any], place: str) -> None:
        """Write named values that have no set, index, epoch or step."""
        if not isinstance(values, Mapping):
            raise TypeError(
                f"{place}: expected a dictionary, got {values!r:.200}. Give each value "
                "a name."
            )
        if values and self._journal.takes_rows():
            leaves = [self._redact(leaf) for leaf in flatten_params(values, place)]
            self._write(what, "", leaves, {})

    def _redact(self, leaf: Leaf) -> Leaf:
        """Mask the secrets in a leaf that is no number."""
        name, kind, number, payload = leaf
        if kind not in _TEXTS:
            return leaf
        value = json.loads(payload)
        masked = redact_value(name, value, self._secrets)
        if masked == value:
            return leaf
        return name, kind, number, json.dumps(masked, ensure_ascii=False)

    def _write(self, what: str, set: str, leaves: list[Leaf], counts: Counts) -> None:
        """Write the leaves that are ready; keep tensors until ``flush`` reads them."""
        now = time.time_ns() // 1000
        ready = [leaf for leaf in leaves if leaf[1] != DEFERRED]
        self._journal.write(what, set, ready, **counts, time_us=now)
        if len(ready) < len(leaves):
            self._deferred.extend(
                (now, what, set, leaf, counts) for leaf in leaves if leaf[1] == DEFERRED
            )


def _is_plain_name(name: object) -> bool:
    """Whether a name needs no closer look."""
    return type(name) is str and name.isascii()


def _make_leaves(values: dict[str, float]) -> list[Leaf]:
    return [(name, FLOAT, number, None) for name, number in values.items()]


def refuse_missing(method: str, wanted: str, *given: object) -> NoReturn:
    """Raise the error of a call such as ``log({"loss": 0.3})``."""
    got = ", ".join(f"{one!r:.200}" for one in given if one is not MISSING)
    raise TypeError(
        f"Run.{method}: expected {wanted}, got only {got}. Write "
        "for example log_metric('loss', 0.3, set='valid', step=500), or "
        "log('metrics', 'valid', {'loss': 0.3}, step=500)."
    )


def describe_call(what: object, set: object) -> str:
    """Place that messages about a logged value name."""
    return f"Run.log({what!r}, {set!r})"


def check_arguments(what: object, set: object, place: str, **counts: object) -> Counts:
    """Check names and counts; returns the counts as ints."""
    check_name(what, "what", place)
    check_name(set, "set", place)
    return {word: _check_count(one, word, place) for word, one in counts.items()}


def _check_fit(number: int, word: str, place: str) -> int:
    checked = _check_count(number, word, place, _HIGHEST["epoch"])
    if checked is None or checked < 1:
        raise ValueError(
            f"{place}: expected {word} from 1, got {number}. Leave it out for the default."
        )
    return checked


def _check_count(
    count: object, word: str, place: str, highest: int | None = None
) -> int | None:
    if count is None:
        return None
    highest = highest or _HIGHEST.get(word, MAX_COUNT)
    if type(count) is int and -highest <= count <= highest:
        return count
    try:
        number = count.__index__()  # type: ignore[attr-defined]
    except AttributeError as error:
        raise TypeError(
            f"{place}: expected an integer or None as {word}, got {count!r}. "
            f"Pass int({word})."
        ) from error
    if not -highest <= number <= highest:
        raise ValueError(
            f"{place}: expected {word} up to {highest}, got {number}. Count in larger "
            "units."
        )
    return int(number)
