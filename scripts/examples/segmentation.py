"""Segmentation: cross-entropy with Dice, and the overlap (IoU) of each class."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassJaccardIndex
from torchmetrics.wrappers import ClasswiseWrapper

import harness

CLASSES = ["ground", "circle", "square"]


class UNet(nn.Module):
    """One level down and up again, with a shortcut."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.enter = block(1, width)
        self.low = block(width, 2 * width)
        self.up = nn.ConvTranspose2d(2 * width, width, 4, stride=4)
        self.leave = nn.Sequential(block(2 * width, width), nn.Conv2d(width, 3, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Scores ``[batch, classes, height, width]`` of images ``[batch, 1, ...]``."""
        high = self.enter(images)
        low = self.low(F.max_pool2d(high, 4))
        scores: Tensor = self.leave(torch.cat([high, self.up(low)], dim=1))
        return scores

    def loss(self, pred: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Both parts are recorded by their names, and their sum is the loss."""
        return {"entropy": F.cross_entropy(pred, target), "dice": dice(pred, target)}


def block(inputs: int, outputs: int) -> nn.Sequential:
    """A convolution with batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        *(nn.BatchNorm2d(outputs), nn.ReLU()),
    )


def dice(pred: Tensor, target: Tensor) -> Tensor:
    """1 minus the Dice overlap, averaged over the classes."""
    shares = pred.softmax(1)
    truth = F.one_hot(target, shares.shape[1]).movedim(-1, 1).to(shares)
    both, either = (shares * truth).sum((0, 2, 3)), (shares + truth).sum((0, 2, 3))
    return 1 - ((2 * both + 1) / (either + 1)).mean()


def draw(count: int, size: int = 24) -> tuple[Tensor, Tensor]:
    """Noisy images of a circle or a square, and the class of each pixel."""
    down, right = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    y, x = torch.randint(6, size - 6, (2, count, 1, 1))
    away = torch.stack([down - y, right - x]).float()
    is_circle, is_square = away.norm(dim=0) < 5.5, away.abs().amax(dim=0) < 5
    kind = torch.randint(1, 3, (count, 1, 1))
    truth = kind * torch.where(kind == 1, is_circle, is_square)
    images = (truth > 0).float() + 0.3 * torch.randn(count, size, size)
    return images.unsqueeze(1), truth


def main(tracker: object = None) -> dict[str, float]:
    """Train, and print the overlap of each class."""
    torch.manual_seed(1)
    overlap = MulticlassJaccardIndex(len(CLASSES), average="none")
    iou = ClasswiseWrapper(overlap, CLASSES, prefix="iou_")
    learner = harness.setup(UNet, optimizer=torch.optim.Adam, metrics={"iou": iou})
    fitted = learner.set_opt_hparams(lr=1e-2).fit(
        draw(480), 6, draw(100), seed=1, tracker=tracker
    )
    found: dict[str, float] = fitted.records["metrics"]["valid"][-1]["iou"]
    print(", ".join(f"{name} {value:.2f}" for name, value in found.items()))
    return found


if __name__ == "__main__":
    main()
