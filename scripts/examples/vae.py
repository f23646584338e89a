"""Variational autoencoder: a loss of two parts, a warm-up of one, and new images."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import harness


class VAE(nn.Module):
    """Encodes an image as a distribution, and decodes a draw from it."""

    ctx: harness.FitContext

    def __init__(self, num_latents: int = 8, warm_up: int = 5) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU())
        self.mean, self.log_var = (nn.Linear(128, num_latents) for _ in range(2))
        self.decoder = nn.Sequential(
            nn.Linear(num_latents, 128), nn.ReLU(), nn.Linear(128, 64)
        )
        self.warm_up = warm_up

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the pixels, and mean and log variance of the latents."""
        hidden = self.encoder(images)
        mean, log_var = self.mean(hidden), self.log_var(hidden)
        noise = torch.randn_like(mean) if self.training else torch.zeros_like(mean)
        return self.decoder(mean + noise * (log_var / 2).exp()), mean, log_var

    def loss(self, pred: tuple[Tensor, Tensor, Tensor], _: object) -> dict[str, Tensor]:
        """Return both parts, in nats per image; the target is the input."""
        logits, mean, log_var = pred
        pixels = F.binary_cross_entropy_with_logits(
            logits, self.ctx.input, reduction="none"
        )
        kl = (mean.square() + log_var.exp() - 1 - log_var) / 2
        share = min(1.0, self.ctx.epoch / self.warm_up) if self.ctx.training else 1.0
        return {
            "reconstruction": pixels.sum(1).mean(),
            "kl": share * kl.sum(1).mean(),
        }

    @torch.no_grad()
    def sample(self, count: int) -> Tensor:
        """New images ``[count, 8, 8]``."""
        latents = torch.randn(count, self.mean.out_features)
        images: Tensor = self.decoder(latents).sigmoid()
        return images.view(-1, 8, 8)


def main(tracker: object = None) -> tuple[float, Tensor]:
    """Train on scikit-learn's digits, and print three new ones."""
    images = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    learner = harness.setup(VAE, optimizer=torch.optim.Adam).set_opt_hparams(lr=2e-3)
    fitted = learner.fit(images, 15, valid_data=0.2, seed=1, tracker=tracker)
    last = fitted.records["metrics"]["valid"][-1]
    parts = (
        f"{last['reconstruction']:.1f} for the pixels, {last['kl']:.1f} for the code"
    )
    print(f"{last['loss']:.1f} nats per image: {parts}")
    new = fitted.model.sample(3)
    for row in torch.cat([*new], dim=1):
        print("".join(" .:-=+*#%@"[int(pixel * 9.99)] * 2 for pixel in row))
    return last["loss"], new


if __name__ == "__main__":
    main()
