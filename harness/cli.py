"""The command ``harness``: parses, calls the library, prints.

Nothing heavy is imported before a command runs, so that ``harness --help`` answers at once.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from tracking.cli import commands as tracking_commands


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
@click.option("--runs-dir", type=click.Path(file_okay=False, path_type=Path),
              help="Folder of runs; default HARNESS_RUNS or ./runs.")  # fmt: skip
@click.option("--no-track", is_flag=True, help="Record nothing.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def fit(target: str, **options: Any) -> None:
    """Train what NAME describes: an Experiment, or a function that returns one."""
    from harness.errors import ExperimentError  # noqa: PLC0415  imports torch

    try:
        experiment = experiment_of(target, options)
    except ExperimentError as exc:
        raise click.UsageError(str(exc)) from exc
    where = options["runs_dir"]
    tracker: Any = {"runs_dir": where} if where is not None else None
    if options["no_track"]:
        tracker = False
    fitted = experiment.fit(verbose=not options["quiet"], tracker=tracker)
    click.echo(str(fitted))
    if fitted.signum is not None:
        sys.exit(128 + fitted.signum)


def experiment_of(target: str, options: dict[str, Any]) -> Any:
    """The experiment, with what the command line says instead of its own settings."""
    from harness.experiment import build, find, literal  # noqa: PLC0415  imports torch

    given = {**read_config(options["config"]), **options["sets"]}
    experiment = build(find(target), given)
    if options["opts"]:
        opts = {name: literal(value) for name, value in options["opts"].items()}
        experiment = experiment.set_opt_hparams(**opts)
    own = {key: options[key] for key in ("name", "experiment", "seed")}
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

if __name__ == "__main__":
    main()
