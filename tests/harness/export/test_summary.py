"""The summary of a model: layers, shapes, parameters and sizes."""

from __future__ import annotations

import copy
import pickle

import torch
from torch import nn

import harness
from harness.accelerators.single import SingleDevice
from harness.export.summary import MAX_ROWS, find_shapes, summarize
from tests.harness.fakes import line_learner, slope


class Net(nn.Module):
    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten())
        self.head = nn.Linear(8, num_classes)
        self.again = self.head
        self.tied = nn.Linear(8, num_classes, bias=False)
        self.tied.weight = self.head.weight
        self.num_calls = 0

    def forward(self, x):
        self.num_calls += 1
        hidden = self.conv(x) + torch.arange(8)
        return {"logits": self.head(hidden), "more": [self.tied(hidden)]}


def test_table_shows_layers_with_shapes_and_counts_shared_weights_once():
    net = Net()
    net.conv[0].weight.requires_grad = False
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    draws = torch.get_rng_state()
    # conv 2 * 9 + 2, norm 4, head 8 * 5 + 5; buffers 2 + 2 floats and one int64.
    assert str(summarize(net, torch.zeros(3, 1, 4, 4))) == "\n".join(
        [
            "layer               output          parameters",
            "Net                 (N, 5), (N, 5)          69",
            "  conv: Sequential  (N, 8)                  24",
            "    0: Conv2d       (N, 2, 2, 2)            20",
            "    1: BatchNorm2d  (N, 2, 2, 2)             4",
            "    2: Flatten      (N, 8)                   0",
            "  head: Linear      (N, 5)                  45",
            "  again: Linear     (N, 5)             as head",
            "  tied: Linear      (N, 5)                  40",
            "69 parameters, 300 bytes, 18 parameters frozen",
        ]
    )
    assert torch.equal(torch.get_rng_state(), draws)
    assert net.training
    assert net.num_calls == 0
    assert all(torch.equal(net.state_dict()[name], before[name]) for name in before)


def test_lazy_layers_are_not_counted_yet():
    found = summarize(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1)))
    assert [layer.num_params for layer in found.layers] == [None, None, 4]
    assert str(found).endswith("at least 4 parameters, 16 bytes")


def test_model_that_looks_at_values_has_no_shapes():
    class Loud(nn.Module):
        def forward(self, x):
            print("loud")  # noqa: T201
            return x[: int(x.sum())]

    assert find_shapes(Loud(), torch.ones(3)) == {}
    assert str(summarize(Loud(), torch.ones(3))).splitlines()[1].split() == [
        "Loud",
        "0",
    ]


def test_innermost_layers_of_a_large_model_are_left_out():
    blocks = [nn.Sequential(*[nn.ReLU() for _ in range(9)]) for _ in range(20)]
    lines = str(summarize(nn.Sequential(*blocks))).splitlines()
    assert len(lines) < MAX_ROWS
    assert lines[-2] == "... and 180 modules within these"


def test_learner_shows_its_model_without_building_weights(capsys):
    class Huge(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.one = nn.Linear(width, width)
            print(self.one.weight.device)  # noqa: T201

    learner = harness.setup(Huge, loss=nn.MSELoss(), optimizer=torch.optim.SGD)
    assert "not built: setup(module): expected" in str(learner)
    text = str(learner.set_hparams(width=100_000))
    assert text.startswith("Learner of Huge\nhparams: {'width': 100000}")
    assert "10,000,100,000 parameters, 40 GB" in text
    assert capsys.readouterr().out == "meta\n"


def test_run_and_result_have_shapes_after_the_fit(tmp_path):
    tracker = {"runs_dir": tmp_path, "delivery": False}
    fitted = line_learner().fit(
        slope(5), 1, tracker=tracker, verbose=False, accelerator=SingleDevice("cpu")
    )
    text = (fitted.run_path / "artifacts" / "model.txt").read_text()
    assert text.startswith(str(fitted.summary()))
    assert "(N)  " in text
    assert len(fitted.example) == 2


def test_fit_leaves_no_hooks_and_a_copy_of_the_model_none_that_matter(tmp_path):
    copies = []

    class Copy(harness.Callback):
        def on_fit_begin(self):
            copies.append(copy.deepcopy(self.ctx.model))

    tracker = {"runs_dir": tmp_path, "delivery": False}
    fitted = line_learner().fit(
        slope(5), 1, tracker=tracker, verbose=False, callbacks=[Copy()]
    )
    (copied,) = copies
    copied(torch.ones(3))
    for model in (fitted.model, copied):
        assert not model._forward_hooks
        assert not model._forward_pre_hooks
        pickle.dumps(model)
