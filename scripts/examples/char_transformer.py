"""Character language model: warm-up and cosine, clipping, accumulation, bf16, samples."""

from __future__ import annotations

import argparse
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import harness
from harness.callbacks import GradientClip, LRScheduler

LENGTH = 32
TEXT = inspect.getsource(argparse)[:80_000]
LETTERS = sorted(set(TEXT))


class Transformer(nn.Module):
    """A small decoder: each character sees those before it."""

    ctx: harness.FitContext
    mask: Tensor

    def __init__(self, width: int = 64, depth: int = 1, heads: int = 4) -> None:
        super().__init__()
        self.letters = nn.Embedding(len(LETTERS), width)
        self.places = nn.Embedding(LENGTH, width)
        layer = nn.TransformerEncoderLayer(
            *(width, heads, 4 * width),
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, len(LETTERS))
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, codes: Tensor) -> Tensor:
        """Scores ``[batch, length, letters]`` of the next character at each position."""
        size = codes.shape[1]
        places = torch.arange(size, device=codes.device)
        hidden = self.letters(codes) + self.places(places)
        mask = self.mask[:size, :size]
        scores: Tensor = self.head(self.layers(hidden, mask=mask, is_causal=True))
        return scores

    def loss(self, pred: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy in nats per character."""
        return F.cross_entropy(pred.flatten(0, 1), target.flatten())


class Sample(harness.Callback):
    """Writes sampled text into the records after each epoch."""

    def on_epoch_end(self) -> None:
        """Draw one character after another."""
        model, codes = self.ctx.model.eval(), [LETTERS.index(" ")]
        generator = torch.Generator().manual_seed(0)  # not that of the training
        for _ in range(80):
            seen = torch.tensor([codes[-LENGTH:]], device=self.ctx.device)
            shares = F.softmax(model(seen)[0, -1].cpu() / 0.7, dim=0)
            codes.append(int(torch.multinomial(shares, 1, generator=generator)))
        self.ctx.log("samples", "valid", "".join(LETTERS[code] for code in codes))


def warm_up(opt: torch.optim.Optimizer, total_steps: int, share: float = 0.1) -> Any:
    """Linear warm-up to the full rate, then cosine decay to 0."""
    schedules = torch.optim.lr_scheduler
    first = max(1, int(share * total_steps))
    linear = schedules.LinearLR(opt, 0.1, total_iters=first)
    cosine = schedules.CosineAnnealingLR(opt, total_steps - first)
    return schedules.SequentialLR(opt, [linear, cosine], [first])


def main(
    tracker: object = None, precision: str | None = None, epochs: int = 2
) -> tuple[float, str]:
    """Train on the source of a Python module, and print a sample."""
    if precision is None:  # few CPUs are fast at bfloat16
        precision = "bf16" if torch.cuda.is_available() else "fp32"
    codes = torch.tensor([LETTERS.index(letter) for letter in TEXT])
    pieces = codes.unfold(0, LENGTH + 1, 16)
    cut = len(pieces) * 9 // 10
    train, valid = ((p[:, :-1], p[:, 1:]) for p in (pieces[:cut], pieces[cut:]))
    learner = harness.setup(Transformer, optimizer=torch.optim.AdamW)
    fitted = learner.set_opt_hparams(lr=3e-3, weight_decay=0.01).fit(
        train,
        epochs,
        valid,
        callbacks=[
            Sample(),
            GradientClip(1.0),
            LRScheduler(
                warm_up, call_on="on_train_batch_after_step", total_steps="auto"
            ),
        ],
        accelerator=harness.accelerator(precision=precision, accumulate=2),
        seed=1,
        tracker=tracker,
    )
    loss = fitted.records["metrics"]["valid"][-1]["loss"]
    sample = fitted.records["samples"]["valid"][-1]
    print(f"{loss:.2f} nats per character, {len(TEXT)} characters\n{sample}")
    return loss, sample


if __name__ == "__main__":
    main()
