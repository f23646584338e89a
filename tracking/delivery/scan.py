"""Read a run's journal once, and learn from it what MLflow needs to know.

Delivery sends rows in order, but rows further on matter too: an overwrite or a rewind
supersedes earlier rows, which are then not sent. MLflow's keys, flags, params, tags,
artifacts and inputs follow from the rows alone, so they are the same however often and
whenever a run is delivered.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
from pyarrow import compute as pc

from tracking.delivery.thinning import mask_doublings
from tracking.errors import InvalidFileError, RunNotFoundError
from tracking.journal.reader import JournalReader
from tracking.journal.tombstones import Tombstones
from tracking.mlflow_store.keys import LATEST, KeyMap
from tracking.mlflow_store.matching import count_within_groups
from tracking.mlflow_store.points import NON_METRICS, distinct_series, mask_metrics
from tracking.mlflow_store.properties import Flags, RunProperties, collect_properties
from tracking.mlflow_store.series import SERIES
from tracking.schema import SCHEMA
from tracking.store import Manifest

READ_ROWS: Final = 1 << 14
_PROPERTIES: Final = pa.array([*NON_METRICS, *SERIES])

FIRST_ITEMS: Final = 200
"""Images, tables or histograms of a name that MLflow gets all; then fewer."""


class JournalScan:
    """Reads the rows of one rank, each once, and keeps what they say about the run.

    Parameters
    ----------
    rank_dir
        Folder of the rank's records; it may not exist yet.
    known
        Earlier scan of the same rank. Its control rows are known from the start, so that
        rows that it found superseded are not sent again.

    Attributes
    ----------
    tombstones
        Which of the rows are superseded.
    keys, param_keys, tag_keys
        MLflow's keys, in the order of the journal.
    last_seq
        ``seq`` of the last row that was read; -1 before the first.
    last_time_ms
        Latest time of a row.
    """

    def __init__(self, rank_dir: Path, known: JournalScan | None = None) -> None:
        self.rank_dir = rank_dir
        self.tombstones: Tombstones = known.tombstones if known else Tombstones()
        self._layout: int = known._layout if known else _read_layout(rank_dir)
        self.keys = KeyMap(layout=self._layout)
        self.param_keys = KeyMap()
        self.tag_keys = KeyMap(reserved_prefix="luz.")
        self.last_seq = -1
        self.last_time_ms = 0
        self._tombstones_seq: int = known._tombstones_seq if known else -1
        self._reader = JournalReader(rank_dir)
        self._flags: Flags = {}
        self._property_rows = [SCHEMA.empty_table()]
        self._properties: RunProperties | None = None

    def read(self) -> pa.Table:
        """Read the next rows, labelled with their fits; an empty table if there are none."""
        rows = self._reader.read(READ_ROWS)
        if rows.num_rows:
            rows = self._learn(rows)
        return rows

    def read_all(self) -> None:
        """Read all rows that have been written so far."""
        while self.read().num_rows:
            pass

    def count_unread(self) -> int:
        """Count the rows that have been written and not read."""
        return self._reader.count_unread()

    def properties(self) -> RunProperties:
        """Params, tags, artifacts, inputs and flags, from the rows read so far."""
        if self._properties is None:
            rows = pa.concat_tables(self._property_rows).unify_dictionaries()
            rows = rows.filter(pa.array(self.tombstones.mask_live(rows)))
            rows = _thin_series(self.tombstones.fits.label(rows))
            self._properties = collect_properties(
                rows, self.param_keys, self.tag_keys, self._flags
            )
        return self._properties

    def _learn(self, rows: pa.Table) -> pa.Table:
        self.last_seq = rows["seq"][-1].as_py()
        last_us = pc.max(rows["time"].cast(pa.int64())).as_py()
        self.last_time_ms = max(self.last_time_ms, last_us // 1000)
        is_changed = self._add_control_rows(rows)
        rows = self.tombstones.fits.label(rows)
        metrics = rows.filter(pa.array(mask_metrics(rows)))
        for series in distinct_series(metrics)[0]:
            self.keys.key_for(series)
        is_changed |= self._flag_inexact(metrics)
        is_other = pc.is_in(rows["what"].cast(pa.string()), _PROPERTIES)
        others = rows.filter(pc.and_not(is_other, pa.array(mask_metrics(rows))))
        if others.num_rows:
            self._property_rows.append(others.select(SCHEMA.names))
        if is_changed or others.num_rows:
            self._properties = None
        return rows

    def _add_control_rows(self, rows: pa.Table) -> bool:
        """Learn what is superseded; whether anything new is."""
        if self.last_seq <= self._tombstones_seq:
            return False
        new = rows.filter(pc.greater(rows["seq"], self._tombstones_seq))
        self._tombstones_seq = self.last_seq
        return self.tombstones.add(new)

    def _flag_inexact(self, metrics: pa.Table) -> bool:
        """Count the values that MLflow does not store exactly; whether there are any."""
        infinite = np.isinf(metrics["value"].to_numpy())
        large = np.asarray(pc.is_valid(metrics["payload"]))
        for reason, mask in (("infinite", infinite), ("large_int", large)):
            found = metrics.filter(pa.array(mask))
            series, place = distinct_series(found)
            counts = np.bincount(place, minlength=len(series))
            by_key = self._flags.setdefault(reason, {}) if series else {}
            for one, count in zip(series, counts.tolist(), strict=True):
                key = self.keys.key_for(one)
                by_key[key] = by_key.get(key, 0) + count
        return bool(infinite.any() or large.any())


def _thin_series(rows: pa.Table) -> pa.Table:
    """Drop items of long series of images, tables or histograms, the same ones always."""
    is_item = np.asarray(pc.is_in(rows["what"].cast(pa.string()), pa.array(SERIES)))
    items = rows.filter(pa.array(is_item))
    at = items.schema.get_field_index("name")
    same = items["set"]  # the name of an item is its file; the set names the series
    _, place = distinct_series(items.set_column(at, items.schema.field(at), same))
    kept = np.ones(rows.num_rows, bool)
    kept[is_item] = mask_doublings(count_within_groups(place), FIRST_ITEMS, 2)
    return rows.filter(pa.array(kept))


def _read_layout(rank_dir: Path) -> int:
    """Layout of the keys of a rank's run; the latest where there is no manifest."""
    try:
        return Manifest.read(rank_dir.parent.parent).keys
    except (RunNotFoundError, InvalidFileError):
        return LATEST
