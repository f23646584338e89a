"""The commands ``fit``, ``resume`` and ``launch``, and the experiment that they train."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from harness.cli.ranks import (
    end_with_ranks,
    find_launch_options,
    is_main,
    launcher_options,
    start_ranks,
)
from harness.cli.target import check_source, load_target
from tracking.cli import render
from tracking.cli.commands import open_run, run_argument, runs_dir_option
from tracking.errors import is_terminal
from tracking.redaction import is_secret
from tracking.settings import read_rank

if TYPE_CHECKING:
    from harness.accelerators.base import Accelerator
    from harness.callback import Callback
    from harness.experiment import Experiment
    from harness.fitted import Fitted
    from harness.pytree import Options
    from tracking import PastRun

_REPLAYED = (
    *("target", "sets", "opts", "epochs", "name", "experiment", "seed"),
    *("max_steps", "valid_every", "limit_batches"),
    *("precision", "device", "deterministic"),
    *("no_track", "no_deliver", "checkpoint_every", "keep_checkpoints"),
    *("no_checkpoints", "stop_within", "strict", "quiet"),
)
"""Options of ``fit`` that a run records as they are; ``config`` is recorded as text."""

MODEL = "model"
"""Folder of a run in which ``harness fit`` saves the trained model."""


def _parse_pairs(
    _: object, option: click.Parameter, pairs: tuple[str, ...]
) -> dict[str, str]:
    """Convert ``NAME=VALUE`` pairs to a dict; a usage error where there is no ``=``."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            msg = f"expected NAME=VALUE, got {pair!r}."
            raise click.BadParameter(msg, param=option)
        found[name] = value
    return found


def secret_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add options for the secrets that a run does not record."""
    for name, flag in (("opts", "--opt"), ("sets", "--set")):
        help_ = f"Value of a secret {flag} option, which the run does not record."
        command = click.option(flag, name, multiple=True, callback=_parse_pairs,
                               metavar="NAME=VALUE", help=help_)(command)  # fmt: skip
    return command


# ----------------------------------------------------------------------- commands


@click.command()
@click.argument("target", metavar="FILE.py:NAME | MODULE:NAME")
@click.option("--set", "sets", multiple=True, callback=_parse_pairs, metavar="NAME=VALUE",
              help="Argument of the function NAME; can be repeated.")  # fmt: skip
@click.option("--opt", "opts", multiple=True, callback=_parse_pairs, metavar="NAME=VALUE",
              help="Optimizer option, e.g. lr=0.01; can be repeated.")  # fmt: skip
@click.option("--config", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="YAML file with arguments; --set overrides it.")  # fmt: skip
@click.option("--epochs", help="Number of epochs, or MIN,MAX.")
@click.option("--max-steps", type=click.IntRange(min=1), metavar="STEPS",
              help="Stop after at most STEPS optimizer steps.")  # fmt: skip
@click.option("--valid-every", metavar="EVERY",
              help="Interval between validations: '500 steps', or a number of epochs.")  # fmt: skip
@click.option("--limit-batches", metavar="N",
              help="Use N batches of each pass, or a fraction such as 0.1.")  # fmt: skip
@click.option("--name", help="Name of the run.")
@click.option("--experiment", help="MLflow experiment of the run.")
@click.option("--seed", type=int, help="Seed of all random generators.")
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]),
              help="Mixed precision; the weights stay in float32.")  # fmt: skip
@click.option("--device", help="Device, e.g. cpu or cuda:1; default: the best one.")
@click.option("--deterministic", is_flag=True,
              help="Use only kernels that give the same bits in each run.")  # fmt: skip
@runs_dir_option
@click.option("--no-track", is_flag=True, help="Do not record the run.")
@click.option("--no-deliver", is_flag=True,
              help="Send nothing to MLflow; 'harness sync' can send it later.")  # fmt: skip
@click.option("--checkpoint-every", type=click.IntRange(min=1), metavar="STEPS",
              help="Also save a checkpoint every STEPS steps.")  # fmt: skip
@click.option("--keep-checkpoints", type=click.IntRange(min=1), default=1,
              show_default=True, metavar="N", help="Number of checkpoints to keep.")  # fmt: skip
@click.option("--no-checkpoints", is_flag=True, help="Save no checkpoints.")
@click.option("--stop-within", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS",
              help="Time from a signal such as SIGTERM until the process is killed.")  # fmt: skip
@click.option("--resume", metavar="RUN", help="Continue this run.")
@click.option("--strict", is_flag=True,
              help="With --resume: refuse changes in code, data or versions.")  # fmt: skip
@click.option("--quiet", is_flag=True, help="Show no progress.")
def fit(target: str, **options: object) -> None:
    """Train the experiment that NAME describes.

    NAME is an Experiment, or a function that returns one. A checkpoint is saved after
    each epoch and on Ctrl-C; 'harness resume RUN' continues from it.
    """
    options["target"] = target
    launched = read_rank()
    is_shown = not options["quiet"] and (launched is None or launched.rank == 0)
    with end_with_ranks():
        check_early(target, options)
        with render.showing(f"loading {target} ...", when=is_shown):
            if options.get("deterministic"):
                _use_deterministic_kernels()
            experiment = load_experiment(target, options)
        fitted = train(experiment, options)
    # In a terminal the last lines of the progress have told it.
    is_told = not options["quiet"] and is_terminal() and sys.stdout.isatty()
    if is_main() and not is_told:
        render.echo(fitted)
    if fitted.signum is not None:
        if is_main():
            render.echo(f"resume with: harness resume {fitted.run_id}", err=True)
        sys.exit(128 + fitted.signum)


@click.command()
@run_argument("run")
@click.option("--strict", is_flag=True,
              help="Refuse changes in code, data or versions.")  # fmt: skip
@click.option("--num-gpus", type=click.IntRange(min=1),
              help="Number of ranks. Default: the same as before.")  # fmt: skip
@secret_options
@runs_dir_option
@click.pass_context
def resume(
    ctx: click.Context,
    /,
    run: str,
    strict: bool,
    num_gpus: int | None,
    runs_dir: Path | None,
    **given: Any,
) -> None:
    """Resume RUN from its last checkpoint.

    Runs the recorded command again. A run of several ranks is resumed on the same number of
    ranks, with DeepSpeed's launcher. To use another launcher, run
    'torchrun ... -m harness.cli resume RUN'.
    """
    past = open_run(run, runs_dir)
    with enter_working_folder(past):
        launch_options = find_launch_options(past, num_gpus)
        if launch_options is not None:
            with render.showing(f"loading {past.id} ..."):
                check_arguments(read_recorded_fit(past, given))
            words = ["resume", str(past.path.absolute()), *["--strict"] * strict]
            for flag, option in (("--set", "sets"), ("--opt", "opts")):
                for name, value in given[option].items():
                    words += [flag, f"{name}={value}"]
            start_ranks(words, launch_options)
        options = read_recorded_fit(past, given)
        options["resume"] = str(past.path.absolute())
        options["runs_dir"] = past.path.parent.absolute()
        options["strict"] = strict or options["strict"]
        ctx.invoke(fit, **options)


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True}
)
@launcher_options
@click.option("--verbose-launcher", is_flag=True,
              help="Show the output of DeepSpeed's launcher.")  # fmt: skip
@click.argument("target", metavar="FILE.py:NAME | MODULE:NAME")
@click.pass_context
def launch(ctx: click.Context, /, target: str, **options: Any) -> None:
    """Train on several ranks with DeepSpeed's launcher.

    The ranks may be on several machines. All other options are passed on to 'harness fit'.
    """
    is_verbose = options.pop("verbose_launcher")
    given = {name: value for name, value in options.items() if value}
    if "hostfile" in given:
        given["hostfile"] = str(given["hostfile"].absolute())
    arguments = [target, *ctx.args]
    options_of_fit = fit.make_context("fit", [*arguments], ctx).params
    with render.showing(f"loading {target} ..."):
        check_arguments(options_of_fit)
    start_ranks(["fit", *arguments], given, verbose=is_verbose)


def _use_deterministic_kernels() -> None:
    """Choose the kernels before NAME is imported, which may use a device."""
    from harness.accelerators.kernels import use_deterministic_kernels  # noqa: PLC0415  imports torch

    use_deterministic_kernels()


def train(experiment: Experiment, options: Options) -> Fitted:
    """Fit an experiment with the options of ``harness fit``, and save the model."""
    from harness.callbacks import Interrupt, ModelCheckpoint, ResumeFromCheckpoint  # noqa: PLC0415  imports torch

    callbacks = [*experiment.callbacks, record_arguments(options)]
    if options.get("stop_within") is not None:
        if any(isinstance(own, Interrupt) for own in callbacks):
            msg = "--stop-within: expected an experiment without Interrupt, got one."
            raise click.UsageError(f"{msg} Set Interrupt(stop_within=...) there.")
        callbacks.append(Interrupt(stop_within=options["stop_within"]))
    if options["resume"] is not None:
        checkpoints = (
            open_run(options["resume"], options["runs_dir"]).path / "checkpoints"
        )
        callbacks.append(ResumeFromCheckpoint(checkpoints, strict=options["strict"]))
    if not (options["no_track"] or options["no_checkpoints"]):
        callbacks.append(
            ModelCheckpoint(
                every_n_steps=options["checkpoint_every"],
                keep_last=options["keep_checkpoints"],
            )
        )
    tracker: Options | bool = {
        "runs_dir": options["runs_dir"],
        "delivery": not options["no_deliver"],
    }
    if options["no_track"]:
        tracker = False
    experiment = replace(experiment, callbacks=callbacks)
    fitted = experiment.fit(verbose=not options["quiet"], tracker=tracker)
    if fitted.run_path is not None and fitted.signum is None and is_main():
        fitted.save(fitted.run_path / MODEL)
    return fitted


# ----------------------------------------------------------------- the experiment


def check_arguments(options: Options) -> None:
    """Check the arguments of ``harness fit`` before ranks start, without a call of NAME."""
    from harness.errors import ExperimentError  # noqa: PLC0415  next to experiment

    arguments, places = _read_arguments(options)
    check_early(options["target"], options)
    from harness.experiment import check_target  # noqa: PLC0415  imports torch

    try:
        check_target(load_target(options["target"]), arguments, places)
    except ExperimentError as error:
        raise click.UsageError(str(error)) from error


def check_early(target: str, options: Options) -> None:
    """Check what can be checked before torch is imported, which takes seconds."""
    from harness.errors import CheckpointError, ExperimentError  # noqa: PLC0415  keeps --help quick

    arguments, places = _read_arguments(options)
    try:
        check_source(target, arguments, places)
    except ExperimentError as error:
        raise click.UsageError(str(error)) from error
    _parse_epochs(options["epochs"])
    _parse_every(options.get("valid_every"))
    _parse_limit(options.get("limit_batches"))
    if options["resume"] is not None:
        past = open_run(options["resume"], options["runs_dir"])
        if not any((past.path / "checkpoints").glob("[!.]*")):
            msg = (
                f"harness resume: expected a checkpoint of run {past.id!r}, found none."
            )
            raise CheckpointError(f"{msg} It saved none: repeat its command instead.")


def load_experiment(target: str, options: Options) -> Experiment:
    """Build the experiment, and apply the options of ``harness fit`` to it."""
    # By the package, which imports torch without the garbage collector.
    from harness import Experiment, ExperimentError  # noqa: F401, PLC0415  imports torch
    from harness.experiment import (  # noqa: PLC0415  next to it
        build_experiment,
        parse_literal,
    )

    arguments, places = _read_arguments(options)
    try:
        experiment = build_experiment(load_target(target), arguments, places)
    except ExperimentError as error:
        raise click.UsageError(str(error)) from error
    if options["opts"]:
        opts = {name: parse_literal(value) for name, value in options["opts"].items()}
        experiment = experiment.set_opt_hparams(**opts)
    changes = {
        "name": options["name"],
        "mlflow_experiment": options["experiment"],
        "seed": options["seed"],
        "epochs": _parse_epochs(options["epochs"]),
        "max_steps": options.get("max_steps"),
        "valid_every": _parse_every(options.get("valid_every")),
        "limit_batches": _parse_limit(options.get("limit_batches")),
        "accelerator": _make_accelerator(experiment, options),
    }
    given = {key: value for key, value in changes.items() if value is not None}
    return replace(experiment, **given)


def _make_accelerator(experiment: Experiment, options: Options) -> Accelerator | None:
    """Make the accelerator that ``--device`` and ``--precision`` ask for."""
    given = {key: options[key] for key in ("precision", "device") if options.get(key)}
    if not given:
        return None
    if experiment.accelerator is not None:
        msg = f"--{next(iter(given))}: expected an experiment without an accelerator"
        raise click.UsageError(f"{msg}, got one. Change it in the experiment instead.")
    from harness.accelerators.select import accelerator  # noqa: PLC0415  imports torch

    try:
        return accelerator(**given)
    except (ValueError, RuntimeError) as error:  # RuntimeError: no such device
        raise click.UsageError(str(error).splitlines()[0]) from error


def _read_arguments(options: Options) -> tuple[Options, dict[str, str]]:
    """Return the arguments of the experiment, and where those of a file come from."""
    path, sets = options["config"], options["sets"]
    found = _read_config(path)
    places = {name: f"--config {path}: {name}" for name in found if name not in sets}
    return {**found, **sets}, places


def _read_config(path: Path | None) -> Options:
    """Read the arguments in a YAML file."""
    if path is None:
        return {}
    import yaml  # noqa: PLC0415  keeps --help quick

    try:
        with path.open(encoding="utf-8") as file:  # it is named in an error
            found = yaml.safe_load(file) or {}
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        msg = f"--config {path}: expected YAML, got: {reason}."
        raise click.UsageError(msg) from error
    if not isinstance(found, dict):
        msg = f"--config {path}: expected arguments by name, got {found!r}."
        raise click.UsageError(f"{msg} Write lines like 'hidden: 128'.")
    return found


def _parse_epochs(text: str | None) -> int | tuple[int, int] | None:
    """Convert ``10`` or ``5,10`` to numbers."""
    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    match numbers:
        case [most] if most >= 1:
            return most
        case [least, most] if 0 <= least <= most and most >= 1:
            return least, most
    expected = "a number from 1, or MIN,MAX"
    msg = f"--epochs: expected {expected}, got {text!r}."
    raise click.UsageError(f"{msg} Write for example --epochs 10.")


def _parse_every(text: str | None) -> int | str | None:
    """Convert the number of epochs in ``--valid-every`` to one."""
    if text is None:
        return None
    from harness.checks.values import parse_every  # noqa: PLC0415  keeps --help quick

    every = int(text) if text.strip().isdecimal() else text
    try:
        parse_every(every)
    except ValueError as error:
        got = str(error).removeprefix("fit(valid_every): ")
        raise click.UsageError(f"--valid-every: {got}") from error
    return every


def _parse_limit(text: str | None) -> float | None:
    """Convert ``--limit-batches`` to a number."""
    if text is None:
        return None
    from harness.checks.values import check_limit  # noqa: PLC0415  keeps --help quick

    try:
        limit = float(text) if "." in text else int(text)
        check_limit("--limit-batches", limit)
    except ValueError as error:
        msg = f"--limit-batches: expected a number of batches, or a fraction, got {text!r}."
        raise click.UsageError(f"{msg} Write for example 10 or 0.1.") from error
    return limit


# ------------------------------------------------------------ the recorded command


@contextmanager
def enter_working_folder(past: PastRun) -> Iterator[None]:
    """Work in the folder that a run was started in, if that still exists."""
    current, recorded = Path.cwd(), Path(past.manifest.cwd)
    if recorded.is_dir():
        os.chdir(recorded)
    try:
        yield
    finally:
        os.chdir(current)


def record_arguments(options: Mapping[str, Any]) -> Callback:
    """Return a callback that keeps the arguments of ``harness fit`` in the run.

    They are kept apart from the command that is shown, whose secrets are masked. A
    secret is left out here, so that ``resume`` asks for it and never uses a mask.
    """
    from harness.accelerators.distributed.environment import read_launch  # noqa: PLC0415  imports torch
    from harness.callback import Callback  # noqa: PLC0415  imports torch

    arguments = {name: options[name] for name in _REPLAYED}
    arguments["config"] = options["config"] and str(options["config"])
    secrets = {}
    for option in ("sets", "opts"):
        hidden = [n for n, text in options[option].items() if is_secret(n, text)]
        arguments[option] = {
            name: text for name, text in options[option].items() if name not in hidden
        }
        secrets[option] = hidden

    launch = read_launch()
    ranks = {
        "world_size": launch.world_size,
        "local_world_size": launch.local_world_size,
        "options": launch.options and dict(launch.options),
    }

    class RecordArguments(Callback):
        def on_fit_begin(self) -> None:
            self.ctx.run.save_manifest(
                fit=arguments, fit_secrets=secrets, fit_ranks=ranks
            )

    return RecordArguments()


def read_recorded_fit(past: PastRun, given: Mapping[str, Any]) -> Options:
    """Return the options of the ``harness fit`` that a run recorded.

    Parameters
    ----------
    given
        Secrets that the run did not record: ``sets`` and ``opts``, as of ``fit``.
    """
    recorded = past.manifest.extra.get("fit")
    if recorded is None:
        shown = " ".join(past.manifest.command)[:120]
        msg = f"run {past.id!r}: expected a run of 'harness fit', got one of {shown!r}."
        raise click.UsageError(f"{msg} Run that script again; AutoResume continues it.")
    context = fit.make_context("fit", [recorded["target"]], click.get_current_context())
    options = {**context.params, **recorded}
    if options["config"] is not None:
        options["config"] = Path(options["config"])
    secrets = past.manifest.extra.get("fit_secrets") or {}
    for option, flag in (("sets", "--set"), ("opts", "--opt")):
        options[option] = {**options[option], **given[option]}
        missing = [n for n in secrets.get(option, ()) if n not in given[option]]
        if missing:
            way = f"{flag} {missing[0]}=VALUE"
            msg = (
                f"run {past.id!r}: expected {way}, got no value. It is a secret, which"
            )
            advice = f"Add {way} to this command."
            raise click.UsageError(f"{msg} the run does not record. {advice}")
    return options
