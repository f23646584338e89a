"""Print results: tables for a terminal, JSON for programs, one line per run."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

import click

from tracking.cli.chart import draw_chart
from tracking.errors import escape_control, is_terminal, write_stderr

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from tracking.curves.charts import Charts
    from tracking.verify.verify import Verification


PIPE_WIDTH: Final = 500
"""Columns of a table where nobody watches."""

LONG_TABLE: Final = 200
"""Rows of a table that are still printed with rich."""

MAX_CHART_WIDTH: Final = 100


def echo(text: object, *, err: bool = False) -> None:
    """Print a text, which cannot control the terminal whatever names are in it."""
    click.echo(escape_control(str(text)), err=err)


@contextmanager
def showing(text: str, *, when: bool = True) -> Iterator[None]:
    """Show a line on stderr in the block, if a person watches; it is erased afterwards."""
    shown = escape_control(text)
    if not when or not is_terminal():
        yield
        return
    write_stderr(shown)
    try:
        yield
    finally:
        write_stderr(f"\r{' ' * len(shown)}\r")


def make_table(columns: Iterable[str], rows: Iterable[Sequence[str]] = ()) -> Table:
    """Make a table of stored texts."""
    from rich.box import SIMPLE_HEAD  # noqa: PLC0415  takes 20 ms
    from rich.table import Table  # noqa: PLC0415  takes 20 ms

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(_as_cell(column), overflow="fold")
    for cells in rows:
        table.add_row(*map(_as_cell, cells))
    return table


def _as_cell(text: str) -> str:
    """One line, which cannot control the terminal."""
    return escape_control(text).replace("\n", "\\n").replace("\t", "\\t")


def make_console() -> Console:
    """Make what prints tables, at the width of the terminal; in a pipe, at their full width."""
    from rich.console import Console  # noqa: PLC0415  takes 20 ms

    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    return console


def print_table(table: Table) -> None:
    """Print a table; the rows of a long one without rich, which takes a millisecond each."""
    from rich.cells import cell_len  # noqa: PLC0415  takes 20 ms

    console = make_console()
    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    headers = [str(column.header) for column in table.columns]
    widths = [
        max(map(cell_len, [header, *cells]))
        for header, cells in zip(headers, columns, strict=True)
    ]
    is_long = table.row_count > LONG_TABLE
    if not is_long or sum(widths) + 3 * len(widths) - 1 > console.width:
        console.print(table)
        return
    head = make_table(headers, [["x" * width for width in widths]])
    with console.capture() as captured:
        console.print(head)
    *lines, _, end = captured.get().splitlines()
    for row in zip(*columns, strict=True):
        cells = [
            cell + " " * (width - cell_len(cell))
            for cell, width in zip(row, widths, strict=True)
        ]
        lines.append(f" {'   '.join(cells)} ")
    click.echo("\n".join([*lines, end]))


def print_json(value: Any, indent: int | None = 2) -> None:
    """Print JSON; values that JSON cannot hold, such as NaN, become strings."""
    text = json.dumps(_to_json(value), indent=indent, ensure_ascii=False)
    click.echo(escape_control(text, lambda letter: json.dumps(letter)[1:-1]))


def _to_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def make_runs_table(
    runs: Sequence[dict[str, Any]],
    metric: str | None = None,
    values: Mapping[str, Any] | None = None,
    best: str | None = None,
) -> Table:
    """One row for each run, from ``summarize_run``; as many columns as fit the terminal.

    Parameters
    ----------
    metric
        Name of the fact that the runs are compared by; None if there is none.
    values
        Its value by run.
    best
        Id of the best run by it, which is marked; None: none.
    """
    columns: dict[str, list[str]] = {
        "run": [run["id"] for run in runs],
        "status": [run["status"] for run in runs],
    }
    if metric is not None and values is not None:
        marks = {best: " *"}
        columns[metric] = [
            format_value(values[run["id"]]) + marks.get(run["id"], "") for run in runs
        ]
    columns["duration"] = [format_duration(run["duration_s"]) for run in runs]
    columns["MLflow"] = [format_behind(run["behind"]) for run in runs]
    columns["experiment"] = [run["experiment"] or "" for run in runs]
    columns["started"] = [format_time(run["created"]) for run in runs]
    width = get_width()
    for name in ("started", "experiment", "MLflow", "duration"):
        if _measure(columns) <= width:
            break
        del columns[name]
    return make_table(columns, zip(*columns.values(), strict=True))


def _measure(columns: dict[str, list[str]]) -> int:
    """Columns of the terminal that a table takes."""
    widths = [max(map(len, [name, *cells])) for name, cells in columns.items()]
    return sum(widths) + 3 * (len(widths) - 1) + 2


def get_width() -> int:
    """Columns of the terminal; in a pipe, as many as anything needs."""
    return make_console().width


def has_colours() -> bool:
    """Whether the terminal shows colours; NO_COLOR says no."""
    console = make_console()
    return console.is_terminal and not console.no_color and not console.is_dumb_terminal


def list_charts(charts: Charts) -> list[str]:
    """Lines of a terminal with charts, and with what there is no room for."""
    lines: list[str] = []
    width, colours = min(get_width(), MAX_CHART_WIDTH), has_colours()
    for metric, found in charts.lines.items():
        cells = {
            _as_cell(name): list(zip(x.tolist(), y.tolist(), strict=True))
            for name, (x, y) in found.items()
        }
        chart = draw_chart(_as_cell(metric), cells, width, has_colours=colours)
        lines += [*chart, ""] if chart else []
        if chart and charts.num_lines[metric] > len(found):
            lines[-1:] = [f"{len(found)} of {charts.num_lines[metric]} lines", ""]
    return lines


def print_lines(lines: Iterable[str]) -> None:
    """Print lines whose names are escaped; colours are left out where nobody sees them."""
    for line in lines:
        click.echo(line)


def make_details_table(run: dict[str, Any]) -> Table:
    """One line for each thing known about a run, from ``describe_run``."""
    from tracking.cli.describe import format_command  # noqa: PLC0415  imports Arrow

    git, mlflow = run["git"] or {}, run["mlflow"] or {}
    lines = {
        "run": run["id"],
        "name": run["name"],
        "status": run["status"],
        "may write": run["writer"]
        and (f"{run['writer']}\nIf it has ended: harness runs release {run['id']}"),
        "error": ": ".join((run["error"] or {}).values()),
        "experiment": run["experiment"],
        "note": run["note"],
        "started": f"{format_time(run['created'])} on {run['host']}",
        "duration": format_duration(run["duration_s"]),
        "resumed": f"{len(run['resumed'])} times" if run["resumed"] else "",
        "command": format_command(run["command"]),
        "folder": run["cwd"],
        "commit": " ".join(str(git[k]) for k in ("commit", "branch") if git.get(k)),
        "changes": "uncommitted, see code.diff" if git.get("dirty") else "",
        "records": f"{run['rows']} rows in {run['path']}",
        "damage": "\n".join(
            f"{damage['rows_lost']} rows lost in {damage['file']} at "
            f"{damage['offset']}: {damage['reason']}"
            for damage in run["damage"]
        ),
        "MLflow": format_behind(run["behind"]),
        "MLflow error": mlflow.get("error"),
        "page": mlflow.get("page") or (mlflow and "harness ui"),
    }
    rows = []
    for label, text in lines.items():
        for line in str(text or "").splitlines():
            rows.append((label, line))
            label = ""
    table = make_table(["", ""], rows)
    table.show_header = False
    return table


def make_params_table(params: dict[str, Any]) -> Table:
    """One row for each param."""
    rows = ((name, format_value(value)) for name, value in params.items())
    return make_table(["param", "value"], rows)


def make_metrics_table(metrics: dict[str, dict[str, Any]]) -> Table:
    """One row for each metric, with its last and extreme values."""
    columns = ("last", "min", "max", "count")
    rows = (
        [name, *(format_value(values[column]) for column in columns)]
        for name, values in metrics.items()
    )
    return make_table(["metric", *columns], rows)


def make_items_table(items: list[dict[str, Any]]) -> Table:
    """One row for each series of images, tables or histograms."""
    rows = []
    for item in items:
        last = f"step {item['last']}" if item["last"] is not None else ""
        texts = (item["kind"], item["name"], str(item["count"]), last)
        rows.append((*texts, item["file"] or ""))
    return make_table(["kind", "name", "count", "last", "file of the last"], rows)


def make_comparison_table(runs: list[dict[str, Any]]) -> Table:
    """What differs between runs in params, code and data, and the last value of metrics."""
    rows = []
    for what in ("params", "origin"):
        for name in _collect_keys(run[what] for run in runs):
            texts = [format_value(run[what].get(name, "")) for run in runs]
            if len(set(texts)) > 1:
                rows.append([name, *texts])
    for name in _collect_keys(run["metrics"] for run in runs):
        last = [run["metrics"].get(name, {}).get("last", "") for run in runs]
        rows.append([name, *map(format_value, last)])
    table = make_table(["", *(run["id"] for run in runs)], rows)
    console = make_console()
    unlimited = console.options.update(width=10_000)
    if console.measure(table, options=unlimited).maximum > console.width:
        for column in table.columns:  # break the ids behind the time
            column.header = re.sub(r"^(\d{8}-\d{6}-)(?=.)", "\\1\n", str(column.header))
    return table


def _collect_keys(dicts: Iterable[dict[str, Any]]) -> list[str]:
    """Keys of several dictionaries, in order of first appearance."""
    return list(dict.fromkeys(key for one in dicts for key in one))


def format_value(value: Any) -> str:
    """Format a param or metric for a table."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def format_time(moment: str) -> str:
    """Format a time in ISO 8601 as local time; empty if it is unknown."""
    if not moment:
        return ""
    return f"{datetime.fromisoformat(moment).astimezone():%Y-%m-%d %H:%M:%S}"


def format_duration(duration_s: float | None) -> str:
    """Format a duration as ``12.3 s`` or ``1:02:03``; empty if it is unknown."""
    if duration_s is None:
        return ""
    minutes, seconds = divmod(duration_s, 60)
    if not minutes:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02d}:{int(seconds):02d}"


def format_behind(behind: int | None) -> str:
    """Describe how many rows MLflow is missing."""
    if behind is None:
        return "not delivered"
    return f"{behind} rows to send" if behind else "delivered"


def format_sync(done: dict[str, Any]) -> str:
    """Describe in one line what sync did for a run."""
    run, phase = done["run"], done["phase"]
    if phase == "done":
        sent = f"{done['sent']} rows sent, " if done["sent"] else ""
        limit = max(done["flags"].get("thinned", {}).values(), default=0)
        most = f", at most {limit} of each metric" if limit else ""
        return f"{run}: {sent}MLflow has all {done['present']}{most}"
    if phase == "gave up":
        return f"{run}: {done['behind']} rows still to send: {done['error']}"
    if phase == "lost":
        return f"{run}: records are lost: {done['error']}"
    status = {"busy": "delivery is running", "started": "delivery was restarted"}
    return f"{run}: {status[phase]}, {done['behind']} rows to send"


def verification_to_json(result: Verification) -> dict[str, Any]:
    """Convert the result of ``verify`` to plain values."""
    return {
        "run": result.run,
        "is_equal": result.is_equal,
        "message": result.message(),
        "mismatches": [vars(mismatch) for mismatch in result.mismatches],
        "notes": result.notes,
        "num_rows": result.num_rows,
    }
