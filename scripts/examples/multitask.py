"""Several tasks: the loss is a module that learns how much each task counts."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanAbsoluteError
from torchmetrics.classification import MulticlassAccuracy

import harness


class Net(nn.Module):
    """One body, and a head for each task."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, hidden), nn.ReLU())
        self.digit, self.ink = nn.Linear(hidden, 10), nn.Linear(hidden, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Scores of the digits, and the amount of ink."""
        hidden = self.body(images)
        return {"digit": self.digit(hidden), "ink": self.ink(hidden).squeeze(1)}


class LearnedWeights(nn.Module):
    """Losses weighted by learned uncertainties (Kendall et al. 2018, section 3.2)."""

    def __init__(self) -> None:
        super().__init__()
        names = ("digit", "ink")
        self.log_vars = nn.ParameterDict(
            {n: nn.Parameter(torch.zeros(())) for n in names}
        )

    def forward(
        self, pred: dict[str, Tensor], target: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the parts; both are recorded, and their sum is the loss."""
        parts = {
            "digit": F.cross_entropy(pred["digit"], target["digit"]),
            "ink": F.mse_loss(pred["ink"], target["ink"]),
        }
        return {
            name: part * (-self.log_vars[name]).exp() + self.log_vars[name] / 2
            for name, part in parts.items()
        }


def main(tracker: object = None) -> dict[str, float]:
    """Learn the digit of an image and its amount of ink, which has another scale."""
    data = load_digits()
    images = torch.tensor(data.data, dtype=torch.float32) / 16
    target = {"digit": torch.tensor(data.target), "ink": images.sum(1)}
    accuracy = MulticlassAccuracy(num_classes=10, average="micro")
    metrics = {
        "accuracy": harness.on(accuracy, pred="digit", target="digit"),
        "ink_error": harness.on(MeanAbsoluteError(), pred="ink", target="ink"),
    }
    learner = harness.setup(
        Net, loss=LearnedWeights(), optimizer=torch.optim.Adam, metrics=metrics
    ).set_opt_hparams(lr=1e-2)
    fitted = learner.fit((images, target), 10, valid_data=0.2, seed=1, tracker=tracker)
    last = fitted.records["metrics"]["valid"][-1]
    found = {name: last[name] for name in metrics}
    weights = {name: (-v).exp().item() for name, v in fitted.loss.log_vars.items()}
    print(f"accuracy {found['accuracy']:.1%}, ink off by {found['ink_error']:.2f}")
    print("weights: " + ", ".join(f"{name} {w:.2f}" for name, w in weights.items()))
    return found | {f"weight of {name}": weight for name, weight in weights.items()}


if __name__ == "__main__":
    main()
