"""The command ``harness``: its group, and the commands that are not in a file of their own.

Heavy imports wait until a command runs, so that ``harness --help`` answers at once.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import click

from harness.cli.inference import evaluate, export_weights, predict
from harness.cli.init import init
from harness.cli.train import fit, launch, resume
from tracking.cli import render
from tracking.cli.commands import commands as tracking_commands
from tracking.cli.commands import (
    json_option,
    open_run,
    run_argument,
    runs,
    runs_dir_option,
)
from tracking.cli.group import CommandGroup
from tracking.errors import escape_control

STATE_COLOURS = {"ok": "green", "limited": "yellow", "broken": "red"}


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, envvar="HARNESS_DEBUG",
              help="Show the whole traceback of an error.")  # fmt: skip
@click.version_option(package_name="luz-harness")
@click.pass_context
def main(ctx: click.Context, debug: bool) -> None:
    """Train PyTorch models, record every logged value, show runs in MLflow."""
    if debug:  # also of the ranks that a command starts
        os.environ["HARNESS_DEBUG"] = "1"  # noqa: TID251
        ctx.call_on_close(partial(os.environ.pop, "HARNESS_DEBUG", None))  # noqa: TID251


own_commands = (init, fit, resume, launch, evaluate, predict, export_weights)
for command in (*own_commands, *tracking_commands):
    main.add_command(command)


@runs.command("fork")
@run_argument("run")
@click.option("--at", "step", type=click.IntRange(min=0), required=True, metavar="STEP",
              help="Step of the checkpoint to start from.")  # fmt: skip
@click.option("--name", help="Name of the new run.")
@runs_dir_option
@json_option
def fork(
    run: str, step: int, name: str | None, runs_dir: Path | None, as_json: bool
) -> None:
    """Start a new run from a checkpoint of RUN.

    The new run shares the records up to that step. RUN itself does not change.
    """
    from harness.checkpoint.fork import fork_run  # noqa: PLC0415  imports torch

    open_run(run, runs_dir)
    child = fork_run(run, step, name=name, runs_dir=runs_dir)
    if as_json:
        render.print_json({"run": child.id, "path": str(child.path)})
    else:
        render.echo(f"{child.id}\nresume with: harness resume {child.id}")
        render.echo(f"side by side: harness ui {run} {child.id}")


@main.command()
@click.option("--runs-dir", default="runs", envvar="HARNESS_RUNS",
              help="Folder of runs. Default: $HARNESS_RUNS or ./runs.")  # fmt: skip
@click.option("--tracking-uri", envvar="MLFLOW_TRACKING_URI", hidden=True)
@json_option
def doctor(runs_dir: str, tracking_uri: str | None, as_json: bool) -> None:
    """Check devices, DeepSpeed, MLflow and disk of this machine.

    Each problem comes with advice. The exit code is 1 if something is broken.
    """
    from harness.cli.doctor import examine  # noqa: PLC0415  imports torch

    found = examine(runs_dir, tracking_uri)
    if as_json:
        render.print_json([asdict(check) for check in found])
    else:
        for check in found:
            state = click.style(f"{check.state:<7}", fg=STATE_COLOURS[check.state])
            detail = escape_control(check.detail)
            click.echo(f"{state} {check.name:<16} {detail}")
            if check.advice:
                render.echo(f"{'':24} -> {check.advice}")
    if any(check.state == "broken" for check in found):
        sys.exit(1)
