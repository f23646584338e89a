"""Contrastive learning without labels, then a linear probe on few labels."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

import harness


class SimCLR(nn.Module):
    """Learns features: close for two views of an image, and far from other images."""

    def __init__(self, width: int = 64, temperature: float = 0.2) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(32 * 16, width), nn.ReLU()),
        )
        self.head = nn.Linear(width, 32)
        self.temperature = temperature

    def predict(self, images: Tensor) -> Tensor:
        """Features ``[batch, width]``, without the head."""
        features: Tensor = self.body(images)
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings ``[2 * batch, 32]``: first one view of each image, then the other."""
        views = torch.cat([view(images), view(images)])
        return F.normalize(self.head(self.body(views)), dim=1)

    def loss(self, pred: Tensor, _: object) -> Tensor:
        """NT-Xent: find the other view among all."""
        likeness = pred @ pred.T / self.temperature
        likeness.fill_diagonal_(-torch.inf)
        places = torch.arange(len(pred), device=pred.device)
        return F.cross_entropy(likeness, places.roll(len(pred) // 2))


def view(images: Tensor) -> Tensor:
    """Move each image by up to a pixel, change its contrast, and add noise."""
    count = len(images)
    shift = torch.randint(-1, 2, (count, 2, 1)) / 4  # a pixel is a quarter
    linear = torch.eye(2).expand(count, 2, 2) + 0.15 * torch.randn(count, 2, 2)
    grid = F.affine_grid(
        torch.cat([linear, shift], 2).to(images), list(images.shape), False
    )
    moved = F.grid_sample(images, grid, align_corners=False)
    contrast = 1 + 0.2 * torch.randn(count, 1, 1, 1).to(images)
    return moved * contrast + 0.1 * torch.randn_like(images)


def main(tracker: object = None) -> dict[str, float]:
    """Compare probes of 50 labels: on trained features, and on the pixels."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    digits = torch.tensor(data.target)
    pretrained = (
        harness.setup(SimCLR, optimizer=torch.optim.Adam)
        .set_opt_hparams(lr=2e-3)
        .fit(
            *(images, 12),
            dataloader_options={"batch_size": 128},
            seed=1,
            tracker=tracker,
        )
    )
    accuracy = {"accuracy": MulticlassAccuracy(num_classes=10, average="micro")}
    probe = harness.setup(
        nn.Linear,
        loss=nn.CrossEntropyLoss(),
        optimizer=torch.optim.Adam,
        metrics=accuracy,
    ).set_opt_hparams(lr=0.02, weight_decay=1e-3)
    found = {}
    for name, features in {
        "pixels": images.flatten(1),
        "features": pretrained.predict(images),
    }.items():
        scaled = (features - features.mean(0)) / (features.std(0) + 1e-3)
        fitted = probe.set_hparams(in_features=scaled.shape[1], out_features=10).fit(
            (scaled[:50], digits[:50]), 60, seed=1, tracker=tracker
        )
        found[name] = fitted.evaluate((scaled[50:], digits[50:]))["accuracy"]
        print(f"probe on {name}: {found[name]:.1%}")
    return found


if __name__ == "__main__":
    main()
