"""The command ``harness``: parses, calls the library, prints.

Nothing heavy is imported before a command runs, so that ``harness --help`` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from tracking.cli.commands import commands as tracking_commands
from tracking.cli.commands import runs

RUNS_DIR = click.option(
    "--runs-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of runs; default HARNESS_RUNS or ./runs.",
)


class Group(click.Group):
    """A click group whose failures end in one clear line; ``--debug`` shows the traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; map exceptions to exit codes 1 and 130."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            sys.exit(130)
        except Exception as exc:
            if ctx.params.get("debug"):
                raise
            click.echo(f"error: {describe(exc)}", err=True)
            sys.exit(1)


def describe(exc: Exception) -> str:
    """The exception in one line, and where it happened."""
    text = str(exc) or type(exc).__name__
    notes = " ".join(getattr(exc, "__notes__", []))
    known = isinstance(exc, ValueError | TypeError | LookupError | OSError)
    kind = "" if known or text.startswith(type(exc).__name__) else type(exc).__name__
    parts = [f"{kind}: {text}" if kind else text, f"({notes})" if notes else ""]
    return " ".join(part for part in parts if part)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(package_name="luz-harness")
def main(debug: bool) -> None:
    """Train PyTorch models; every logged value stays, every run shows in MLflow."""


def settings(_: Any, option: click.Parameter, pairs: tuple[str, ...]) -> dict[str, str]:
    """``NAME=VALUE`` pairs as a dict; a usage error where there is no ``=``."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            msg = f"expected NAME=VALUE, got {pair!r}."
            raise click.BadParameter(msg, param=option)
        found[name] = value
    return found


def read_config(path: Path | None) -> dict[str, Any]:
    """Settings from a YAML file."""
    if path is None:
        return {}
    import yaml  # noqa: PLC0415  keeps --help quick

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as exc:
        msg = f"--config {path}: expected YAML, got: {exc}."
        raise click.UsageError(msg) from exc
    if not isinstance(found, dict):
        msg = f"--config {path}: expected settings by name, got {found!r}."
        raise click.UsageError(f"{msg} Write lines like 'hidden: 128'.")
    return found


@main.command()
@click.argument("target", metavar="FILE.py:NAME | MODULE:NAME")
@click.option("--set", "sets", multiple=True, callback=settings, metavar="NAME=VALUE",
              help="Parameter of the function NAME; may be repeated.")  # fmt: skip
@click.option("--opt", "opts", multiple=True, callback=settings, metavar="NAME=VALUE",
              help="Optimizer option, such as lr=0.01; may be repeated.")  # fmt: skip
@click.option("--config", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="YAML file with parameters; --set goes before it.")  # fmt: skip
@click.option("--epochs", help="Epochs, or MIN,MAX.")
@click.option("--name", help="Name of the run.")
@click.option("--experiment", help="MLflow experiment the run belongs to.")
@click.option("--seed", type=int, help="Seed of all random generators.")
@RUNS_DIR
@click.option("--no-track", is_flag=True, help="Record nothing.")
@click.option(
    "--no-deliver", is_flag=True, help="Leave MLflow alone; 'harness sync' sends later."
)
@click.option("--checkpoint-every", type=click.IntRange(min=1), metavar="STEPS",
              help="Also save a checkpoint every so many steps.")  # fmt: skip
@click.option("--keep-checkpoints", type=click.IntRange(min=1), default=1,
              show_default=True, metavar="N", help="Newest checkpoints that stay.")  # fmt: skip
@click.option("--no-checkpoints", is_flag=True, help="Save no checkpoints.")
@click.option("--resume", metavar="RUN", help="Go on with this run.")
@click.option("--strict", is_flag=True,
              help="With --resume: refuse differences in code, data or versions.")  # fmt: skip
@click.option("--quiet", is_flag=True, help="Show no progress.")
def fit(target: str, **options: Any) -> None:
    """Train what NAME describes: an Experiment, or a function that returns one.

    A checkpoint is saved after each epoch and on Ctrl-C; 'harness resume RUN' goes on.
    """
    experiment = experiment_of(target, options)
    fitted = train(experiment, options)
    if is_main():
        click.echo(str(fitted))
    if fitted.signum is not None:
        if is_main():
            click.echo(f"go on with: harness resume {fitted.run_id}", err=True)
        sys.exit(128 + fitted.signum)


def is_main() -> bool:
    """True on the rank that prints and saves."""
    from harness.accelerators.distributed.environment import read_launch  # noqa: PLC0415  imports torch

    return read_launch().rank == 0


def train(experiment: Any, options: dict[str, Any]) -> Any:
    """Fit as the options say; the model is saved in the run."""
    from harness.callbacks import ModelCheckpoint, ResumeFromCheckpoint  # noqa: PLC0415
    from harness.cli.inference import MODEL  # noqa: PLC0415  imports torch

    where = options["runs_dir"]
    extra: list[Any] = []
    if options["resume"] is not None:
        run = run_of(options["resume"], where)
        folder, strict = run.path / "checkpoints", options["strict"]
        extra.append(ResumeFromCheckpoint(folder, strict=strict))
    if not (options["no_track"] or options["no_checkpoints"]):
        extra.append(
            ModelCheckpoint(
                every_n_steps=options["checkpoint_every"],
                keep_last=options["keep_checkpoints"],
            )
        )
    experiment = replace(experiment, callbacks=[*experiment.callbacks, *extra])
    tracker: Any = {"runs_dir": where, "delivery": not options["no_deliver"]}
    if options["no_track"]:
        tracker = False
    fitted = experiment.fit(verbose=not options["quiet"], tracker=tracker)
    if fitted.run_path is not None and fitted.signum is None and is_main():
        fitted.save(fitted.run_path / MODEL)
    return fitted


def run_of(ref: str, runs_dir: Path | None) -> Any:
    """A run by path, id or part of its name; a usage error if there is none."""
    import tracking  # noqa: PLC0415  keeps --help quick

    try:
        return tracking.open(ref, runs_dir=runs_dir)
    except tracking.RunNotFoundError as exc:
        raise click.UsageError(str(exc)) from exc


@main.command()
@click.argument("run")
@click.option("--strict", is_flag=True,
              help="Refuse differences in code, data or versions.")  # fmt: skip
@RUNS_DIR
@click.pass_context
def resume(ctx: click.Context, run: str, strict: bool, runs_dir: Path | None) -> None:
    """Go on with RUN from its last checkpoint, with the recorded command."""
    past = run_of(run, runs_dir)
    with recorded_folder(past):
        options = ["--resume", str(past.path.absolute())]
        options += ["--runs-dir", str(past.path.parent.absolute())]
        options += ["--strict"] if strict else []
        ctx.invoke(fit, **parsed(past, options))


@runs.command("fork")
@click.argument("run")
@click.option("--at", "step", type=click.IntRange(min=0), required=True, metavar="STEP",
              help="Optimizer steps done at the checkpoint.")  # fmt: skip
@click.option("--name", help="Name of the new run.")
@RUNS_DIR
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def fork_command(
    run: str, step: int, name: str | None, runs_dir: Path | None, as_json: bool
) -> None:
    """Make a run that shares RUN's records up to a checkpoint and goes its own way."""
    import json  # noqa: PLC0415  keeps --help quick

    from harness.checkpoint.fork import fork_run  # noqa: PLC0415  imports torch

    run_of(run, runs_dir)
    child = fork_run(run, step, name=name, runs_dir=runs_dir)
    if as_json:
        click.echo(json.dumps({"run": child.id, "path": str(child.path)}))
    else:
        click.echo(f"{child.id}\ngo on with: harness resume {child.id}")


@main.command()
@click.argument("run")
@RUNS_DIR
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def evaluate(run: str, runs_dir: Path | None, as_json: bool) -> None:
    """Losses and metrics of what RUN trained, on its test data, else its validation data."""
    import json  # noqa: PLC0415  keeps --help quick

    from harness.cli.inference import fitted_of, test_data_of  # noqa: PLC0415  imports torch

    past = run_of(run, runs_dir)
    with recorded_folder(past):
        options = parsed(past, [])
        experiment = experiment_of(options.pop("target"), options)
        data = test_data_of(experiment)
        fitted = fitted_of(past.path.absolute(), experiment)
    found = experiment.learner.evaluate(fitted, data, verbose=False)
    values = found.records["metrics"]["valid"][0]
    click.echo(json.dumps(values) if as_json else str(found))


@main.command()
@click.argument("run")
@click.argument("data", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--to", required=True, type=click.Path(dir_okay=False, path_type=Path),
              help="File to write: .npy, .csv or .parquet.")  # fmt: skip
@RUNS_DIR
def predict(run: str, data: Path, to: Path, runs_dir: Path | None) -> None:
    """Predict the rows of DATA (.npy, .csv, .parquet) with what RUN trained."""
    from harness.cli.inference import fitted_of, read_rows, write_rows  # noqa: PLC0415  torch

    past = run_of(run, runs_dir)
    rows = read_rows(data)
    with recorded_folder(past):
        options = parsed(past, [])
        experiment = experiment_of(options.pop("target"), options)
        fitted = fitted_of(past.path.absolute(), experiment)
    pred = fitted.predict(rows, verbose=False)
    write_rows(pred, to)
    click.echo(f"{len(rows)} rows -> {to}")


@main.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True}
)
@click.option("--num-gpus", type=click.IntRange(min=1), help="Ranks on each machine.")
@click.option("--num-nodes", type=click.IntRange(min=1), help="Machines to use.")
@click.option("--hostfile", type=click.Path(path_type=Path),
              help="Lines 'name slots=N', one for each machine.")  # fmt: skip
@click.option("--master-port", type=int, help="Port of rank 0.")
@click.option("--verbose-launcher", is_flag=True, help="Let DeepSpeed's launcher talk.")
@click.argument("target", metavar="FILE.py:NAME | MODULE:NAME")
@click.pass_context
def launch(ctx: click.Context, /, target: str, **options: Any) -> None:
    """The same as fit, on several ranks by DeepSpeed's launcher; further options go to fit."""
    from harness.accelerators.distributed.launcher import build_launch_command  # noqa: PLC0415
    from harness.accelerators.distributed.launcher import launch as start  # noqa: PLC0415

    try:
        command = build_launch_command(
            ["-m", "harness.cli", "fit", target, *ctx.args],
            num_gpus=options["num_gpus"],
            num_nodes=options["num_nodes"],
            hostfile=options["hostfile"],
            master_port=options["master_port"],
            verbose=options["verbose_launcher"],
        )
    except ValueError as exc:
        raise click.UsageError(str(exc)) from exc
    sys.exit(start(command))


@main.command()
@click.option("--runs-dir", default="runs", envvar="HARNESS_RUNS", show_default=True,
              help="Folder of runs.")  # fmt: skip
@click.option("--tracking-uri", envvar="MLFLOW_TRACKING_URI", hidden=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(runs_dir: str, tracking_uri: str | None, as_json: bool) -> None:
    """What this machine can do, and what to do about each lack; exit code 1 if broken."""
    import json  # noqa: PLC0415  keeps --help quick

    from harness.doctor import examine  # noqa: PLC0415  imports torch

    found = examine(runs_dir, tracking_uri)
    if as_json:
        click.echo(json.dumps([asdict(check) for check in found], indent=1))
    else:
        colours = {"ok": "green", "limited": "yellow", "broken": "red"}
        for check in found:
            state = click.style(f"{check.state:<7}", fg=colours[check.state])
            click.echo(f"{state} {check.name:<16} {check.detail}")
            if check.advice:
                click.echo(f"{'':24} -> {check.advice}")
    if any(check.state == "broken" for check in found):
        sys.exit(1)


@contextmanager
def recorded_folder(past: Any) -> Iterator[None]:
    """Work in the folder in which the run was started, where it is still there."""
    here, then = Path.cwd(), Path(past.manifest.cwd)
    if then.is_dir():
        os.chdir(then)
    try:
        yield
    finally:
        os.chdir(here)


def parsed(past: Any, options: list[str]) -> dict[str, Any]:
    """The recorded arguments of ``fit``, with these options instead of theirs."""
    from harness.cli.inference import fit_arguments, without_option  # noqa: PLC0415  torch
    from harness.errors import ExperimentError  # noqa: PLC0415  keeps --help quick

    try:
        recorded = fit_arguments(past.manifest.command, past.id)
    except ExperimentError as exc:
        raise click.UsageError(str(exc)) from exc
    arguments = without_option(recorded, "--resume", "--runs-dir") + options
    return dict(fit.make_context("fit", arguments).params)


def experiment_of(target: str, options: dict[str, Any]) -> Any:
    """The experiment, with what the command line says instead of its own settings."""
    from harness.errors import ExperimentError  # noqa: PLC0415  keeps --help quick
    from harness.experiment import (  # noqa: PLC0415  imports torch
        build_experiment,
        load_target,
        parse_literal,
    )

    given = {**read_config(options["config"]), **options["sets"]}
    try:
        experiment = build_experiment(load_target(target), given)
    except ExperimentError as exc:
        raise click.UsageError(str(exc)) from exc
    if options["opts"]:
        opts = {name: parse_literal(value) for name, value in options["opts"].items()}
        experiment = experiment.set_opt_hparams(**opts)
    own = {key: options[key] for key in ("name", "seed")}
    own["mlflow_experiment"] = options["experiment"]
    own["epochs"] = epochs_of(options["epochs"])
    return replace(
        experiment, **{key: value for key, value in own.items() if value is not None}
    )


def epochs_of(text: str | None) -> int | tuple[int, int] | None:
    """``10`` or ``5,10`` as numbers."""
    if text is None:
        return None
    try:
        low, *high = (int(part) for part in text.split(","))
        return (low, *high) if len(high) == 1 else low  # type: ignore[return-value]
    except ValueError:
        msg = f"--epochs: expected a number or MIN,MAX, got {text!r}."
        raise click.UsageError(f"{msg} Write for example --epochs 10.") from None


for command in tracking_commands:
    main.add_command(command)
