"""Handwritten digits on several ranks, by DeepSpeed.

On two GPUs:     deepspeed --num_gpus 2 scripts/examples/train_deepspeed.py
on CPU ranks:    torchrun --nproc-per-node 2 scripts/examples/train_deepspeed.py
on one device:   python scripts/examples/train_deepspeed.py --stage 1

Each step uses 32 rows in total, on any number of ranks.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

import harness


class Net(nn.Module):
    """Two hidden layers."""

    def __init__(self, hidden: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(64, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Scores ``[batch, 10]`` of the digits on images ``[batch, 64]``."""
        scores: Tensor = self.layers(images)
        return scores


def digits() -> tuple[Tensor, Tensor]:
    """All 1,797 images, scaled to 0..1, and their digits."""
    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)


def main() -> None:
    """Train, and print the accuracy on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", type=int, default=2, help="ZeRO stage, 0 to 3")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16")
    parser.add_argument("--epochs", type=int, default=5)
    # Added by DeepSpeed's launcher; the accelerator reads the environment instead.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()

    # DeepSpeed's own config. "auto" values are filled in from the learner and the loader.
    accelerator = harness.accelerator(
        {
            "train_batch_size": "auto",
            "zero_optimization": {"stage": options.stage},
            "bf16": {"enabled": options.bf16},
        }
    )
    learner = harness.setup(
        Net,
        loss=nn.CrossEntropyLoss(),
        optimizer=torch.optim.AdamW,
        metrics={"accuracy": MulticlassAccuracy(num_classes=10, average="micro")},
    ).set_opt_hparams(lr=1e-3)
    fitted = learner.fit(
        digits(),
        epochs=options.epochs,
        valid_data=0.2,
        accelerator=accelerator,
        dataloader_options={"batch_size": max(1, 32 // accelerator.world_size)},
        seed=2,
        tracker={"experiment": "digits-deepspeed"},
    )
    if accelerator.is_main:
        accuracy = fitted.get_metrics().query("set == 'valid' and metric == 'accuracy'")
        print(f"ranks: {accelerator.world_size}, ZeRO: {options.stage}")
        print(f"validation accuracy: {accuracy['value'].iloc[-1]:.4f}")


if __name__ == "__main__":
    main()
