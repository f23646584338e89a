"""K folds: each row is held out once; the runs share an experiment of MLflow."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import StratifiedKFold
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

import harness


class Net(nn.Sequential):
    """Two layers on thirty measurements."""

    def __init__(self, hidden: int = 32) -> None:
        super().__init__(
            *(nn.BatchNorm1d(30), nn.Linear(30, hidden), nn.ReLU()),
            nn.Linear(hidden, 2),
        )


def main(tracker: object = None) -> tuple[float, float]:
    """Train five times, and print mean and spread of the accuracy on held-out rows."""
    data = load_breast_cancer()
    x, y = torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target)
    learner = harness.setup(
        Net,
        loss=nn.CrossEntropyLoss(),
        optimizer=torch.optim.AdamW,
        metrics={"accuracy": MulticlassAccuracy(num_classes=2, average="micro")},
    ).set_opt_hparams(lr=1e-2)
    folds = StratifiedKFold(n_splits=5, shuffle=True, random_state=0).split(x, y)
    found = []
    for number, (train, valid) in enumerate(folds, start=1):
        run = tracker
        if tracker is None:
            run = {"experiment": "folds", "name": f"fold {number}"}
        fitted = learner.fit((x[train], y[train]), 5, seed=number, tracker=run)
        found.append(fitted.evaluate((x[valid], y[valid]))["accuracy"])
    mean, spread = float(np.mean(found)), float(np.std(found, ddof=1))
    print(
        f"accuracy {mean:.3f}, standard deviation {spread:.3f} over {len(found)} folds"
    )
    return mean, spread


if __name__ == "__main__":
    main()
