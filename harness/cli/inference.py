"""What a recorded run can do again: resume, evaluate, predict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.data.loaders import split_data
from harness.errors import CheckpointError, ExperimentError
from harness.experiment import Experiment
from harness.fitted import Fitted
from harness.learner import load, seed_all
from tracking.durable import replace_file

MODEL = "model"
"""Folder of a run in which ``harness fit`` saves the trained model."""


def fit_arguments(command: Sequence[str], run_id: str) -> list[str]:
    """Arguments of the ``harness fit`` that a run recorded.

    Raises
    ------
    ExperimentError
        If the run was started otherwise.
    """
    words = list(command)
    for place, word in enumerate(words):
        if (
            word == "fit"
            and place > 0
            and Path(words[place - 1]).stem in {"harness", "cli"}
        ):
            return words[place + 1 :]
    shown = " ".join(words)[:120]
    msg = f"run {run_id!r}: expected a command 'harness fit ...', got {shown!r}."
    raise ExperimentError(f"{msg} Run that script again; AutoResume lets it go on.")


def without_option(arguments: Sequence[str], *names: str) -> list[str]:
    """The arguments without options that take one value."""
    kept, skip = [], False
    for word in arguments:
        name, equals, _ = word.partition("=")
        if skip:
            skip = False
        elif name in names:
            skip = not equals
        else:
            kept.append(word)
    return kept


def fitted_of(path: Path, experiment: Experiment) -> Fitted:
    """What a run trained, with the learner of its experiment.

    Raises
    ------
    CheckpointError
        If the run has no trained model.
    """
    place = path / MODEL
    if not place.is_dir():
        msg = f"run {path.name!r}: expected a trained model in {str(place)!r}, found none."
        raise CheckpointError(f"{msg} Finish it with 'harness resume {path.name}'.")
    return load(place, experiment.learner.module)


def test_data_of(experiment: Experiment) -> Any:
    """Data to evaluate on: for tests, else the validation data of the fit.

    Raises
    ------
    ExperimentError
        If the experiment has neither, or split its data without a seed.
    """
    if experiment.test_data is not None:
        return experiment.test_data
    held = experiment.valid_data
    if held is None:
        msg = "evaluate: expected test_data or valid_data in the experiment, got none."
        raise ExperimentError(f"{msg} Add test_data to the Experiment.")
    if not isinstance(held, float):
        return held
    if experiment.seed is None:
        msg = "evaluate: expected a seed, got none, so the split cannot be made again."
        raise ExperimentError(f"{msg} Give the Experiment a seed, or test_data.")
    seed_all(experiment.seed)
    return split_data(experiment.data, held)[1]


def read_rows(path: Path) -> Tensor:
    """Rows to predict, of a ``.npy``, ``.csv`` or ``.parquet`` file.

    Raises
    ------
    ValueError
        If the file is of another kind or holds no numbers.
    """
    if path.suffix == ".npy":
        array = np.load(path, allow_pickle=False)
    elif path.suffix in {".csv", ".parquet"}:
        import pandas as pd  # noqa: PLC0415  slow to import

        read = pd.read_csv if path.suffix == ".csv" else pd.read_parquet
        array = read(path).to_numpy()
    else:
        msg = f"predict({str(path)!r}): expected .npy, .csv or .parquet, got {path.suffix!r}."
        raise ValueError(f"{msg} Convert the file.")
    if array.dtype.kind not in "biuf":
        msg = f"predict({str(path)!r}): expected numbers, got {array.dtype}."
        raise ValueError(f"{msg} Leave out other columns.")
    is_whole = array.dtype.kind in "iu"
    return torch.as_tensor(array, dtype=torch.int64 if is_whole else torch.float32)


def write_rows(pred: Tensor, path: Path) -> None:
    """Write predictions as ``.npy``, or flattened to columns as ``.csv`` or ``.parquet``.

    Raises
    ------
    ValueError
        If `path` has another suffix, or the model gives no tensor.
    """
    if not isinstance(pred, Tensor):
        msg = f"predict: expected a tensor from the model, got {type(pred).__name__}."
        raise ValueError(f"{msg} Predict in Python: Fitted.predict().")
    if path.suffix not in {".npy", ".csv", ".parquet"}:
        msg = (
            f"--to {str(path)!r}: expected .npy, .csv or .parquet, got {path.suffix!r}."
        )
        raise ValueError(f"{msg} Choose one of those.")
    array = pred.float().numpy() if pred.is_floating_point() else pred.numpy()
    with replace_file(path) as temporary:
        if path.suffix == ".npy":
            np.save(temporary, array)
        else:
            _write_frame(array, temporary)


def _write_frame(array: np.ndarray[Any, Any], path: Path) -> None:
    import pandas as pd  # noqa: PLC0415  slow to import

    flat = array.reshape(len(array), -1)
    frame = pd.DataFrame(flat, columns=[f"pred_{n}" for n in range(flat.shape[1])])
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path)
