"""What a part of the journal says as a whole, read ahead of sending.

Delivery sends rows in order, but must know what comes later: an overwrite or rewind
further on means that a row is not sent at all. And keys in MLflow, flags, params, tags,
artifacts and inputs follow from the rows alone, so that they are the same whenever and
however often a run is delivered.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from pyarrow import compute as pc

from tracking.journal.reader import JournalReader
from tracking.journal.tombstones import Place, Tombstones
from tracking.mlflow_store.client import MAX_PARAM_LENGTH, MAX_TAG_LENGTH
from tracking.mlflow_store.keys import KeyMap
from tracking.mlflow_store.points import NOT_METRICS, distinct_series, is_metric
from tracking.schema import SCHEMA, parse_value

Flags = dict[str, dict[str, Any]]
"""By reason: how many values of each key, or of what kind, MLflow does not hold."""

_READ_ROWS: Final = 1 << 14
_MAX_DIGEST: Final = 36
_MAX_NAME: Final = 500


@dataclass
class RunProperties:
    """What MLflow is to know of a run besides its metrics.

    Attributes
    ----------
    params, tags
        By key.
    changed
        Last value of the params that were logged with several; MLflow keeps the first.
    artifacts
        Size and checksum by relative path.
    inputs
        Data sets and their tags.
    flags
        What MLflow cannot hold as it is.
    """

    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    changed: dict[str, str] = field(default_factory=dict)
    artifacts: dict[str, dict[str, Any]] = field(default_factory=dict)
    inputs: list[tuple[dict[str, str], dict[str, str]]] = field(default_factory=list)
    flags: Flags = field(default_factory=dict)


@dataclass
class ControlRows:
    """Control rows that were not known before."""

    rewinds: list[tuple[int, int]]
    overwrites: list[tuple[int, Place]]


class JournalScan:
    """All that has been written of a part so far.

    Parameters
    ----------
    rank_dir
        Folder of the part; it may not be there yet.

    Attributes
    ----------
    tombstones
        Which rows count.
    keys, param_keys, tag_keys
        MLflow's keys, given in the journal's order.
    last
        ``seq`` of the last row seen; -1 before the first.
    last_time_ms
        Latest time of a row.
    num_rows
        Rows seen.
    """

    def __init__(self, rank_dir: Path) -> None:
        self.tombstones = Tombstones()
        self.keys = KeyMap()
        self.param_keys = KeyMap()
        self.tag_keys = KeyMap(reserved="luz.")
        self.last = -1
        self.last_time_ms = 0
        self.num_rows = 0
        self._tail = JournalReader(rank_dir)
        self._flags: Flags = {}
        self._special = [SCHEMA.empty_table()]
        self._properties: RunProperties | None = None

    def look(self) -> ControlRows:
        """Read what has been written since the last look."""
        known = len(self.tombstones.rewinds), len(self.tombstones.overwrites)
        while (table := self._tail.read(_READ_ROWS)).num_rows:
            self._take_in(table)
        return ControlRows(
            self.tombstones.rewinds[known[0] :],
            self.tombstones.overwrites[known[1] :],
        )

    def properties(self) -> RunProperties:
        """Params, tags, artifacts, inputs and flags, by the rows that count."""
        if self._properties is None:
            table = pa.concat_tables(self._special).unify_dictionaries()
            table = table.filter(pa.array(self.tombstones.mask_live(table)))
            self._properties = self._folded(table)
        return self._properties

    def _take_in(self, table: pa.Table) -> None:
        """Learn from the next rows."""
        self.last = table["seq"][-1].as_py()
        last_us = pc.max(table["time"].cast(pa.int64())).as_py()
        self.last_time_ms = max(self.last_time_ms, last_us // 1000)
        self.num_rows += table.num_rows
        metrics = table.filter(pa.array(is_metric(table)))
        for series in distinct_series(metrics)[0]:
            self.keys.of(series)
        is_flagged = self._flag(metrics)
        special = table.filter(pc.is_in(table["what"].cast(pa.string()), _SPECIAL))
        if special.num_rows:
            self._special.append(special)
        if self.tombstones.add(table) or special.num_rows or is_flagged:
            self._properties = None

    def _flag(self, metrics: pa.Table) -> bool:
        """Count the values that MLflow will hold otherwise than they are."""
        infinite = np.isinf(metrics["value"].to_numpy())
        large = np.asarray(pc.is_valid(metrics["payload"]))
        for reason, mask in (("infinite", infinite), ("large_int", large)):
            found = metrics.filter(pa.array(mask))
            series, place = distinct_series(found)
            counts = np.bincount(place, minlength=len(series))
            by_key = self._flags.setdefault(reason, {}) if series else {}
            for one, count in zip(series, counts.tolist(), strict=True):
                key = self.keys.of(one)
                by_key[key] = by_key.get(key, 0) + count
        return bool(infinite.any() or large.any())

    def _folded(self, table: pa.Table) -> RunProperties:
        """Properties from the rows that are no metrics."""
        found = RunProperties()
        for reason, counts in self._flags.items():
            found.flags[reason] = dict(counts)
        for row in table.to_pylist():
            value = parse_value(row["kind"], row["value"], row["payload"])
            if row["what"] == "params":
                self._add_param(found, row["name"], as_text(value, row))
            elif row["what"] == "tags":
                self._add_tag(found, row["name"], as_text(value, row))
            elif row["what"] == "artifacts":
                found.artifacts[row["name"]] = _first(value)
            else:
                _add_input(found, row["name"], _first(value))
        return found

    def _add_param(self, found: RunProperties, name: str, text: str) -> None:
        """Add a param; the first value counts, as in MLflow."""
        key = self.param_keys.of(("params", "", name))
        if len(text) > MAX_PARAM_LENGTH:
            found.flags.setdefault("long_param", {})[key] = len(text)
            text = text[:MAX_PARAM_LENGTH]
        if found.params.setdefault(key, text) != text:
            found.changed[key] = text
            found.flags.setdefault("changed_param", {})[key] = 1
        elif key in found.changed:
            found.changed[key] = text

    def _add_tag(self, found: RunProperties, name: str, text: str) -> None:
        """Set a tag."""
        key = self.tag_keys.of(("tags", "", name))
        if len(text) > MAX_TAG_LENGTH:
            found.flags.setdefault("long_tag", {})[key] = len(text)
            text = text[:MAX_TAG_LENGTH]
        found.tags[key] = text


_SPECIAL: Final = pa.array(NOT_METRICS)


def as_text(value: Any, row: dict[str, Any]) -> str:
    """A param's or tag's value as MLflow has it: JSON for lists, Python's str else."""
    if isinstance(value, list | dict):
        return str(row["payload"])
    return str(value)


def _first(value: Any) -> dict[str, Any]:
    """The description in the payload of an artifact or input."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return value[0]
    return value if isinstance(value, dict) else {}


def _add_input(found: RunProperties, context: str, described: dict[str, Any]) -> None:
    """Add a data set; MLflow keeps one context for each name and digest."""
    more = {k: v for k, v in described.items() if k not in ("name", "digest", "source")}
    text = json.dumps(described, sort_keys=True, default=str)
    digest = str(described.get("digest") or hashlib.sha256(text.encode()).hexdigest())
    digest = digest if len(digest) <= _MAX_DIGEST else digest[:8]
    dataset = {
        "name": str(described.get("name") or context)[:_MAX_NAME],
        "digest": digest,
        "source_type": "local",
        "source": json.dumps({"uri": str(described.get("source") or "")}),
        "profile": json.dumps(more, default=str),
    }
    tags = {"mlflow.data.context": context[:_MAX_NAME]}
    others = [d for d, t in found.inputs if t != tags]
    if any((d["name"], d["digest"]) == (dataset["name"], digest) for d in others):
        mark = hashlib.sha256(context.encode()).hexdigest()[:6]
        dataset["digest"] = f"{digest[: _MAX_DIGEST - 7]}-{mark}"
    if (dataset, tags) not in found.inputs:
        found.inputs.append((dataset, tags))
