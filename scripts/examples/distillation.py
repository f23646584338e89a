"""Distillation: a small student learns from the scores of a large teacher."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

import harness


class Net(nn.Module):
    """One hidden layer of any width."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Scores ``[batch, 10]`` of images ``[batch, 64]``."""
        scores: Tensor = self.layers(images)
        return scores


class Distill(nn.Module):
    """Distance to the teacher's softened scores, and to the labels where they are known."""

    def __init__(self, temperature: float = 3.0) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, pred: Tensor, digits: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss; a batch holds ``(images, digits, teacher's scores)``."""
        own, soft = (
            F.log_softmax(scores / self.temperature, 1) for scores in (pred, teacher)
        )
        imitation = F.kl_div(own, soft, reduction="batchmean", log_target=True)
        known = F.cross_entropy(pred, digits, ignore_index=-1, reduction="sum")
        return self.temperature**2 * imitation + known / len(digits)


def main(tracker: object = None) -> dict[str, float]:
    """Train a teacher, and two students with few labels: one by it, one without it."""
    data = load_digits()
    images = torch.tensor(data.data, dtype=torch.float32) / 16
    digits = torch.tensor(data.target)
    train, test = slice(0, 1400), (images[1400:], digits[1400:])
    few = digits[train].clone()
    few[100:] = -1  # the student sees a hundred labels

    accuracy = {"accuracy": MulticlassAccuracy(num_classes=10, average="micro")}
    teacher = (
        harness.setup(Net, loss=nn.CrossEntropyLoss(), optimizer=torch.optim.Adam)
        .set_hparams(hidden=256)
        .set_opt_hparams(lr=3e-3)
        .fit((images[train], digits[train]), 8, seed=1, tracker=tracker)
    )
    scores = teacher.predict(images[train])  # once for each image, in order
    found = {"teacher": teacher.evaluate(test, metrics=accuracy)["accuracy"]}

    small = {"hidden": 16}
    student = harness.setup(Net, loss=Distill(), optimizer=torch.optim.Adam)
    alone = harness.setup(
        Net, loss=nn.CrossEntropyLoss(), optimizer=torch.optim.Adam, metrics=accuracy
    )
    for name, learner, rows in (
        ("student", student, (images[train], few, scores)),
        ("without a teacher", alone, (images[:100], digits[:100])),
    ):
        epochs = 10 * 1400 // len(rows[0])  # the same number of steps
        fitted = (
            learner.set_hparams(**small)
            .set_opt_hparams(lr=1e-2)
            .fit(rows, epochs, seed=1, tracker=tracker)
        )
        found[name] = alone.evaluate(fitted, test)["accuracy"]
    for name, value in found.items():
        print(f"{name}: {value:.1%}")
    return found


if __name__ == "__main__":
    main()
