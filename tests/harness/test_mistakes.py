"""Mistakes that beginners make, and what they are told: what is wrong, where, and what to do.

Wrong arguments one by one are in ``test_checks``; the command line's are in ``cli/test_target``.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC, MulticlassAccuracy

import harness
from harness.callbacks import (
    EarlyStopping,
    LRScheduler,
    Mixup,
    MixupLoss,
    ResumeFromCheckpoint,
)
from harness.checks.hints import add_hint, find_loss_hint, find_model_hint
from harness.steps import call_model

X, Y = torch.randn(12, 4), torch.arange(12) % 3
ONE_HOT = nn.functional.one_hot(Y)
CE = nn.CrossEntropyLoss()
ACC = MulticlassAccuracy(num_classes=3)


class Net(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))

    def forward(self, x: Tensor) -> Any:
        return self.layers(x)


def setup(module: Any = Net, loss: Any = CE, **options: Any) -> harness.Learner:
    options = {"optimizer": torch.optim.SGD} | options
    return harness.setup(module, loss=loss, **options)


def fit(
    learner: Any = None, data: Any = (X, Y), epochs: Any = 1, **options: Any
) -> Any:
    given = {"tracker": False, "seed": 1, "dataloader_options": {"batch_size": 6}}
    return (learner or setup()).fit(data, epochs, **(given | options))


def failing(error: Exception) -> Any:
    """A learner whose loss raises what a device would."""

    def loss(pred: Tensor, target: Tensor) -> Tensor:
        raise error

    return setup(loss=loss)


class ReturnsNothing(Net):
    def forward(self, x: Tensor) -> Any:
        self.layers(x)


class WithoutParameters(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :3]


class WithoutGraph(Net):
    def loss(self, pred: Tensor, target: Tensor) -> Any:
        return nn.functional.cross_entropy(pred, target).detach()


class OutputOfGradients(Net):
    def forward(self, x: Tensor) -> Tensor:
        x.requires_grad_()
        out = super().forward(x)
        [found] = torch.autograd.grad(out.sum(), x, create_graph=self.training)
        return out + found.sum()


class Backward(harness.Callback):
    def on_epoch_end(self) -> None:
        CE(self.ctx.model(X), Y).backward()


class LossAsNumber(Net):
    def loss(self, pred: Tensor, target: Tensor) -> Any:
        return nn.functional.cross_entropy(pred, target).item()


class StepOfItsOwn(Net):
    def step(self) -> Tensor:
        return nn.functional.cross_entropy(self(self.ctx.input), self.ctx.target)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.embed(x).mean(1))


class ReturnsDict(Net):
    def forward(self, x: Tensor) -> Any:
        return {"a": super().forward(x)}


class Unlisted(Dataset[Any]):
    def __getitem__(self, index: int) -> Any:
        return X[index], Y[index]


class TooLong(Unlisted):
    def __len__(self) -> int:
        return 99


class LogsMetric(Net):
    def loss(self, pred: Tensor, target: Tensor) -> Any:
        self.ctx.log_metric("accuracy", ACC)
        return CE(pred, target)


class LogsName(Net):
    def loss(self, pred: Tensor, target: Tensor) -> Any:
        self.ctx.log_metric("accuracy", 0.5)
        return CE(pred, target)


class StepOfArguments(Net):
    def step(self, batch: Any, batch_idx: int) -> Tensor:
        return CE(self(batch[0]), batch[1])


class TwoInputs(Net):
    def forward(self, x: Tensor, y: Tensor) -> Any:
        return super().forward(x + y)


class ListOfImages(Net):
    def step(self) -> Tensor:
        return CE(self(list(self.ctx.input)), self.ctx.target)

    def forward(self, images: list[Tensor]) -> Any:
        return super().forward(torch.stack(images))


def frozen() -> nn.Module:
    return Net().requires_grad_(False)


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.LazyLinear(3))


class Samples(Dataset[Any]):
    """A data set whose samples a function makes."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make = make

    def __len__(self) -> int:
        return 12

    def __getitem__(self, row: int) -> Any:
        return self.make(row)


class Listens(harness.Callback):
    """Does something at the end of an epoch."""

    def __init__(self, do: Callable[[Any], object]) -> None:
        self.do = do

    def on_epoch_end(self) -> None:
        self.do(self.ctx)


def define(**methods: Any) -> type:
    return type("Own", (harness.Callback,), methods)


def define_net(**methods: Any) -> type:
    return type("Made", (Net,), methods)


def wrong_field(ctx: Any) -> None:
    ctx.lerning = 1


def norm() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))


OPT = torch.optim.SGD


def scheduler(*given: Any) -> LRScheduler:
    return LRScheduler(torch.optim.lr_scheduler.StepLR, *given)


MISTAKES: dict[str, tuple[Callable[[], object], str]] = {
    # --- the model
    "forward without return": (
        lambda: fit(setup(ReturnsNothing)),
        "forward returned None: does it end with 'return'",
    ),
    "instance of a model": (lambda: setup(Net()), "Pass Net itself, and its arguments"),
    "function that returns no model": (
        lambda: fit(setup(lambda: None)),
        "expected it to return an nn.Module, got None",
    ),
    "no parameters": (
        lambda: fit(setup(WithoutParameters)),
        "expected parameters of WithoutParameters, got none",
    ),
    "all frozen": (lambda: fit(setup(frozen)), "got only frozen ones"),
    "misspelt hyper-parameter": (
        lambda: fit(setup().set_hparams(widht=3)),
        "got 'widht'. Did you mean 'width'",
    ),
    # --- what the model is given
    "too many features": (
        lambda: fit(data=(torch.randn(12, 5), Y)),
        "The first layer takes 4 features, the input has 5",
    ),
    "input of float64": (
        lambda: fit(data=(X.double(), Y)),
        "The weights are float32: pass the input as input.to",
    ),
    "input of whole numbers": (
        lambda: fit(data=(X.long(), Y)),
        "The weights are float32: pass the input as",
    ),
    "tokens as floats": (
        lambda: fit(setup(Tokens), data=(torch.ones(12, 5), Y)),
        "nn.Embedding takes whole numbers: pass them as int64, by .long()",
    ),
    "channels last": (
        lambda: fit(setup(conv), data=(torch.zeros(12, 8, 8, 3), Y)),
        r"Channels come second, and are last in the input: use input.permute\(0, 3, 1, 2\)",
    ),
    "grey pictures": (
        lambda: fit(setup(conv), data=(torch.zeros(12, 1, 8, 8), Y)),
        "The first layer takes 3 channels, the input has 1",
    ),
    "pictures of bytes": (
        lambda: fit(
            setup(conv), data=(np.zeros((12, 3, 8, 8), np.uint8), np.zeros(12, int))
        ),
        "The weights are float32: pass the input as",
    ),
    "one row and BatchNorm": (
        lambda: fit(setup(norm), dataloader_options={"batch_size": 1}),
        "BatchNorm needs more than one row in training: use a larger batch_size",
    ),
    "several inputs of a prediction": (
        lambda: fit(setup(TwoInputs), data=((X, X), Y)).predict((X, X)),
        r"For several inputs: fit\(\(\(a, b\), y\)\), predict\(\(\(a, b\),\)\)",
    ),
    "list of images and an own step": (
        lambda: fit(setup(ListOfImages, None)).predict([([X[0], X[1]],)]),
        r"Lists in the rows of data .* takes a list as a whole",
    ),
    "features of a prediction": (
        lambda: fit().predict(torch.randn(3, 5)),
        "The first layer takes 4 features, the input has 5",
    ),
    # --- loss and target
    "labels as floats": (
        lambda: fit(data=(X, Y.float())),
        r"Class labels are whole numbers: pass the target as target.long\(\)",
    ),
    "labels of another dtype": (
        lambda: fit(data=(X, Y.int())),
        r"CrossEntropyLoss takes class labels as target.long\(\)",
    ),
    "labels as a column": (
        lambda: fit(data=(X, Y[:, None])),
        r"pass the target as target.squeeze\(1\)",
    ),
    "labels from 1": (
        lambda: fit(data=(X, torch.arange(12) % 3 + 1)),
        "For 3 outputs labels are 0 to 2, the target has 1 to 3",
    ),
    "loss of swapped arguments": (
        lambda: fit(setup(loss=lambda target, pred: CE(pred, target))),
        r"A loss is called as loss\(pred, target\)",
    ),
    "loss for another kind of target": (
        lambda: fit(setup(loss=nn.BCEWithLogitsLoss())),
        "MSELoss a target of the prediction's shape",
    ),
    "class of a loss": (
        lambda: setup(loss=nn.CrossEntropyLoss),
        r"Write CrossEntropyLoss\(\)",
    ),
    "loss without mean": (
        lambda: fit(setup(loss=nn.CrossEntropyLoss(reduction="none"))),
        "Use the mean over the batch",
    ),
    "step of another library": (
        lambda: fit(setup(StepOfArguments)),
        r"called as f\(\), got step.* Everything else that it needs is in self.ctx",
    ),
    "loss without graph": (
        lambda: fit(setup(WithoutGraph, loss=None)),
        r"expected a loss with gradients, got one without.* detach\(\), item\(\)",
    ),
    "gradients in a validation": (
        lambda: fit(setup(OutputOfGradients), valid_data=(X, Y)),
        r"Gradients are off in validation.*inside 'with torch.enable_grad\(\):'",
    ),
    "gradients in a callback": (
        lambda: fit(callbacks=[Backward()]),
        r"Gradients are off in validation.*inside 'with torch.enable_grad\(\):'",
    ),
    "loss as a number": (
        lambda: fit(setup(LossAsNumber, loss=None)),
        "expected a tensor with one element, got ",
    ),
    "no target": (lambda: fit(data=X), r"Pass data as \(input, target\)"),
    "table with the target in it": (
        lambda: fit(data=torch.randn(12, 5)),
        "takes 4 features, the input has 5. The batch has no target",
    ),
    "prediction of several parts": (
        lambda: fit(setup(ReturnsDict)),
        r"setup\(loss=harness.on\(loss, pred='a'\)\) takes an item",
    ),
    "whole numbers for BCEWithLogitsLoss": (
        lambda: fit(setup(loss=nn.BCEWithLogitsLoss()), data=(X, ONE_HOT)),
        r"target as target.float\(\). Class labels, .* are target.argmax\(1\)",
    ),
    "BCELoss without a sigmoid": (
        lambda: fit(setup(loss=nn.BCELoss()), data=(X, ONE_HOT.float())),
        "probabilities from 0 to 1: end the model with a sigmoid",
    ),
    "class of a scheduler as an optimizer": (
        lambda: setup(optimizer=torch.optim.lr_scheduler.StepLR),
        r"Schedulers are callbacks: callbacks=\[LRScheduler\(StepLR, ...\)\]",
    ),
    "scheduler as a callback": (
        lambda: fit(callbacks=[torch.optim.lr_scheduler.StepLR]),
        r"Write LRScheduler\(StepLR, ...\)",
    ),
    "callback without a list": (
        lambda: fit(callbacks=EarlyStopping()),
        r"got EarlyStopping. Write \[...\] around it",
    ),
    "context in __init__": (
        lambda: define(__init__=lambda self: setattr(self.ctx, "epoch", 1))(),
        "no attribute 'ctx': it is there in events, and not in __init__",
    ),
    "misspelt monitor with a mode": (
        lambda: fit(valid_data=0.5, callbacks=[EarlyStopping("valid/los", mode="min")]),
        "got 'valid/los'. Did you mean 'valid/loss'",
    ),
    "training_step alone": (
        lambda: fit(setup(define_net(training_step=None), loss=None)),
        r"Turn Made.training_step into step\(self\)",
    ),
    # --- arguments of other libraries' functions
    "batch_size": (
        lambda: fit(batchsize=16),
        r"It is dataloader_options=\{'batch_size': ...\} here",
    ),
    "device": (
        lambda: fit(device="cuda"),
        r"It is accelerator=harness.accelerator\(device=...\) here",
    ),
    "learning rate": (
        lambda: harness.setup(Net, loss=CE, lr=0.1),  # type: ignore[call-arg]
        r"It is set_opt_hparams\(lr=...\) here",
    ),
    "validation data": (lambda: fit(val_data=(X, Y)), "It is valid_data=... here"),
    "epoch": (lambda: fit(epoch=2), "Did you mean 'epochs'"),
    "options as a dict": (
        lambda: setup().set_hparams({"width": 8}),  # type: ignore[call-arg]
        r"or a dict as \*\*options",
    ),
    "input and target": (
        lambda: fit().evaluate(X, Y),  # type: ignore[call-arg]
        r"Data is one argument: \(input, target\)",
    ),
    "misspelt name of the package": (
        lambda: harness.seutp,
        "module 'harness' has no attribute 'seutp'. Did you mean 'setup'",
    ),
    "prediction before a fit": (
        lambda: setup().predict(X),  # type: ignore[call-arg]
        r"first argument is the result of fit. fitted.predict\(data\)",
    ),
    # --- data
    "class of a data set": (lambda: fit(data=Unlisted), r"Write Unlisted\(...\)"),
    "data set without a length": (
        lambda: fit(data=Unlisted()),
        "expected a data set with __len__, got Unlisted. Define __len__",
    ),
    "rows as lists of numbers": (
        lambda: fit().predict([[1.0, 2.0, 3.0, 4.0]]),
        r"got a list of lists of numbers. Make a tensor of it: torch.tensor\(...\)",
    ),
    "tensors of many lengths": (
        lambda: fit(data=([torch.ones(n % 3 + 1) for n in range(12)], Y)),
        r"lengths \[1, 2, 3, 1, 2, 3, 1, 2, 3, 1, ...\]",
    ),
    "mixed target": (
        lambda: fit(setup(StepOfItsOwn, MixupLoss(CE)), callbacks=[Mixup()]),
        r"mix the targets: compute the loss by MixupLoss\(...\)",
    ),
    # --- data
    "lengths differ": (
        lambda: fit(data=(X, Y[:7])),
        r"expected tensors of equal length, got lengths \[12, 7\]",
    ),
    "several loaders": (
        lambda: fit(data={"train": DataLoader(X), "val": DataLoader(X)}),
        r"got DataLoader. Pass one as data, and others as valid_data",
    ),
    "fit inside autocast": (
        lambda: torch.autocast("cpu", dtype=torch.bfloat16)(fit)(),
        r"expected autocast to be off.*precision='bf16'",
    ),
    "no rows": (lambda: fit(data=(X[:0], Y[:0])), "expected at least one row"),
    "path of a file": (
        lambda: fit(data="train.csv"),
        "^data: expected a tensor or array, got str 'train.csv'. Read files first",
    ),
    "data frame of texts": (
        lambda: fit(data=pd.DataFrame({"a": ["x", "y"]})),
        "Convert categories to numbers first",
    ),
    "target in place of epochs": (
        lambda: setup().fit(X, Y, 3),
        r"Data is one argument: fit\(\(input, target\), epochs\)",
    ),
    "rows of lists": (
        lambda: fit(data=list(zip(X.tolist(), Y.tolist(), strict=True))),
        r"joined by torch item by item: give torch.tensor\(...\)",
    ),
    "list of labels": (
        lambda: fit(data=(X, Y.tolist())),
        r"got int. Make a tensor of the list of numbers: torch.tensor\(...\)",
    ),
    "sampler of all rows and a share of them": (
        lambda: fit(valid_data=0.5, dataloader_options={"sampler": range(12)}),
        "got valid_data=0.5, which renumbers the rows. Split the data yourself",
    ),
    "generator": (
        lambda: fit(data=((X, Y) for _ in range(3))),
        "expected data that can be read in each epoch, got generator",
    ),
    "mapping with its target": (
        lambda: fit(data=Samples(lambda row: {"x": X[row], "y": Y[row]})),
        r"If one is the target: setup\(batch=lambda b: \(b\['x'\], b\['y'\]\)\)",
    ),
    "rows of different lengths": (
        lambda: fit(data=Samples(lambda row: (torch.zeros(row + 1), Y[row]))),
        "they need tensors of one shape",
    ),
    "rows that are objects": (
        lambda: fit(data=Samples(lambda row: (object(), Y[row]))),
        "they need tensors of one shape",
    ),
    "rows of workers": (
        lambda: fit(
            data=Samples(lambda row: (torch.zeros(row + 1), Y[row])),
            dataloader_options={"num_workers": 1, "multiprocessing_context": "fork"},
        ),
        "they need tensors of one shape",
    ),
    "loader and options": (
        lambda: fit(data=DataLoader(TensorDataset(X, Y), 4)),
        "Set them where you make the DataLoader",
    ),
    "number of validation rows": (
        lambda: fit(valid_data=20),
        r"expected a fraction in \(0, 1\), got 20",
    ),
    # --- optimizer and length
    "instance of an optimizer": (
        lambda: setup(optimizer=torch.optim.SGD(Net().parameters(), lr=0.1)),
        r"Pass torch.optim.SGD, and set_opt_hparams\(lr=0.1\)",
    ),
    "misspelt option of an optimizer": (
        lambda: fit(setup().set_opt_hparams(learning_rate=0.1)),
        "got 'learning_rate'. Did you mean 'lr'",
    ),
    "learning rate as text": (
        lambda: fit(setup().set_opt_hparams(lr="0.1")),
        "expected a number for SGD, got '0.1'",
    ),
    "learning rate that is no number": (
        lambda: fit(setup().set_opt_hparams(lr=float("nan"))),
        "expected a number for SGD, got nan",
    ),
    "schedulers beside optimizers": (
        lambda: fit(setup(optimizer=lambda model: ([OPT(model.parameters())], []))),
        r"Schedulers are callbacks: callbacks=\[LRScheduler",
    ),
    "scheduler as an optimizer": (
        lambda: fit(
            setup(optimizer=lambda p: {"optimizer": OPT(p), "lr_scheduler": 1})
        ),
        r"Schedulers are callbacks: callbacks=\[LRScheduler",
    ),
    "no epochs": (lambda: fit(epochs=0), "expected at least 1 epoch, got 0"),
    "schedule without its option": (
        lambda: scheduler(),
        r"Pass them as LRScheduler\(..., step_size=...\)",
    ),
    # --- metrics
    "class of a metric": (
        lambda: setup(metrics=MulticlassAccuracy),
        r"Write MulticlassAccuracy\(...\)",
    ),
    "name of a metric": (
        lambda: setup(metrics=["accuracy"]),
        "expected a metric, got 'accuracy'",
    ),
    "another number of classes": (
        lambda: fit(setup(metrics=MulticlassAccuracy(num_classes=2))),
        r"The model has 3 outputs: MulticlassAccuracy\(num_classes=3\)",
    ),
    "metric of two classes": (
        lambda: fit(setup(metrics=BinaryAccuracy())),
        r"For 3 outputs use MulticlassAccuracy\(num_classes=3\)",
    ),
    "metric of two classes that sees it at the end": (
        lambda: fit(setup(metrics=BinaryAUROC())),
        r"For 3 outputs use MulticlassAUROC\(num_classes=3\)",
    ),
    "metric of a dict": (
        lambda: fit(setup(ReturnsDict, lambda pred, _: pred["a"].mean(), metrics=ACC)),
        r"The prediction is a dict: harness.on\(metric, pred='a'\)",
    ),
    "metric without a prediction": (
        lambda: fit(setup(StepOfItsOwn, CE, metrics=ACC)),
        r"set ctx.pred in your step",
    ),
    "name of a metric that is logged": (
        lambda: fit(setup(LogsName, None, metrics={"accuracy": ACC})),
        r"expected a name that no metric has, got 'accuracy'",
    ),
    "metric that is logged": (
        lambda: fit(setup(LogsMetric, None)),
        r"got the metric MulticlassAccuracy. Pass it to setup\(metrics=...\)",
    ),
    # --- callbacks
    "class of a callback": (
        lambda: fit(callbacks=[EarlyStopping]),
        r"Write EarlyStopping\(...\)",
    ),
    "callback outside of a list": (
        lambda: fit(callbacks=EarlyStopping()),
        r"Write \[...\] around it",
    ),
    "event of another library": (
        lambda: define(on_epoch_finish=lambda self: None),
        "expected an event, got 'on_epoch_finish'",
    ),
    "arguments of another library": (
        lambda: define(on_epoch_end=lambda self, trainer, module: None),
        "expected no arguments but self, got trainer, module. .* fields of self.ctx",
    ),
    "nothing to validate": (
        lambda: fit(callbacks=[EarlyStopping()]),
        "Pass valid_data=..., or monitor 'train/loss'",
    ),
    "monitor of another library": (
        lambda: fit(valid_data=0.5, callbacks=[EarlyStopping("val_loss")]),
        "Did you mean 'valid/loss'",
    ),
    "field of another library": (
        lambda: fit(callbacks=[Listens(lambda ctx: ctx.global_step)]),
        "got 'global_step'. It is ctx.step here",
    ),
    "misspelt field that is read": (
        lambda: fit(callbacks=[Listens(lambda ctx: ctx.epochs)]),
        "got 'epochs'. Did you mean 'epoch'",
    ),
    "misspelt field that is set": (
        lambda: fit(callbacks=[Listens(wrong_field)]),
        "Put your own values into ctx.buffers",
    ),
    "value that is no number": (
        lambda: fit(callbacks=[Listens(lambda ctx: ctx.log_metric("m", object()))]),
        r"expected a number, .* at value\['m'\]",
    ),
    # --- files and devices
    "no folder for a picture": (
        lambda: fit().plot("nowhere/curves.png"),
        r"^plot\(path\): expected a folder that exists, got 'nowhere'",
    ),
    "no checkpoint": (
        lambda: fit(callbacks=[ResumeFromCheckpoint("nothing")]),
        "got a path that does not exist. .*or set missing_ok=True",
    ),
    "no saved model": (
        lambda: harness.load("nothing"),
        r"Pass a folder that Fitted.save\(\) wrote",
    ),
    "misspelt option of the tracker": (
        lambda: fit(tracker={"run_dir": "x"}),
        "got 'run_dir'. Did you mean 'runs_dir'",
    ),
    "more than the memory of the device": (
        lambda: fit(failing(torch.OutOfMemoryError("CUDA out of memory"))),
        "half as many rows, and accumulate=2",
    ),
    "label out of range on a GPU": (
        lambda: fit(failing(RuntimeError("CUDA error: device-side assert"))),
        "such as a label or a row of an Embedding.* device='cpu' names the place",
    ),
    "own tensor that stays on the CPU": (
        lambda: fit(
            failing(RuntimeError("Expected all tensors to be on the same device"))
        ),
        "self.register_buffer",
    ),
    "name of no device": (
        lambda: harness.accelerator(device="gpu"),
        "expected 'cpu', 'cuda' or 'mps', got 'gpu'",
    ),
    "precision as a number": (
        lambda: harness.accelerator(precision=16),  # type: ignore[arg-type]
        "expected one of .*'bf16'.*, got 16",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_mistake_is_explained(name: str) -> None:
    make, expected = MISTAKES[name]
    with pytest.raises(Exception, match=r".") as caught:  # torch's own kind, or ours
        make()
    # A DataLoader whose workers the garbage collector ends waits five seconds for them.
    traceback.clear_frames(caught.value.__traceback__)
    notes = getattr(caught.value, "__notes__", [])
    found = "\n".join([str(caught.value), *notes])
    assert re.search(expected, found), found


def test_explained_error_ends_in_the_line_of_the_user() -> None:
    def get_last(make: Callable[[], object]) -> str:
        with pytest.raises(Exception, match="expected") as caught:
            make()
        return caught.traceback[-1].name if len(caught.traceback) < 5 else "long"

    assert get_last(lambda: setup().fit((X, Y[:3]), 1)) == "call"
    assert get_last(lambda: fit().evaluate((X, Y[:3]))) == "call"
    options = {"num_workers": -1}  # refused in a context manager
    assert get_last(lambda: fit(dataloader_options=options)) == "call"
    words = setup(metrics={"a": lambda pred, target: "good"})  # and below torchmetrics
    assert get_last(lambda: fit(words)) == "call"

    class Logs(Net):
        def loss(self, pred: Tensor, target: Tensor) -> Any:
            self.ctx.log("notes", "train", object())  # type: ignore[call-arg]

    with pytest.raises(TypeError, match="expected a number") as caught:
        fit(setup(Logs, None))
    assert caught.traceback[-1].name == "loss"


def test_explained_error_keeps_all_frames_for_a_bug_report(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HARNESS_DEBUG", "1")
    with pytest.raises(ValueError, match="expected") as caught:
        setup().fit((X, Y[:3]), 1)
    assert str(caught.traceback[-1].path).startswith(str(Path(harness.__file__).parent))


def test_training_step_that_is_never_called_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="training_step: expected a step") as caught:
        fit(setup(define_net(training_step=lambda self, batch, index: None)))
    assert len(caught) == 1


def test_warning_is_of_the_line_of_the_user() -> None:
    loader = DataLoader(TensorDataset(X, Y), 4)
    fitted = fit()
    for call in (fitted.predict, partial(setup().evaluate, fitted)):
        with pytest.warns(UserWarning, match="do not apply to it") as caught:
            call(loader, dataloader_options={"batch_size": 2})
        assert caught[0].filename == __file__


def test_nan_of_the_data_is_told_from_one_of_the_training() -> None:
    broken = X.clone()
    broken[3, 2] = float("nan")
    with pytest.warns(UserWarning, match="The input of the batch has nan"):
        fit(data=(broken, Y))


def test_error_of_a_data_set_tells_which_data() -> None:
    with pytest.raises(IndexError) as caught:
        fit(data=TooLong())
    assert caught.value.__notes__ == [
        "in the loader of train batches, epoch 1, after batch 0"
    ]


def test_table_has_fifty_mistakes() -> None:
    assert len(MISTAKES) >= 50


class Nested(nn.Module):
    """Calls a function of its own with too few arguments."""

    def forward(self, x):
        return self.join(x)  # type: ignore[call-arg]

    def join(self, a, b):
        return a + b


@pytest.mark.parametrize(
    ("model", "input", "expected"),
    [
        (Nested(), torch.ones(1), ""),
        (
            nn.Linear(1, 1),
            (torch.ones(1),) * 2,
            "The input's 2 items are the arguments",
        ),
        (nn.Linear(1, 1), [torch.ones(1)] * 2, "Lists in the rows of data"),
        (
            nn.Linear(1, 1),
            {"x": torch.ones(1)},
            "forward is called with the batch's 'x'",
        ),
    ],
    ids=["inner function", "tuple", "list", "names"],
)
def test_hint_for_a_call_is_of_the_models_own_forward(
    model: nn.Module, input: Any, expected: str
) -> None:
    with pytest.raises(TypeError) as caught:
        call_model(model, input)
    hint = find_model_hint(caught.value, model, input, torch.ones(1))
    assert hint[: len(expected) or None] == expected


class Ragged(Tensor):
    """A tensor without a shape, as a nested one."""

    @property
    def shape(self) -> Any:
        raise RuntimeError("no sizes")


def test_error_of_the_user_stays_where_no_hint_can_be_found() -> None:
    error, target = ZeroDivisionError("mine"), torch.ones(2, 3).as_subclass(Ragged)
    with pytest.raises(RuntimeError, match="no sizes"):
        find_loss_hint(torch.zeros(2, 3), target)
    add_hint(error, find_loss_hint, torch.zeros(2, 3), target)
    assert not hasattr(error, "__notes__")


def test_error_of_names_or_of_an_own_step_gets_no_hint_on_prediction_and_target() -> (
    None
):
    def misspelt(pred: Tensor, target: Tensor) -> Any:
        return pred.mean() * torch.no_such_name  # type: ignore[attr-defined]

    class Inplace(Net):
        def step(self) -> Tensor:
            pred = self(self.ctx.input).exp()
            loss = pred.mean()
            pred.mul_(2)
            return loss

    for learner in (setup(loss=misspelt), setup(Inplace, None)):
        with pytest.raises(Exception, match=r"no_such_name|inplace") as caught:
            fit(learner)
        assert not [n for n in caught.value.__notes__ if n.startswith("hint")]
