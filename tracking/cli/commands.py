"""The commands that need no torch: ``runs``, ``export``, ``sync``, ``verify``, ``ui``.

`harness` takes them from `commands`. Each one parses, calls the library and prints;
what is heavy is imported when it runs, so that ``harness --help`` answers at once.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from tracking.cli.render import (
    facts,
    keys,
    left,
    new_table,
    print_json,
    print_table,
    synced,
    told,
    values,
    verified,
    when,
    word,
)

if TYPE_CHECKING:
    from tracking.read import PastRun

F = TypeVar("F", bound=Callable[..., Any])


def _options(command: F) -> F:
    """The options that every command has."""
    folder = click.Path(file_okay=False, path_type=Path)
    command = click.option("--json", "as_json", is_flag=True, help="Print JSON.")(
        command
    )
    text = "Folder of runs; default HARNESS_RUNS or ./runs."
    return click.option("--runs-dir", type=folder, help=text)(command)


# --------------------------------------------------------------------------- runs


@click.group(invoke_without_command=True)
@click.pass_context
def runs(ctx: click.Context) -> None:
    """Browse runs: list, show, compare, delete."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_, runs_dir=None, as_json=False, limit=20)


@runs.command("list")
@_options
@click.option("--limit", default=20, show_default=True, help="At most so many; 0: all.")
def list_(runs_dir: Path | None, as_json: bool, limit: int) -> None:
    """List runs, newest first."""
    from tracking.cli.overview import brief  # noqa: PLC0415 (Arrow)

    found = []
    for run in _all(runs_dir)[: limit or None]:
        try:
            found.append(brief(run))
        except ValueError as error:  # a manifest that somebody spoilt
            click.echo(f"warning: {error}", err=True)
    if as_json:
        print_json(found)
        return
    table = new_table("run", "status", "experiment", "started", "took", "MLflow")
    for one in found:
        words = (one["id"], one["status"], one["experiment"] or "")
        table.add_row(*words, *when(one), left(one["behind"]))
    print_table(table)


@runs.command()
@click.argument("run")
@_options
def show(run: str, runs_dir: Path | None, as_json: bool) -> None:
    """Show all that is known of RUN: its path, id, or a part of its name."""
    from tracking.cli.overview import overview  # noqa: PLC0415 (Arrow)

    found = overview(_open(run, runs_dir))
    if as_json:
        print_json(found)
        return
    print_table(facts(found))
    for kind, title in (("params", "param"), ("metrics", "metric")):
        if found[kind]:
            print_table(values(found[kind], title))


@runs.command()
@click.argument("names", nargs=-1, required=True, metavar="RUN RUN...")
@_options
def compare(names: tuple[str, ...], runs_dir: Path | None, as_json: bool) -> None:
    """Show the params that differ and the metrics of several runs, side by side."""
    from tracking.cli.overview import overview  # noqa: PLC0415 (Arrow)

    found = [overview(_open(name, runs_dir)) for name in names]
    if as_json:
        print_json(found)
        return
    table = new_table("", *(one["id"] for one in found))
    for key in keys(one["params"] for one in found):
        words = [word(one["params"].get(key, "")) for one in found]
        if len(set(words)) > 1:
            table.add_row(key, *words)
    for key in keys(one["metrics"] for one in found):
        last = [one["metrics"].get(key, {}).get("last") for one in found]
        table.add_row(key, *("" if value is None else word(value) for value in last))
    print_table(table)


@runs.command()
@click.argument("names", nargs=-1, required=True, metavar="RUN...")
@click.option("--yes", is_flag=True, help="Ask nothing.")
@_options
def delete(
    names: tuple[str, ...], yes: bool, runs_dir: Path | None, as_json: bool
) -> None:
    """Delete the records, artifacts and checkpoints of runs; MLflow keeps its own."""
    found = [_open(name, runs_dir) for name in names]
    for run in found:
        if run.status == "running":
            raise click.ClickException(
                f"runs delete: expected a run that has ended, got {run.id}, which is "
                "being written. End it first."
            )
    if not yes:
        click.echo("\n".join(str(run.path) for run in found), err=True)
        click.confirm("Delete these folders?", abort=True, err=True)
    for run in found:
        shutil.rmtree(run.path)
    if as_json:
        print_json([run.id for run in found])


# --------------------------------------------------- export, sync, verify and ui


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="RUN...")
@click.option("--to", required=True, metavar="PATH", help="File or folder, or a URI.")
@click.option("--superseded", is_flag=True, help="Also rows that were rewound.")
@_options
def export(
    names: tuple[str, ...],
    to: str,
    superseded: bool,
    runs_dir: Path | None,
    as_json: bool,
) -> None:
    """Write records to .parquet, .csv, .arrow or .feather, or to a folder by run."""
    from tracking.exporter import export as export_runs  # noqa: PLC0415 (Arrow)

    found = [_open(name, runs_dir) for name in names]
    try:
        rows = export_runs(found, to, superseded=superseded)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if as_json:
        print_json({"rows": rows, "path": to})
    else:
        click.echo(f"{rows} rows -> {to}")


@click.command()
@click.argument("names", nargs=-1, metavar="[RUN...]")
@click.option(
    "--patience", default=10.0, show_default=True, help="Wait so many seconds."
)
@_options
def sync(
    names: tuple[str, ...], patience: float, runs_dir: Path | None, as_json: bool
) -> None:
    """Deliver what MLflow lacks of runs; without RUN, of all that are to be delivered."""
    from tracking.delivery.sync import sync as sync_runs  # noqa: PLC0415 (Arrow)

    done = sync_runs(_chosen(names, runs_dir), patience)
    if as_json:
        print_json([vars(one) for one in done])
    else:
        for one in done:
            click.echo(synced(vars(one)))
    if any(one.phase == "gave up" for one in done):
        sys.exit(1)


@click.command()
@click.argument("names", nargs=-1, metavar="[RUN...]")
@click.option(
    "--file",
    "files",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Parquet file to compare with, instead of those among the artifacts.",
)
@click.option("--no-mlflow", is_flag=True, help="Leave MLflow out.")
@_options
def verify(
    names: tuple[str, ...],
    files: tuple[Path, ...],
    no_mlflow: bool,
    runs_dir: Path | None,
    as_json: bool,
) -> None:
    """Compare journal, Parquet and MLflow row by row; silent if all are equal."""
    from tracking.errors import DeliveryError  # noqa: PLC0415 (beside it)
    from tracking.verify.verify import verify as verify_run  # noqa: PLC0415 (Arrow)

    found, failed = [], False
    for run in _chosen(names, runs_dir):
        try:
            found.append(verify_run(run, files or None, mlflow=not no_mlflow))
        except DeliveryError as error:  # the other runs are compared all the same
            click.echo(f"error: {error}", err=True)
            failed = True
    if as_json:
        print_json([verified(one) for one in found])
    else:
        for line in (line for one in found for line in told(one)):
            click.echo(line)
    for one in found:
        if one.mismatches:
            click.echo(f"error: {one.message()}", err=True)
    if failed or any(one.mismatches for one in found):
        sys.exit(1)


@click.command()
@click.option("--port", default=5000, show_default=True, help="0: any that is free.")
@click.option("--open", "opens", is_flag=True, help="Open the page in a browser.")
@_options
def ui(port: int, opens: bool, runs_dir: Path | None, as_json: bool) -> None:
    """Show MLflow's page on the store the runs went to, until Ctrl-C."""
    from tracking.mlflow_store.server import Server  # noqa: PLC0415 (beside it)
    from tracking.mlflow_store.tags import page_url  # noqa: PLC0415 (Arrow)

    store, experiment_id = _store(runs_dir)
    if store.startswith(("http://", "https://")):
        _announce(page_url(store, experiment_id), opens, as_json)
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), Server(store, port) as server:
        _announce(page_url(server.address, experiment_id), opens, as_json)
        server.wait()


commands: Final = (runs, export, sync, verify, ui)
"""Commands for the group ``harness``."""


# ------------------------------------------------------------------- finding runs


def _open(ref: str, runs_dir: Path | None) -> PastRun:
    """A run by what the user calls it; a usage error if there is none."""
    import tracking  # noqa: PLC0415 (Arrow)

    try:
        return tracking.open(ref, runs_dir)
    except tracking.RunNotFoundError as error:
        raise click.UsageError(str(error)) from error


def _all(runs_dir: Path | None) -> list[PastRun]:
    """All runs, newest first."""
    import tracking  # noqa: PLC0415 (Arrow)

    return list(tracking.list_runs(runs_dir))


def _chosen(names: tuple[str, ...], runs_dir: Path | None) -> list[PastRun]:
    """The runs that were named; if none were, all that are to be in MLflow."""
    if names:
        return [_open(name, runs_dir) for name in names]
    return [run for run in _all(runs_dir) if run.manifest.deliver]


def _store(runs_dir: Path | None) -> tuple[str, str]:
    """Tracking URI of the store that runs went to, and the newest run's experiment."""
    from tracking.delivery.state import DeliveryState  # noqa: PLC0415 (beside it)
    from tracking.mlflow_store.uris import resolve_uri  # noqa: PLC0415 (beside it)
    from tracking.settings import Settings  # noqa: PLC0415 (beside it)

    settings = Settings.read()
    states = (DeliveryState.read(run.path) for run in _all(runs_dir))
    latest = next((state for state in states if state and state.mlflow_run_id), None)
    uri = settings.tracking_uri
    if uri is None and latest is not None:
        return latest.tracking_uri, latest.experiment_id or "0"
    uri = resolve_uri(Path.cwd(), uri)
    is_there = latest is not None and latest.tracking_uri == settings.redact(uri)
    return uri, (latest.experiment_id or "0") if latest and is_there else "0"


def _announce(address: str, opens: bool, as_json: bool) -> None:
    """Tell where the page is."""
    if as_json:
        print_json({"page": address})
    else:
        click.echo(address)
    sys.stdout.flush()
    if opens:
        webbrowser.open(address)
