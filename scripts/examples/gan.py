"""Wasserstein GAN with gradient penalty: five critic steps for each generator step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import harness


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    """Two hidden layers of 64."""
    return nn.Sequential(
        *(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()),
        nn.Linear(64, outputs),
    )


class GAN(nn.Module):
    """A generator and a critic, each with its own optimizer."""

    ctx: harness.FitContext

    def __init__(self, num_latents: int = 2, num_critic_steps: int = 5) -> None:
        super().__init__()
        self.gen, self.critic = mlp(num_latents, 2), mlp(2, 1)
        self.num_latents, self.num_critic_steps = num_latents, num_critic_steps

    def set_optimizers(self, lr: float) -> dict[str, torch.optim.Optimizer]:
        """Both by Adam with little momentum, as in the paper."""
        options = {"lr": lr, "betas": (0.5, 0.9)}
        return {
            "critic": torch.optim.Adam(self.critic.parameters(), **options),
            "gen": torch.optim.Adam(self.gen.parameters(), **options),
        }

    def forward(self, latents: Tensor) -> Tensor:
        """Points ``[batch, 2]`` made from noise."""
        points: Tensor = self.gen(latents)
        return points

    def fake(self, count: int) -> Tensor:
        """New points."""
        return self(torch.randn(count, self.num_latents, device=self.ctx.device))

    def penalty(self, real: Tensor, fake: Tensor) -> Tensor:
        """How far the critic's slope is from 1, between real and fake points."""
        with torch.enable_grad():  # gradients are off in validation
            share = torch.rand(len(real), 1, device=real.device)
            between = torch.lerp(real, fake, share).requires_grad_()
            score = self.critic(between).sum()
            (slope,) = torch.autograd.grad(score, between, create_graph=True)
        return (slope.norm(dim=1) - 1).square().mean()

    def step(self) -> None:
        """Several steps of the critic, then one of the generator."""
        ctx, real = self.ctx, self.ctx.input
        for _ in range(self.num_critic_steps if ctx.training else 1):
            with ctx.optimizing("critic"):
                fake = self.fake(len(real)).detach()
                distance = self.critic(real).mean() - self.critic(fake).mean()
                ctx.optimize(self.penalty(real, fake) - distance)
        with ctx.optimizing("gen"):
            ctx.optimize(-self.critic(self.fake(len(real))).mean())
        ctx.log_metric("distance", distance)


ANGLES = torch.arange(6) * (math.pi / 3)
PLACES = torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)


def main(tracker: object = None) -> tuple[int, float]:
    """Train on points around six centers, and count the centers that new points reach."""
    torch.manual_seed(1)
    real = PLACES.repeat(400, 1) + 0.05 * torch.randn(2400, 2)
    fitted = (
        harness.setup(GAN)
        .set_opt_hparams(lr=2e-3)
        .fit(real, 12, dataloader_options={"batch_size": 128}, seed=1, tracker=tracker)
    )
    points = fitted.predict(torch.randn(1000, 2))
    nearest = torch.cdist(points, PLACES).min(dim=1)
    is_near = nearest.values < 0.25
    found, share = len(nearest.indices[is_near].unique()), float(is_near.float().mean())
    print(f"{found} of 6 centers found; {share:.0%} of the points are near one")
    return found, share


if __name__ == "__main__":
    main()
