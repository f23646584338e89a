"""What MLflow stores of a run besides metrics: params, tags, artifacts and inputs.

Everything follows from the rows of the journal alone, so it is the same however often
and whenever a run is delivered.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import pyarrow as pa

from tracking.journal.fits import get_fits, name_in_fit
from tracking.mlflow_store.client import MAX_PARAM_LENGTH, MAX_TAG_LENGTH
from tracking.mlflow_store.keys import KeyMap, SeriesId
from tracking.mlflow_store.series import SERIES, collect_uploads
from tracking.schema import parse_value

Flags = dict[str, dict[str, Any]]
"""Values that MLflow does not store exactly: by reason, a number for each key."""

_MAX_DIGEST: Final = 36
_MAX_NAME: Final = 500


@dataclass
class RunProperties:
    """What MLflow should have of a run besides its metrics."""

    #: params and tags by key
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    #: last value of each param that was logged with several; MLflow keeps the first
    changed: dict[str, str] = field(default_factory=dict)
    #: size and checksum by relative path in MLflow, and what the file is made from
    artifacts: dict[str, dict[str, Any]] = field(default_factory=dict)
    #: data sets, each with its tags
    inputs: list[tuple[dict[str, str], dict[str, str]]] = field(default_factory=list)
    #: values that MLflow does not store exactly
    flags: Flags = field(default_factory=dict)


def collect_properties(
    rows: pa.Table, param_keys: KeyMap, tag_keys: KeyMap, flags: Flags
) -> RunProperties:
    """Build a run's properties from its rows.

    Parameters
    ----------
    rows
        Live rows in the public schema, perhaps with their fits, whose ``what`` is one of
        `NON_METRICS` or `SERIES`.
    param_keys, tag_keys
        Of MLflow's params and tags; new names are added.
    flags
        Of the run's metrics; they become part of the properties' flags.
    """
    found = RunProperties(flags={reason: dict(some) for reason, some in flags.items()})
    items: list[dict[str, Any]] = []
    for fit, row in zip(get_fits(rows).tolist(), rows.to_pylist(), strict=True):
        value = parse_value(row["kind"], row["value"], row["payload"])
        match row["what"]:
            case "params":
                text = _as_text(value, row)
                key = param_keys.key_for(SeriesId("params", "", row["name"]))
                if fit > 1 and not _has_param(found, key, text):
                    key = param_keys.key_for(SeriesId("params", "", row["name"], fit))
                _add_param(found, key, text)
            case "tags":
                key = tag_keys.key_for(SeriesId("tags", "", row["name"]))
                _add_tag(found, key, _as_text(value, row))
            case "artifacts":
                found.artifacts[row["name"]] = _description(value)
            case "inputs":
                _add_input(found, row["name"], _description(value))
            case _ if row["what"] in SERIES:
                name = name_in_fit(row["set"], fit)
                items.append(row | {"set": name, "about": _description(value)})
    uploads, tags = collect_uploads(items)
    found.artifacts |= uploads
    found.tags = tags | found.tags
    return found


def _has_param(found: RunProperties, key: str, text: str) -> bool:
    """Whether fit 1 has a param with this value, so that a later fit adds none."""
    return found.changed.get(key, found.params.get(key)) == text[:MAX_PARAM_LENGTH]


def _add_param(found: RunProperties, key: str, text: str) -> None:
    """Add a param. The first value is kept, as in MLflow."""
    if len(text) > MAX_PARAM_LENGTH:
        found.flags.setdefault("long_param", {})[key] = len(text)
        text = text[:MAX_PARAM_LENGTH]
    if found.params.setdefault(key, text) != text:
        found.changed[key] = text
        found.flags.setdefault("changed_param", {})[key] = 1
    elif key in found.changed:
        found.changed[key] = text


def _add_tag(found: RunProperties, key: str, text: str) -> None:
    """Set a tag. The last value is kept."""
    if len(text) > MAX_TAG_LENGTH:
        found.flags.setdefault("long_tag", {})[key] = len(text)
        text = text[:MAX_TAG_LENGTH]
    found.tags[key] = text


def _add_input(found: RunProperties, context: str, described: dict[str, Any]) -> None:
    """Add a data set. MLflow keeps one context for each name and digest.

    So a data set that is used in a second context gets another digest there.
    """
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
        suffix = hashlib.sha256(context.encode()).hexdigest()[:6]
        dataset["digest"] = f"{digest[: _MAX_DIGEST - 7]}-{suffix}"
    if (dataset, tags) not in found.inputs:
        found.inputs.append((dataset, tags))


def _as_text(value: Any, row: Mapping[str, Any]) -> str:
    """Text of a param or tag: JSON for lists and dicts, else Python's ``str``."""
    if isinstance(value, list | dict):
        return str(row["payload"])
    return str(value)


def _description(value: Any) -> dict[str, Any]:
    """The dictionary in the payload of an artifact or input."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return value[0]
    return value if isinstance(value, dict) else {}
