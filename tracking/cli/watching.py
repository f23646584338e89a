"""Watch a run while it is being written: in a terminal in place, elsewhere a line an epoch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tracking.cli import render
from tracking.cli.describe import collect_charts, summarize_run
from tracking.journal.reader import SealedBlocks
from tracking.read import PastRun, Snapshot

if TYPE_CHECKING:
    from rich.console import RenderableType


def watch_run(run: PastRun, every_s: float, *, as_json: bool = False) -> None:
    """Show a run until it has ended.

    Parameters
    ----------
    every_s : seconds
        Time between two looks at its files.
    """
    console = render.make_console()
    if as_json or not console.is_terminal:
        _print_epochs(run, every_s, as_json=as_json)
        return
    from rich.live import Live  # noqa: PLC0415  takes 20 ms

    with Live(console=console, auto_refresh=False) as live:
        for _, read in _iter_looks(run, every_s):
            live.update(_render(run, read), refresh=True)


def _iter_looks(run: PastRun, every_s: float) -> Iterator[tuple[str, Snapshot]]:
    """Yield the status and the records of a run until it has ended."""
    known: SealedBlocks = {}
    while True:
        status = run.status  # before its rows, so that none is missing at the end
        start = time.process_time()  # without waits for who reads what is printed
        yield status, run.snapshot(known)
        if status != "running":
            return
        # A look at a long run takes a while; it gets a tenth of a processor at most.
        time.sleep(max(every_s, 9 * (time.process_time() - start)))


def _render(run: PastRun, read: Snapshot) -> RenderableType:
    """The state of a run, its metrics and as many charts as the terminal has room for."""
    from rich.console import Group  # noqa: PLC0415  takes 20 ms
    from rich.text import Text  # noqa: PLC0415  takes 20 ms

    found = summarize_run(run, read)
    parts: list[RenderableType] = [render.make_runs_table([found])]
    if found["metrics"]:
        parts.append(render.make_metrics_table(found["metrics"]))
    room = render.make_console().height - 9 - len(found["metrics"])
    lines = render.list_charts(collect_charts(read, max(room // 12, 0)))
    parts += [Text.from_ansi(line) for line in lines]
    return Group(*parts)


def _print_epochs(run: PastRun, every_s: float, *, as_json: bool) -> None:
    """Print the metrics of each epoch once: when the next one has begun, or at the end."""
    printed = 0
    for status, read in _iter_looks(run, every_s):
        rows = list(read.points.iter_places(skip=printed))
        ready = rows if status != "running" else rows[:-1]
        for filled in ready:
            if as_json:
                render.print_json(filled, indent=None)
                continue
            words = [f"{name} {render.format_value(filled[name])}" for name in filled]
            render.echo("  ".join(words))
        printed += len(ready)
    if not as_json:
        render.echo(f"{run.id}: {status}")
