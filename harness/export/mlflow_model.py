"""Write a model as MLflow has models, without MLflow, which takes seconds for it.

The model is a graph of torch.export (MLflow's format ``pt2``). Loading one needs neither the
model's class nor a pickle, so it runs no code.
"""

from __future__ import annotations

import json
import platform
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from harness.data.batch import num_rows
from harness.export.formats import compare, make_sample, save_program, trace
from harness.export.sample import as_arguments, has_rows, suppress_output
from harness.pytree import iter_tensors

GRAPH = "data/model.pt2"


def write_mlflow_model(
    model: nn.Module, folder: Path, example: object, about: Mapping[str, object]
) -> None:
    """Write a model into a new folder that ``mlflow.pytorch.load_model`` reads.

    Parameters
    ----------
    model
        In evaluation mode, on the CPU.
    example
        Input of the model as a batch has it; of its values nothing is written.
    about
        Metadata of the model, such as its run.
    """
    place = "log_model"
    sample = make_sample(example, place)
    program = trace(model, sample, place)
    path = folder / GRAPH
    path.parent.mkdir(parents=True)
    save_program(program, path)
    with suppress_output():
        graph = torch.export.load(path).module()
    compare(model, graph, sample, place)
    args, named = as_arguments(sample)
    with torch.no_grad(), suppress_output():
        output = model(*args, **named)
    version = str(torch.__version__).partition("+")[0]  # no index has names of builds
    requirements = [f"mlflow=={metadata.version('mlflow')}", f"torch=={version}"]
    python = platform.python_version()
    files: dict[str, object] = {
        "MLmodel": {
            "flavors": _list_flavors(args, named, output, python),
            "metadata": dict(about),
            "mlflow_version": metadata.version("mlflow"),
            "model_size_bytes": path.stat().st_size,
            "model_uuid": uuid.uuid4().hex,
            "signature": {
                "inputs": json.dumps(_list_specs(args, named, num_rows(sample))),
                "outputs": json.dumps(_list_specs((output,), {}, num_rows(sample))),
                "params": None,
            },
            "utc_time_created": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S.%f}",
        },
        "conda.yaml": {
            "channels": ["conda-forge"],
            "dependencies": [f"python={python}", "pip", {"pip": requirements}],
            "name": "mlflow-env",
        },
        "python_env.yaml": {
            "python": python,
            "build_dependencies": ["pip"],
            "dependencies": ["-r requirements.txt"],
        },
    }
    for name, content in files.items():
        (folder / name).write_text(yaml.safe_dump(content))
    (folder / "requirements.txt").write_text("\n".join(requirements) + "\n")


def _list_flavors(
    args: tuple[Any, ...], named: Mapping[str, Any], output: object, python: str
) -> dict[str, object]:
    """Ways to load the model; pyfunc takes one array and gives one."""
    flavors: dict[str, object] = {
        "pytorch": {
            "code": None,
            "model_data": "data",
            "pytorch_version": str(torch.__version__),
        }
    }
    is_plain = not named and len(args) == 1 and isinstance(args[0], Tensor)
    if is_plain and isinstance(output, Tensor):
        flavors["python_function"] = {
            "config": {"device": None},
            "data": "data",
            "env": {"conda": "conda.yaml", "virtualenv": "python_env.yaml"},
            "loader_module": "mlflow.pytorch",
            "pickle_module_name": "mlflow.pytorch.pickle_module",
            "python_version": python,
        }
    return flavors


def _list_specs(
    args: tuple[Any, ...], named: Mapping[str, Any], rows: int | None
) -> list[dict[str, object]]:
    """MLflow's schema of tensors; -1 is the number of rows. Several ones have names."""
    found: list[tuple[str | None, Tensor]] = [
        (None, tensor) for tensor in iter_tensors(args)
    ]
    found += [(name, t) for name, item in named.items() for t in iter_tensors(item)]
    specs = []
    for number, (name, tensor) in enumerate(found):
        shape = list(tensor.shape)
        if has_rows(tensor, rows):
            shape[0] = -1
        kind = str(tensor.dtype).removeprefix("torch.")
        kind = "float32" if kind == "bfloat16" else kind  # NumPy has none
        spec: dict[str, object] = {
            "type": "tensor",
            "tensor-spec": {"dtype": kind, "shape": shape},
        }
        specs.append(spec | ({"name": name or str(number)} if len(found) > 1 else {}))
    return specs
