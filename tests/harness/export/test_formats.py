"""Exported models do what the model does, for any number of rows."""

from __future__ import annotations

import importlib.util
import itertools

import pytest
import torch
from torch import nn

import harness
from harness.errors import ExportError
from harness.export.formats import export_model
from harness.export.sample import MAX_BYTES, take_sample

pytestmark = pytest.mark.slow  # torch.export takes seconds to import


class Two(nn.Module):
    """Takes two arguments, and returns a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 2)
        self.emb = nn.Embedding(5, 2)

    def forward(self, x, ids):
        return {"out": self.lin(x) + self.emb(ids).mean(1)}


class Plain(nn.Module):
    def __init__(self, forward) -> None:
        super().__init__()
        self.function = forward

    def forward(self, x):
        return self.function(x)


COUNT = itertools.count()
IDS = torch.tensor([[1, 2], [3, 4], [0, 0]])


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (
            nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout()),
            torch.ones(1, 3),
        ),
        (Two(), (torch.rand(3, 3), IDS)),
        (Two(), {"x": torch.rand(3, 3), "ids": IDS}),
        (Plain(lambda x: x + torch.rand_like(x)), torch.ones(2, 3)),
    ],
)
def test_exported_file_gives_the_same_outputs_for_any_number_of_rows(
    tmp_path, model, example
):
    export_model(model.eval(), tmp_path / "m.pt2", example)  # compares outputs
    program = torch.export.load(tmp_path / "m.pt2")
    assert program.example_inputs is None  # none of the data is in the file
    more = harness.pytree.map_tensors(example, lambda t: torch.cat([t] * 5))
    args, named = harness.export.sample.as_arguments(more)
    torch.manual_seed(0)
    expected = model(*args, **named)
    torch.manual_seed(0)
    torch.testing.assert_close(program.module()(*args, **named), expected)


def test_fit_gives_the_example(tmp_path):
    learner = harness.setup(
        nn.Linear, loss=nn.MSELoss(), optimizer=torch.optim.SGD
    ).set_hparams(in_features=3, out_features=1)
    learner = learner.set_opt_hparams(lr=0.1)
    data = (torch.rand(8, 3), torch.rand(8, 1))
    fitted = learner.fit(data, 1, tracker=False, verbose=False)
    fitted.export(tmp_path / "new" / "m.pt2")
    found = torch.export.load(tmp_path / "new" / "m.pt2").module()(data[0])
    torch.testing.assert_close(found, fitted.predict(data[0]))


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda x: x + 1 if x.sum() > 0 else x, "that torch.export can trace, got"),
        (lambda x: x + next(COUNT), "expected outputs as"),
    ],
)
def test_model_that_cannot_be_exported_leaves_no_file(tmp_path, forward, message):
    with pytest.raises(ExportError, match=message):
        export_model(Plain(forward), tmp_path / "m.pt2", torch.ones(2, 3))
    assert list(tmp_path.iterdir()) == []


def test_model_of_a_fixed_number_of_rows_is_told(tmp_path):
    with pytest.warns(
        UserWarning, match="any number of rows, got one that only takes 2"
    ):
        export_model(
            Plain(lambda x: x.reshape(2, -1)), tmp_path / "m.pt2", torch.ones(2, 3)
        )


def test_bad_arguments_are_refused(tmp_path):
    model = nn.Linear(3, 1)
    with pytest.raises(ValueError, match=r"ends in .pt2 or .onnx, got 'm.pt'"):
        export_model(model, tmp_path / "m.pt", torch.ones(2, 3))
    with pytest.raises(ValueError, match="expected an example of the model's input"):
        export_model(model, tmp_path / "m.pt2", None)
    if importlib.util.find_spec("onnxscript") is None:
        with pytest.raises(ImportError, match=r"pip install .*onnxscript"):
            export_model(model, tmp_path / "m.onnx", torch.ones(2, 3))


def test_onnx_file_gives_the_same_outputs(tmp_path):
    pytest.importorskip("onnxscript")
    export_model(Two().eval(), tmp_path / "m.onnx", (torch.rand(3, 3), IDS))
    assert (tmp_path / "m.onnx").stat().st_size > 0


def test_sample_is_two_rows_of_what_has_rows():
    sample = take_sample({"x": torch.arange(5.0), "mask": torch.ones(3, 3)})
    assert sample["x"].tolist() == [0.0, 1.0]
    assert sample["mask"].shape == (3, 3)
    assert take_sample(torch.ones(1, 2)).shape == (2, 2)
    assert take_sample(None) is None
    jagged = torch.nested.nested_tensor([torch.ones(1)], layout=torch.jagged)
    assert take_sample(jagged) is None  # it has no rows to take
    assert take_sample(torch.empty(4, MAX_BYTES // 4)) is None
