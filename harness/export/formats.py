"""Export a model to torch.export or ONNX, and compare the file with the model."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harness.checks.calls import warn_user
from harness.data.batch import num_rows
from harness.errors import ExportError
from harness.export.sample import as_arguments, has_rows, suppress_output, take_sample
from harness.pytree import iter_tensors, map_tensors
from tracking.durable import replace_file

SUFFIXES = (".pt2", ".onnx")


def export_model(model: nn.Module, path: Path, example: object) -> None:
    """Write a model to a file in the format of its suffix, and compare both.

    Parameters
    ----------
    model
        In evaluation mode, on the CPU.
    path
        Ends in ``.pt2`` or ``.onnx``.
    example
        Input of the model as a batch has it; two rows are taken of it.

    Raises
    ------
    ValueError
        If the suffix is another one, or there is no example.
    ImportError
        If a package for the format is not installed.
    ExportError
        If the model cannot be exported, or the file gives other outputs.
    """
    place = f"export({str(path)!r})"
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"{place}: expected a file that ends in {' or '.join(SUFFIXES)}, got "
            f"{path.name!r}. The suffix chooses the format."
        )
    if path.suffix == ".onnx":
        check_packages(place, ("onnx", "onnxscript"))
    sample = make_sample(example, place)
    program = trace(model, sample, place)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as temporary:
        if path.suffix == ".onnx":
            _write_onnx(program, temporary, place)
            run = _load_onnx(temporary)
        else:
            save_program(program, temporary)
            run = torch.export.load(temporary).module()
        compare(model, run, sample, place)


def make_sample(example: object, place: str) -> object:
    """Return two rows of an example."""
    if example is None:
        raise ValueError(
            f"{place}: expected an example of the model's input, got none. "
            "Pass example=, an input as a batch has it, such as torch.zeros(2, 3)."
        )
    example = map_tensors(example, lambda tensor: tensor.detach().cpu())
    return example if num_rows(example) is None else take_sample(example)


def check_packages(place: str, packages: Sequence[str]) -> None:
    """Raise unless packages are installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"{place}: expected the packages {' and '.join(packages)}, got no "
            f"{' and no '.join(missing)}. Run 'pip install {' '.join(missing)}', or "
            "export to a .pt2 file."
        )


def trace(model: nn.Module, sample: object, place: str) -> torch.export.ExportedProgram:
    """Trace a model by torch.export; the number of rows stays free."""
    args, named = as_arguments(sample)
    rows = num_rows(sample)
    dims = [_free_rows(item, rows) for item in args]
    named_dims = {name: _free_rows(item, rows) for name, item in named.items()}
    # With named arguments alone, torch.export takes the shapes by name.
    shapes: Any = {**named_dims} if named else tuple(dims)
    try:
        with suppress_output(), torch.no_grad():
            program = torch.export.export(
                model, args, named or None, dynamic_shapes=shapes, strict=False
            )
    except Exception as error:
        raise ExportError(
            f"{place}: expected a model that torch.export can trace, got "
            f"{_describe(error)}. Its forward may depend on values of its input; torch.cond "
            "expresses that."
        ) from error
    return program


def _describe(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    return f"{type(error).__name__}: {line:.300}"


def save_program(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write a program without the rows of data that it was traced with."""
    program._example_inputs = None
    with suppress_output():
        torch.export.save(program, path)


def _free_rows(item: object, rows: int | None) -> Any:
    """Which dimensions of the tensors of an argument may change: the first one."""
    auto = torch.export.Dim.AUTO

    def free(tensor: Tensor) -> object:
        return {0: auto} if has_rows(tensor, rows) else None

    return map_tensors(item, free) if [*iter_tensors(item)] else None


def compare(
    model: nn.Module, exported: Callable[..., Any], sample: object, place: str
) -> None:
    """Raise if an exported model gives other outputs, for two rows and for three."""
    _compare_outputs(model, exported, sample, place)
    rows = num_rows(sample)
    if rows is None:
        return
    more = _repeat_rows(sample, rows)
    try:
        _compare_outputs(model, exported, more, place)
    except ExportError:
        raise
    except Exception:  # noqa: BLE001  each runtime has its own
        msg = f"{place}: expected a model that takes any number of rows, got one that"
        advice = f"only takes {rows}: its forward depends on their number."
        warn_user(f"{msg} {advice}")


def _compare_outputs(
    model: nn.Module, exported: Callable[..., Any], sample: object, place: str
) -> None:
    """Raise if the outputs differ, where both draw the same random numbers."""
    args, named = as_arguments(sample)
    outputs: list[object] = []
    for call in (model, exported):
        with torch.no_grad(), suppress_output(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            outputs.append(call(*args, **named))
    expected, found = outputs
    _check_equal(expected, found, place)


def _repeat_rows(sample: object, rows: int) -> object:
    def repeat(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor[:1]]) if has_rows(tensor, rows) else tensor

    return map_tensors(sample, repeat)


def _check_equal(expected: object, found: object, place: str) -> None:
    ours, theirs = [*iter_tensors(expected)], [*iter_tensors(found)]
    if len(ours) != len(theirs):
        msg = f"{place}: expected {len(ours)} outputs of the exported model, got"
        raise ExportError(f"{msg} {len(theirs)}. Report this.")
    for one, other in zip(ours, theirs, strict=True):
        try:
            torch.testing.assert_close(
                other, one, rtol=1e-3, atol=1e-4, check_dtype=False, equal_nan=True
            )
        except AssertionError as error:
            raise ExportError(
                f"{place}: expected outputs as the model's, got others: {error} "
                "A model that draws random numbers in forward cannot be compared."
            ) from error


def _write_onnx(program: torch.export.ExportedProgram, path: Path, place: str) -> None:
    try:
        with suppress_output():
            made: Any = torch.onnx.export(program, dynamo=True, verbose=False)
            made.save(str(path), external_data=False)
    except Exception as error:
        raise ExportError(
            f"{place}: expected a model that ONNX can express, got "
            f"{_describe(error)}. Export to a .pt2 file."
        ) from error


def _load_onnx(path: Path) -> Callable[..., Any]:
    """Return a function that runs a file: with onnxruntime if there is one."""
    session: Any
    if importlib.util.find_spec("onnxruntime") is not None:
        session = importlib.import_module("onnxruntime").InferenceSession(str(path))
        names = [put.name for put in session.get_inputs()]
    else:
        session = importlib.import_module("onnx.reference").ReferenceEvaluator(
            str(path)
        )
        names = session.input_names

    def run(*args: object, **named: object) -> list[Tensor]:
        tensors = iter_tensors([args, named])
        feed = dict(zip(names, (t.numpy() for t in tensors), strict=True))
        return [torch.from_numpy(np.asarray(out)) for out in session.run(None, feed)]

    return run
