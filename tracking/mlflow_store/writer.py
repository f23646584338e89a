"""Write into one MLflow run: send what it does not have yet.

Nothing here waits or tries again: an `UnreachableError` reaches the caller. What MLflow
refuses is found by bisecting a batch, recorded, and left out, so that it does not hold
up the rest.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from tracking.errors import TrackingError
from tracking.mlflow_store.client import (
    MAX_BATCH,
    MAX_PARAMS,
    MAX_TAG_LENGTH,
    GoneError,
    MlflowRun,
    Point,
    RefusedError,
    StoreClient,
    UnreachableError,
    as_json,
)
from tracking.mlflow_store.keys import is_valid
from tracking.mlflow_store.properties import RunProperties
from tracking.mlflow_store.series import (
    IMAGES_TAG,
    TABLES_TAG,
    is_present,
    is_series_file,
    merge_tables,
    open_upload,
)
from tracking.mlflow_store.tags import NOTE, NOTE_DIGEST, digest_note

BATCH: Final = MAX_BATCH - 20
"""Points in one call; the rest of a call is for the tags that go with them."""

PROBE_TAG: Final = "luz.probe"
"""Written to see whether MLflow takes anything, after it failed several times."""

_FAILURES: Final = (RefusedError, GoneError, UnreachableError)
_MAX_REASON: Final = 200
_NUM_TRIES: Final = 2

T = TypeVar("T")


class RunWriter:
    """Writes into one MLflow run.

    Parameters
    ----------
    run
        The run as MLflow has it now.
    watermark_tag
        Tag with the ``seq`` up to which all rows have been sent.
    is_borrowed
        Whether the run is the caller's, so that its status stays as it is.

    Attributes
    ----------
    refused
        Why MLflow refused something, by key or name; part of the run's flags.
    is_isolating
        Whether what fails counts as refused while MLflow takes other things. A call
        that succeeds ends it.
    """

    def __init__(
        self,
        client: StoreClient,
        run: MlflowRun,
        watermark_tag: str,
        *,
        is_borrowed: bool = False,
    ) -> None:
        self.client = client
        self.run_id = run.run_id
        self.experiment_id = run.experiment_id
        self.status = run.status
        self.tags = dict(run.tags)
        self.refused = read_refusals(run.tags)
        self._watermark_tag = watermark_tag
        self.is_isolating = False
        self._is_borrowed = is_borrowed
        self._params = dict(run.params)
        self._inputs: list[Any] = []
        self._artifacts: dict[str, Any] = {}
        self._failed_artifacts: set[str] = set()
        self._may_have_images = IMAGES_TAG in run.tags

    @property
    def delivered(self) -> int:
        """``seq`` up to which MLflow has all rows, by its own tag; -1 for none."""
        text = self.tags.get(self._watermark_tag, "-1")
        return int(text) if text.lstrip("-").isdigit() else -1

    def can_write(self) -> bool:
        """Whether MLflow takes a write into the run now."""
        try:
            self.client.run(self.run_id)
            # Another value each time: a database would not write the same one.
            self.client.send(self.run_id, (), {PROBE_TAG: str(time.time_ns())})
        except (RefusedError, GoneError, UnreachableError):
            return False
        return True

    def _check_refusal(self, error: TrackingError) -> None:
        """Raise the error again unless it is about what was sent.

        An error that may pass counts as a refusal only while isolating, and only if
        MLflow takes another write right after it.
        """
        if isinstance(error, RefusedError | GoneError):
            self.client.run(self.run_id)  # raises if it is deleted
        elif not self.is_isolating or not self.can_write():
            raise error

    def _leave_out(
        self, name: str, send: Callable[[], None], error: TrackingError
    ) -> None:
        """Record that MLflow refuses an item; what merely failed is tried again first."""
        self._check_refusal(error)
        if isinstance(error, UnreachableError):
            for _ in range(_NUM_TRIES):
                try:
                    send()
                except _FAILURES as again:
                    self._check_refusal(again)
                else:
                    return
        self.refused[name] = str(error)[:_MAX_REASON]

    def send_points(self, points: Sequence[Point], upto: int | None = None) -> None:
        """Send at most `BATCH` points; leave out those that MLflow refuses.

        Parameters
        ----------
        points
            In any order.
        upto
            ``seq`` up to which all rows have been sent with these points; stored in
            the same call. None: the watermark stays.
        """
        self._send_batch(points, self._watermark(upto))
        self.is_isolating = False

    def send(
        self,
        wanted: RunProperties,
        more: Mapping[str, str],
        points: Sequence[Point] = (),
        upto: int | None = None,
    ) -> None:
        """Send the params, tags and inputs that MLflow does not have, and some points.

        They go in one call if it has room: for a short run, each call takes longer than
        what it sends.

        Parameters
        ----------
        more
            Tags that describe the run. A tag of the user's replaces one of these, and a
            description that somebody changed in MLflow stays.
        """
        params = {k: v for k, v in wanted.params.items() if k not in self._params}
        tags = self._list_missing_tags(wanted, more)
        if not self._send_together(params, tags, points, upto):
            send = partial(self.client.send, self.run_id)
            for some in _split(params):
                self._bisect(lambda items: send(params=dict(items)), some)
                self._params |= dict(some)
            for some in _split(tags):
                self._bisect(lambda items: send(tags=dict(items)), some)
                self.tags |= dict(some)
            self._send_batch(points, self._watermark(upto))
        for described in wanted.inputs:
            if described not in self._inputs:
                self._bisect(self._send_inputs, [described])
                self._inputs.append(described)
        self.is_isolating = False

    def _list_missing_tags(
        self, wanted: RunProperties, more: Mapping[str, str]
    ) -> dict[str, str]:
        tags = {**more, **wanted.tags, **self._flag_tags(wanted)}
        if TABLES_TAG in tags:
            tags[TABLES_TAG] = merge_tables(tags[TABLES_TAG], self.tags.get(TABLES_TAG))
        tags = {k: v for k, v in tags.items() if self.tags.get(k) != v}
        if NOTE in tags and NOTE not in wanted.tags and self._is_note_edited():
            kept = {name: tags.pop(name, "") for name in (NOTE, NOTE_DIGEST)}
            self.tags |= kept
        return tags

    def _send_together(
        self,
        params: dict[str, str],
        tags: dict[str, str],
        points: Sequence[Point],
        upto: int | None,
    ) -> bool:
        """Send all in one call; False if that is too much, or MLflow refuses some of it."""
        tags = tags | self._watermark(upto)
        if max(len(params), len(tags)) > MAX_PARAMS:
            return False
        if len(params) + len(tags) + len(points) > MAX_BATCH:
            return False
        try:
            if params or tags or points:
                self.client.send(self.run_id, points, tags, params)
        except _FAILURES as error:
            self._check_refusal(error)
            return False
        self._params |= params
        self.tags |= tags
        return True

    def _watermark(self, upto: int | None) -> dict[str, str]:
        return {} if upto is None else {self._watermark_tag: str(upto)}

    def upload_artifacts(
        self, wanted: RunProperties, folder: Path, limit_s: float | None = None
    ) -> None:
        """Upload the artifacts that MLflow does not have.

        Parameters
        ----------
        folder
            With the files. An artifact without a file is recorded as refused.
        limit_s : seconds
            Stop after the first file that ends later than this; None: upload all.
        """
        started = time.monotonic()
        if self._may_have_images:
            self.recognize_artifacts(wanted, "images")
            self._may_have_images = False
        missing = self._list_missing_artifacts(wanted, folder)
        missing.sort(key=self._failed_artifacts.__contains__)  # what failed comes last
        for name in missing:
            self._upload(name, wanted.artifacts[name], folder)
            if limit_s is not None and time.monotonic() - started >= limit_s:
                break
        self.is_isolating = False

    def _upload(self, name: str, about: Mapping[str, Any], folder: Path) -> None:
        """Upload an artifact; one that MLflow refuses, or that cannot be made, is left out."""
        parent = name.rpartition("/")[0] or None
        try:
            with open_upload(folder, name, about) as path:
                send = partial(self.client.send_artifact, self.run_id, path, parent)
                try:
                    send()
                    if not is_series_file(about):
                        self._check_stored_name(name, parent)
                except _FAILURES as error:
                    self._failed_artifacts.add(name)
                    self._leave_out(name, send, error)
        except (ImportError, OSError, ValueError) as error:
            self.refused[name] = str(error)[:_MAX_REASON]
        self._artifacts[name] = about

    def _check_stored_name(self, name: str, parent: str | None) -> None:
        """Raise if a server keeps an artifact under another name, as it does ``a?b``."""
        if not is_valid(name) and name not in self.client.artifacts(
            self.run_id, parent
        ):
            raise RefusedError("MLflow stores it under another name")

    def recognize_artifacts(
        self, wanted: RunProperties, folder: str | None = None
    ) -> None:
        """Treat artifacts that MLflow has under the same name and size as uploaded."""
        present = self.client.artifacts(self.run_id, folder)
        for name, described in wanted.artifacts.items():
            size_bytes = described.get("size_bytes")
            # The size of a picture that delivery made is not known; its name tells what it is.
            if name in present and size_bytes in (None, present[name]):
                self._artifacts[name] = described

    def set_tag(self, key: str, text: str) -> None:
        """Set a tag of the MLflow run."""
        self.client.send(self.run_id, (), {key: text})
        self.tags[key] = text

    def set_status(self, status: str, end_ms: int | None = None) -> None:
        """Set the run's status, and the time of its end if it has ended."""
        if not self._is_borrowed:
            self.client.set_status(self.run_id, status, end_ms)
        self.status = status

    def flags(self, wanted: RunProperties) -> dict[str, Any]:
        """What MLflow stores inexactly, or refused."""
        refused = {"refused": self.refused} if self.refused else {}
        return {**wanted.flags, **refused}

    def _list_missing_artifacts(self, wanted: RunProperties, folder: Path) -> list[str]:
        missing = []
        for name, described in wanted.artifacts.items():
            if self._artifacts.get(name) == described or name in self.refused:
                continue
            if is_present(folder, name, described):
                missing.append(name)
            else:
                self.refused[name] = "the file is not in the run's folder"
        return missing

    def _is_note_edited(self) -> bool:
        """Whether MLflow has another description than the one that was sent last."""
        tags = self.client.run(self.run_id).tags
        digest = tags.get(NOTE_DIGEST)
        return digest is not None and digest != digest_note(tags.get(NOTE, ""))

    def _flag_tags(self, wanted: RunProperties) -> dict[str, str]:
        """Tags about flags and changed params, if there are any."""
        found = {"luz.flags": self.flags(wanted), "luz.changed_params": wanted.changed}
        return {
            name: json_within_limit(value)
            for name, value in found.items()
            if value or name in self.tags
        }

    def _send_batch(self, points: Sequence[Point], tags: dict[str, str]) -> None:
        """Send points and tags; leave out points that MLflow refuses."""
        if not points and not tags:
            return
        try:
            self.client.send(self.run_id, points, tags)
        except _FAILURES as error:
            self._check_refusal(error)
            if not points:
                raise UnreachableError(str(error)) from error
            self._bisect(partial(self.client.send, self.run_id), points)
            self._send_batch((), tags)
        else:
            self.tags |= tags

    def _bisect(self, send: Callable[[Sequence[T]], None], items: Sequence[T]) -> None:
        """Send items; leave out and record those that MLflow refuses."""
        try:
            send(items)
        except _FAILURES as error:
            self._check_refusal(error)
            if len(items) == 1:
                self._leave_out(_name_of(items[0]), partial(send, items), error)
                return
            half = len(items) // 2
            self._bisect(send, items[:half])
            self._bisect(send, items[half:])

    def _send_inputs(self, inputs: Sequence[Any]) -> None:
        for dataset, tags in inputs:
            self.client.send_input(self.run_id, dataset, tags)


def json_within_limit(value: Mapping[str, Any]) -> str:
    """JSON of a dictionary, with as many entries as fit into a tag."""
    for limit in (10_000, 300, 100, 30, 10, 3, 1):
        text = as_json(_cut(value, limit))
        if len(text) <= MAX_TAG_LENGTH:
            return text
    return as_json({"...": len(value)})


def read_refusals(tags: Mapping[str, str]) -> dict[str, str]:
    """Why MLflow refused something, by key or name, as recorded in a run's tags."""
    try:
        found = json.loads(tags.get("luz.flags", "{}")).get("refused", {})
    except (ValueError, AttributeError):
        return {}
    return found if isinstance(found, dict) else {}


def _cut(value: Any, limit: int) -> Any:
    """Keep at most ``limit`` entries at each level, and count the others."""
    if isinstance(value, str):
        return value[: 20 * limit]
    if not isinstance(value, Mapping):
        return value
    kept = {key: _cut(value[key], limit) for key in list(value)[:limit]}
    return kept if len(kept) == len(value) else {**kept, "...": len(value) - len(kept)}


def _name_of(item: Any) -> str:
    """Name of a param, tag, point or data set."""
    return item[0] if isinstance(item[0], str) else str(item[0].get("name"))


def _split(items: Mapping[str, str]) -> Iterator[list[tuple[str, str]]]:
    """Split a dictionary into parts that one call takes."""
    pairs = list(items.items())
    for start in range(0, len(pairs), MAX_PARAMS):
        yield pairs[start : start + MAX_PARAMS]
