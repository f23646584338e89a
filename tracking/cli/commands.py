"""Commands that need no torch: ``runs``, ``export``, ``sync``, ``verify`` and ``ui``.

Each command parses its options, calls the library and prints. Heavy imports wait until a
command runs, so that ``harness --help`` answers at once.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
import webbrowser
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from tracking.cli import render
from tracking.cli.query import (
    Query,
    check_name,
    find_main_metric,
    has_order,
    list_facts,
    sort_key,
)

if TYPE_CHECKING:
    from tracking.read import PastRun

F = TypeVar("F", bound=Callable[..., Any])

MAIN_RUNS: Final = 20
"""Newest runs that the main metric of a list is chosen from."""

INDEXED_RUNS: Final = 100
"""A list of more runs keeps what it read in an index."""

runs_dir_option = click.option(
    "--runs-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of runs. Default: $HARNESS_RUNS or ./runs.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def run_argument(name: str, **options: Any) -> Callable[[F], F]:
    """Add an argument that names a run; a shell can complete it."""
    return click.argument(name, shell_complete=_complete_run, **options)


def _complete_run(ctx: click.Context, _: click.Parameter, text: str) -> list[str]:
    """Ids of the runs that contain a text, newest first; those of a name that begins so."""
    from tracking.store import run_paths  # noqa: PLC0415  imports Arrow

    with contextlib.suppress(Exception):  # a shell shows no error while it completes
        found = [path.name for path in run_paths(ctx.params.get("runs_dir"))]
        return [name for name in found if text in name]
    return []


def _common_options(command: F) -> F:
    """Add the options that every command has."""
    return runs_dir_option(json_option(command))


def _patience_option(default: float) -> Callable[[F], F]:
    return click.option("--patience", type=click.FloatRange(min=0), default=default,
                        show_default=True, metavar="SECONDS",
                        help="Time to wait for a server that does not answer.")  # fmt: skip


# --------------------------------------------------------------------------- runs


@click.group(invoke_without_command=True)
@click.pass_context
def runs(ctx: click.Context) -> None:
    """List, show, watch, compare, delete, release and fork runs.

    Without a command, lists the runs.
    """
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_)


@runs.command("list")
@_common_options
@click.option("--where", metavar="EXPRESSION",
              help="Only matching runs: 'valid/loss < 0.1 and params.lr = 0.001'.")  # fmt: skip
@click.option("--sort", metavar="NAME",
              help="Sort by this, lowest first; -NAME: highest first.")  # fmt: skip
@click.option("--limit", type=click.IntRange(min=0), default=20, show_default=True,
              help="Number of runs to list; 0 lists all.")  # fmt: skip
def list_(
    runs_dir: Path | None,
    as_json: bool,
    where: str | None,
    sort: str | None,
    limit: int,
) -> None:
    """List runs, newest first, with their main metric.

    The main metric is the one of --sort, otherwise the validation loss if one of the newest
    20 runs has it. Its last value is shown, and * marks the best run. Names are metrics such
    as valid/loss (the last value), valid/loss.min or .max, params.NAME, tags.NAME, and name,
    status, experiment, created, duration_s.
    """
    descends, key = (sort or "").startswith("-"), (sort or "").removeprefix("-")
    try:
        query = Query(where) if where is not None else None
        # Without a condition or an order, only those that are shown are read, and those
        # that the main metric depends on, which is the same for any limit.
        reads_all = query is not None or bool(key) or not limit
        found, num_main = _summarize_runs(
            runs_dir, 0 if reads_all else max(limit, MAIN_RUNS)
        )
        facts = {run["id"]: list_facts(run) for run in found}
        if facts and (query is not None or sort is not None):
            known = sorted({name for own in facts.values() for name in own})
            if query is not None:
                query.check(facts.values(), known)
                found = [run for run in found if query.matches(facts[run["id"]])]
            if sort is not None:
                check_name("--sort", key, known)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    candidates = found if query is not None else found[:num_main]
    names = dict.fromkeys(name for run in candidates for name in run["metrics"])
    metric = key or find_main_metric(names) or ""
    if query is None and not key:
        found = found[: limit or None]
    has_metric = [run for run in found if has_order(facts[run["id"]].get(metric))]
    has_metric.sort(
        key=lambda run: sort_key(facts[run["id"]][metric]), reverse=descends
    )
    if key:
        ids = {run["id"] for run in has_metric}
        found = has_metric + [run for run in found if run["id"] not in ids]
    is_ordered = bool(key) or metric.endswith("loss")
    best = has_metric[0]["id"] if is_ordered and len(has_metric) > 1 else None
    found = found[: limit or None]
    if as_json:
        render.print_json(found)
    else:
        values = {run["id"]: facts[run["id"]].get(metric, "") for run in found}
        table = render.make_runs_table(found, metric or None, values, best)
        render.print_table(table)


def _summarize_runs(
    runs_dir: Path | None, limit: int
) -> tuple[list[dict[str, Any]], int]:
    """Describe the newest runs, or all; one that cannot be read hides no other.

    Returns
    -------
    the runs, and how many of them are of the newest `MAIN_RUNS`
    """
    from tracking.cli.run_index import RunIndex, read_summary  # noqa: PLC0415  imports Arrow
    from tracking.errors import TrackingError  # noqa: PLC0415  next to it
    from tracking.store import run_paths, runs_folder  # noqa: PLC0415  next to it

    found, num_main = [], 0
    paths = run_paths(runs_dir)
    wanted = paths[: limit or None]
    has_index = len(wanted) > INDEXED_RUNS
    index = RunIndex(runs_folder(runs_dir), paths) if has_index else None
    text = f"Reading {len(wanted)} runs ..."
    with render.showing(text, when=has_index), contextlib.ExitStack() as end:
        if index:
            end.callback(index.save)  # also after Ctrl-C
        if not paths:
            _tell_of_none(runs_dir)
        for place, path in enumerate(wanted):
            try:
                found.append(index.summarize(path) if index else read_summary(path))
            except (TrackingError, OSError, ValueError) as error:
                render.echo(f"warning: {error}", err=True)
            if place < MAIN_RUNS:
                num_main = len(found)
    return found, num_main


@runs.command()
@run_argument("run")
@_common_options
def show(run: str, runs_dir: Path | None, as_json: bool) -> None:
    """Show everything about RUN, with its curves.

    RUN is the path or id of a run, or any part of the id.
    """
    from tracking.cli.describe import collect_charts, describe_run  # noqa: PLC0415  imports Arrow

    past = open_run(run, runs_dir)
    read = past.snapshot()
    found = describe_run(past, read)
    if as_json:
        render.print_json(found)
        return
    render.print_table(render.make_details_table(found))
    if found["params"]:
        render.print_table(render.make_params_table(found["params"]))
    if found["metrics"]:
        render.print_table(render.make_metrics_table(found["metrics"]))
    if found["items"]:
        render.print_table(render.make_items_table(found["items"]))
    render.print_lines(render.list_charts(collect_charts(read)))


@runs.command()
@run_argument("run", required=False)
@_common_options
@click.option("--every", "every_s", type=click.FloatRange(min=0.1), default=1.0,
              show_default=True, metavar="SECONDS", help="Time between updates.")  # fmt: skip
def watch(
    run: str | None, runs_dir: Path | None, as_json: bool, every_s: float
) -> None:
    """Watch the metrics and curves of RUN while it trains.

    Without RUN, watches the newest run. In a pipe, prints a line for each epoch; with --json,
    each line is JSON. Ends when the run ends, or on Ctrl-C, which does not affect the run.
    """
    from tracking.cli.watching import watch_run  # noqa: PLC0415  imports Arrow
    from tracking.read import PastRun  # noqa: PLC0415  imports Arrow
    from tracking.store import run_paths  # noqa: PLC0415  next to it

    if run is None:
        paths = run_paths(runs_dir)
        if not paths:
            raise click.UsageError("runs watch: expected a run, got an empty folder.")
        past = PastRun(paths[0])
    else:
        past = open_run(run, runs_dir)
    with contextlib.suppress(KeyboardInterrupt):
        watch_run(past, every_s, as_json=as_json)


@runs.command()
@run_argument("names", nargs=-1, required=True, metavar="RUN RUN...")
@_common_options
def compare(names: tuple[str, ...], runs_dir: Path | None, as_json: bool) -> None:
    """Compare the params, code, data and metrics of runs.

    Prints a table of the differences and of the last value of each metric, and curves.
    """
    from tracking.cli.describe import compare_curves, describe_run  # noqa: PLC0415  imports Arrow

    past = open_runs(names, runs_dir)
    reads = [run.snapshot() for run in past]
    found = [describe_run(*both) for both in zip(past, reads, strict=True)]
    if as_json:
        render.print_json(found)
        return
    render.print_table(render.make_comparison_table(found))
    main = find_main_metric(dict.fromkeys(n for run in found for n in run["metrics"]))
    if main is not None:
        by_id = {run.id: read for run, read in zip(past, reads, strict=True)}
        render.print_lines(render.list_charts(compare_curves(by_id, main)))


@runs.command()
@run_argument("names", nargs=-1, required=True, metavar="RUN...")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@_common_options
def delete(
    names: tuple[str, ...], yes: bool, runs_dir: Path | None, as_json: bool
) -> None:
    """Delete runs with their artifacts and checkpoints.

    MLflow keeps its copy of the runs. If RUN is a symbolic link, only the link is deleted.
    """
    from tracking.errors import RunNotFoundError  # noqa: PLC0415  next to store
    from tracking.store import find_run_folders  # noqa: PLC0415

    try:
        # The manifest is not read: a spoilt run can be deleted too.
        found = list(dict.fromkeys(find_run_folders(names, runs_dir)))
    except RunNotFoundError as error:
        raise click.UsageError(str(error)) from error
    for path in found:
        if not path.is_symlink():
            _check_has_ended(path)
    if not yes:
        for path in found:
            render.echo(path, err=True)
        click.confirm("Delete these folders?", abort=True, err=True)
    for path in found:
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path)
    if as_json:
        render.print_json([path.name for path in found])


def _check_has_ended(path: Path) -> None:
    """Raise if a run is being written, or may be."""
    from tracking.store import describe_unknown, find_writers  # noqa: PLC0415

    for writer in find_writers(path).values():
        got = (
            f"got {path.name}, which is still being written by {writer}. Stop it first."
        )
        if writer.state == "unknown":
            got = describe_unknown(writer, path.name)
        msg = f"runs delete: expected a run that has ended, {got}"
        raise click.ClickException(msg)


@runs.command()
@run_argument("names", nargs=-1, required=True, metavar="RUN...")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@_common_options
def release(
    names: tuple[str, ...], yes: bool, runs_dir: Path | None, as_json: bool
) -> None:
    """Declare that runs with status unknown have ended.

    They can then be resumed or deleted. They were written by a process on another machine
    that has given no sign of life for some time. Make sure that it has ended: if two
    processes write one run, its records get mixed up.
    """
    from tracking.store import find_writers, release_run  # noqa: PLC0415  next to read

    paths = list(dict.fromkeys(run.path for run in open_runs(names, runs_dir)))
    for path in paths:
        for writer in find_writers(path).values():
            if writer.state == "live":
                raise click.ClickException(
                    f"runs release: expected a run with status unknown, got {path.name}, "
                    f"which is being written by {writer}. Stop it."
                )
            render.echo(f"{path.name}: {writer}", err=True)
    if not yes:
        click.confirm("Have these processes ended?", abort=True, err=True)
    released = {path.name: release_run(path) for path in paths}
    if as_json:
        render.print_json([name for name, ranks in released.items() if ranks])


# --------------------------------------------------- export, sync, verify and ui


@click.command()
@run_argument("names", nargs=-1, required=True, metavar="RUN...")
@click.option("--to", required=True, metavar="PATH",
              help="File, folder or URI to write to.")  # fmt: skip
@click.option("--superseded", is_flag=True, help="Include superseded rows.")
@_common_options
def export(
    names: tuple[str, ...],
    to: str,
    superseded: bool,
    runs_dir: Path | None,
    as_json: bool,
) -> None:
    """Write the records of runs to Parquet, CSV or Arrow.

    The suffix of PATH chooses the format: .parquet, .csv, .arrow or .feather. A PATH without
    a suffix is a folder with one Parquet file per run.
    """
    from tracking.exporter import export as export_runs  # noqa: PLC0415  imports Arrow

    found = open_runs(names, runs_dir)
    try:
        rows = export_runs(found, to, superseded=superseded)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if as_json:
        render.print_json({"rows": rows, "path": to})
    else:
        render.echo(f"{rows} rows -> {to}")


@click.command()
@run_argument("names", nargs=-1, metavar="[RUN...]")
@_patience_option(10.0)
@_common_options
def sync(
    names: tuple[str, ...], patience: float, runs_dir: Path | None, as_json: bool
) -> None:
    """Send records that MLflow is missing. Without RUN, for every run.

    The exit code is 1 if MLflow is still missing records afterwards.
    """
    from tracking.delivery.sync import sync_each  # noqa: PLC0415  imports Arrow

    done = []
    for one in sync_each(_select_runs(names, runs_dir), patience):
        done.append(one)
        if not as_json:
            render.echo(render.format_sync(vars(one)))
    if as_json:
        render.print_json([vars(one) for one in done])
    if not all(one.is_complete for one in done):
        sys.exit(1)


@click.command()
@run_argument("names", nargs=-1, metavar="[RUN...]")
@click.option("--file", "files", multiple=True,
              type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Parquet file to compare with. Default: the exports in the run.")  # fmt: skip
@click.option("--no-mlflow", is_flag=True, help="Do not compare with MLflow.")
@_patience_option(30.0)
@_common_options
def verify(
    names: tuple[str, ...],
    files: tuple[Path, ...],
    no_mlflow: bool,
    patience: float,
    runs_dir: Path | None,
    as_json: bool,
) -> None:
    """Compare journals, exported files and MLflow row by row.

    Without RUN, checks every run. Prints nothing if all rows are equal. Differences are
    summarized with a few examples; --json lists all of them.
    """
    from tracking.delivery.sync import open_mlflow  # noqa: PLC0415  imports Arrow
    from tracking.errors import TrackingError  # noqa: PLC0415  next to verify
    from tracking.verify.report import list_errors, list_findings  # noqa: PLC0415  next to it
    from tracking.verify.verify import verify as verify_run  # noqa: PLC0415  imports Arrow

    results, errors = [], []
    with open_mlflow(patience) as read:
        for run in _select_runs(names, runs_dir):
            try:
                mlflow = False if no_mlflow else read
                results.append(verify_run(run, files or None, mlflow=mlflow))
            except (TrackingError, OSError, ValueError) as error:  # of this run alone
                errors.append(str(error))
    if as_json:
        render.print_json([render.verification_to_json(result) for result in results])
    else:
        for line in list_findings(results):
            render.echo(line)
    errors += [result.message() for result in results if result.mismatches]
    for line in errors if as_json else list_errors(errors):
        render.echo(f"error: {line}", err=True)
    if errors:
        sys.exit(1)


@click.command()
@run_argument("names", nargs=-1, metavar="[RUN...]")
@click.option("--port", type=click.IntRange(0, 65535), default=5000, show_default=True,
              help="Port of the server; 0 picks a free one.")  # fmt: skip
@click.option("--open", "opens", is_flag=True, help="Open the page in a browser.")
@_common_options
def ui(
    names: tuple[str, ...], port: int, opens: bool, runs_dir: Path | None, as_json: bool
) -> None:
    """Serve MLflow's UI for the store of the runs.

    Prints the address of the page, and serves it until Ctrl-C. The page shows the experiment,
    one RUN, or several runs side by side, such as a run and its forks.
    """
    from tracking.mlflow_store.server import Server  # noqa: PLC0415  next to page_url
    from tracking.mlflow_store.uris import page_url  # noqa: PLC0415  imports Arrow

    pages: dict[str, str] = {}  # experiment of each run of MLflow
    store, experiment, _ = _find_store(runs_dir)
    for number, run in enumerate(open_runs(names, runs_dir)):
        own, experiment, run_id = _find_store(runs_dir, [run.path])
        if run_id is None:
            msg = f"ui: expected a run that MLflow has, got {run.id}."
            raise click.UsageError(f"{msg} Run 'harness sync {run.id}' first.")
        if number and own != store:
            msg = (
                f"ui: expected runs of the same MLflow store, got {run.id} in another."
            )
            raise click.UsageError(f"{msg} Name runs of the same store.")
        store, pages[run_id] = own, experiment
    if store.startswith(("http://", "https://")):
        _print_page(page_url(store, experiment, pages), opens, as_json)
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), Server(store, port) as server:
        _print_page(page_url(server.address, experiment, pages), opens, as_json)
        server.wait()


commands: Final = (runs, export, sync, verify, ui)
"""Commands for the group ``harness``."""


# ------------------------------------------------------------------- finding runs


def open_run(ref: str, runs_dir: Path | None) -> PastRun:
    """Open a run by path, id or part of its name; a usage error if there is none."""
    return open_runs([ref], runs_dir)[0]


def open_runs(refs: Sequence[str], runs_dir: Path | None) -> list[PastRun]:
    """Open several runs, as ``open_run``; the folder of runs is looked through once."""
    import tracking  # noqa: PLC0415  imports Arrow
    from tracking.store import find_runs  # noqa: PLC0415  next to it

    try:
        return [tracking.PastRun(path) for path in find_runs(refs, runs_dir)]
    except tracking.RunNotFoundError as error:
        raise click.UsageError(str(error)) from error


def _select_runs(names: tuple[str, ...], runs_dir: Path | None) -> list[PastRun]:
    """Open the named runs; without names, all runs that are delivered to MLflow."""
    from tracking.read import PastRun  # noqa: PLC0415  imports Arrow
    from tracking.store import read_manifests  # noqa: PLC0415  next to it

    if names:
        return open_runs(names, runs_dir)
    manifests = [*read_manifests(runs_dir)]
    found = [PastRun(path) for path, manifest in manifests if manifest.deliver]
    if not found:
        _tell_of_none(runs_dir, " that are sent to MLflow" if manifests else "")
    return found


def _tell_of_none(runs_dir: Path | None, kind: str = "") -> None:
    """Say that a folder has no runs: it may be the wrong one."""
    from tracking.store import runs_folder  # noqa: PLC0415  imports Arrow

    render.echo(f"no runs{kind} in {runs_folder(runs_dir)}", err=True)


def _find_store(
    runs_dir: Path | None, paths: list[Path] | None = None
) -> tuple[str, str, str | None]:
    """Tracking URI of the store that runs went to, and the newest one's experiment and id."""
    from tracking.delivery.state import DeliveryState  # noqa: PLC0415  next to uris
    from tracking.mlflow_store.uris import relocate, resolve_uri  # noqa: PLC0415  imports Arrow
    from tracking.settings import Settings  # noqa: PLC0415  next to uris
    from tracking.store import run_paths  # noqa: PLC0415  next to uris

    settings = Settings.read()
    paths = run_paths(runs_dir) if paths is None else paths
    states = ((path, DeliveryState.read_or_none(path)) for path in paths)
    used = ((path, state) for path, state in states if state and state.mlflow_run_id)
    path, latest = next(used, (Path(), None))
    if settings.tracking_uri is None and latest is not None:
        lay_in = Path(latest.run_path or path)
        uri = relocate(latest.tracking_uri, lay_in, path)
        return uri, latest.experiment_id or "0", latest.mlflow_run_id
    uri = resolve_uri(Path.cwd(), settings.tracking_uri)
    if latest is not None and latest.tracking_uri == settings.redact_address(uri):
        return uri, latest.experiment_id or "0", latest.mlflow_run_id
    return uri, "0", None


def _print_page(address: str, opens: bool, as_json: bool) -> None:
    """Print the address of a page, and open it in a browser if asked to."""
    if as_json:
        render.print_json({"page": address})
    else:
        render.echo(address)
    sys.stdout.flush()
    if opens:
        webbrowser.open(address)
