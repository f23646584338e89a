"""luz's cases about loaders and devices: ``test-accelerator``, ``test-as_dataloader``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import harness
from tests.harness.fakes import At
from tests.luz.parts import Net, rows


class Batches(harness.Callback):
    """Keeps every batch of a prediction."""

    def on_predict_begin(self) -> None:
        self.found: list[Any] = []

    def on_predict_batch_begin(self) -> None:
        self.found.append(self.ctx.batch)


def batches_of(fitted: harness.Fitted, data: Any, **options: Any) -> list[Any]:
    """The batches that `data` becomes."""
    batches = Batches()
    fitted.predict(data, callbacks=[batches], dataloader_options=options or None)
    return batches.found


@pytest.fixture(scope="module")
def looking() -> harness.Fitted:
    """A fitted model that returns its input."""

    class Same(nn.Linear):
        def forward(self, x: Tensor, *_: Tensor) -> Tensor:
            return x

    learner = harness.setup(Same, loss=nn.MSELoss(), optimizer=torch.optim.SGD)
    learner = learner.set_hparams(in_features=1, out_features=1)
    data = torch.ones(1, 1, requires_grad=True), torch.ones(1, 1)
    return learner.fit(data, 1, tracker=False)


def test_device_dataloader(looking):
    x, y = torch.randn(100, 10), torch.randn(100, 15)
    loader = DataLoader(TensorDataset(x, y), batch_size=10)
    found = batches_of(looking, loader)
    assert len(found) == 10
    device = harness.accelerator().device
    for inputs, targets in found:
        assert inputs.shape == (10, 10)
        assert targets.shape == (10, 15)
        assert inputs.device.type == targets.device.type == device.type
    last_x, last_y = found[-1]
    assert torch.equal(last_x.cpu(), x[90:])
    assert torch.equal(last_y.cpu(), y[90:])


def test_switch_parameters(learner):
    def check(ctx: Any) -> None:
        (group,) = ctx.opt.param_groups
        stepped = [param.data_ptr() for param in group["params"]]
        assert stepped == [param.data_ptr() for param in ctx.model.parameters()]
        assert {param.device for param in ctx.model.parameters()} == {ctx.device}

    seen = At("on_train_batch_begin", check)
    learner.fit(rows(), 1, callbacks=[seen], tracker=False)


def test_as_dataloader_fails(learner):
    with pytest.raises(TypeError, match="data: expected a tensor or array"):
        learner.fit(object(), tracker=False)


class Squares(Dataset[Tensor]):
    def __getitem__(self, index: int) -> Tensor:
        return torch.randn(10, 10)

    def __len__(self) -> int:
        return 100


def test_works_for_datasets(looking):
    found = batches_of(looking, Squares(), batch_size=32)
    assert [len(batch) for batch in found] == [32, 32, 32, 4]
    assert found[0].shape == (32, 10, 10)
    found = batches_of(looking, Squares(), batch_size=10)
    assert len(found) == 10
    assert found[0].shape == (10, 10, 10)


@pytest.mark.parametrize(
    "second", [torch.randn(100, 5), np.ones((100, 5))], ids=["tensor", "array"]
)
def test_works_for_lists_of_tensors(looking, second):
    found = batches_of(looking, [torch.randn(100, 10), second], batch_size=32)
    assert len(found) == 4
    assert found[0][0].shape == (32, 10)
    assert found[0][1].shape == (32, 5)


@pytest.mark.parametrize(
    "data",
    [
        np.random.rand(100),
        np.random.rand(100, 10),
        np.random.rand(100, 10, 10),
        torch.randn(100, 10),
    ],
    ids=["vector", "matrix", "array", "tensor"],
)
def test_works_for_numerics(looking, data):
    found = batches_of(looking, data, batch_size=32)
    assert len(found) == 4
    assert found[0][0].dtype == torch.float32


def test_default_batches_have_32_rows():
    learner = harness.setup(Net, loss=nn.MSELoss(), optimizer=torch.optim.Adam)
    learner = learner.set_hparams(input_size=10, output_size=1)
    shapes: list[Any] = []
    see = At("on_train_batch_begin", lambda ctx: shapes.append(ctx.input.shape))
    learner.fit(rows(), 1, callbacks=[see], tracker=False)
    assert shapes == [(32, 10)] * 3
