from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import harness
from harness.accelerators.single import SingleDevice
from harness.callbacks import GradientClip, NaNGuard
from tests.harness.checkpoint.test_resume import check_exact
from tests.harness.exact import Case, Net, TwoParts, X, Y, adam, same_bits
from tests.harness.fakes import At

OFF: dict[str, Any] = {"tracker": False, "verbose": False}
NAN, INF = float("nan"), float("inf")


def fit(*callbacks: Any, x: Any = X, module: Any = Net, accumulate: int = 1, **options):
    optimizer = None if module is TwoParts else torch.optim.Adam
    learner = harness.setup(module, loss=nn.CrossEntropyLoss(), optimizer=optimizer)
    return learner.fit(
        (x, Y),
        2,
        callbacks=callbacks,
        seed=3,
        accelerator=SingleDevice("cpu", accumulate=accumulate),
        dataloader_options={"batch_size": 4, "shuffle": False, "drop_last": False},
        **OFF | options,
    )


def weights_before(batch: int, **options: Any) -> dict[str, torch.Tensor]:
    """Weights and buffers of a fit without faults before a batch of epoch 1."""
    found = {}

    def note(ctx):
        if ctx.epoch == 1 and ctx.iter == batch:
            state = ctx.model.state_dict()
            found.update({name: value.clone() for name, value in state.items()})

    fit(At("on_train_batch_begin", note, weight=-9), **options)
    return found


def spoil(row: int) -> torch.Tensor:
    x = X.clone()
    x[row] = NAN
    return x


@pytest.mark.parametrize("module", [Net, TwoParts])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_guard_names_the_rows_and_keeps_the_state_before_them(
    module, accumulate, tmp_path
):
    options = {"module": module, "accumulate": accumulate}
    with pytest.raises(FloatingPointError) as info:
        fit(
            NaNGuard(),
            x=spoil(9),
            tracker={"runs_dir": tmp_path, "delivery": False},
            **options,
        )
    text = str(info.value)
    assert "expected finite loss in epoch 1, batch 3, got nan" in text
    assert "Rows of the input that are not finite: 1." in text
    assert "first appears in the output of body.0 (Linear)" in text
    folder = Path(re.search(r"are in '(.*)'", text).group(1))
    kept, wanted = (
        load_file(folder / "weights.safetensors"),
        weights_before(3, **options),
    )
    assert all(same_bits(kept[name], wanted[name]) for name in wanted)
    batch = load_file(folder / "batch-0.safetensors")
    assert sorted(map(len, batch.values())) == [4, 4]
    assert batch["batch/0"].isnan().any(1).tolist() == [False, True, False, False]


def test_guard_names_the_module():
    class Wrong(Net):
        def forward(self, x):
            hidden = self.body(x)
            spoilt = self.training and (x == X[9]).all(1).any()
            return self.head(hidden * INF if spoilt else hidden)

    with pytest.raises(
        FloatingPointError,
        match=r"Rows of the pred.* first appears in the output of head",
    ):
        fit(NaNGuard(), module=Wrong)


def test_guard_names_the_parameters_of_a_gradient_before_clipping():
    def spoil_one(ctx):
        if ctx.iter == 2:
            ctx.model.head.bias.grad[1] = INF

    spoiler = At("on_train_batch_before_step", spoil_one, weight=-6)
    with pytest.raises(
        FloatingPointError,
        match=r"finite gradients in epoch 1, batch 2, got others in head.bias\. Look",
    ):
        fit(GradientClip(), spoiler, NaNGuard())


def test_guard_names_the_weights_after_a_step_and_takes_it_back():
    ended = []

    def handle(ctx):
        ctx.handlers[FloatingPointError] = ended.append

    def spoil_one(ctx):
        if ctx.iter == 3:
            ctx.model.head.weight[1, 1] = NAN

    spoiler = At("on_train_batch_after_step", spoil_one, weight=-6)
    fitted = fit(spoiler, NaNGuard(), At("on_fit_begin", handle))
    assert "finite weights in epoch 1, batch 3, got others in head.weight after" in str(
        ended[0]
    )
    wanted = weights_before(3)
    assert all(
        same_bits(value, wanted[name])
        for name, value in fitted.model.state_dict().items()
    )


def test_guard_names_weights_that_were_spoilt_before():
    def spoil_one(ctx):
        if ctx.epoch == 2:
            ctx.model.head.bias.fill_(NAN)

    with pytest.raises(
        FloatingPointError, match=r"epoch 2, batch 1.*not finite before: head.bias\."
    ):
        fit(At("on_epoch_begin", spoil_one), NaNGuard(keep=False))


def test_guard_of_a_model_with_its_own_step_names_the_rows():
    class Own(Net):
        def step(self):
            self.ctx.pred = self(self.ctx.input)
            return nn.functional.cross_entropy(self.ctx.pred, self.ctx.target)

    with pytest.raises(
        FloatingPointError, match=r"Rows of the input that are not finite: 1\. L"
    ):
        fit(NaNGuard(), module=Own, x=spoil(9))


def test_guard_leaves_a_good_fit_as_it_is(tmp_path):
    plain, guarded = fit(), fit(NaNGuard())
    assert plain.records["metrics"] == guarded.records["metrics"]
    case = Case(learner=adam, accumulate=2, callbacks=lambda folder: [NaNGuard()])
    check_exact(case, tmp_path, [("on_train_batch_end", 5)])


def test_guard_without_a_copy_ends_the_fit_too():
    with pytest.raises(FloatingPointError, match=r"got nan\. Rows of the input"):
        fit(NaNGuard(keep=False, gradients=False, weights=False), x=spoil(0))
