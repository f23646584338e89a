"""One MLflow run being filled: what it has, what it lacks, and sending that.

Nothing here waits or tries again: an `UnreachableError` goes up to who does. What
MLflow refuses is found by halving, noted, and left out, so that it holds up nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from tracking.delivery.scan import RunProperties
from tracking.mlflow_store.client import (
    MAX_BATCH,
    MAX_PARAMS,
    MAX_TAG_LENGTH,
    MlflowRun,
    Point,
    RefusedError,
    StoreClient,
    UnreachableError,
    as_json,
)

BATCH: Final = MAX_BATCH - 20
"""Points of one call; the rest is for tags that are to be written with them."""

T = TypeVar("T")


class RunWriter:
    """Fills one MLflow run.

    Parameters
    ----------
    remote
        Store that the run is in.
    run
        As MLflow has it now.
    mark
        Tag that tells how far the run's rows have been sent.

    Attributes
    ----------
    refused
        Why MLflow took something not, by key or name; part of the run's flags.
    """

    def __init__(self, remote: StoreClient, run: MlflowRun, mark: str) -> None:
        self.remote = remote
        self.run_id = run.run_id
        self.experiment_id = run.experiment_id
        self.status = run.status
        self.tags = dict(run.tags)
        self.refused: dict[str, str] = _refused_before(run.tags)
        self._mark = mark
        self._params = dict(run.params)
        self._inputs: list[Any] = []
        self._artifacts: dict[str, Any] = {}

    @property
    def delivered(self) -> int:
        """``seq`` of the last row that MLflow says it has; -1 before the first."""
        text = self.tags.get(self._mark, "-1")
        return int(text) if text.lstrip("-").isdigit() else -1

    def send_points(self, points: Sequence[Point], upto: int | None = None) -> None:
        """Send points, at most `BATCH`; a point that MLflow refuses is left out.

        Parameters
        ----------
        points
            In any order.
        upto
            Position that all rows have been sent to with these; None: not told.
        """
        self._send_batch(points, {} if upto is None else {self._mark: str(upto)})

    def send_properties(self, wanted: RunProperties, more: Mapping[str, str]) -> None:
        """Send the params, tags and inputs that MLflow lacks.

        Parameters
        ----------
        wanted
            What the journal says.
        more
            Tags of our own.
        """
        params = {k: v for k, v in wanted.params.items() if k not in self._params}
        for some in _in_parts(params, MAX_PARAMS):
            self._halved(self._send_params, list(some.items()))
            self._params |= some
        tags = {**wanted.tags, **more, **self._own_tags(wanted)}
        tags = {k: v for k, v in tags.items() if self.tags.get(k) != v}
        for some in _in_parts(tags, MAX_PARAMS):
            self._halved(self._send_tags, list(some.items()))
            self.tags |= some
        for described in wanted.inputs:
            if described not in self._inputs:
                self._halved(self._send_inputs, [described])
                self._inputs.append(described)

    def missing_artifacts(self, wanted: RunProperties, folder: Path) -> list[str]:
        """Names of the artifacts to be uploaded; those whose file is gone are flagged."""
        missing = []
        for name, described in wanted.artifacts.items():
            if self._artifacts.get(name) == described or name in self.refused:
                continue
            if (folder / name).is_file():
                missing.append(name)
            else:
                self.refused[name] = "the file is not in the run's folder"
        return missing

    def send_artifact(self, wanted: RunProperties, folder: Path, name: str) -> None:
        """Upload one artifact."""
        parent = name.rpartition("/")[0] or None
        try:
            self.remote.send_artifact(self.run_id, folder / name, parent)
        except RefusedError as error:
            self._check_run()
            self.refused[name] = str(error)[:200]
        self._artifacts[name] = wanted.artifacts.get(name)

    def note_artifacts(self, wanted: RunProperties) -> None:
        """Take the artifacts that MLflow has, by name and size, as uploaded."""
        present = self.remote.artifacts(self.run_id)
        for name, described in wanted.artifacts.items():
            if present.get(name) == described.get("size_bytes"):
                self._artifacts[name] = described

    def set_status(
        self, status: str, end_ms: int | None = None, name: str | None = None
    ) -> None:
        """Set the run's status."""
        self.remote.set_status(self.run_id, status, end_ms, name)
        self.status = status

    def flags(self, wanted: RunProperties) -> dict[str, Any]:
        """What MLflow holds otherwise than the journal, or not at all."""
        refused = {"refused": self.refused} if self.refused else {}
        return {**wanted.flags, **refused}

    def _own_tags(self, wanted: RunProperties) -> dict[str, str]:
        """Tags about flags and changed params, if there are any."""
        flags = self.flags(wanted)
        found = {"luz.flags": flags, "luz.changed_params": wanted.changed}
        return {
            name: json_within_limit(value)
            for name, value in found.items()
            if value or name in self.tags
        }

    def _send_batch(self, points: Sequence[Point], tags: dict[str, str]) -> None:
        """Send points and tags; points that MLflow refuses are left out."""
        try:
            self.remote.send(self.run_id, points, tags)
        except RefusedError as error:
            self._check_run()
            if not points:
                raise UnreachableError(str(error)) from error
            if len(points) == 1:
                self.refused[points[0].key] = str(error)[:200]
                self._send_batch([], tags)
                return
            half = len(points) // 2
            self._send_batch(points[:half], {})
            self._send_batch(points[half:], tags)
        else:
            self.tags |= tags

    def _halved(self, send: Callable[[list[T]], None], items: list[T]) -> None:
        """Send items; those that MLflow refuses are left out and noted."""
        try:
            send(items)
        except RefusedError as error:
            self._check_run()
            if len(items) == 1:
                self.refused[_name_of(items[0])] = str(error)[:200]
                return
            half = len(items) // 2
            self._halved(send, items[:half])
            self._halved(send, items[half:])

    def _send_params(self, params: list[tuple[str, str]]) -> None:
        self.remote.send_params(self.run_id, dict(params))

    def _send_tags(self, tags: list[tuple[str, str]]) -> None:
        self.remote.send(self.run_id, (), dict(tags))

    def _send_inputs(self, inputs: list[Any]) -> None:
        for dataset, tags in inputs:
            self.remote.send_input(self.run_id, dataset, tags)

    def _check_run(self) -> None:
        """Raise if what was refused is the run itself, for it is in MLflow's bin."""
        self.remote.run(self.run_id)


def json_within_limit(value: Mapping[str, Any]) -> str:
    """JSON of a dictionary, with as much of it as a tag can hold."""
    for limit in (10_000, 300, 100, 30, 10, 3, 1):
        text = as_json(_cut(value, limit))
        if len(text) <= MAX_TAG_LENGTH:
            return text
    return as_json({"...": len(value)})


def _cut(value: Any, limit: int) -> Any:
    """A value with at most so many entries at each level, the rest counted."""
    if isinstance(value, str):
        return value[: 20 * limit]
    if not isinstance(value, Mapping):
        return value
    kept = {key: _cut(value[key], limit) for key in list(value)[:limit]}
    return kept if len(kept) == len(value) else {**kept, "...": len(value) - len(kept)}


def _name_of(item: Any) -> str:
    """What a param, tag or data set is called."""
    return item[0] if isinstance(item[0], str) else str(item[0].get("name"))


def _in_parts(items: Mapping[str, str], size: int) -> list[dict[str, str]]:
    """A dictionary in several of at most ``size`` entries."""
    pairs = list(items.items())
    return [dict(pairs[i : i + size]) for i in range(0, len(pairs), size)]


def _refused_before(tags: Mapping[str, str]) -> dict[str, str]:
    """What an earlier delivery noted as refused."""
    try:
        found = json.loads(tags.get("luz.flags", "{}")).get("refused", {})
    except (ValueError, AttributeError):
        return {}
    return found if isinstance(found, dict) else {}
