from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import SWALR, AveragedModel, update_bn

import harness
from harness.callbacks import EMA, KeepBestModel, LRScheduler, StochasticWeightAveraging
from tests.harness.callbacks.averaging.test_ema import fit, same, two_parts
from tests.harness.checkpoint.test_resume import check_exact
from tests.harness.exact import Case, Net, Stop, X, Y, loader
from tests.harness.fakes import Tape, line_learner

OFF: dict[str, Any] = {"tracker": False, "verbose": False}


def test_swa_gives_what_torchs_gives():
    torch.manual_seed(3)
    model = Net()
    opt = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    schedule = SWALR(opt, swa_lr=0.01, anneal_epochs=2)
    averaged = AveragedModel(model)
    torch.manual_seed(3)
    model.load_state_dict(Net().state_dict())
    for epoch in range(1, 5):
        for x, y in loader():
            opt.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            opt.step()
        schedule.step()
        if epoch >= 3:
            averaged.update_parameters(model)
    update_bn(loader(), averaged)
    own = [
        StochasticWeightAveraging(3),
        LRScheduler(SWALR, swa_lr=0.01, anneal_epochs=2),
    ]
    fitted = fit(*own, epochs=4, valid_data=None)
    # torch's passes the number of updates as a tensor, which rounds differently.
    torch.testing.assert_close(fitted.model.state_dict(), averaged.module.state_dict())
    assert not fitted.model.training


def test_swa_by_hand():
    # One row (1, 2), rate 0.01: w = 0.04, 0.0784, 0.115264 after the epochs.
    data = (torch.ones(1), torch.full((1,), 2.0))
    for start, mean in (
        (1, 0.0778880),
        (2, 0.0968320),
        (0.5, 0.0968320),
        (3, 0.115264),
    ):
        own = [StochasticWeightAveraging(start)]
        fitted = line_learner().fit(data, 3, callbacks=own, **OFF)
        assert fitted.model.w.item() == pytest.approx(mean)


def test_swa_computes_batch_norm_of_inputs_of_any_form():
    class Two(Net):
        def forward(self, a, b):
            return super().forward(a + b)

    learner = harness.setup(Two, loss=nn.CrossEntropyLoss(), optimizer=torch.optim.SGD)
    data = [({"a": x, "b": x}, y) for x, y in zip(X, Y, strict=True)]
    loader = torch.utils.data.DataLoader(data, batch_size=22)
    own = [StochasticWeightAveraging(1)]
    fitted = learner.set_opt_hparams(lr=0.1).fit(loader, 1, callbacks=own, **OFF)
    body: Any = fitted.model.body
    with torch.no_grad():
        wanted = body[0](2 * X).mean(0)
    torch.testing.assert_close(body[1].running_mean, wanted)


def test_swa_resumes_exactly(tmp_path):
    case = Case(
        learner=two_parts,
        accumulate=2,
        epochs=3,
        callbacks=lambda folder: [StochasticWeightAveraging(2)],
    )
    check_exact(case, tmp_path, [("on_train_batch_end", 14), ("on_valid_batch_end", 5)])


def test_swa_of_an_interrupted_fit_returns_the_weights_of_training():
    stop = ("on_train_batch_end", 10)
    found = fit(StochasticWeightAveraging(1), Stop(*stop))
    assert same(fit(Stop(*stop)).model, found.model)


@pytest.mark.parametrize(
    ("callbacks", "match"),
    [
        (
            [StochasticWeightAveraging(3)],
            r"\(start\): expected an epoch up to 2, got 3",
        ),
        ([StochasticWeightAveraging(1), KeepBestModel()], "got KeepBestModel too"),
        ([StochasticWeightAveraging(1), EMA()], "expected one average of the same"),
    ],
)
def test_swa_that_cannot_work_is_refused_before_training(callbacks, match):
    tape = Tape()
    with pytest.raises(ValueError, match=match):
        fit(*callbacks, tape)
    assert tape.events == []


@pytest.mark.parametrize("start", [0, -0.5, "last"])
def test_swa_start_is_checked(start):
    with pytest.raises((ValueError, TypeError), match=r"Averaging\(start\): expected"):
        StochasticWeightAveraging(start)
