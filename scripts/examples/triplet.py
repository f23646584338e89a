"""Triplet loss: images of a digit are close to each other, and far from other digits."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

import harness


class Triplets(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """An image, another one of the same digit, and one of another digit."""

    def __init__(self, images: Tensor, digits: Tensor) -> None:
        self.images, self.digits = images, digits
        self.rows = [(digits == digit).nonzero()[:, 0] for digit in range(10)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[tuple[Tensor, Tensor, Tensor]]:
        digit = int(self.digits[index])
        other = (digit + int(torch.randint(1, 10, ()))) % 10
        positive, negative = (self._draw(self.rows[one]) for one in (digit, other))
        return ((self.images[index], positive, negative),)

    def _draw(self, rows: Tensor) -> Tensor:
        return self.images[rows[torch.randint(len(rows), ())]]


class Embedding(nn.Module):
    """Embeds images on a sphere."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, width))

    def embed(self, images: Tensor) -> Tensor:
        """Embeddings ``[batch, width]`` of length 1."""
        return F.normalize(self.layers(images), dim=1)

    predict = embed  # predictions are of single images

    def forward(self, *images: Tensor) -> tuple[Tensor, ...]:
        """Embeddings of the three images of each row."""
        return tuple(map(self.embed, images))

    def loss(self, pred: tuple[Tensor, Tensor, Tensor], _: object) -> Tensor:
        """Return the triplet margin loss."""
        return F.triplet_margin_loss(*pred, margin=0.5)


def classify(
    fitted: harness.Fitted, known: Tensor, digits: Tensor, new: Tensor
) -> Tensor:
    """Digits of the nearest known images."""
    nearest = torch.cdist(fitted.predict(new), fitted.predict(known)).argmin(1)
    return digits[nearest]


def main(tracker: object = None) -> float:
    """Train, and classify test images by the nearest of ten examples for each digit."""
    data = load_digits()
    images = torch.tensor(data.data, dtype=torch.float32) / 16
    digits = torch.tensor(data.target)
    learner = harness.setup(Embedding, optimizer=torch.optim.Adam)
    fitted = learner.set_opt_hparams(lr=3e-3).fit(
        Triplets(images[:1400], digits[:1400]), 8, seed=1, tracker=tracker
    )
    found = classify(fitted, images[:100], digits[:100], images[1400:])
    accuracy = float((found == digits[1400:]).float().mean())
    print(f"{accuracy:.1%} of 397 new images have a nearest image of the same digit")
    return accuracy


if __name__ == "__main__":
    main()
