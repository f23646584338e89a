"""The model of a fit as a model of MLflow, which loads without the model's class."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from torch import nn

import harness
import tracking
from tests.harness.fakes import line_learner, slope

pytestmark = pytest.mark.slow  # MLflow and torch.export take seconds to import

LOAD = """
import json, sys, numpy, torch
import mlflow
uri, store = sys.argv[1:]
mlflow.set_tracking_uri(store)
version = mlflow.register_model(uri, "digits")
x = numpy.arange(12, dtype=numpy.float32).reshape(4, 3)
loaded = mlflow.pytorch.load_model(uri)(torch.tensor(x))
called = mlflow.pyfunc.load_model("models:/digits/1").predict(x)
print(json.dumps([loaded.tolist(), called.tolist(), version.version]))
"""


class Hidden(nn.Module):
    """A class that the loading process cannot import."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 2)

    def forward(self, x):
        return torch.relu(self.lin(x))


def test_model_of_a_fit_by_steps_belongs_to_the_step_of_its_metrics(tmp_path):
    learner = harness.setup(Hidden, loss=nn.MSELoss(), optimizer=torch.optim.SGD)
    data = (torch.rand(8, 3), torch.rand(8, 2))
    fitted = learner.set_opt_hparams(lr=0.1).fit(
        data,
        2,
        data,
        valid_every="2 steps",
        callbacks=[harness.callbacks.KeepBestModel()],
        dataloader_options={"batch_size": 2},
        tracker={"runs_dir": tmp_path, "delivery": False},
        verbose=False,
    )
    assert fitted.best_step == 8
    about = yaml.safe_load((fitted.log_model() / "MLmodel").read_text())
    assert about["metadata"]["step"] == fitted.best_step


def test_model_is_registered_and_loaded_in_another_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    learner = harness.setup(Hidden, loss=nn.MSELoss(), optimizer=torch.optim.SGD)
    learner = learner.set_opt_hparams(lr=0.1)
    data = (torch.rand(8, 3), torch.rand(8, 2))
    fitted = learner.fit(data, 2, verbose=False)
    folder = fitted.log_model("digits-model")
    assert folder == fitted.run_path / "models" / "digits-model"
    assert (folder / "requirements.txt").read_text().startswith("mlflow==")
    (result,) = sync(fitted)
    assert result.phase == "done"
    import mlflow  # noqa: PLC0415

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    run = client.get_run(result.mlflow_run_id)
    uuid, model_id = run.data.tags["luz.model.digits-model"].split()
    (output,) = run.outputs.model_outputs
    assert (output.model_id, output.step) == (model_id, 2)
    model = client.get_logged_model(model_id)
    assert (model.name, str(model.status)) == ("digits-model", "READY")
    assert yaml.safe_load((folder / "MLmodel").read_text())["model_uuid"] == uuid
    command = [
        sys.executable,
        "-c",
        LOAD,
        f"models:/{model_id}",
        os.environ["MLFLOW_TRACKING_URI"],
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    loaded, called, version = json.loads(done.stdout.splitlines()[-1])
    with torch.no_grad():
        expected = fitted.model(torch.arange(12.0).reshape(4, 3))
    torch.testing.assert_close(torch.tensor(loaded), expected)
    torch.testing.assert_close(torch.tensor(called), expected)
    assert int(version) == 1
    assert sync(fitted)[0].phase == "done"
    assert len(client.get_run(run.info.run_id).outputs.model_outputs) == 1


def sync(fitted):
    from tracking.delivery.sync import sync  # noqa: PLC0415

    return sync([tracking.open(fitted.run_path)], patience_s=60.0)


def test_model_of_several_inputs_has_names_and_no_pyfunc(tmp_path):
    from harness.export.mlflow_model import write_mlflow_model  # noqa: PLC0415

    class Sum(nn.Module):
        def forward(self, a, b):
            return a + b

    example = {"a": torch.ones(4, 2), "b": torch.ones(4, 2)}
    write_mlflow_model(Sum(), tmp_path / "m", example, {})
    about = yaml.safe_load((tmp_path / "m" / "MLmodel").read_text())
    specs = json.loads(about["signature"]["inputs"])
    assert [(s["name"], s["tensor-spec"]["shape"]) for s in specs] == [
        ("a", [-1, 2]),
        ("b", [-1, 2]),
    ]
    assert list(about["flavors"]) == ["pytorch"]


def test_model_without_a_run_or_of_a_bad_name_is_refused(tmp_path):
    fitted = line_learner().fit(slope(4), 1, tracker=False, verbose=False)
    with pytest.raises(ValueError, match="fit that was tracked, got one without a run"):
        fitted.log_model()
    tracker = {"runs_dir": tmp_path, "delivery": False}
    fitted = line_learner().fit(slope(4), 1, tracker=tracker, verbose=False)
    with pytest.raises(ValueError, match=r"log_model: expected letters.*got '../x'"):
        fitted.log_model("../x")
    with pytest.raises(harness.ExportError, match="trace"):
        fitted.log_model(example={"nothing": torch.ones(2)})
    assert list((fitted.run_path / "models").iterdir()) == []
