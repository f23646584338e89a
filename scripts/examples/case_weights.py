"""Case weights in the loss and in the metrics: some rows count more than others."""

from __future__ import annotations

import torch
from sklearn.datasets import make_classification
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric

import harness


def weighted_loss(pred: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean of weighted losses; batches are ``(input, target, weight)``."""
    return (weight * F.cross_entropy(pred, target, reduction="none")).mean()


class WeightedAccuracy(MeanMetric):
    """Weighted share of correct rows, exact over all batches of an epoch."""

    ctx: harness.Context
    higher_is_better = True  # type: ignore[assignment]

    def update(self, pred: Tensor, target: Tensor) -> None:  # type: ignore[override]
        """Add a batch; its weights are the third item."""
        right = (pred.argmax(1) == target).float()
        super().update(right, self.ctx.batch[2])


def main(tracker: object = None) -> dict[str, float]:
    """Train with and without weights where one class is rare and matters more."""
    x, y = make_classification(
        2000, n_features=8, n_informative=4, weights=[0.9], flip_y=0.1, random_state=1
    )
    features, target = torch.tensor(x, dtype=torch.float32), torch.tensor(y)
    weight = torch.where(target == 1, 9.0, 1.0)
    weight = weight / weight.mean()  # so that the mean loss is the weighted mean
    learner = harness.setup(
        nn.Linear,
        loss=weighted_loss,
        optimizer=torch.optim.Adam,
        metrics={"accuracy": WeightedAccuracy()},
    )
    learner = learner.set_hparams(in_features=8, out_features=2)
    valid = features[1500:], target[1500:], weight[1500:]
    found = {}
    for name, own in {"equal": torch.ones(2000), "weighted": weight}.items():
        train = features[:1500], target[:1500], own[:1500]
        fitted = learner.set_opt_hparams(lr=2e-2).fit(
            train, 5, valid, seed=1, tracker=tracker
        )
        found[name] = fitted.records["metrics"]["valid"][-1]["accuracy"]
        print(f"{name} weights in training: weighted accuracy {found[name]:.1%}")
    return found


if __name__ == "__main__":
    main()
