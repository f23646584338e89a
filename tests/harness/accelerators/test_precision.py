"""Mixed precision on one device, beside loops that are written with ``torch.amp``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import harness
from harness.accelerators.deepspeed.precision import add_precision, name_precision
from harness.accelerators.single import SingleDevice
from harness.callbacks import GradientClip, LRScheduler, ModelCheckpoint
from tests.harness.exact import Stop

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
ROWS, BATCH = 40, 8


def data() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(ROWS, 6, generator=draw)
    return x, torch.randint(0, 3, (ROWS,), generator=draw)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        pred: Tensor = self.head(torch.tanh(self.body(x)))
        return pred


class Two(Net):
    """The body and the head have optimizers of their own."""

    def set_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {
            "body": torch.optim.AdamW(self.body.parameters(), lr=1e-2),
            "head": torch.optim.SGD(self.head.parameters(), lr=0.1, momentum=0.9),
        }


def fit(module: Any = Two, accelerator: Any = None, **options: Any) -> harness.Fitted:
    own = {} if hasattr(module, "set_optimizers") else {"optimizer": torch.optim.Adam}
    learner = harness.setup(module, loss=nn.CrossEntropyLoss(), **own)
    given = {"dataloader_options": {"batch_size": BATCH, "shuffle": False}} | options
    accelerator = accelerator or harness.accelerator(device="cpu", precision="fp16")
    return learner.fit(data(), 2, accelerator=accelerator, tracker=False, **given)


def plain(precision: str, accumulate: int) -> nn.Module:
    """Two epochs of ``Two``, with a step of each optimizer after `accumulate` batches."""
    net, (x, y) = Two(), data()
    opts = net.set_optimizers()
    scalers = {
        name: torch.amp.GradScaler("cpu", enabled=precision == "fp16") for name in opts
    }
    starts = list(range(0, ROWS, BATCH))
    windows = [starts[n : n + accumulate] for n in range(0, len(starts), accumulate)]
    for window in windows * 2:
        for start in window:
            for name, opt in opts.items():
                with torch.autocast("cpu", HALF[precision]):
                    pred = net(x[start : start + BATCH])
                    loss = nn.functional.cross_entropy(pred, y[start : start + BATCH])
                params = [p for group in opt.param_groups for p in group["params"]]
                scaled = scalers[name].scale(loss / len(window))
                for param, grad in zip(
                    params, torch.autograd.grad(scaled, params), strict=True
                ):
                    param.grad = grad if param.grad is None else param.grad + grad
                if start == window[-1]:
                    scalers[name].unscale_(opt)
                    nn.utils.clip_grad_norm_(params, 0.05)
                    scalers[name].step(opt)
                    scalers[name].update()
                    opt.zero_grad()
    return net


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_fit_equals_a_loop_of_torch_amp(precision: str, accumulate: int) -> None:
    accelerator = harness.accelerator(
        device="cpu", precision=precision, accumulate=accumulate
    )
    fitted = fit(accelerator=accelerator, callbacks=[GradientClip(0.05)])
    for name, wanted in plain(precision, accumulate).state_dict().items():
        assert torch.equal(fitted.model.state_dict()[name], wanted), name
    # NumPy knows no bfloat16, and metrics would add up in half precision.
    assert fitted.predict(data()[0], accelerator=accelerator).dtype == torch.float32


class Overflowing(Net):
    """The gradients of the second batch are infinite."""

    batches = 0

    def forward(self, x: Tensor) -> Tensor:
        self.batches += self.training
        return super().forward(x) * (float("inf") if self.batches == 2 else 1.0)


@pytest.mark.filterwarnings("ignore:.*expected a number, got nan")
def test_step_that_overflows_is_left_out_counted_and_no_step_of_schedulers() -> None:
    rates: list[float] = []
    accelerator = SingleDevice("cpu", precision="fp16")

    class Watch(harness.Callback):
        def on_train_batch_end(self) -> None:
            rates.append(self.ctx.opt.param_groups[0]["lr"])

    schedule = LRScheduler(
        torch.optim.lr_scheduler.ExponentialLR,
        gamma=0.5,
        call_on="on_train_batch_after_step",
    )
    fitted = fit(Overflowing, accelerator, callbacks=[schedule, Watch()])
    assert (accelerator.steps, accelerator.overflows) == ({"opt": 9}, {"opt": 1})
    assert rates[:4] == [5e-4, 5e-4, 2.5e-4, 1.25e-4]
    assert all(param.isfinite().all() for param in fitted.model.parameters())


@pytest.mark.parametrize("stop", [2, 3])
def test_resume_continues_with_the_same_scale_and_open_window(
    stop: int, tmp_path: Any
) -> None:
    def accelerator() -> SingleDevice:
        return SingleDevice("cpu", accumulate=2, precision="fp16")

    whole = fit(accelerator=accelerator())
    saver = ModelCheckpoint(tmp_path)
    stopped = fit(
        accelerator=accelerator(), callbacks=[Stop("on_train_batch_end", stop), saver]
    )
    assert stopped.signum
    resume = harness.callbacks.ResumeFromCheckpoint(tmp_path)
    resumed = fit(accelerator=accelerator(), callbacks=[resume])
    for name, wanted in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], wanted), name
    # The open gradients of a window are those of scaled losses.
    if stop == 3:
        with pytest.raises(harness.CheckpointError, match="window"):
            fit(
                accelerator=SingleDevice("cpu", accumulate=2),
                callbacks=[harness.callbacks.ResumeFromCheckpoint(tmp_path)],
            )


def test_own_backward_must_scale_the_loss() -> None:
    def own(loss: Tensor) -> None:
        loss.backward()

    learner = harness.setup(
        Net, loss=nn.CrossEntropyLoss(), optimizer=torch.optim.Adam, backward=own
    )
    with pytest.raises(RuntimeError, match=r"expected a call .*got none in fp16"):
        learner.fit(
            data(), 1, accelerator=SingleDevice("cpu", precision="fp16"), tracker=False
        )


def test_scale_is_that_of_before_after_a_window_that_is_not_stepped() -> None:
    accelerator, net = SingleDevice("cpu", precision="fp16"), Net()
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    accelerator.prepare(net, {"opt": opt})
    x, y = data()

    def train(times: float = 1.0) -> None:
        with accelerator.optimizing():
            loss = nn.functional.cross_entropy(net(x), y)
        accelerator.backward(loss * times)

    train(times=float("inf"))
    # Clipping takes the scale out of the gradients, and finds that they overflow.
    assert not accelerator.clip(1e9).isfinite()
    accelerator.drop_window()
    train()
    assert net.head.bias.grad is not None
    assert net.head.bias.grad.norm() > 1000  # scaled again
    assert accelerator.step()
    assert accelerator.state_dict()["scalers"]["opt"]["_growth_tracker"] == 1


@pytest.mark.parametrize("precision", ["bf17", "16-mixed", 16, torch.float16])
def test_other_precision_is_refused(precision: Any) -> None:
    with pytest.raises(ValueError, match=r"accelerator\(precision\): expected one of"):
        harness.accelerator(device="cpu", precision=precision)


def test_precision_becomes_autocast_in_a_config() -> None:
    config = add_precision({"zero_optimization": {"stage": 1}}, "bf16")
    assert config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    assert name_precision(config) == "bf16"
    assert add_precision(config, None) is config
    auto = {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto", "loss_scale": 0}}
    assert add_precision(auto, "bf16").keys() == {"torch_autocast"}
    assert add_precision(auto, "fp32") == {}
    assert name_precision(add_precision({}, "fp32")) == "fp32"
    with pytest.raises(
        ValueError, match=r"accelerator\(precision\): .*'torch_autocast'"
    ):
        add_precision(config, "fp16")
