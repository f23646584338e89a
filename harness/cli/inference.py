"""The commands ``evaluate``, ``predict`` and ``export-weights``: use what a run trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from harness.cli.train import (
    MODEL,
    enter_working_folder,
    load_experiment,
    read_recorded_fit,
    secret_options,
)
from tracking.cli import render
from tracking.cli.commands import json_option, open_run, run_argument, runs_dir_option
from tracking.durable import replace_file

if TYPE_CHECKING:
    import numpy as np
    import torch

    from harness.experiment import Experiment
    from harness.fitted import Fitted
    from tracking import PastRun


@click.command()
@run_argument("run")
@secret_options
@runs_dir_option
@json_option
def evaluate(run: str, runs_dir: Path | None, as_json: bool, **given: object) -> None:
    """Evaluate the model of RUN on its test or validation data."""
    past = open_run(run, runs_dir)
    with enter_working_folder(past):
        experiment = reload_experiment(past, given)
        data = get_test_data(experiment)
        fitted = load_fitted(past, experiment)
    found = experiment.learner.evaluate(fitted, data)
    sets = {name: own[0] for name, own in found.records["metrics"].items() if own}
    values = next(iter(sets.values())) if len(sets) == 1 else sets
    if as_json:
        render.print_json(values)
    else:
        render.echo(found)


@click.command()
@run_argument("run")
@click.argument("data", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--to", required=True, type=click.Path(dir_okay=False, path_type=Path),
              help="File to write to.")  # fmt: skip
@secret_options
@runs_dir_option
def predict(
    run: str, data: Path, to: Path, runs_dir: Path | None, **given: object
) -> None:
    """Predict the rows of DATA with the model of RUN.

    DATA and the output are .npy, .csv or .parquet files.
    """
    if to.suffix not in {".npy", ".csv", ".parquet"}:
        msg = f"--to {str(to)!r}: expected .npy, .csv or .parquet, got {to.suffix!r}."
        raise click.UsageError(f"{msg} Choose one of those.")
    past = open_run(run, runs_dir)
    rows = read_rows(data)
    with enter_working_folder(past):
        fitted = load_fitted(past, reload_experiment(past, given))
    write_rows(fitted.predict(rows), to)
    render.echo(f"{len(rows)} rows -> {to}")


@click.command("export-weights")
@click.argument("source", metavar="CHECKPOINT")
@click.argument("to", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--shard-size", "shard_gb", type=click.FloatRange(min=0, min_open=True),
              default=5.0, show_default=True, metavar="GB",
              help="Size of each file in a folder.")  # fmt: skip
@runs_dir_option
def export_weights(
    source: str, to: Path, shard_gb: float, runs_dir: Path | None
) -> None:
    """Write the weights of CHECKPOINT to safetensors files.

    CHECKPOINT is a checkpoint (saved on any number of ranks), a folder of checkpoints (the
    newest is used), or a run. OUT is a .safetensors file, or a folder for several files with
    an index, as Hugging Face's libraries read them. Only one parameter at a time is held in
    memory.
    """
    from harness.checkpoint.full_weights.export import export_weights as write  # noqa: PLC0415  imports torch

    path = Path(source)
    if not path.exists():
        path = open_run(source, runs_dir).path
    found = write(path, to, max(1, int(shard_gb * 1e9)))
    render.echo(f"{found} -> {to}")


# ------------------------------------------------------------------- what ran before


def reload_experiment(past: PastRun, given: Mapping[str, Any]) -> Experiment:
    """Build the experiment of a run again, from what it recorded and its secrets."""
    options = read_recorded_fit(past, given)
    return load_experiment(options.pop("target"), options)


def load_fitted(past: PastRun, experiment: Experiment) -> Fitted:
    """Load the model that a run trained."""
    from harness.errors import CheckpointError  # noqa: PLC0415  next to learner
    from harness.learner import load  # noqa: PLC0415  imports torch

    place = past.path.absolute() / MODEL
    if not place.is_dir():
        msg = (
            f"run {past.id!r}: expected a trained model in {str(place)!r}, found none."
        )
        raise CheckpointError(f"{msg} Finish the run with 'harness resume {past.id}'.")
    return load(place, experiment.learner.module)


def get_test_data(experiment: Experiment) -> Any:
    """Test data of an experiment; its validation data if it has none."""
    from harness.data.loaders import split_data  # noqa: PLC0415  imports torch
    from harness.errors import ExperimentError  # noqa: PLC0415  next to learner
    from harness.rng import seed_all  # noqa: PLC0415  imports torch

    if experiment.test_data is not None:
        return experiment.test_data
    valid_data = experiment.valid_data
    if valid_data is None:
        msg = "evaluate: expected test_data or valid_data in the experiment, got none."
        raise ExperimentError(f"{msg} Add test_data to the Experiment.")
    if not isinstance(valid_data, float):
        return valid_data
    if experiment.seed is None:
        msg = "evaluate: expected a seed, got none, so the split cannot be repeated."
        raise ExperimentError(f"{msg} Give the Experiment a seed, or test_data.")
    seed_all(experiment.seed)
    return split_data(experiment.data, valid_data)[1]


# --------------------------------------------------------------------------- files


def read_rows(path: Path) -> torch.Tensor:
    """Read the rows of a ``.npy``, ``.csv`` or ``.parquet`` file.

    Returns
    -------
    (rows, ...), int64 or float32
    """
    import numpy as np  # noqa: PLC0415  keeps --help quick
    import torch  # noqa: PLC0415  keeps --help quick

    if path.suffix == ".npy":
        array = np.load(path, allow_pickle=False)
    elif path.suffix in {".csv", ".parquet"}:
        import pandas as pd  # noqa: PLC0415  keeps --help quick

        read = pd.read_csv if path.suffix == ".csv" else pd.read_parquet
        array = read(path).to_numpy()
    else:
        msg = f"predict({str(path)!r}): expected .npy, .csv or .parquet, got {path.suffix!r}."
        raise ValueError(f"{msg} Convert the file.")
    if array.dtype.kind not in "biuf":
        msg = f"predict({str(path)!r}): expected numbers, got {array.dtype}."
        raise ValueError(f"{msg} Remove the other columns.")
    is_integer = array.dtype.kind in "iu"
    return torch.as_tensor(array, dtype=torch.int64 if is_integer else torch.float32)


def write_rows(pred: object, path: Path) -> None:
    """Write predictions as ``.npy``, or flattened to columns as ``.csv`` or ``.parquet``."""
    import numpy as np  # noqa: PLC0415  keeps --help quick
    import torch  # noqa: PLC0415  keeps --help quick

    if not isinstance(pred, torch.Tensor):
        msg = f"predict: expected a tensor from the model, got {type(pred).__name__}."
        raise ValueError(f"{msg} Predict in Python: Fitted.predict().")
    path.parent.mkdir(parents=True, exist_ok=True)
    array = pred.float().numpy() if pred.is_floating_point() else pred.numpy()
    with replace_file(path) as temporary:
        if path.suffix == ".npy":
            np.save(temporary, array)
        else:
            _write_frame(array, temporary)


def _write_frame(array: np.ndarray[Any, Any], path: Path) -> None:
    import pandas as pd  # noqa: PLC0415  keeps --help quick

    flat = array.reshape(len(array), -1)
    frame = pd.DataFrame(flat, columns=[f"pred_{n}" for n in range(flat.shape[1])])
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path)
