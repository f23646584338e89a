"""Handwritten digits: 1,797 real images of 8 x 8 pixels, ten classes.

Train:                  harness fit scripts/examples/digits.py:experiment
with another width:     harness fit scripts/examples/digits.py:experiment --set hidden=256
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

import harness


class Net(nn.Module):
    """Two convolutions, one pooling, one hidden layer."""

    def __init__(self, hidden: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(64 * 4 * 4, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Scores ``[batch, 10]`` of the digits on images ``[batch, 1, 8, 8]``."""
        scores: Tensor = self.layers(images)
        return scores


def digits() -> tuple[Tensor, Tensor]:
    """All images, scaled to 0..1, and their digits."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32) / 16
    return images.unsqueeze(1), torch.tensor(data.target)


def experiment(
    hidden: int = 128, lr: float = 1e-3, epochs: int = 15, seed: int = 2
) -> harness.Experiment:
    """Train on four fifths of the digits, validate on the rest."""
    learner = harness.setup(
        Net,
        loss=nn.CrossEntropyLoss(),
        optimizer=torch.optim.AdamW,
        metrics={"accuracy": MulticlassAccuracy(num_classes=10, average="micro")},
    )
    learner = learner.set_hparams(hidden=hidden).set_opt_hparams(lr=lr)
    return harness.Experiment(
        learner=learner,
        data=digits(),
        valid_data=0.2,
        epochs=epochs,
        mlflow_experiment="digits",
        seed=seed,
    )
