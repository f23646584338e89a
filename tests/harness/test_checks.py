"""Mistakes of a caller raise an error before any epoch runs, and leave nothing behind."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics import MeanMetric

import harness
import tracking
from harness import callbacks
from harness.callbacks import EarlyStopping

X, Y = torch.randn(40, 3), torch.randn(40, 1)
LOADER = DataLoader(TensorDataset(X, Y), batch_size=8)


class Net(nn.Module):
    def __init__(self, width: int = 1) -> None:
        super().__init__()
        self.layer = nn.Linear(3, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class Seen(harness.Callback):
    """Tells whether an epoch began."""

    def __init__(self) -> None:
        self.epochs = 0

    def on_epoch_begin(self) -> None:
        self.epochs += 1


class Stream(IterableDataset):
    def __iter__(self):
        return iter(TensorDataset(X, Y))


def learner(**options):
    options = {"loss": nn.MSELoss(), "optimizer": torch.optim.SGD} | options
    return harness.setup(Net, **options).set_opt_hparams(lr=0.1)


SETUPS = {
    "no loss": (ValueError, "expected a loss", {"loss": None}),
    "no optimizer": (ValueError, "expected an optimizer", {"optimizer": None}),
    "optimizer instance": (
        TypeError,
        "expected a class, got an instance of SGD",
        {"optimizer": torch.optim.SGD(Net().parameters())},
    ),
    "loss class": (TypeError, "Write MSELoss", {"loss": nn.MSELoss}),
    "metric class": (TypeError, "got the class MeanMetric", {"metrics": [MeanMetric]}),
    "average as a metric": (
        TypeError,
        r"metrics\['loss2'\]: expected a metric of pred and target, got MeanMetric",
        {"metrics": {"loss2": MeanMetric()}},
    ),
    "no metric": (TypeError, "expected a metric, got 'acc'", {"metrics": ["acc"]}),
    "name of a metric": (TypeError, "names of metrics, got 3", {"metrics": {3: max}}),
    "metric named loss": (ValueError, "'loss' is taken", {"metrics": {"loss": max}}),
}


@pytest.mark.parametrize("case", SETUPS)
def test_setup_wrong_argument_is_told(case):
    kind, match, options = SETUPS[case]
    with pytest.raises(kind, match=match):
        learner(**options)


def test_setup_model_instance_is_told():
    with pytest.raises(TypeError, match="got an instance of Net"):
        harness.setup(Net(), loss=nn.MSELoss(), optimizer=torch.optim.SGD)


def test_setup_factory_of_something_else_is_told_by_fit():
    made = harness.setup(dict, loss=nn.MSELoss(), optimizer=torch.optim.SGD)
    with pytest.raises(TypeError, match=r"to return an nn\.Module, got {}"):
        made.fit((X, Y), 1, tracker=False)


def test_fit_without_any_gradient_is_told():
    with (
        torch.inference_mode(),
        pytest.raises(RuntimeError, match=r"got a call in torch.inference_mode\(\)"),
    ):
        learner().fit((X, Y), 1, tracker=False)


FITS = {
    "epochs zero": (ValueError, "at least 1 epoch", {"epochs": 0}),
    "epochs negative": (ValueError, "at least 1 epoch", {"epochs": -3}),
    "epochs float": (TypeError, "a whole number, got 2.5", {"epochs": 2.5}),
    "min over max": (ValueError, "min_epochs <= max_epochs", {"epochs": (5, 2)}),
    "fraction 0": (ValueError, r"a fraction in \(0, 1\), got 0", {"valid_data": 0}),
    "fraction 1": (ValueError, r"a fraction in \(0, 1\)", {"valid_data": 1.0}),
    "fraction 1.5": (ValueError, r"a fraction in \(0, 1\)", {"valid_data": 1.5}),
    "fraction of a loader": (
        ValueError,
        "got a DataLoader",
        {"data": LOADER, "valid_data": 0.2},
    ),
    "fraction of a stream": (
        ValueError,
        "got a IterableDataset",
        {"data": Stream(), "valid_data": 0.2},
    ),
    "empty data": (ValueError, "at least one row", {"data": (X[:0], Y[:0])}),
    "lengths": (ValueError, r"lengths \[40, 39\]", {"data": (X, Y[:39])}),
    "no data": (TypeError, r"data: expected a tensor", {"data": "digits"}),
    "option": (
        ValueError,
        r"got 'batchsize'\. Did you mean 'batch_size'",
        {"dataloader_options": {"batchsize": 4}},
    ),
    "options of a loader": (
        ValueError,
        "expected none with a DataLoader",
        {"data": LOADER, "dataloader_options": {"batch_size": 4}},
    ),
    "no batch": (
        ValueError,
        "at least one batch",
        {"dataloader_options": {"batch_size": 64, "drop_last": True}},
    ),
    "callback class": (
        TypeError,
        r"got the class EarlyStopping\. Write EarlyStopping",
        {"callbacks": [EarlyStopping]},
    ),
    "no callback": (TypeError, r"expected a harness\.Callback", {"callbacks": [3]}),
    "tracker": (TypeError, "expected None, False, a dict or a Run", {"tracker": 5}),
    "no steps": (
        ValueError,
        r"max_steps\): expected at least 1, got 0",
        {"max_steps": 0},
    ),
    "steps": (TypeError, r"max_steps\): expected a whole number", {"max_steps": 1.5}),
    "every half": (
        TypeError,
        r"expected a number of steps or epochs, got 0.5. Write '500 steps'",
        {"valid_data": (X, Y), "valid_every": 0.5},
    ),
    "every word": (
        ValueError,
        "expected a number of steps or epochs, got '5 batches'",
        {"valid_data": (X, Y), "valid_every": "5 batches"},
    ),
    "every zero": (
        ValueError,
        "number of steps or epochs, got '0 steps'",
        {"valid_data": (X, Y), "valid_every": "0 steps"},
    ),
    "every of nothing": (
        ValueError,
        "expected validation data, got none for 2",
        {"valid_every": 2},
    ),
    "every past the end": (
        ValueError,
        "at most the 1 epoch of this fit, got 500. For steps write '500 steps'",
        {"valid_data": (X, Y), "valid_every": 500},
    ),
    "every past the steps": (
        ValueError,
        "at most the 5 steps of this fit, got '6 steps'",
        {"valid_data": (X, Y), "valid_every": "6 steps", "max_steps": 5},
    ),
    "limit of no set": (
        ValueError,
        "expected sets of this fit, got 'valid'",
        {"valid_data": None, "limit_batches": {"valid": 3}},
    ),
    "limit zero": (ValueError, "at least 1 batch", {"limit_batches": 0}),
    "limit 1.5": (ValueError, "a fraction of them, got 1.5", {"limit_batches": 1.5}),
    "limit word": (TypeError, "a number of batches, got 'x'", {"limit_batches": "x"}),
    "limit of a set": (
        ValueError,
        r"sets of this fit, got 'tain'. Did you mean 'train'",
        {"limit_batches": {"tain": 3}},
    ),
    "share of a stream": (
        ValueError,
        "train data without a length, got 0.5",
        {"data": Stream(), "limit_batches": 0.5},
    ),
}


@pytest.mark.parametrize("case", FITS)
def test_fit_wrong_argument_is_told_before_any_epoch(case, tmp_path):
    kind, match, options = FITS[case]
    seen = Seen()
    options = {
        "data": (X, Y),
        "epochs": 1,
        "tracker": {"runs_dir": tmp_path / "runs", "delivery": False},
    } | options
    options["callbacks"] = [seen, *options.get("callbacks", [])]
    with pytest.raises(kind, match=match):
        learner().fit(options.pop("data"), **options)
    assert seen.epochs == 0
    assert not (tmp_path / "runs").exists()


class Optimizers(Net):
    def set_optimizers(self, kind="list", lr=0.1):
        one = torch.optim.SGD(self.parameters(), lr=lr)
        alike = SimpleNamespace(param_groups=one.param_groups, step=one.step)
        made = {"list": [one, one], "none": {}, "other": {"a": 3}, "alike": alike}
        return made[kind]


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("list", "expected a dict of named optimizers, got a list"),
        ("none", "at least one optimizer"),
        ("other", "expected a torch optimizer at 'a', got 3"),
        ("alike", "got SimpleNamespace without state, zero_grad, state_dict, load"),
    ],
)
def test_fit_wrong_optimizers_are_told(kind, match):
    made = harness.setup(Optimizers, loss=nn.MSELoss()).set_opt_hparams(kind=kind)
    with pytest.raises(TypeError, match=match):
        made.fit((X, Y), 1, tracker=False)


def test_fit_options_for_a_valid_loader_warn():
    with pytest.warns(UserWarning, match="valid_data is a DataLoader"):
        learner().fit(
            (X, Y),
            1,
            LOADER,
            dataloader_options={"batch_size": 4},
            tracker=False,
            verbose=False,
        )


def test_callback_unknown_event_is_told_when_defined():
    with pytest.raises(
        ValueError, match=r"'on_epoch_ends'\. Did you mean 'on_epoch_end'"
    ):
        type("Bad", (harness.Callback,), {"on_epoch_ends": lambda self: None})


class Logs(harness.Callback):
    def __init__(self, value: object) -> None:
        self.value = value

    def on_train_begin(self) -> None:
        self.ctx.log("notes", "train", self.value)


@pytest.mark.parametrize("tracked", [True, False])
def test_log_unloggable_value_names_its_path(tracked, tmp_path):
    tracker = {"runs_dir": tmp_path, "delivery": False} if tracked else False
    with pytest.raises(TypeError, match=r"value\['a'\]\['b'\]"):
        learner().fit(
            (X, Y), 1, callbacks=[Logs({"a": {"b": object()}})], tracker=tracker
        )


def test_fit_runs_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("here first")
    seen = Seen()
    with pytest.raises(OSError, match="file"):
        learner().fit(
            (X, Y),
            1,
            callbacks=[seen],
            tracker={"runs_dir": tmp_path / "file" / "runs", "delivery": False},
        )
    assert seen.epochs == 0


def test_export_unknown_run_is_told(tmp_path):
    with pytest.raises(tracking.RunNotFoundError, match="nowhere"):
        tracking.export("nowhere", tmp_path / "x.parquet")
    assert not (tmp_path / "x.parquet").exists()


def test_early_stopping_unknown_monitor_lists_what_was_logged():
    with pytest.raises(ValueError, match="Logged so far: train/loss") as caught:
        learner().fit(
            (X, Y),
            2,
            callbacks=[EarlyStopping("valid/acc", mode="max"), Seen()],  # it may log it
            tracker=False,
            verbose=False,
        )
    assert "EarlyStopping.on_epoch_end, epoch 1" in caught.value.__notes__[0]


def test_error_of_the_model_keeps_its_type_and_gains_a_note(tmp_path):
    wrong = torch.randn(40, 4)
    with pytest.raises(RuntimeError, match="mat1 and mat2") as caught:
        learner().fit(
            (wrong, Y),
            1,
            tracker={"runs_dir": tmp_path, "delivery": False},
            verbose=False,
        )
    assert "epoch 1, iter 1, training" in caught.value.__notes__[0]
    assert tracking.list_runs(tmp_path)[0].status == "failed"
    assert Path(tmp_path).is_dir()


# --- names in a model that mean something else


class OwnCtx(Net):
    def __init__(self) -> None:
        super().__init__()
        self.ctx = 128


class CtxSubmodule(Net):
    def __init__(self) -> None:
        super().__init__()
        self.ctx = nn.Linear(3, 3)


class CtxPlaceholder(Net):
    def __init__(self) -> None:
        super().__init__()
        self.ctx = None


class CtxProperty(Net):
    @property
    def ctx(self) -> int:
        return 3


class StepBuffer(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("step", torch.tensor(0))


class StepNumber(Net):
    step = 0


class PredictSubmodule(Net):
    def __init__(self) -> None:
        super().__init__()
        self.predict = nn.Linear(3, 1)


class BackwardParameter(Net):
    def __init__(self) -> None:
        super().__init__()
        self.backward = nn.Parameter(torch.zeros(1))


class OptimizersList(Net):
    def __init__(self) -> None:
        super().__init__()
        self.set_optimizers = [torch.optim.SGD]


class LossHistory(Net):
    def __init__(self) -> None:
        super().__init__()
        self.loss: list[float] = []


class LossContainer(Net):
    def __init__(self) -> None:
        super().__init__()
        self.loss = nn.ModuleDict()


class LossClass(Net):
    loss = nn.MSELoss


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (OwnCtx, "ctx"),
        (CtxSubmodule, "ctx"),
        (CtxPlaceholder, "ctx"),
        (CtxProperty, "ctx"),
        (StepBuffer, "step"),
        (StepNumber, "step"),
        (PredictSubmodule, "predict"),
        (BackwardParameter, "backward"),
        (OptimizersList, "set_optimizers"),
        (LossHistory, "loss"),
        (LossContainer, "loss"),
        (LossClass, "loss"),
    ],
)
def test_name_in_a_model_that_means_something_else_is_refused(model, name):
    seen = Seen()
    with pytest.raises(TypeError, match=rf"{model.__name__}\.{name}: .*Rename it"):
        harness.setup(model, loss=nn.MSELoss(), optimizer=torch.optim.SGD).fit(
            (X, Y), 1, callbacks=[seen], tracker=False, verbose=False
        )
    assert seen.epochs == 0


class LossModule(Net):
    def __init__(self) -> None:
        super().__init__()
        self.loss = nn.L1Loss()


class LossFunction(Net):
    def __init__(self) -> None:
        super().__init__()
        self.loss = nn.functional.l1_loss


class LossStatic(Net):
    ctx = None
    loss = staticmethod(nn.functional.l1_loss)


class LossOfClass(Net):
    step = None
    loss = nn.L1Loss()


@pytest.mark.parametrize("model", [LossModule, LossFunction, LossStatic, LossOfClass])
def test_loss_of_the_model_may_be_a_module_or_function(model):
    learner = harness.setup(model, optimizer=torch.optim.SGD).set_opt_hparams(lr=0)
    fitted = learner.fit(
        (X, Y), 1, dataloader_options={"shuffle": False}, tracker=False, verbose=False
    )
    with torch.no_grad():  # the short last batch is dropped
        expected = nn.functional.l1_loss(fitted.model(X[:32]), Y[:32])
    assert fitted.records["metrics"]["train"][0]["loss"] == pytest.approx(
        expected.item()
    )


def test_binding_a_model_leaves_its_own_ctx():
    ctx = harness.Context()
    model = OwnCtx()
    with pytest.raises(TypeError, match=r"OwnCtx\.ctx"):
        ctx.model = model
    assert model.ctx == 128


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"backward": 3}, r"setup\(backward\): expected a function of the loss, got 3"),
        ({"loss": "mse"}, r"setup\(loss\): expected a function or module, got 'mse'"),
    ],
)
def test_setup_refuses_what_cannot_be_called(options, match):
    options = {"loss": nn.MSELoss(), "optimizer": torch.optim.SGD} | options
    with pytest.raises(TypeError, match=match):
        harness.setup(Net, **options)


@pytest.mark.parametrize(("epochs", "got"), [(0, "0"), (-1, "-1")])
def test_epochs_below_one_are_told_as_given(epochs, got):
    with pytest.raises(ValueError, match=rf"at least 1 epoch, got {got}\."):
        learner().fit((X, Y), epochs, tracker=False, verbose=False)


@pytest.mark.parametrize("kind", [torch.optim.Adagrad, None])
def test_optimizer_that_needs_the_sizes_of_lazy_layers_is_refused(kind):
    class Lazy(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(2, 2), nn.LazyLinear(1))

        def set_optimizers(self, lr):
            return torch.optim.Adagrad(self.parameters(), lr)

    learner = harness.setup(Lazy, loss=nn.MSELoss(), optimizer=kind)
    with pytest.raises(ValueError, match=r"got lazy layers \['1.weight', '1.bias'\]"):
        learner.set_opt_hparams(lr=0.1).fit(torch.ones(4, 2), 1, tracker=False)


def test_other_errors_of_an_optimizer_are_its_own():
    learner = harness.setup(Net, loss=nn.MSELoss(), optimizer=torch.optim.SGD)
    with pytest.raises(ValueError, match="Invalid learning rate"):
        learner.set_opt_hparams(lr=-1.0).fit((X, Y), 1, tracker=False)


# --- what is told in words of our own


class AddsTo:
    def __call__(self, pred: torch.Tensor) -> torch.Tensor:
        return pred.mean()


class StepWithBatch(Net):
    def step(self, batch):
        return None


class PredictNothing(Net):
    def predict(self):
        return None


class LossOfOne(Net):
    def loss(self, pred):
        return pred.mean()


CALLS = {
    "loss of one": ({"loss": lambda pred: pred.mean()}, r"setup\(loss\): .*f\(pred, t"),
    "loss object": ({"loss": AddsTo()}, r"setup\(loss\): .*got AddsTo\(pred"),
    "loss of three": ({"loss": nn.TripletMarginLoss()}, "got TripletMarginLoss"),
    "metric": ({"metrics": {"m": lambda pred: 0.0}}, r"metrics\['m'\]: .*f\(pred, t"),
    "backward": ({"backward": lambda: None}, r"setup\(backward\): .*f\(loss\)"),
    "step": ({"module": StepWithBatch}, r"StepWithBatch.step: .*as f\(\), got step\(b"),
    "predict": ({"module": PredictNothing}, r"PredictNothing.predict: .*f\(input\)"),
    "own loss": ({"module": LossOfOne, "loss": None}, "LossOfOne.loss: "),
}


@pytest.mark.parametrize("case", CALLS)
def test_functions_that_take_other_arguments_are_told_before_any_epoch(case):
    options, match = CALLS[case]
    seen = Seen()
    with pytest.raises(TypeError, match=match):
        harness.setup(
            **(
                {"module": Net, "loss": nn.MSELoss(), "optimizer": torch.optim.SGD}
                | options
            )
        ).set_opt_hparams(lr=0.1).fit(
            (X, Y), 1, callbacks=[seen], tracker=False, verbose=False
        )
    assert seen.epochs == 0


def test_own_step_may_call_the_loss_as_it_likes():
    class Triplet(Net):
        def step(self):
            x = self(self.ctx.input)
            return self.ctx.loss_fn(x, x + 1, x - 1)

    made = harness.setup(
        Triplet, loss=nn.TripletMarginLoss(), optimizer=torch.optim.SGD
    ).set_opt_hparams(lr=0.1)
    # The distances to both are the same, so the loss is the margin.
    found = made.fit((X, Y), 1, tracker=False, verbose=False).records
    assert found["metrics"]["train"][0]["loss"] == pytest.approx(1.0, abs=1e-5)


HPARAMS = {
    "optimizer": ({"learning_rate": 1}, {}, r"got 'learning_rate'\. Did you mean 'lr'"),
    "optimizer decay": ({"wd": 1}, {}, r"argument of SGD, .*mean 'weight_decay'"),
    "model": ({}, {"widht": 2}, r"set_hparams: .* Net, got 'widht'\. .* 'width'\?"),
}


@pytest.mark.parametrize("case", HPARAMS)
def test_hparam_that_nothing_takes_names_the_nearest(case):
    opt_hparams, hparams, match = HPARAMS[case]
    made = learner().set_opt_hparams(**opt_hparams).set_hparams(**hparams)
    with pytest.raises(TypeError, match=match):
        made.fit((X, Y), 1, tracker=False, verbose=False)


def test_hparam_of_set_optimizers_names_the_nearest():
    made = harness.setup(Optimizers, loss=nn.MSELoss()).set_opt_hparams(kid="list")
    with pytest.raises(TypeError, match=r"set_optimizers, got 'kid'\. .*'kind'"):
        made.fit((X, Y), 1, tracker=False)


def collate_nothing(rows):
    return None


def fit_of_batches(batches, **options):
    made = learner(**options)
    made.fit(DataLoader(batches, batch_size=None), 1, tracker=False, verbose=False)


class Batches(IterableDataset):
    def __init__(self, *batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


WITHOUT = "a target, got a batch without one"
FIRST_BATCHES = {
    "none": (Batches(None), {}, "Net.forward: expected an input, got None"),
    "later none": (Batches((X, Y), None), {}, "Net.forward: expected an input"),
    "pair of none": (Batches((None, None)), {}, "Net.forward: expected an input"),
    "lone tensor": (Batches(X), {}, f"loss: expected {WITHOUT}"),
    "target none": (Batches((X, None)), {}, f"loss: expected {WITHOUT}"),
    "lone tensor of a function": (
        Batches(X),
        {"loss": lambda pred, target: (pred - target).mean()},
        f"loss: expected {WITHOUT}",
    ),
    "cross entropy": (
        Batches(X),
        {"loss": nn.CrossEntropyLoss()},
        f"loss: expected {WITHOUT}",
    ),
    "metric": (
        Batches(X),
        {
            "loss": lambda pred, target: pred.mean(),
            "metrics": {"mae": lambda pred, target: (pred - target).mean()},
        },
        f"metric 'mae': expected {WITHOUT}",
    ),
    "complex loss": (
        Batches((X, Y)),
        {"loss": lambda pred, target: pred.mean() * 1j},
        r"loss: expected a real number, got torch\.complex64",
    ),
    "no loss": (
        Batches((X, Y)),
        {"loss": lambda pred, target: None},
        "got None. Return the mean over the batch",
    ),
}


@pytest.mark.parametrize("case", FIRST_BATCHES)
def test_batch_or_loss_of_a_wrong_kind_is_told(case):
    batches, options, match = FIRST_BATCHES[case]
    with pytest.raises(TypeError, match=match) as caught:
        fit_of_batches(batches, **options)
    assert "epoch 1, iter" in caught.value.__notes__[0]


def test_target_that_is_missing_in_predict_and_evaluate():
    fitted = learner().fit((X, Y), 1, tracker=False, verbose=False)
    assert fitted.predict(X).shape == (40, 1)
    with pytest.raises(TypeError, match=WITHOUT):
        fitted.evaluate(X)
    with pytest.raises(TypeError, match=r"Net.forward: expected an input, got None"):
        fitted.predict(DataLoader(TensorDataset(X, Y), 8, collate_fn=collate_nothing))


class Broken(Net):
    def loss(self, pred, target):
        raise RuntimeError("of the user")


def test_error_of_a_loss_without_a_target_stays_the_users():
    made = harness.setup(Broken, optimizer=torch.optim.SGD).set_opt_hparams(lr=0.1)
    with pytest.raises(RuntimeError, match="of the user"):
        made.fit(X, 1, tracker=False, verbose=False)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("log_figure", r"The run has it: ctx\.run\.log_figure"),
        ("epocs", r"Did you mean 'epoch'"),
    ],
)
def test_field_that_the_context_does_not_have_is_told(name, match):
    class Reads(harness.Callback):
        def on_epoch_end(self):
            getattr(self.ctx, name)

    with pytest.raises(AttributeError, match=match):
        learner().fit((X, Y), 1, callbacks=[Reads()], tracker=False, verbose=False)


OneCycle, Schedule = torch.optim.lr_scheduler.OneCycleLR, harness.callbacks.LRScheduler


@pytest.mark.parametrize(
    ("call_on", "accumulate", "needed"),
    [  # 5 batches of 8, 2 epochs
        ("on_train_batch_after_step", 1, 10),
        ("on_train_batch_after_step", 2, 6),
        ("on_train_batch_after_step", 4, 4),
        ("on_train_batch_end", 4, 10),
        ("on_epoch_end", 1, 2),
    ],
)
def test_schedule_one_step_too_short_is_told(call_on, accumulate, needed):
    def fit(total):
        seen = Seen()
        schedule = Schedule(OneCycle, call_on=call_on, max_lr=0.1, total_steps=total)
        learner().fit(
            (X, Y),
            2,
            callbacks=[seen, schedule],
            accelerator=harness.accelerator(accumulate=accumulate, device="cpu"),
            dataloader_options={"batch_size": 8},
            tracker=False,
            verbose=False,
        )
        return seen

    with warnings.catch_warnings():  # torch: an accumulating optimizer steps later
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        fit(needed)
        with pytest.raises(
            ValueError, match=f"at least {needed} steps for this fit, got {needed - 1}"
        ):
            fit(needed - 1)


def test_schedule_option_that_it_does_not_take_is_told():
    with pytest.raises(TypeError, match=r"LRScheduler.*got 'Tmax'\. Did you mean 'T_m"):
        Schedule(torch.optim.lr_scheduler.CosineAnnealingLR, Tmax=3)


# --- names that a forward takes


class StoresAll(Net):
    """Keeps values of a forward under names that ``harness`` uses."""

    def forward(self, x):
        out = super().forward(x)
        self.ctx = "mine"
        self.predict = self.loss = self.backward = out.detach()
        self.step = 7
        self.set_optimizers = [1]
        return out


class StoresOverMethods(Net):
    """Hides methods that it has."""

    def forward(self, x):
        out = super().forward(x)
        vars(self).update(step=out.detach(), predict=out.detach())
        return out

    def step(self):
        return nn.functional.mse_loss(self(self.ctx.input), self.ctx.target)

    def predict(self, x):
        return self.layer(x) * 0 + 5


@pytest.mark.parametrize("model", [StoresAll, StoresOverMethods])
def test_names_that_a_forward_takes_stay_the_models_own(model):
    def fit(module):
        made = harness.setup(module, loss=nn.MSELoss(), optimizer=torch.optim.SGD)
        return made.set_opt_hparams(lr=0.1).fit(
            (X, Y), 3, (X, Y), seed=1, tracker=False, verbose=False
        )

    plain, fitted = fit(Net), fit(model)
    assert torch.equal(plain.model.layer.weight, fitted.model.layer.weight)
    assert fitted.evaluate((X, Y))["loss"] == plain.evaluate((X, Y))["loss"]
    if model is StoresAll:
        assert torch.equal(fitted.predict(X), plain.predict(X))
        assert fitted.model.ctx == "mine"
        assert fitted.model.step == 7
    else:
        assert fitted.predict(X).unique().tolist() == [5]
        assert not hasattr(fitted.model, "ctx")


# --- setup(batch=...)


def as_rows(rows):
    return {"picture": torch.stack([r[0] for r in rows]), "value": [r[1] for r in rows]}


def read_rows(loaded):
    return loaded["picture"], torch.stack(loaded["value"])


def rows_loader():
    return DataLoader(TensorDataset(X, Y), batch_size=8, collate_fn=as_rows)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_batch_function_reads_batches_of_fit_evaluate_and_predict(accumulate, tmp_path):
    def fit(data, **options):
        return learner(metrics={"mae": nn.functional.l1_loss}, **options).fit(
            data,
            2,
            data,
            seed=1,
            accelerator=harness.accelerator(accumulate=accumulate, device="cpu"),
            tracker=False,
            verbose=False,
        )

    plain = fit(LOADER)
    fitted = fit(rows_loader(), batch=read_rows)
    assert fitted.records["metrics"] == plain.records["metrics"]
    assert torch.equal(fitted.model.layer.weight, plain.model.layer.weight)
    expected = plain.evaluate(LOADER).records
    assert fitted.evaluate(rows_loader()).records == expected
    assert torch.equal(fitted.predict(rows_loader()), plain.predict(LOADER))
    fitted.save(tmp_path / "net")
    assert harness.load(tmp_path / "net").evaluate(rows_loader()).records == expected


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        (3, r"setup\(batch\): expected a function of the batch, got 3"),
        (lambda: None, r"setup\(batch\): expected a function .* f\(batch\)"),
        (lambda loaded: loaded["picture"], r"to return \(input, target\), got tensor"),
        (lambda loaded: None, r"to return \(input, target\), got None"),
    ],
)
def test_batch_function_of_a_wrong_kind_is_told(batch, match):
    with pytest.raises(TypeError, match=match):
        learner(batch=batch).fit(rows_loader(), 1, tracker=False, verbose=False)


class OfKeywords(Net):
    def forward(self, x, labels=None):
        return super().forward(x)


def test_labels_of_a_mapping_are_the_target():
    batches = [
        {"x": x, "labels": y} for x, y in zip(X.split(8), Y.split(8), strict=True)
    ]
    fitted, plain = (
        harness.setup(module, loss=nn.MSELoss(), optimizer=torch.optim.SGD)
        .set_opt_hparams(lr=0.1)
        .fit(data, 1, seed=1, tracker=False, verbose=False)
        for module, data in (
            (OfKeywords, DataLoader(Batches(*batches), batch_size=None)),
            (Net, LOADER),
        )
    )
    assert fitted.records["metrics"] == plain.records["metrics"]


# --- arguments of calls

FITTED = learner().fit((X, Y), 1, tracker=False, verbose=False)
WRONG_CALLS = {
    "seed": (lambda: fit_wrong(seed="a"), r"fit\(seed\): expected a whole number"),
    "seed float": (lambda: fit_wrong(seed=1.5), r"fit\(seed\): .*got 1\.5"),
    "accelerator": (
        lambda: fit_wrong(accelerator="cpu"),
        r"fit\(accelerator\): .*'cpu'",
    ),
    "accelerator class": (
        lambda: fit_wrong(accelerator=type(harness.accelerator(device="cpu"))),
        r"fit\(accelerator\): expected an accelerator, got <class",
    ),
    "options": (
        lambda: fit_wrong(dataloader_options=[1]),
        r"dataloader_options: expected a dict, got \[1\]",
    ),
    "batch size 0": (
        lambda: fit_wrong(dataloader_options={"batch_size": 0}),
        r"\(batch_size\): expected at least 1, got 0",
    ),
    "batch size text": (
        lambda: fit_wrong(dataloader_options={"batch_size": "8"}),
        r"\(batch_size\): expected a whole number, got '8'",
    ),
    "workers text": (
        lambda: fit_wrong(dataloader_options={"num_workers": "2"}),
        r"dataloader_options: expected options .*got .*num_workers='2'",
    ),
    "options that exclude each other": (
        lambda: fit_wrong(dataloader_options={"sampler": [1], "shuffle": True}),
        r"dataloader_options: expected .*shuffle=True.*: sampler option is mutually",
    ),
    "evaluate a model": (
        lambda: learner().evaluate(FITTED.model, (X, Y)),
        r"evaluate\(fitted\): expected the result of fit, got Net",
    ),
    "predict of a model": (
        lambda: learner().predict(FITTED.model, X),
        r"predict\(fitted\): expected the result of fit, got Net",
    ),
    "evaluate accelerator": (
        lambda: FITTED.evaluate((X, Y), accelerator=3),
        r"evaluate\(accelerator\): expected an accelerator, got 3",
    ),
    "lr_finder": (
        lambda: harness.lr_finder(Net, (X, Y)),
        r"lr_finder\(learner\): expected a learner, got <class",
    ),
    "device": (
        lambda: harness.accelerator(device="gpu"),
        r"accelerator\(device\): expected .*got 'gpu'\. Leave it out",
    ),
    "device of another kind": (
        lambda: harness.accelerator(device=3.5),
        r"accelerator\(device\): expected .*got 3\.5",
    ),
    "device that is not there": (
        lambda: harness.accelerator(device="cuda:99"),
        r"accelerator\(device\): expected a device of this machine, got 'cuda:99'",
    ),
    "accumulate text": (
        lambda: harness.accelerator(accumulate="2"),
        r"accelerator\(accumulate\): expected a whole number, got '2'",
    ),
    "accumulate float": (
        lambda: harness.accelerator(accumulate=2.5),
        r"accelerator\(accumulate\): expected a whole number, got 2\.5",
    ),
    "accumulate bool": (
        lambda: harness.accelerator(accumulate=True),
        r"accelerator\(accumulate\): expected a whole number, got True",
    ),
    "csv": (
        lambda: harness.callbacks.CSVLogger(3),
        r"CSVLogger\(path\): expected a path, got 3\. Pass text",
    ),
    "checkpoint": (
        lambda: harness.callbacks.ModelCheckpoint(3),
        r"ModelCheckpoint\(path\): expected a path, got 3",
    ),
    "resume": (
        lambda: harness.callbacks.ResumeFromCheckpoint(None),
        r"ResumeFromCheckpoint\(path\): expected a path, got None",
    ),
    "tensorboard": (
        lambda: harness.callbacks.TensorBoard(3),
        r"TensorBoard\(folder\): expected a path, got 3",
    ),
    "load": (lambda: harness.load(3), r"load\(path\): expected a path, got 3"),
    "save": (lambda: FITTED.save(None), r"save\(path\): expected a path, got None"),
    "save_weights": (lambda: FITTED.save_weights(3), r"save_weights\(path\): .*got 3"),
    "load_weights": (lambda: FITTED.load_weights(3), r"load_weights\(path\): .*got 3"),
    "plot": (lambda: FITTED.plot(3), r"plot\(path\): expected a path, got 3"),
    "tracker experiment": (
        lambda: fit_wrong(tracker={"experiment": 3}),
        "start: expected a string as experiment, got 3",
    ),
    "tracker without a name": (
        lambda: fit_wrong(tracker={"experiment": ""}),
        r"start\(experiment\): expected a name, got ''\. Leave it out",
    ),
    "tracker params": (
        lambda: fit_wrong(tracker={"params": [("lr", 0.1)]}),
        r"start\(params\): expected a dictionary, got \[",
    ),
    "tracker delivery": (
        lambda: fit_wrong(tracker={"delivery": {"per_key": 1}}),
        r"start\(delivery=\{'per_key': \.\.\.\}\): .* got 1",
    ),
    "tracker name": (
        lambda: fit_wrong(tracker={"experimnt": "x"}),
        r"fit\(tracker\): .*got 'experimnt'\. Did you mean 'experiment'",
    ),
    "tracker key": (
        lambda: fit_wrong(tracker={3: "x"}),
        r"fit\(tracker\): expected an argument of start, got '3'",
    ),
    "scheduler without options": (
        lambda: Schedule(torch.optim.lr_scheduler.StepLR),
        r"expected values for \['step_size'\] of StepLR.*step_size=\.\.\.",
    ),
    "verbose": (lambda: fit_wrong(verbose="yes"), r"fit\(verbose\): .*got 'yes'"),
    "verbose of predict": (
        lambda: FITTED.predict(X, verbose=[]),
        r"predict\(verbose\): expected True, False or None, got \[\]",
    ),
    "optimizer option as text": (
        lambda: learner().set_opt_hparams(lr="0.1").fit((X, Y), 1, tracker=False),
        r"set_opt_hparams\(lr\): expected a number for SGD, got '0\.1'",
    ),
    "optimizer option as list": (
        lambda: learner().set_opt_hparams(lr=[0.1]).fit((X, Y), 1, tracker=False),
        r"set_opt_hparams\(lr\): expected a number for SGD, got \[0\.1\]",
    ),
    "scheduler option as text": (
        lambda: Schedule(torch.optim.lr_scheduler.StepLR, step_size="a"),
        r"LRScheduler\(step_size\): expected a number for StepLR, got 'a'",
    ),
    "scheduler that cannot step": (
        lambda: fit_wrong(
            callbacks=[Schedule(torch.optim.lr_scheduler.StepLR, step_size=0)]
        ),
        r"LRScheduler\(StepLR\): expected options .*step_size=0: ZeroDivisionError",
    ),
    "scheduler of another kind": (
        lambda: fit_wrong(callbacks=[Schedule(make_nothing)]),
        r"LRScheduler\(scheduler\): expected it to return a scheduler, got None",
    ),
}


def make_nothing(opt):
    return None


def fit_wrong(**options):
    learner().fit((X, Y), 1, **{"tracker": False, "verbose": False} | options)


@pytest.mark.parametrize("case", WRONG_CALLS)
def test_wrong_arguments_of_calls_are_told(case):
    call, match = WRONG_CALLS[case]
    with pytest.raises((TypeError, ValueError), match=match):
        call()


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (harness.callbacks.ModelCheckpoint, "file"),
        (harness.callbacks.AutoResume, "file/below"),
        (harness.callbacks.CSVLogger, "file/log.csv"),
        (harness.callbacks.CSVLogger, "folder"),
    ],
)
def test_paths_where_nothing_can_be_written_are_told_before_any_epoch(
    make, got, tmp_path
):
    (tmp_path / "file").write_text("here first")
    (tmp_path / "folder").mkdir()
    seen = Seen()
    with pytest.raises(OSError, match=rf"{make.__name__}\(path\): expected a f"):
        fit_wrong(callbacks=[make(tmp_path / got), seen])
    assert seen.epochs == 0


# --- what models and optimizers are built from


class Hidden(Net):
    def __init__(self, hidden, *, depth):
        super().__init__()


class OptimizerOf(Net):
    def set_optimizers(self, lr, kind=None):
        opt = torch.optim.SGD(self.parameters(), lr)
        return {"int": {3: opt}, "empty": {"": opt}, "none": None}[kind]


class Frozen(Net):
    def __init__(self):
        super().__init__()
        self.requires_grad_(False)


class Unregistered(nn.Module):
    """A model without parameters that torch can find."""

    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(3, 1)]

    def forward(self, x):
        return self.layers[0](x)


def of_another_model(params, lr):
    return torch.optim.SGD(Net().parameters(), lr)


BUILT: dict[str, tuple[Any, dict[str, Any], str]] = {
    "model": (
        Hidden,
        {},
        r"\['hidden', 'depth'\] of Hidden, .*set_hparams\(hidden=\.\.",
    ),
    "factory": (lambda width: Net(width), {}, r"setup\(module\): .*\['width'\]"),
    "optimizer": (
        Net,
        {"optimizer": lambda params, lr, decay: None},
        r"setup\(optimizer\): .*\['decay'\] .*set_opt_hparams\(decay=\.\.\.\)",
    ),
    "optimizer without parameters": (
        Net,
        {"optimizer": lambda *, lr: None},
        r"setup\(optimizer\): expected a function of 1 argument, got <lambda>\(lr\)",
    ),
    "optimizer none": (
        Net,
        {"optimizer": lambda params, lr: None},
        r"setup\(optimizer\): expected a torch optimizer at 'opt', got None",
    ),
    "optimizer list": (
        Net,
        {"optimizer": lambda params, lr: [3]},
        r"setup\(optimizer\): expected a dict of named optimizers, got a list",
    ),
    "own none": (OptimizerOf, {"kind": "none"}, r"set_optimizers\(\): .*got None"),
    "own int": (OptimizerOf, {"kind": "int"}, "expected names of optimizers, got 3"),
    "own empty": (OptimizerOf, {"kind": "empty"}, "names of optimizers, got ''"),
    "frozen": (Frozen, {}, "expected parameters with requires_grad, got only frozen"),
    "another model": (
        Net,
        {"optimizer": of_another_model},
        "expected parameters of the model of this fit, got others",
    ),
    "unregistered": (Unregistered, {}, "parameters of Unregistered, got none"),
}


@pytest.mark.parametrize("case", BUILT)
def test_model_or_optimizer_that_cannot_be_built_is_told_before_any_epoch(case):
    module, options, match = BUILT[case]
    is_own = module is OptimizerOf
    optimizer = None if is_own else options.get("optimizer", torch.optim.SGD)
    made = harness.setup(module, loss=nn.MSELoss(), optimizer=optimizer)
    hparams = {"lr": 0.1} | (options if is_own else {})
    # Not the test's own callback: that might unfreeze parameters.
    with pytest.raises((TypeError, ValueError), match=match) as caught:
        made.set_opt_hparams(**hparams).fit((X, Y), 1, tracker=False, verbose=False)
    assert not getattr(caught.value, "__notes__", [])  # of an event or epoch


NOTES = {
    "model": (Net, {"width": "3"}, {}, [], "in Net, called with width (str)"),
    "optimizer": (Net, {}, {"lr": -0.1}, [], "in SGD, called with lr (float)"),
    "set_optimizers": (
        OptimizerOf,
        {},
        {"lr": "0.1"},
        [],
        "in set_optimizers, called with lr (str)",
    ),
    "scheduler": (
        Net,
        {},
        {},
        [Schedule(OneCycle, max_lr="a", total_steps=5)],
        "in OneCycleLR, called with max_lr (str), total_steps (int)",
    ),
}


@pytest.mark.parametrize("case", NOTES)
def test_error_of_what_is_built_tells_the_options_without_their_values(case):
    module, hparams, opt_hparams, callbacks, note = NOTES[case]
    optimizer = None if module is OptimizerOf else torch.optim.SGD
    made = harness.setup(module, loss=nn.MSELoss(), optimizer=optimizer)
    made = made.set_hparams(**hparams).set_opt_hparams(**opt_hparams)
    with pytest.raises((TypeError, ValueError)) as caught:
        made.fit((X, Y), 1, callbacks=callbacks, tracker=False, verbose=False)
    assert caught.value.__notes__[0] == note


def test_missing_argument_of_set_optimizers_is_told():
    with pytest.raises(TypeError, match=r"\['lr'\] of set_optimizers, got none"):
        harness.setup(OptimizerOf, loss=nn.MSELoss()).fit((X, Y), 1, tracker=False)


class SetsUnregistered(Unregistered):
    def set_optimizers(self, lr):
        return torch.optim.SGD(self.layers[0].parameters(), lr)


class Unfreezes(harness.Callback):
    def on_fit_begin(self):
        self.ctx.model.requires_grad_(True)


@pytest.mark.parametrize(
    ("module", "optimizer", "callbacks"),
    [
        (SetsUnregistered, None, []),
        (Frozen, torch.optim.SGD, [Unfreezes()]),
        (lambda: Net(), lambda params, lr: torch.optim.SGD(params, lr), []),
    ],
)
def test_optimizer_of_parameters_that_can_be_trained_is_accepted(
    module, optimizer, callbacks
):
    before = torch.manual_seed(1) and module()(X)
    made = harness.setup(module, loss=nn.MSELoss(), optimizer=optimizer)
    fitted = made.set_opt_hparams(lr=0.1).fit(
        (X, Y), 1, seed=1, callbacks=callbacks, tracker=False, verbose=False
    )
    assert not torch.equal(fitted.model(X), before)


# --- errors of torch in the first batch


CLASSES = torch.zeros(40, dtype=torch.long)
FIRST_ERRORS = {
    "classes float": (
        (nn.CrossEntropyLoss(), 4, CLASSES.float()),
        RuntimeError,
        "CrossEntropyLoss (prediction float32 (8, 4), target float32 (8,))",
    ),
    "classes 2-d": (
        (nn.CrossEntropyLoss(), 4, CLASSES[:, None]),
        RuntimeError,
        "CrossEntropyLoss (prediction float32 (8, 4), target int64 (8, 1))",
    ),
    "class out of range": (
        (nn.CrossEntropyLoss(), 4, CLASSES + 7),
        IndexError,
        "CrossEntropyLoss (prediction float32 (8, 4), target int64 (8,))",
    ),
    "not a probability": (
        (nn.BCELoss(), 1, Y + 9),
        RuntimeError,
        "BCELoss (prediction float32 (8, 1), target float32 (8, 1))",
    ),
    "function": (
        (nn.functional.nll_loss, 4, Y[:, 0]),
        RuntimeError,
        "nll_loss (prediction float32 (8, 4), target float32 (8,))",
    ),
}


@pytest.mark.parametrize("case", FIRST_ERRORS)
def test_error_of_a_loss_keeps_its_type_and_tells_what_it_got(case):
    (loss, width, target), kind, note = FIRST_ERRORS[case]
    made = learner(loss=loss).set_hparams(width=width)
    data = DataLoader(TensorDataset(X, target), batch_size=8)
    with pytest.raises(kind) as caught:
        made.fit(data, 1, tracker=False, verbose=False)
    first, *hints = caught.value.__notes__
    assert first == f"in loss {note}, epoch 1, iter 1, training"
    assert all(hint.startswith("hint: ") for hint in hints)


class FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sum()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("no derivative")


def no_derivative(pred, target):
    return FailsBackward.apply(pred)


def test_error_of_the_backward_of_a_loss_tells_what_it_got():
    with pytest.raises(RuntimeError, match="no derivative") as caught:
        learner(loss=no_derivative).fit(LOADER, 1, tracker=False, verbose=False)
    assert caught.value.__notes__ == [
        "in loss no_derivative (prediction float32 (8, 1), target float32 (8, 1)),"
        " epoch 1, iter 1, training"
    ]


class OwnStep(Net):
    def step(self):
        return nn.functional.mse_loss(self(self.ctx.input), self.ctx.target)


@pytest.mark.parametrize("module", [Net, OwnStep])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_error_of_a_model_tells_the_batch(module, dtype):
    wrong = torch.zeros(40, 4, dtype=dtype)
    made = harness.setup(module, loss=nn.MSELoss(), optimizer=torch.optim.SGD)
    loader = DataLoader(TensorDataset(wrong, Y), batch_size=8)
    name = f"{str(dtype).removeprefix('torch.')} (8, 4)"
    note = (
        f"in {module.__name__} (input {name}, target float32 (8, 1)), epoch 1, iter 1"
    )
    with pytest.raises(RuntimeError) as caught:
        made.fit(loader, 1, tracker=False, verbose=False)
    assert caught.value.__notes__[0] == f"{note}, training"
    fitted = made.fit(LOADER, 1, tracker=False, verbose=False)
    with pytest.raises(RuntimeError) as caught:
        fitted.evaluate(loader)
    assert caught.value.__notes__[0] == f"{note}, evaluation"


def test_error_of_a_model_in_predict_tells_the_batch():
    with pytest.raises(RuntimeError) as caught:
        FITTED.predict(DataLoader(torch.zeros(40, 4), batch_size=8))
    assert "in Net (input float32 (8, 4), target None)" in caught.value.__notes__[0]


FLAGS = [
    (kind, name)
    for kind in (getattr(callbacks, name) for name in callbacks.__all__)
    for name, parameter in inspect.signature(kind).parameters.items()
    if isinstance(parameter.default, bool)
]


@pytest.mark.parametrize(
    ("kind", "name"), FLAGS, ids=[f"{kind.__name__}-{name}" for kind, name in FLAGS]
)
def test_flags_of_callbacks_are_true_or_false(kind, name):
    needed = (
        {"path": "checkpoints"}
        if issubclass(kind, callbacks.ResumeFromCheckpoint)
        else {}
    )
    kind(**needed, **{name: True})
    for wrong in ("no", 1, None):
        match = rf"^{kind.__name__}\({name}\): expected True or False, got "
        with pytest.raises(TypeError, match=match):
            kind(**needed, **{name: wrong})
