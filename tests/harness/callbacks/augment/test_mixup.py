from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

import harness
from harness.callbacks import CutMix, Mixup, MixupLoss
from harness.callbacks.augment.mixing import MixedTarget
from tests.harness.checkpoint.test_resume import check_exact
from tests.harness.exact import VALID, Case, TwoParts, X, Y, adam, loader
from tests.harness.fakes import At, Tape, line_learner, slope

OFF: dict[str, Any] = {"tracker": False, "verbose": False}


def learner(loss: Any = None, metrics: Any = None) -> harness.Learner:
    made = harness.setup(
        nn.Linear,
        loss=loss or nn.CrossEntropyLoss(),
        optimizer=torch.optim.SGD,
        metrics=metrics,
    )
    return made.set_hparams(in_features=4, out_features=3).set_opt_hparams(lr=0.1)


def fit(*callbacks: Any, loss: Any = None, metrics: Any = None, **options: Any):
    options = {"epochs": 2, "valid_data": VALID, "seed": 3} | OFF | options
    return learner(loss, metrics).fit((X, Y), callbacks=callbacks, **options)


def test_mixup_gives_what_a_plain_loop_gives():
    torch.manual_seed(3)
    model = nn.Linear(4, 3)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        for x, y in loader():
            other = torch.randperm(len(y))
            share = torch.distributions.Beta(0.4, 0.4).sample((len(y),))
            share = torch.stack([share, 1 - share]).amax(0)
            x = share[:, None] * x + (1 - share[:, None]) * x[other]
            losses = [
                nn.functional.cross_entropy(model(x), one, reduction="none")
                for one in (y, y[other])
            ]
            loss = (share * losses[0] + (1 - share) * losses[1]).mean()
            opt.zero_grad()
            loss.backward()
            opt.step()
    options = {"batch_size": 4, "shuffle": False, "drop_last": False}
    own = MixupLoss(nn.CrossEntropyLoss())
    for callback, given in ((Mixup(auto_loss=True), None), (Mixup(), own)):
        found = fit(callback, loss=given, valid_data=None, dataloader_options=options)
        torch.testing.assert_close(found.model.state_dict(), model.state_dict())


def test_loss_by_hand():
    inner = nn.MSELoss()
    loss = MixupLoss(inner)
    pred = torch.tensor([1.0, 3.0])
    mixed = MixedTarget(
        torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]), torch.tensor([0.75, 0.5])
    )
    # 0.75 * 1 + 0.25 * 0 and 0.5 * 4 + 0.5 * 9: mean of 0.75 and 6.5.
    assert loss(pred, mixed).item() == 3.625
    assert loss(pred, mixed.first).item() == 2.5
    assert inner.reduction == "mean"
    assert mixed.get_main().tolist() == [0.0, 1.0]
    pixels = MixupLoss(nn.MSELoss())(
        torch.zeros(2, 2),
        MixedTarget(torch.ones(2, 2), torch.zeros(2, 2), mixed.weight),
    )
    assert pixels.item() == 0.625


def test_mixup_mixes_validation_only_if_asked():
    seen: dict[str, list[bool]] = {}

    def note(ctx):
        mixed = isinstance(ctx.target, MixedTarget)
        seen.setdefault("train" if ctx.training else "valid", []).append(mixed)

    notes = [At(f"on_{split}_batch_after_loss", note) for split in ("train", "valid")]
    fit(Mixup(auto_loss=True), *notes)
    assert set(seen["train"]) == {True}
    assert set(seen["valid"]) == {False}
    seen.clear()
    fit(Mixup(auto_loss=True, run_valid=True), *notes)
    assert set(seen["valid"]) == {True}


def test_mixup_gives_metrics_the_target_with_the_larger_share():
    metrics = {"accuracy": MulticlassAccuracy(num_classes=3)}
    fitted = fit(Mixup(auto_loss=True), metrics=metrics)
    assert set(fitted.get_metrics()["metric"]) == {"loss", "accuracy"}
    plain = fit(metrics=metrics, epochs=1)
    assert plain.evaluate(VALID, verbose=False)["accuracy"] >= 0


def test_mixup_mixes_inputs_of_any_form_alike():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, a, b):
            torch.testing.assert_close(a * 2, b[0])
            return self.layer(a)

    data = [({"a": x, "b": [2 * x]}, y) for x, y in zip(X, Y, strict=True)]
    made = harness.setup(Two, loss=nn.CrossEntropyLoss(), optimizer=torch.optim.SGD)
    made.set_opt_hparams(lr=0.1).fit(
        torch.utils.data.DataLoader(data, batch_size=4),
        1,
        callbacks=[Mixup(auto_loss=True)],
        **OFF,
    )


def images(rows: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.arange(float(rows))
    return values[:, None, None, None].expand(rows, 2, 5, 7).clone(), values.long() % 3


def test_cutmix_puts_in_a_rectangle_and_counts_its_area():
    x, _ = images()
    torch.manual_seed(1)
    sizes = set()
    for _ in range(20):
        partners = torch.randperm(6)
        mixed, share = CutMix().mix(x, partners)
        assert torch.equal(x, images()[0])
        for row, partner in enumerate(partners.tolist()):
            own = (mixed[row] == row).float().mean().item()
            assert own == pytest.approx(1.0 if partner == row else share[row].item())
            foreign = (mixed[row, 0] == partner).nonzero()
            if partner != row and len(foreign):
                height, width = (foreign.amax(0) - foreign.amin(0) + 1).tolist()
                assert height * width == len(foreign)
        sizes.add(share[0].item())
    assert len(sizes) > 5
    assert all(0 <= size <= 1 for size in sizes)


def test_cutmix_trains():
    class Net(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Flatten(), nn.Linear(70, 3))

    made = harness.setup(
        Net,
        loss=MixupLoss(nn.CrossEntropyLoss()),
        optimizer=torch.optim.SGD,
        metrics={"accuracy": MulticlassAccuracy(num_classes=3)},
    ).set_opt_hparams(lr=0.01)
    fitted = made.fit(images(), 2, images(), callbacks=[CutMix()], **OFF)
    assert fitted.evaluate(images(), verbose=False)["loss"] > 0


CASES = {
    "two-optimizers": Case(
        learner=lambda: harness.setup(TwoParts, loss=MixupLoss(nn.CrossEntropyLoss())),
        accumulate=2,
        callbacks=lambda folder: [Mixup()],
    ),
    "metrics": Case(
        learner=adam, callbacks=lambda folder: [Mixup(run_valid=True, auto_loss=True)]
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_mixup_resumes_exactly(name, tmp_path):
    stops = [("on_train_batch_end", 5), ("on_valid_batch_end", 2)]
    check_exact(CASES[name], tmp_path, stops)


@pytest.mark.parametrize(
    ("callbacks", "match"),
    [
        ([Mixup()], "Mixup: expected a MixupLoss, got CrossEntropyLoss. Use setup"),
        ([CutMix()], "CutMix: expected a MixupLoss, got CrossEntropyLoss"),
        (
            [Mixup(auto_loss=True), CutMix(auto_loss=True)],
            "expected one callback that mixes rows, got Mixup and CutMix",
        ),
    ],
)
def test_mixup_that_cannot_work_is_refused_before_training(callbacks, match):
    tape = Tape()
    with pytest.raises(ValueError, match=match):
        fit(*callbacks, tape)
    assert tape.events == []


@pytest.mark.parametrize(
    ("callback", "data", "match"),
    [
        (
            Mixup,
            (X.long(), Y),
            "Mixup: expected floating-point inputs, got torch.int64",
        ),
        (CutMix, (X, Y), r"CutMix: expected images .* got shape \(22, 4\)"),
        (Mixup, X, "Mixup: expected a target with a row for each sample, got NoneType"),
    ],
)
def test_mixup_of_a_batch_that_cannot_be_mixed_is_refused_at_the_first(
    callback, data, match
):
    with pytest.raises((TypeError, ValueError), match=match):
        learner().fit(data, 1, callbacks=[callback(auto_loss=True)], **OFF)


def test_loss_that_reduces_its_rows_is_refused():
    made = line_learner(loss=nn.functional.mse_loss)
    with pytest.raises(ValueError, match=r"a loss for each of 4 rows, got shape \(\)"):
        made.fit(slope(4), 1, callbacks=[Mixup(auto_loss=True)], **OFF)

    class Own(nn.Module):
        pass

    with pytest.raises(TypeError, match="expected a loss with 'reduction', got Own"):
        MixupLoss(Own())


@pytest.mark.parametrize("alpha", [0, -1.0, "a"])
def test_mixup_alpha_is_checked(alpha):
    with pytest.raises((TypeError, ValueError), match=r"Mixup\(alpha\): expected"):
        Mixup(alpha)
