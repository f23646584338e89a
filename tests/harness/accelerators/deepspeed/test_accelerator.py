"""Features of DeepSpeed only: precision, offload, its own optimizers, overflow."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import harness
from harness.accelerators.deepspeed.accelerator import DeepSpeedAccelerator
from harness.accelerators.deepspeed.library import import_deepspeed
from harness.accelerators.deepspeed.zero3_weights import WholeWeights
from harness.accelerators.single import SingleDevice
from harness.callbacks import LRScheduler, ModelCheckpoint, ResumeFromCheckpoint
from harness.checkpoint.format import list_checkpoints, read_rank
from harness.checkpoint.state import search_context
from harness.errors import CheckpointError
from tests.harness.accelerators.cases import (
    Gan,
    Lab,
    Net,
    Normed,
    adam,
    adversarial,
    check_equal,
    plain,
    prepared,
    regression,
    seeded,
    train_window,
    two_rates,
    windows,
)
from tests.harness.exact import KeepsMore

STAGES = [0, 1, 2, 3]


# --------------------------------------------------------------------- refused at start


def test_accumulate_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"accumulate\): expected at least 1, got 0"):
        DeepSpeedAccelerator({}, device="cpu", accumulate=0)


def test_wrong_config_is_refused() -> None:
    with pytest.raises(ValueError, match="Did you mean 'zero_optimization'"):
        DeepSpeedAccelerator({"zero_optimisation": {}}, device="cpu")


@pytest.mark.parametrize("stage", [0, 3])
def test_optimizer_of_the_config_trains_and_resumes(
    stage: int, make: Any, tmp_path: Path
) -> None:
    params = {"lr": "auto", "torch_adam": True, "adam_w_mode": False}
    config = {"optimizer": {"type": "Adam", "params": params}}
    data = torch.randn(32, 5), torch.randn(32, 3)

    def fit(optimizer: Any, accelerator: Any, epochs: int, **options: Any) -> Any:
        learner = harness.setup(Net, loss=nn.MSELoss(), optimizer=optimizer)
        fitted = learner.set_opt_hparams(lr=0.05).fit(
            data,
            epochs,
            accelerator=accelerator,
            tracker=False,
            verbose=False,
            seed=1,
            **options,
        )
        return fitted.model.state_dict()

    wanted = fit(torch.optim.Adam, SingleDevice("cpu"), 3)
    found = fit("config", make(stage, **config), 3)
    saving = [ModelCheckpoint(tmp_path / "saved")]
    fit("config", make(stage, **config), 1, callbacks=saving)
    resuming = [ResumeFromCheckpoint(tmp_path / "saved")]
    resumed = fit("config", make(2, **config), 3, callbacks=resuming)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(resumed[name], value, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="an optimizer in the accelerator's config"):
        fit("config", SingleDevice("cpu"), 1)


def test_state_has_what_was_frozen_and_sets_no_other_attribute(make: Any) -> None:
    first, last = make(0), make(0)
    model, _ = prepared(first)
    model.head.requires_grad_(False)
    state = first.state_dict()
    other, _ = prepared(last)
    (engine,) = last._engines.deepspeed_engines.values()
    was = engine.optimizer
    for facts in state["facts"].values():
        facts["counters"] = {**facts["counters"], "optimizer": 1}
    last.load_state_dict(state)
    assert engine.optimizer is was
    frozen = [name for name, p in other.named_parameters() if not p.requires_grad]
    assert frozen == ["head.weight", "head.bias"]


def test_batch_size_of_the_loader_is_checked(make: Any) -> None:
    data = torch.utils.data.TensorDataset(torch.zeros(8, 5))
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    model = Net()
    accelerator = make(train_micro_batch_size_per_gpu=2)
    with pytest.raises(ValueError, match=r"= 4, the loader's batch size, got 2"):
        accelerator.prepare(model, adam(model), [loader])


# ------------------------------------------------------------------ refused in training


def test_other_norms_are_refused(make: Any) -> None:
    accelerator = make(1)
    prepared(accelerator)
    with pytest.raises(
        ValueError, match=r"clip\(norm_type\): expected 2.0 under DeepSpeed"
    ):
        accelerator.clip(1.0, norm_type=1.0)


def test_unprepared_accelerator_says_so(make: Any) -> None:
    with pytest.raises(RuntimeError, match="expected prepare"):
        make().state_dict()


# ---------------------------------------------------------------- features of DeepSpeed


@pytest.mark.parametrize("stage", STAGES)
def test_optimizer_of_the_config_trains(stage: int, make: Any) -> None:
    data = windows(1, [2, 1])
    wanted = plain(
        Net,
        lambda model: {
            "opt": torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
        },
        regression,
        data,
        each_micro=stage >= 2,
    )
    params = {"lr": "auto", "momentum": 0.9}
    accelerator = make(stage, 2, optimizer={"type": "SGD", "params": params})
    model = seeded(Net)
    model, opts, _ = accelerator.prepare(model, {}, opt_hparams={"lr": 0.3})
    assert list(opts) == ["opt"]
    for window in data:
        train_window(Lab(stage, Path()), accelerator, model, opts, regression, window)
    check_equal(accelerator.full_state_dict(model), wanted)


@pytest.mark.parametrize("stage", [1, 3])
def test_scheduler_of_the_config_steps_with_the_optimizer(
    stage: int, make: Any
) -> None:
    params = {"warmup_max_lr": 0.1, "warmup_num_steps": 4, "warmup_type": "linear"}
    accelerator = make(stage, scheduler={"type": "WarmupLR", "params": params})
    model, opts = prepared(accelerator)
    rates = []
    for window in windows(1, [1, 1, 1]):
        train_window(Lab(stage, Path()), accelerator, model, opts, regression, window)
        rates.append(opts["opt"].param_groups[0]["lr"])
    assert rates == pytest.approx([0.0, 0.025, 0.05])


@pytest.mark.parametrize("stage", STAGES)
def test_clipping_by_the_config_equals_clip(stage: int, make: Any) -> None:
    data = windows(1, [1, 2])
    wanted = plain(Net, adam, regression, data, each_micro=stage >= 2, max_norm=0.05)
    accelerator = make(stage, 2, gradient_clipping=0.05)
    model, opts = prepared(accelerator)
    for window in data:
        train_window(Lab(stage, Path()), accelerator, model, opts, regression, window)
    check_equal(accelerator.full_state_dict(model), wanted, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("stage", [0, 2])
def test_clip_takes_the_place_of_clipping_by_the_config(stage: int, make: Any) -> None:
    ((micro,),) = windows(1, [1])
    exact = seeded(Net)
    regression(exact, "opt", micro[0]).backward()
    wanted = nn.utils.clip_grad_norm_(exact.parameters(), 1.0)
    accelerator = make(stage, gradient_clipping=1e-4)
    model, _ = prepared(accelerator)
    with accelerator.optimizing():
        accelerator.backward(regression(model, "opt", micro[0]))
    norm = accelerator.clip(0.05)
    accelerator.step()
    assert float(norm) == pytest.approx(float(wanted), rel=1e-5)
    assert wanted > 0.05


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload_equals_plain_torch(stage: int, make: Any) -> None:
    data = windows(1, [1, 3, 2])
    wanted = plain(Net, adam, regression, data, each_micro=stage >= 2)
    zero = {"offload_optimizer": {"device": "cpu"}}
    accelerator = make(stage, 3, zero_optimization=zero)
    model, opts = prepared(accelerator)
    for window in data:
        train_window(Lab(stage, Path()), accelerator, model, opts, regression, window)
    check_equal(accelerator.full_state_dict(model), wanted)


def test_open_window_with_offload_is_not_saved(make: Any) -> None:
    accelerator = make(2, 2, zero_optimization={"offload_optimizer": {"device": "cpu"}})
    model, _ = prepared(accelerator)
    with accelerator.optimizing():
        accelerator.backward(regression(model, "opt", windows(1, [1])[0][0][0]))
    with pytest.raises(RuntimeError, match="expected the end of a window with offload"):
        accelerator.state_dict()


@pytest.mark.parametrize("build", ["net", "gan"])
@pytest.mark.parametrize("stage", STAGES)
def test_bf16_is_near_full_precision(stage: int, build: str, make: Any) -> None:
    data = windows(1, [1, 2, 2])
    kinds: Any = {"net": (Net, two_rates, regression), "gan": (Gan, slow, in_bf16)}
    made, optimizers, loss_of = kinds[build]
    wanted = plain(
        made,
        optimizers,
        adversarial if build == "gan" else loss_of,
        data,
        each_micro=False,
    )
    accelerator = make(stage, 2, bf16={"enabled": True})
    model, opts = prepared(accelerator, made, optimizers)
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}
    for window in data:
        train_window(Lab(stage, Path()), accelerator, model, opts, loss_of, window)
    found = accelerator.full_state_dict(model)
    start = seeded(made).state_dict()
    for name, value in wanted.state_dict().items():
        assert found[name].dtype == torch.float32
        moved = (value - start[name]).abs().max()
        assert (found[name] - value).abs().max() < 0.1 * moved + 4e-3, name
    accelerator.finish()
    assert {param.dtype for param in model.parameters()} == {torch.float32}


def slow(model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    """Players whose steps follow the size of the gradient: Adam's follow its sign."""
    gan: Any = model
    return {
        "disc": torch.optim.SGD(gan.disc.parameters(), lr=0.1),
        "gen": torch.optim.SGD(gan.gen.parameters(), lr=0.1),
    }


@pytest.mark.parametrize("stage", STAGES)
def test_batch_norm_in_bf16_keeps_statistics_in_float32(stage: int, make: Any) -> None:
    accelerator = make(stage, bf16={"enabled": True})
    model, _ = prepared(accelerator, Normed, adam_of_all)
    x = torch.randn(16, 5)
    with torch.no_grad():
        model(x)
    plain = seeded(Normed)
    hidden = plain.body.bfloat16()(x.bfloat16()).float()
    mean = model.get_buffer("norm.running_mean")
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, 0.1 * hidden.mean(0), rtol=1e-3, atol=1e-4)
    with accelerator.optimizing():
        accelerator.backward(model(x).float().square().mean())
    accelerator.step()
    model.eval()
    assert model(x).dtype == torch.float32  # what a loss compares with its target


def adam_of_all(model: nn.Module) -> Any:
    """One optimizer for all parameters."""
    return {"opt": torch.optim.Adam(model.parameters(), lr=0.01)}


def in_bf16(model: nn.Module, name: str, batch: tuple[Tensor, Tensor]) -> Tensor:
    """As ``adversarial``; parts that are called by themselves take what they are given."""
    return adversarial(model, name, (batch[0].bfloat16(), batch[1]))


@pytest.mark.parametrize("stage", STAGES)
def test_autocast_is_torchs(stage: int, make: Any) -> None:
    data = windows(1, [1, 2])

    def under_autocast(model: nn.Module, name: str, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return regression(model, name, batch)

    wanted = plain(Net, adam, under_autocast, data, each_micro=stage >= 2)
    accelerator = make(stage, 2, torch_autocast={"enabled": True, "dtype": "bfloat16"})
    model, opts = prepared(accelerator)
    for window in data:
        train_window(Lab(stage, Path()), accelerator, model, opts, regression, window)
    # Gradients travel in bfloat16 under DeepSpeed's autocast.
    check_equal(accelerator.full_state_dict(model), wanted, rtol=2e-2, atol=6e-3)
    assert model(data[0][0][0][0]).dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")


def test_autocast_is_left_where_the_forward_raises(make: Any) -> None:
    accelerator = make(0, torch_autocast={"enabled": True})
    model, _ = prepared(accelerator)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.zeros(2, 3))
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("stage", STAGES)
def test_overflow_is_skipped_and_counted(stage: int, make: Any) -> None:
    accelerator = make(stage, bf16={"enabled": True, "check_grad_overflow": True})
    model, opts = prepared(accelerator)
    lab, (window, *_) = Lab(stage, Path()), windows(1, [1])
    before = accelerator.full_state_dict(model)
    with accelerator.optimizing("opt"):
        loss = regression(model, "opt", window[0][0]) * float("inf")
        accelerator.backward(loss, "opt")
    changed = accelerator.step("opt")
    assert (changed, accelerator.steps, accelerator.overflows) == (
        False,
        {"opt": 0},
        {"opt": 1},
    )
    torch.testing.assert_close(
        accelerator.full_state_dict(model), before, rtol=0, atol=0
    )
    train_window(lab, accelerator, model, opts, regression, window)
    assert (accelerator.steps, accelerator.overflows) == ({"opt": 1}, {"opt": 1})


class Overflow(harness.Callback):
    """Lets the gradients of the second batch overflow."""

    def on_train_batch_before_backward(self) -> None:
        if self.ctx.iter == 2:
            assert self.ctx.loss_grad is not None
            self.ctx.loss_grad = torch.mul(self.ctx.loss_grad, float("inf"))


def test_fit_records_overflows(make: Any) -> None:
    accelerator = make(1, bf16={"enabled": True, "check_grad_overflow": True})
    step_lr = torch.optim.lr_scheduler.StepLR
    scheduler = LRScheduler(step_lr, call_on="on_train_batch_after_step", step_size=1)
    learner = harness.setup(
        lambda: nn.Linear(3, 1), loss=nn.MSELoss(), optimizer=torch.optim.AdamW
    )
    fitted = learner.fit(
        (torch.ones(16, 3), torch.ones(16, 1)),
        2,
        callbacks=[Overflow(), scheduler],
        accelerator=accelerator,
        dataloader_options={"batch_size": 4},
        tracker=False,
        verbose=False,
    )
    counts = [epoch["overflows"] for epoch in fitted.records["profile"]["train"]]
    assert counts == [1, 2]
    assert scheduler.scheduler.last_epoch == 2 * 3


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_parameter_without_gradient_counts_as_zero(
    stage: int, offload: bool, make: Any
) -> None:
    class Half(Net):
        def forward(self, x: Tensor, use_body: bool = True) -> Tensor:
            hidden = self.body(x) if use_body else x.sum(1, keepdim=True).repeat(1, 7)
            return self.head(torch.tanh(hidden))

    def sgd(model: nn.Module) -> Any:
        return {"opt": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)}

    if offload and stage == 0:
        pytest.skip("nothing is offloaded without ZeRO")
    zero = {"offload_optimizer": {"device": "cpu"}} if offload else {}
    accelerator = make(stage, 2, zero_optimization=zero)
    model, _ = prepared(accelerator, Half, sgd)
    wanted = seeded(Half)
    opt = sgd(wanted)["opt"]
    uses = [(True, True), (False, True), (True, False), (False, False), (True, True)]
    for window, used in zip(windows(1, [2] * 5), uses, strict=True):
        opt.zero_grad(set_to_none=False)
        for ((x, y),), use_body in zip(window, used, strict=True):
            ((wanted(x, use_body) - y).square().mean() / 2).backward()
            with accelerator.optimizing():
                accelerator.backward((model(x, use_body) - y).square().mean())
        opt.step()
        assert accelerator.step()
    check_equal(accelerator.full_state_dict(model), wanted)


def test_users_step_opt_is_called_with_the_optimizer(make: Any) -> None:
    accelerator = make(1)
    model, opts = prepared(accelerator)
    seen: list[Any] = []

    def step_opt(opt: Any) -> None:
        seen.append(opt)

    with accelerator.optimizing():
        accelerator.backward(regression(model, "opt", windows(1, [1])[0][0][0]))
    assert not accelerator.step("opt", step_opt)
    assert seen == [opts["opt"]]
    assert accelerator.steps == {"opt": 0}
    assert accelerator.step("opt")


def test_evaluation_needs_no_engine(make: Any) -> None:
    accelerator = make(3)
    model = seeded(Net)
    found, opts, _ = accelerator.prepare(model, None, [None])
    assert found is model
    assert opts == {}
    with torch.no_grad(), accelerator.optimizing("opt"):
        torch.testing.assert_close(
            model(torch.ones(2, 5)), seeded(Net)(torch.ones(2, 5))
        )


def test_validation_between_training_batches_changes_nothing(make: Any) -> None:
    data = windows(1, [2, 2])
    for stage in STAGES:
        wanted = plain(Net, adam, regression, data, each_micro=stage >= 2)
        accelerator = make(stage, 2)
        model, opts = prepared(accelerator)
        for window in data:
            with torch.no_grad():
                model.eval()
                model(torch.zeros(3, 5))
                model.train()
            train_window(
                Lab(stage, Path()), accelerator, model, opts, regression, window
            )
        check_equal(accelerator.full_state_dict(model), wanted)
        accelerator.finish()


@pytest.mark.slow
def test_nothing_is_said_and_mlflow_stays_away(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, torch\n"
        "from harness.accelerators.deepspeed.accelerator import DeepSpeedAccelerator\n"
        "for stage in range(4):\n"
        "    acc = DeepSpeedAccelerator({'zero_optimization': {'stage': stage}}, device='cpu')\n"
        "    model = torch.nn.Linear(2, 1)\n"
        "    opt = torch.optim.AdamW(model.parameters())\n"
        "    acc.prepare(model, {'opt': opt})\n"
        "    acc.backward(model(torch.ones(3, 2)).mean())\n"
        "    assert acc.step()\n"
        "    acc.finish()\n"
        "assert 'mlflow' not in sys.modules\n"
        "assert 'torch._inductor.codecache' not in sys.modules\n"  # seconds to import
    )
    root = Path(__file__).resolve().parents[4]
    done = subprocess.run(
        [sys.executable, "-W", "default", script],
        env={"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_functions_of_torch_are_its_own_again(make: Any) -> None:
    before = torch.nn.functional.linear
    accelerator = make(3)
    prepared(accelerator)
    accelerator.finish()
    # DeepSpeed's has other last bits, and cannot be compiled.
    assert torch.nn.functional.linear is before


def living_bytes() -> int:
    """Bytes of all tensors in the process, also of those in reference cycles."""
    found = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in found}
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("stage", STAGES)
def test_fit_leaves_no_tensor_behind(stage: int) -> None:
    config = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": True}}
    data = torch.randn(8, 5), torch.randn(8, 3)

    def fit() -> harness.Fitted:
        learner = harness.setup(
            Net, loss=nn.MSELoss(), optimizer=torch.optim.AdamW
        ).set_opt_hparams(lr=0.01)
        accelerator = harness.accelerator(config, device="cpu")
        return learner.fit(data, epochs=2, accelerator=accelerator, tracker=False)

    fit()
    gc.collect()
    with no_collector():
        before = living_bytes()
        fitted = fit()
        own = sum(param.nbytes for param in fitted.model.parameters())
        # A single number of somebody else may come or go; the net has 66 of them.
        assert living_bytes() - before - own < 66 * 4


@contextmanager
def no_collector() -> Iterator[None]:
    """Let Python not look for garbage in reference cycles inside."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Aliased(Net):
    """Keeps a weight in a list, too, and marks it."""

    def __init__(self) -> None:
        super().__init__()
        self.own = [self.body.weight]
        self.body.weight.no_decay = True  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("stage", "zero_init"), [(0, False), (2, False), (3, False), (3, True)]
)
def test_parameters_stay_the_same_objects(stage: int, zero_init: bool) -> None:
    config = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": True}}
    accelerator = harness.accelerator(config, device="cpu", zero_init=zero_init)
    data = torch.randn(8, 5), torch.randn(8, 3)
    learner = harness.setup(Aliased, loss=nn.MSELoss(), optimizer=torch.optim.AdamW)
    fitted = learner.fit(data, epochs=1, accelerator=accelerator, tracker=False)
    model: Any = fitted.model
    assert model.own[0] is model.body.weight
    assert [vars(param) for param in model.parameters()] == [
        {"no_decay": True},
        {},
        {},
        {},
    ]


class Grow(harness.Callback):
    """Adds a layer while the model trains."""

    def on_train_batch_begin(self) -> None:
        self.ctx.model.later = nn.Linear(2, 2)


def test_layer_that_is_added_later_is_told_at_zero_3() -> None:
    learner = harness.setup(Net, loss=nn.MSELoss(), optimizer=torch.optim.AdamW)
    accelerator = Lab(3, Path()).make()
    data = torch.randn(8, 5), torch.randn(8, 3)
    options: Any = {"callbacks": [Grow()], "tracker": False}
    with pytest.raises(AttributeError) as caught:
        learner.fit(data, 1, accelerator=accelerator, **options)
    assert any("ZeRO 3 steps only layers" in note for note in caught.value.__notes__)


class Clamp(harness.Callback):
    """Clamps weights around each step, which ZeRO 3 refuses before it."""

    def __init__(self, *, is_at_zero3: bool) -> None:
        self.is_at_zero3 = is_at_zero3

    def on_train_batch_before_step(self) -> None:
        if not self.is_at_zero3:
            self.on_train_batch_end()

    def on_train_batch_end(self) -> None:
        for param in self.ctx.model.parameters():
            param.clamp_(-0.1, 0.1)


@pytest.mark.parametrize("stage", STAGES)
def test_weights_that_a_callback_changes_stay_changed(
    stage: int, tmp_path: Path
) -> None:
    learner = harness.setup(Net, loss=nn.MSELoss(), optimizer=torch.optim.AdamW)
    learner = learner.set_opt_hparams(lr=0.1)
    data = torch.randn(8, 5), torch.randn(8, 3)

    def fit(accelerator: Any, *callbacks: harness.Callback) -> harness.Fitted:
        return learner.fit(
            *(data, 4),
            callbacks=[Clamp(is_at_zero3=stage == 3), *callbacks],
            accelerator=accelerator,
            tracker=False,
            seed=1,
        )

    wanted = fit(SingleDevice("cpu")).model
    found = fit(Lab(stage, Path()).make(), ModelCheckpoint(tmp_path))
    largest = max(float(param.detach().abs().max()) for param in wanted.parameters())
    assert largest > 0.09
    check_equal(found.model.state_dict(), wanted, atol=1e-6)
    found.load_weights(tmp_path)  # those that were changed after the step
    check_equal(found.model.state_dict(), wanted, atol=1e-6)


class Doubles(torch.optim.Optimizer):
    """Steps by another optimizer with the same groups, every third time twice as far."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": 0.9})
        self.inner = torch.optim.SGD(self.param_groups, lr=lr, momentum=0.9)
        self.param_groups, self.count = self.inner.param_groups, 0

    def step(self, closure: Any = None) -> None:
        self.count += 1
        for _ in range(1 + (self.count % 3 == 0)):
            self.inner.step()


def test_what_an_optimizer_holds_resumes_or_is_named(
    make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    learner = harness.setup(Net, loss=nn.MSELoss(), optimizer=Doubles)
    data = torch.randn(8, 5), torch.randn(8, 3)

    def fit(epochs: int, callback: harness.Callback, stage: int = 1) -> nn.Module:
        fitted = learner.set_opt_hparams(lr=0.02).fit(
            *(data, epochs),
            callbacks=[callback],
            accelerator=make(stage, zero_allow_untested_optimizer=True),
            tracker=False,
            verbose=stage == 2,
            seed=1,
        )
        return fitted.model

    wanted = fit(7, harness.Callback())
    fit(2, ModelCheckpoint(tmp_path))
    resumed = fit(7, ResumeFromCheckpoint(tmp_path, strict=True))
    check_equal(resumed.state_dict(), wanted)
    fit(3, ResumeFromCheckpoint(tmp_path), stage=2)
    lost = "optimizers.opt.inner belongs to the ranks that saved it"
    assert lost in capsys.readouterr().err


def test_what_an_optimizer_keeps_under_names_is_converted(
    make: Any, tmp_path: Path
) -> None:
    learner = harness.setup(Net, loss=nn.MSELoss(), optimizer=KeepsMore)
    data = torch.randn(8, 5), torch.randn(8, 3)

    def fit(accelerator: Any, epochs: int, *callbacks: harness.Callback) -> nn.Module:
        fitted = learner.set_opt_hparams(lr=0.01).fit(
            *(data, epochs),
            callbacks=callbacks,
            accelerator=accelerator,
            tracker=False,
            verbose=False,
            seed=1,
        )
        return fitted.model

    wanted = fit(SingleDevice("cpu"), 6)
    one, two = tmp_path / "one", tmp_path / "two"
    fit(SingleDevice("cpu"), 2, ModelCheckpoint(one))
    engine = make(1, zero_allow_untested_optimizer=True)
    fit(engine, 4, ResumeFromCheckpoint(one), ModelCheckpoint(two))
    found = fit(SingleDevice("cpu"), 6, ResumeFromCheckpoint(two))
    check_equal(found.state_dict(), wanted, atol=1e-6)


def test_optimizer_that_leaves_out_what_torch_adds_is_refused(make: Any) -> None:
    class Alone(Doubles):
        def __init__(self, params: Any, lr: float) -> None:
            self.inner = torch.optim.SGD(params, lr=lr)
            self.param_groups = self.inner.param_groups

    model = Net()
    match = r"prepare\('opt'\): expected an optimizer that calls torch's .*, got Alone"
    with pytest.raises(ValueError, match=match):
        make(0).prepare(model, {"opt": Alone(model.parameters(), 0.1)})


class Failing(Net):
    """Fails in the second batch."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 2:
            raise RuntimeError("second")
        return super().forward(self.body(x)[:, :5])


def test_failed_fit_leaves_no_tensor_behind() -> None:
    data = torch.randn(8, 5), torch.randn(8, 3)
    learner = harness.setup(Failing, loss=nn.MSELoss(), optimizer=torch.optim.SGD)

    def fit() -> None:
        accelerator = harness.accelerator({"zero_optimization": 3}, device="cpu")
        options: Any = {"dataloader_options": {"batch_size": 4}, "tracker": False}
        with pytest.raises(RuntimeError, match="second"):
            learner.set_opt_hparams(lr=0.1).fit(
                data, 1, accelerator=accelerator, **options
            )

    fit()
    gc.collect()
    before = living_bytes()
    fit()
    gc.collect()
    # A single number of somebody else may come or go; the net has 66 of them.
    assert living_bytes() - before < 66 * 4


def test_log_level_in_the_config_asks_for_chatter(make: Any) -> None:
    try:
        prepared(make(1, log_level="info"))
        assert import_deepspeed().utils.logger.level == 20
    finally:
        prepared(make(1))
    assert import_deepspeed().utils.logger.level == 40


def test_warnings_of_the_users_own_are_left_alone(make: Any) -> None:
    prepared(make(3))
    with pytest.warns(FutureWarning, match="mine"):
        warnings.warn("mine", FutureWarning, stacklevel=1)


class Averages(harness.Callback):
    """Averages the weights, as people write it."""

    def __init__(self, event: str) -> None:
        setattr(self, event, self.average)

    def average(self) -> None:
        model = self.ctx.model
        assert model is not None
        self.means = {name: p.clone() for name, p in model.state_dict().items()}


class Reads(harness.Callback):
    """Looks at weights in ways that work with parts."""

    def on_train_batch_end(self) -> None:
        assert self.ctx.model is not None
        self.trained = [p.requires_grad for p in self.ctx.model.parameters()]
        assert self.ctx.accelerator is not None
        self.whole = self.ctx.accelerator.full_state_dict(self.ctx.model)


class ClipsByHand(harness.Callback):
    """Clips as people write it; below ZeRO 2 one rank has all gradients."""

    def on_train_batch_before_step(self) -> None:
        nn.utils.clip_grad_norm_(self.ctx.model.parameters(), 1e-3)


def test_gradients_that_engines_combine_in_the_step_are_refused_before_it(
    make: Any,
) -> None:
    learner = harness.setup(Net, loss=nn.MSELoss(), optimizer=torch.optim.SGD)
    data = torch.randn(8, 5), torch.randn(8, 3)
    options: Any = {"epochs": 1, "tracker": False, "verbose": False}

    def fit(stage: int, *callbacks: harness.Callback) -> None:
        learner.fit(data, accelerator=make(stage), callbacks=callbacks, **options)

    for stage in (2, 3):
        with pytest.raises(
            ValueError, match=rf"ZeRO {stage}: .*\.grad before the step"
        ):
            fit(stage, ClipsByHand())
    fit(1, ClipsByHand())
    fit(2, harness.callbacks.GradientClip())
    with pytest.raises(ValueError, match=r"GradientClip\(norm_type\): expected 2.0"):
        fit(2, harness.callbacks.GradientClip(norm_type=float("inf")))


@pytest.mark.parametrize("event", ["on_fit_begin", "on_train_batch_end"])
def test_weights_that_zero_divides_are_refused_in_callbacks(
    event: str, make: Any
) -> None:
    learner = harness.setup(
        Net, loss=nn.MSELoss(), optimizer=torch.optim.SGD
    ).set_opt_hparams(lr=0.1)
    data = torch.randn(8, 5), torch.randn(8, 3)
    options: Any = {"tracker": False, "verbose": False}
    small = {"stage3_param_persistence_threshold": 0}

    def fit(stage: int, *callbacks: Any) -> Any:
        accelerator = make(stage, zero_optimization=small)
        return learner.fit(
            data, 1, accelerator=accelerator, callbacks=callbacks, **options
        )

    with pytest.raises(ValueError, match=r"no use of the weight 'body.weight' .*full_"):
        fit(3, Averages(event))
    assert fit(2, Averages(event)).model is not None
    reads = Reads()
    fit(3, reads)
    assert reads.trained == [True] * 4
    assert reads.whole["body.weight"].shape == (7, 5)


class Parts(nn.Module):
    """Its step and loss call submodules themselves, also again in the backward pass."""

    ctx: Any

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 3)
        self.blocks = nn.ModuleList([nn.Sequential(nn.LayerNorm(5), self.inner)])
        self.side, self.noise = nn.Linear(5, 3), nn.Linear(2, 3)
        self.mean = nn.MSELoss()

    def cast(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        again = checkpoint(self.blocks[0], x, use_reentrant=False)
        return self.side(x) + again

    def loss(self, pred: Tensor, target: Tensor) -> Tensor:
        side = self.side(self.cast(self.ctx.input)).float()
        return self.mean(pred.float(), target) + side.square().mean()

    def step(self) -> Tensor:
        x = self.cast(self.ctx.input)
        pred = self(x) + checkpoint(self.blocks[0], x, use_reentrant=False)
        inner = self.inner(input=self.cast(self.ctx.input))
        noise = self.cast(torch.ones(len(x), 2))
        return self.loss(pred + inner + self.noise(noise), self.ctx.target)


class CastParts(Parts):
    """The same, with inputs that it converts by itself."""

    def cast(self, x: Tensor) -> Tensor:
        return x.to(torch.bfloat16)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_submodules_that_a_step_calls_get_inputs_in_bf16(stage: int, make: Any) -> None:
    data = torch.randn(16, 5), torch.randn(16, 3)

    def fit(module: type[Parts]) -> harness.Fitted:
        learner = harness.setup(module, optimizer=torch.optim.SGD)
        return learner.set_opt_hparams(lr=0.01).fit(
            data,
            2,
            data,
            accelerator=make(stage, bf16={"enabled": True}),
            dataloader_options={"batch_size": 8},
            tracker=False,
            verbose=False,
            seed=1,
        )

    found, wanted = fit(Parts), fit(CastParts)
    assert found.records["metrics"] == wanted.records["metrics"]
    weights = wanted.model.state_dict()
    for name, value in found.model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    assert not any(one._forward_pre_hooks for one in found.model.modules())


def test_parameter_that_a_step_uses_by_itself_is_hinted_at(make: Any) -> None:
    class Raw(Parts):
        def loss(self, pred: Tensor, target: Tensor) -> Tensor:
            return (self.ctx.input @ self.side.weight.T).square().mean()

        step = None  # type: ignore[assignment]

    learner = harness.setup(Raw, optimizer=torch.optim.SGD)
    data = torch.randn(8, 5), torch.randn(8, 3)
    with pytest.raises(RuntimeError) as raised:
        learner.fit(data, 1, accelerator=make(1, bf16={"enabled": True}), tracker=False)
    hint = (
        "hint: The weights are bfloat16: .*input.to.*, or train with precision='bf16'"
    )
    assert any(re.match(hint, note) for note in raised.value.__notes__)


def test_step_at_zero_3_checks_no_use_of_weights_by_deepspeed(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, check = [0], WholeWeights.__torch_function__

    def count(self: Any, *given: Any) -> object:
        calls[0] += 1
        return check(self, *given)

    monkeypatch.setattr(WholeWeights, "__torch_function__", count)

    def count_checks(layers: int) -> int:
        model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(layers)))
        accelerator = make(3)
        accelerator.prepare(model, adam_of_all(model))
        for _ in range(2):  # the first one makes buffers
            before = calls[0]
            with accelerator.optimizing():
                accelerator.backward(model(torch.ones(3, 2)).sum())
            accelerator.step()
            found = calls[0] - before
        accelerator.finish()
        return found

    assert 0 < count_checks(1) == count_checks(8)


class Transformed(nn.Module):
    """A net of layers, one of which `how` runs in a way of its own."""

    def __init__(self, how: Any) -> None:
        super().__init__()
        self.layer, self.how = nn.Linear(5, 3), how

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x) + self.how(self.layer, x)
        return found


def call_with_others(layer: Any, x: Tensor) -> Any:
    others = {name: p * 0.5 for name, p in layer.named_parameters()}
    return torch.func.functional_call(layer, others, (x,))


def call_for_rows(layer: Any, x: Tensor) -> Any:
    return torch.func.vmap(layer)(x)


def test_functional_torch_at_zero_3_is_refused(make: Any) -> None:
    ways: dict[Any, tuple[type[Exception], str]] = {
        call_with_others: (AttributeError, "functional_call gives them others"),
        call_for_rows: (ValueError, r"ZeRO 3: expected no layer or weight in a"),
    }
    data = torch.randn(8, 5), torch.randn(8, 3)
    options = {"tracker": False, "verbose": False}
    for how, (kind, text) in ways.items():
        model = partial(Transformed, how)
        learner = harness.setup(model, loss=nn.MSELoss(), optimizer=torch.optim.SGD)
        learner = learner.set_opt_hparams(lr=0.1)
        learner.fit(data, 1, accelerator=make(2), **options)
        with pytest.raises(kind) as raised:
            learner.fit(data, 1, accelerator=make(3), **options)
        notes = getattr(raised.value, "__notes__", [])
        assert re.search(text, "\n".join([str(raised.value), *notes]))


class Saved(harness.Callback):
    """Notes what a checkpoint has beside the model and the optimizers."""

    def on_valid_begin(self) -> None:
        found = search_context(self.ctx)
        places = [*found.objects["model"], *found.owners["model"]]
        self.places = [place for place in places if "hooks" in place]


@pytest.mark.parametrize("stage", [1, 3])
def test_checkpoint_has_state_of_an_engine_once(
    make: Any, stage: int, tmp_path: Path
) -> None:
    # Adagrad has state before the engine replaces what it steps.
    learner = harness.setup(
        Net, loss=nn.MSELoss(), optimizer=torch.optim.Adagrad
    ).set_opt_hparams(lr=0.1)
    data, saved = (torch.randn(8, 5), torch.randn(8, 3)), Saved()
    learner.fit(
        data,
        1,
        data,
        callbacks=[ModelCheckpoint(tmp_path), saved],
        accelerator=make(stage),
        tracker=False,
        verbose=False,
    )
    assert saved.places == []
    (path,) = list_checkpoints(tmp_path)
    assert read_rank(path, 0)["fields"] == {}


def test_hook_that_is_a_method_of_a_dict_trains_and_is_passed_over(
    make: Any, tmp_path: Path
) -> None:
    met: dict[object, object] = {}

    class Hooked(Net):
        def __init__(self) -> None:
            super().__init__()
            self.body.register_forward_pre_hook(met.setdefault)

    learner = harness.setup(Hooked, loss=nn.MSELoss(), optimizer=torch.optim.SGD)
    learner.set_opt_hparams(lr=0.1).fit(
        (torch.randn(8, 5), torch.randn(8, 3)),
        1,
        callbacks=[ModelCheckpoint(tmp_path)],
        accelerator=make(3),
        tracker=False,
        verbose=False,
    )
    assert len(met) == 1
    assert list_checkpoints(tmp_path)


class Wraps(torch.optim.Optimizer):
    """Steps by another optimizer, which has the state."""

    def __init__(self, params: Any, lr: float) -> None:
        self.base = torch.optim.SGD(params, lr=lr, momentum=0.9)
        super().__init__(self.base.param_groups, self.base.defaults)

    def step(self, closure: Any = None) -> Any:
        return self.base.step()


@pytest.mark.parametrize("stage", [1, 3])
def test_optimizer_that_wraps_another_is_resumed_or_named(
    make: Any, stage: int, tmp_path: Path
) -> None:
    learner = harness.setup(Net, loss=nn.MSELoss(), optimizer=Wraps)
    data = torch.randn(8, 5), torch.randn(8, 3)

    def fit(epochs: int, *callbacks: harness.Callback) -> Any:
        return learner.set_opt_hparams(lr=0.1).fit(
            *(data, epochs),
            callbacks=callbacks,
            accelerator=make(stage, zero_allow_untested_optimizer=True),
            tracker=False,
            verbose=False,
            seed=1,
        )

    wanted = fit(2).model.state_dict()
    fit(1, ModelCheckpoint(tmp_path))
    if stage == 1:
        found = fit(2, ResumeFromCheckpoint(tmp_path, strict=True))
        for name, value in found.model.state_dict().items():
            assert torch.equal(value, wanted[name]), name
        return
    text = r"opt.base has no parameters between steps at ZeRO 3: use ZeRO 2"
    with pytest.raises(CheckpointError, match=text):
        fit(2, ResumeFromCheckpoint(tmp_path, strict=True))
