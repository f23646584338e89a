"""What commands print: tables for a terminal, JSON for programs, runs in words."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.table import Table


def new_table(*columns: str) -> Table:
    """An empty table."""
    from rich.box import SIMPLE_HEAD  # noqa: PLC0415 (20 ms)
    from rich.table import Table  # noqa: PLC0415 (20 ms)

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def print_table(table: Table) -> None:
    """Print a table as wide as the terminal; in a pipe, as wide as it is."""
    from rich.console import Console  # noqa: PLC0415 (20 ms)

    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console = Console(markup=False, highlight=False, width=500)
    console.print(table)


def print_json(value: Any) -> None:
    """Print JSON; what it cannot hold, such as NaN, as a string."""
    click.echo(json.dumps(_plain(value), indent=2, ensure_ascii=False))


def _plain(value: Any) -> Any:
    """A value in JSON's terms."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def facts(found: dict[str, Any]) -> Table:
    """What is known of a run, a line each."""
    git, mlflow = found["git"] or {}, found["mlflow"] or {}
    started, took = when(found)
    lines = {
        "run": found["id"],
        "name": found["name"],
        "status": found["status"],
        "error": ": ".join((found["error"] or {}).values()),
        "experiment": found["experiment"],
        "note": found["note"],
        "started": f"{started} on {found['host']}",
        "took": took,
        "resumed": len(found["resumed"]) or "",
        "command": " ".join(found["command"]),
        "in": found["cwd"],
        "code": " ".join(str(git[k]) for k in ("commit", "branch") if git.get(k)),
        "changed": "yes" if git.get("dirty") else "",
        "records": f"{found['rows']} rows in {found['path']}",
        "damage": "\n".join(
            f"{one['rows_lost']} rows lost in {one['file']} at {one['offset']}: "
            f"{one['reason']}"
            for one in found["damage"]
        ),
        "MLflow": left(found["behind"]),
        "why": mlflow.get("error"),
        "page": mlflow.get("page") or (mlflow and "harness ui"),
    }
    table = new_table("", "")
    table.show_header = False
    for word, text in lines.items():
        if text:
            table.add_row(word, str(text))
    return table


def values(found: dict[str, Any], title: str) -> Table:
    """Params, or metrics with their last and extreme values."""
    if title == "param":
        table = new_table(title, "value")
        for key, value in found.items():
            table.add_row(key, word(value))
        return table
    table = new_table(title, "last", "least", "greatest", "values")
    for key, one in found.items():
        words = (word(one[name]) for name in ("last", "min", "max", "count"))
        table.add_row(key, *words)
    return table


def when(found: dict[str, Any]) -> tuple[str, str]:
    """When a run started, in local time, and how long it took."""
    created, took = found["created"], found["duration_s"]
    started = ""
    if created:
        started = f"{datetime.fromisoformat(created).astimezone():%Y-%m-%d %H:%M:%S}"
    if took is None:
        return started, ""
    minutes, seconds = divmod(took, 60)
    if not minutes:
        return started, f"{seconds:.1f} s"
    hours, minutes = divmod(int(minutes), 60)
    return started, f"{hours}:{minutes:02d}:{int(seconds):02d}"


def left(behind: int | None) -> str:
    """How far MLflow is behind, in words."""
    if behind is None:
        return "not delivered"
    return f"{behind} rows to go" if behind else "all there"


def synced(done: dict[str, Any]) -> str:
    """What sync did for a run, in a line."""
    if done["phase"] == "done":
        sent = f"{done['sent']} rows sent, " if done["sent"] else ""
        return f"{done['run']}: {sent}MLflow has all {done['present']}"
    if done["phase"] == "gave up":
        return f"{done['run']}: {done['behind']} rows still to go: {done['error']}"
    word = {"busy": "is being delivered", "started": "is being delivered again"}
    return f"{done['run']}: {word[done['phase']]}, {done['behind']} rows to go"


def verified(found: Any) -> dict[str, Any]:
    """A comparison in JSON's terms."""
    return {
        "run": found.run,
        "is_equal": found.is_equal,
        "message": found.message(),
        "mismatches": [vars(mismatch) for mismatch in found.mismatches],
        "notes": found.notes,
        "num_rows": found.num_rows,
    }


def told(found: Any) -> list[str]:
    """What a comparison found, a line each; nothing if all is equal."""
    notes = [f"note: {found.run}: {note}" for note in found.notes]
    return notes + [str(mismatch) for mismatch in found.mismatches]


def keys(found: Iterable[dict[str, Any]]) -> list[str]:
    """Keys of several dictionaries, in order of first appearance."""
    return list(dict.fromkeys(key for one in found for key in one))


def word(value: Any) -> str:
    """A value as it stands in a table."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
