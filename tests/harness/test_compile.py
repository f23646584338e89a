"""``setup(compile=...)``: compiled fits give the numbers of plain ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MeanAbsoluteError

import harness
from tests.harness.exact import Stop


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        assert torch.compiler.is_compiling() == self.is_compiled
        pred: Tensor = self.head(self.drop(self.norm(self.body(x)).relu()))
        return pred

    is_compiled = False


class Compiled(Net):
    is_compiled = True


class Two(Compiled):
    """A loss for each of two optimizers."""

    def set_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {
            "body": torch.optim.Adam(self.body.parameters()),
            "head": torch.optim.Adam(self.head.parameters()),
        }


X = torch.linspace(-1, 1, 60).reshape(20, 3)
DATA = (X, X.sum(dim=1, keepdim=True))


def fit(module: Any, compile: object = False, **options: Any) -> harness.Fitted:
    own = {} if hasattr(module, "set_optimizers") else {"optimizer": torch.optim.Adam}
    metrics = {"mean": mean, "error": MeanAbsoluteError()}
    learner = harness.setup(
        module, loss=nn.MSELoss(), metrics=metrics, compile=compile, **own
    )
    given = {"valid_data": 0.25, "seed": 4, "tracker": False} | options
    return learner.fit(DATA, 3, dataloader_options={"batch_size": 5}, **given)


def mean(pred: Tensor, target: Tensor) -> Tensor:
    return pred.mean()


def test_compiled_fit_equals_the_plain_one_and_gives_a_plain_model() -> None:
    plain, compiled = fit(Net), fit(Compiled, {"backend": "eager"})
    weights = compiled.model.state_dict()
    assert list(weights) == list(plain.model.state_dict())
    for name, wanted in plain.model.state_dict().items():
        assert torch.equal(weights[name], wanted), name
    assert compiled.get_metrics().equals(plain.get_metrics())
    with pytest.raises(AssertionError):  # which ``Compiled`` raises if it is not
        compiled.predict(X)


def test_compiled_fit_resumes_exactly(tmp_path: Any) -> None:
    callbacks = harness.callbacks
    eager = {"backend": "eager"}
    stop = Stop("on_train_batch_end", 4)
    fit(Compiled, eager, callbacks=[stop, callbacks.ModelCheckpoint(tmp_path)])
    resume = callbacks.ResumeFromCheckpoint(tmp_path)
    resumed, whole = fit(Compiled, eager, callbacks=[resume]), fit(Compiled, eager)
    for name, wanted in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], wanted), name


# These imports take a second, which the workers that run other tests need not wait for.


def make_counter() -> Any:
    """A backend that counts what it compiles."""
    from torch._dynamo.testing import CompileCounter  # noqa: PLC0415

    return CompileCounter()


def boxed(run: Any) -> Any:
    """Let a function take its inputs as one list."""
    from functorch.compile import (  # type: ignore[import-untyped]  # noqa: PLC0415
        make_boxed_func,
    )

    return make_boxed_func(run)


def test_several_optimizers_compile_once_for_each() -> None:
    counter = make_counter()
    torch._dynamo.reset()
    fit(Two, {"backend": counter})
    # Each freezes the other's parameters; validation has no gradients.
    # torch before 2.13 counts the two as one.
    assert 2 <= counter.frame_count <= 3


def test_compiled_forward_under_autocast_compiles_once() -> None:
    counter = make_counter()
    torch._dynamo.reset()
    accelerator = harness.accelerator(device="cpu", precision="bf16")
    fit(Compiled, {"backend": counter}, accelerator=accelerator)
    assert counter.frame_count == 2  # with gradients and without
    plain = fit(Net, accelerator=harness.accelerator(device="cpu", precision="bf16"))
    eager = {"backend": "eager"}
    accelerator = harness.accelerator(device="cpu", precision="bf16")
    compiled = fit(Compiled, eager, accelerator=accelerator)
    for name, wanted in plain.model.state_dict().items():
        assert torch.equal(compiled.model.state_dict()[name], wanted), name


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (3, "expected True, False or a dict, got 3"),
        ("max-autotune", "expected True, False or a dict, got 'max-autotune'"),
        ({"moed": "default"}, "got 'moed'. Did you mean 'mode'"),
        ({"backend": "inducter"}, "got 'inducter'. Did you mean 'inductor'"),
    ],
)
def test_what_is_no_option_is_refused(options: Any, match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        harness.setup(
            Net, loss=nn.MSELoss(), optimizer=torch.optim.Adam, compile=options
        )


def as_it_is(graph: Any, inputs: list[Tensor]) -> Any:
    """Run a graph by Python."""
    return boxed(graph.forward)


def reusing_outputs(graph: Any, inputs: list[Tensor]) -> Any:
    """Write the outputs of each call where those of the last one were, as CUDA graphs do."""
    kept: list[Tensor] = []

    def run(*args: Any) -> list[Any]:
        found = list(graph(*args))
        tensors = [item for item in found if isinstance(item, Tensor)]
        if [t.shape for t in kept] != [t.shape for t in tensors]:
            kept[:] = [t.clone() for t in tensors]
        with torch.no_grad():
            for old, new in zip(kept, tensors, strict=True):
                old.copy_(new)
        places = iter(kept)
        return [next(places) if isinstance(item, Tensor) else item for item in found]

    return boxed(run)


def without_dropout(module: type[Net]) -> Net:
    """A model that draws no numbers, whose compiled order may differ."""
    model = module()
    model.drop.p = 0.0
    return model


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is:DeprecationWarning")
def test_outputs_that_the_next_call_overwrites_are_kept_by_value() -> None:
    from torch._dynamo.backends.common import aot_autograd  # noqa: PLC0415

    last: list[Tensor] = []

    class Keep(harness.Callback):
        def on_valid_batch_end(self) -> None:
            last.append(self.ctx.pred)

    backend = aot_autograd(fw_compiler=reusing_outputs, bw_compiler=as_it_is)
    plain = fit(lambda: without_dropout(Net))
    compiled = fit(
        lambda: without_dropout(Compiled), {"backend": backend}, callbacks=[Keep()]
    )
    assert torch.equal(last[0], last[1])  # it does overwrite
    torch.testing.assert_close(
        compiled.get_metrics()["value"].tolist(), plain.get_metrics()["value"].tolist()
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is:DeprecationWarning")
def test_compiled_by_inductor_is_near_the_plain_one() -> None:
    plain = fit(lambda: without_dropout(Net))
    compiled = fit(lambda: without_dropout(Compiled), True)
    # Weights that do not matter, such as a bias before BatchNorm, follow rounding errors.
    for table in (plain, compiled):
        assert len(table.get_metrics()) == 18
    wanted, found = (one.get_metrics()["value"] for one in (plain, compiled))
    torch.testing.assert_close(
        torch.tensor(found), torch.tensor(wanted), rtol=0.02, atol=1e-3
    )
