#!/usr/bin/env python3
"""Cost of a training loop: harness and other libraries, compared with a hand-written loop.

    python scripts/bench/peers.py [--env .peers] [--epochs 20] [--rounds 5]

Makes an environment of its own with the libraries of `PEERS`, once, and measures in it: harness
does not depend on them. The work is that of ``loop.py``: an MLP 64-128-10 on scikit-learn's
digits, batches of 32 in the same order of size, AdamW, loss and accuracy of training and
validation in each epoch, one thread; no display, no logger, no checkpoint. All contenders take
turns in one process. A ratio is that of the processor time of a fit to that of the hand-written
loop of as many epochs in the same round; the median of the rounds. "step" leaves out what a
fit costs once: it is taken from fits of two lengths. "first" is a fit of some epochs as it comes.
"""

from __future__ import annotations

# ruff: noqa: E402
import sys

# The logging.py in this folder must not hide the standard library's.
sys.path = [path for path in sys.path if not path.endswith("scripts/bench")]

import argparse
import importlib.util
import logging
import os
import statistics
import subprocess
import time
import venv
import warnings
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from torch import nn

PEERS = ("lightning", "accelerate", "pytorch-ignite", "fastai", "keras", "skorch")
ROOT = Path(__file__).parents[2]

Fit = Callable[[Any, Any, int], object]
"""Trains a fresh model on a loader, with validation on another, for some epochs."""


def run_in_environment(folder: Path) -> int:
    """Run this script in an environment that has the peers; makes it if it is not there."""
    python = str(folder / "bin" / "python")
    if not Path(python).exists():
        venv.create(folder, with_pip=True)
    constraints = str(ROOT / "scripts" / "constraints.txt")
    install = [python, "-m", "pip", "install", "-qq", "--constraint", constraints]
    subprocess.run([*install, "--editable", str(ROOT), *PEERS], check=True)
    return subprocess.call([python, *sys.argv, "--here"])


def load_work() -> Any:
    """The model, the data and the hand-written loop of ``loop.py``."""
    file = ROOT / "scripts" / "bench" / "loop.py"
    spec = importlib.util.spec_from_file_location("bench_loop", file)
    assert spec is not None
    assert spec.loader is not None
    work = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(work)
    return work


# ----------------------------------------- each library, as its own tutorials use it


def by_hand(work: Any) -> Fit:
    def fit(train: Any, valid: Any, epochs: int) -> object:
        loop = work.Raw(train, valid)
        return [loop.run_epoch() for _ in range(epochs)][-1]

    return fit


def harness(work: Any) -> Fit:
    def fit(train: Any, valid: Any, epochs: int) -> object:
        options = {"seed": 0, "tracker": False, "verbose": False}
        return work.LEARNER.fit(train, epochs, valid, **options)

    return fit


def lightning(work: Any) -> Fit:
    import lightning
    from torchmetrics.classification import MulticlassAccuracy

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.loss_fn = work.Net(), nn.CrossEntropyLoss()
            self.fit_accuracy = MulticlassAccuracy(num_classes=10)
            self.valid_accuracy = MulticlassAccuracy(num_classes=10)

        def training_step(self, batch: Any) -> torch.Tensor:
            return self.share(batch, "fit", self.fit_accuracy)

        def validation_step(self, batch: Any) -> torch.Tensor:
            return self.share(batch, "valid", self.valid_accuracy)

        def share(self, batch: Any, name: str, accuracy: nn.Module) -> torch.Tensor:
            x, y = batch
            pred = self.net(x)
            loss = self.loss_fn(pred, y)
            accuracy(pred, y)
            self.log(f"{name}_loss", loss, on_step=False, on_epoch=True)
            self.log(f"{name}_accuracy", accuracy, on_step=False, on_epoch=True)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.net.parameters())

    def fit(train: Any, valid: Any, epochs: int) -> object:
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(Module(), train, valid)
        return trainer.callback_metrics

    return fit


def accelerate(work: Any) -> Fit:
    from accelerate import Accelerator

    raw: Any = work.Raw

    class Loop(raw):
        """The loop by hand, with the calls that Accelerate asks for."""

        net: Any
        opt: Any

        def __init__(self, train: Any, valid: Any) -> None:
            super().__init__(train, valid)
            self.accelerator = Accelerator(cpu=True)
            own = (self.net, self.opt, train, valid)
            prepared = self.accelerator.prepare(*own)
            self.net, self.opt, self.train, self.valid = prepared

        def backward(self, loss: torch.Tensor) -> None:
            self.accelerator.backward(loss)

    def fit(train: Any, valid: Any, epochs: int) -> object:
        loop = Loop(train, valid)
        return [loop.run_epoch() for _ in range(epochs)][-1]

    return fit


def ignite(work: Any) -> Fit:
    from ignite import engine
    from ignite.metrics import Accuracy, Loss

    def fit(train: Any, valid: Any, epochs: int) -> object:
        net, loss_fn = work.Net(), nn.CrossEntropyLoss()
        opt = torch.optim.AdamW(net.parameters())
        trainer = engine.create_supervised_trainer(
            net, opt, loss_fn, output_transform=lambda x, y, pred, loss: (pred, y)
        )
        evaluator = engine.create_supervised_evaluator(net)
        for own in (trainer, evaluator):
            Accuracy().attach(own, "accuracy")
            Loss(loss_fn).attach(own, "loss")
        done = engine.Events.EPOCH_COMPLETED
        trainer.add_event_handler(done, lambda: evaluator.run(valid))
        trainer.run(train, max_epochs=epochs)
        return evaluator.state.metrics

    return fit


def fastai(work: Any) -> Fit:
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.metrics import accuracy
    from fastai.optimizer import OptimWrapper

    def adamw(params: Any, **options: Any) -> Any:
        return OptimWrapper(params, torch.optim.AdamW, **options)

    def fit(train: Any, valid: Any, epochs: int) -> object:
        learner = Learner(
            DataLoaders(train, valid),
            work.Net(),
            loss_func=nn.CrossEntropyLoss(),
            opt_func=adamw,
            metrics=accuracy,
        )
        learner.recorder.train_metrics = True
        with learner.no_logging():  # bars come with another import
            learner.fit(epochs)
        return learner.recorder.values[-1]

    return fit


def keras(work: Any) -> Fit:
    os.environ["KERAS_BACKEND"] = "torch"
    import keras

    def fit(train: Any, valid: Any, epochs: int) -> object:
        wrapped = keras.layers.TorchModuleWrapper(work.Net(), output_shape=(None, 10))
        model = keras.Sequential([wrapped])
        model.compile(
            keras.optimizers.AdamW(1e-3),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        fitted = model.fit(train, validation_data=valid, epochs=epochs, verbose=0)
        return fitted.history

    return fit


def skorch(work: Any) -> Fit:
    from skorch import NeuralNetClassifier
    from skorch.callbacks import EpochScoring
    from skorch.helper import predefined_split

    def fit(train: Any, valid: Any, epochs: int) -> object:
        of_training = {"on_train": True, "lower_is_better": False}
        net = NeuralNetClassifier(
            work.Net,
            classes=range(10),
            criterion=nn.CrossEntropyLoss,
            optimizer=torch.optim.AdamW,
            batch_size=32,
            iterator_train__shuffle=True,
            iterator_train__drop_last=True,
            max_epochs=epochs,
            train_split=predefined_split(valid.dataset),
            callbacks=[EpochScoring("accuracy", name="train_acc", **of_training)],
            callbacks__print_log=None,
        )
        net.fit(train.dataset, y=None)
        return net.history[-1]

    return fit


MAKERS: dict[str, Callable[[Any], Fit]] = {
    "by hand": by_hand,
    "luz-harness": harness,
    "Lightning": lightning,
    "Accelerate": accelerate,
    "Ignite": ignite,
    "fastai": fastai,
    "Keras": keras,
    "skorch": skorch,
}


def measure(contenders: dict[str, Fit], data: Any, epochs: int, rounds: int) -> None:
    """Print the ratios of each contender to the first of them."""
    lengths = (epochs, 3 * epochs)
    times: dict[tuple[str, int], list[float]] = {}
    for turn in range(rounds + 1):
        for length in lengths:
            for name, fit in contenders.items():
                began = time.process_time()
                fit(data[0], data[1], length if turn else 1)
                if turn:  # the first round warms up
                    taken = time.process_time() - began
                    times.setdefault((name, length), []).append(taken)
    short, long = lengths
    base = next(iter(contenders))

    def per_step(name: str) -> list[float]:
        pairs = zip(times[name, short], times[name, long], strict=True)
        return [(slow - quick) / (long - short) for quick, slow in pairs]

    def ratio(own: list[float], other: list[float]) -> float:
        return statistics.median(a / b for a, b in zip(own, other, strict=True))

    for name in contenders:
        step = ratio(per_step(name), per_step(base))
        first = ratio(times[name, short], times[base, short])
        print(f"  {name:12} {step:6.2f} {first:6.2f}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env", type=Path, default=ROOT / ".peers")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--here", action="store_true", help="in this environment")
    options = parser.parse_args()
    if not options.here:
        return run_in_environment(options.env)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    work = load_work()
    contenders: dict[str, Fit] = {}
    for name, make in MAKERS.items():
        try:
            contenders[name] = make(work)
        except ImportError as error:
            print(f"left out: {name}, {error}")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    found = {each.name: each.version for each in distributions()}
    print(", ".join(f"{n} {found[n]}" for n in ("torch", *PEERS) if n in found))
    forms = {
        "rows": work.loaders(work.Rows(work.TRAIN), work.Rows(work.VALID)),
        "tensors in a loader": work.loaders(work.TRAIN, work.VALID),
    }
    for form, data in forms.items():
        print(f"{form:14} step  {options.epochs} epochs, once included")
        measure(contenders, data, options.epochs, options.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
