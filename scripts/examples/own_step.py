"""A custom step: train on attacked images too, and stay accurate under attack."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import harness


class Net(nn.Module):
    """A classifier that may train on images that an attacker has changed."""

    ctx: harness.FitContext

    def __init__(self, share: float = 0.5, size: float = 0.1) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        self.share, self.size = share, size

    def forward(self, images: Tensor) -> Tensor:
        """Scores ``[batch, 10]`` of images ``[batch, 64]``."""
        scores: Tensor = self.layers(images)
        return scores

    def attack(self, images: Tensor, digits: Tensor) -> Tensor:
        """Move each pixel by `size` in the direction that makes the loss larger."""
        with torch.enable_grad():  # gradients are off in validation
            images = images.clone().requires_grad_()
            loss = F.cross_entropy(self(images), digits)
            (gradient,) = torch.autograd.grad(loss, images)
        return (images + self.size * gradient.sign()).clamp(0, 1).detach()

    def step(self) -> dict[str, Tensor]:
        """Return the parts of the loss, in training and in validation."""
        images, digits = self.ctx.batch
        attacked = self(self.attack(images, digits))
        right = (attacked.argmax(1) == digits).float().mean()
        self.ctx.log_metric("accuracy_attacked", right)
        parts = {"clean": F.cross_entropy(self(images), digits)}
        if self.share:
            parts["attacked"] = F.cross_entropy(attacked, digits)
        weights = {"clean": 1 - self.share, "attacked": self.share}
        return {name: weights[name] * part for name, part in parts.items()}


def main(tracker: object = None) -> dict[str, float]:
    """Train with and without attacks, and compare the accuracy under attack."""
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    data = images, torch.tensor(digits.target)
    learner = harness.setup(Net, optimizer=torch.optim.Adam).set_opt_hparams(lr=3e-3)
    found = {}
    for name, share in {"plain": 0.0, "adversarial": 0.5}.items():
        fitted = learner.set_hparams(share=share).fit(
            data, 4, valid_data=0.2, seed=1, tracker=tracker
        )
        last = fitted.records["metrics"]["valid"][-1]
        found[name] = last["accuracy_attacked"]
        print(f"{name}: {found[name]:.3f} accuracy on attacked images")
    return found


if __name__ == "__main__":
    main()
