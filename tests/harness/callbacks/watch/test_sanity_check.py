from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import harness
from harness.callbacks import SanityCheck
from tests.harness.checkpoint.test_resume import check_exact
from tests.harness.exact import (
    VALID,
    Augmented,
    Case,
    OwnStep,
    TwoParts,
    adam,
    differences,
    fit,
    loader,
    sgd,
)
from tests.harness.fakes import At, Tape, line_learner, slope

OFF: dict[str, Any] = {"tracker": False, "verbose": False}


class CountsCalls(OwnStep):
    """Counts in a buffer and logs in validation too."""

    def step(self) -> None:
        self.count.add_(0 if self.ctx.training else 3)
        self.ctx.log_metric("calls", float(self.count))
        super().step()


CASES = {
    "metrics": Case(learner=adam),
    "two-optimizers": Case(
        learner=lambda: harness.setup(TwoParts, loss=nn.CrossEntropyLoss()),
        accumulate=2,
    ),
    "own-step": Case(learner=lambda: sgd(CountsCalls)),
    "random-valid": Case(
        data=lambda: loader(shuffle=True),
        valid=loader(Augmented(), shuffle=True),
        options=None,
    ),
}
FIELDS = ("learner", "data", "valid", "accumulate", "options")


@pytest.mark.parametrize("name", CASES)
def test_sanity_check_leaves_nothing_behind(name, tmp_path):
    case, events = CASES[name], list[str]()
    note = [
        At(event, lambda ctx, event=event: events.append(event), weight=-2000)
        for event in ("on_fit_begin", "on_valid_batch_end", "on_epoch_begin")
    ]
    plain = fit(case, tmp_path / "plain")
    checked = Case(
        **{f: getattr(case, f) for f in FIELDS},
        callbacks=lambda folder: [SanityCheck(), *note],
    )
    assert differences(fit(checked, tmp_path / "checked"), plain) == []
    assert events[:2] == ["on_fit_begin", "on_epoch_begin"]


def test_sanity_check_resumes_exactly(tmp_path):
    case = Case(learner=adam, callbacks=lambda folder: [SanityCheck()])
    check_exact(case, tmp_path, [("on_train_batch_end", 5)])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"metrics": {"bad": lambda pred, target: pred.nothing}}, "nothing"),
        ({"loss": lambda pred, target: pred + target[:1, None, None]}, "one element"),
    ],
)
def test_sanity_check_shows_a_mistake_before_the_first_epoch(options, match):
    tape = Tape()
    metrics = options.pop("metrics", None)
    given = {"metrics": harness.MetricSet(valid=metrics)} if metrics else options
    with pytest.raises((AttributeError, ValueError), match=match) as info:
        line_learner(**given).fit(
            slope(4), 1, slope(4), callbacks=[SanityCheck(), tape], **OFF
        )
    assert "in SanityCheck, before the first epoch" in info.value.__notes__
    assert tape.events == ["on_fit_begin", "on_exception"]


def test_sanity_check_looks_at_as_many_batches_as_told():
    seen = []

    class Looks(nn.Linear):
        def forward(self, x):
            seen.append((len(x), self.training))
            return super().forward(x)

    learner = harness.setup(Looks, loss=nn.MSELoss(), optimizer=torch.optim.SGD)
    learner = learner.set_hparams(in_features=1, out_features=1)
    data = torch.ones(8, 1), torch.ones(8, 1)
    stop = At("on_epoch_begin", lambda ctx: seen.append("epoch"))
    learner.set_opt_hparams(lr=0.1).fit(
        data,
        1,
        data,
        callbacks=[SanityCheck(3), stop],
        dataloader_options={"batch_size": 2},
        **OFF,
    )
    assert seen[:4] == [(2, False)] * 3 + ["epoch"]


def workers() -> Any:
    return loader(num_workers=1, persistent_workers=True)


@pytest.mark.parametrize(
    ("module", "valid", "match"),
    [
        (nn.Linear, None, "SanityCheck: expected validation data, got none"),
        (
            nn.Linear,
            workers(),
            "expected a validation loader without persistent_workers",
        ),
        (lambda *_: nn.LazyLinear(3), VALID, "expected a model with shapes, got lazy"),
    ],
)
def test_sanity_check_that_cannot_work_is_refused(module, valid, match):
    def build() -> nn.Module:
        return module(4, 3)

    learner = harness.setup(
        build, loss=nn.CrossEntropyLoss(), optimizer=torch.optim.SGD
    )
    with pytest.raises(ValueError, match=match):
        learner.set_opt_hparams(lr=0.1).fit(
            loader(), 1, valid, callbacks=[SanityCheck()], **OFF
        )
