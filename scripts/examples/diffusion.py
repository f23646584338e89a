"""Diffusion: learn to remove noise, with averaged weights, and draw new points."""

from __future__ import annotations

import torch
from sklearn.datasets import make_moons
from torch import Tensor, nn
from torch.nn import functional as F

import harness
from harness.callbacks import EMA


class Diffusion(nn.Module):
    """Predicts the noise in points that were mixed with it."""

    ctx: harness.FitContext
    kept: Tensor

    def __init__(self, steps: int = 40, width: int = 128) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Linear(2 + 16, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()),
            nn.Linear(width, 2),
        )
        angles = torch.linspace(0, torch.pi / 2, steps + 2)[1:-1]
        self.register_buffer("kept", angles.cos().square())  # share of the point
        self.steps = steps

    def forward(self, points: Tensor, time: Tensor) -> Tensor:
        """Noise in `points` at each `time`, which counts from 0."""
        phase = (time + 1).unsqueeze(1) / self.steps * 2.0 ** torch.arange(8).to(points)
        return self.net(torch.cat([points, phase.sin(), phase.cos()], dim=1))

    def step(self) -> Tensor:
        """Return the loss; the default ``fit`` does the rest."""
        points = self.ctx.input
        time = torch.randint(self.steps, (len(points),), device=points.device)
        noise, kept = torch.randn_like(points), self.kept[time].unsqueeze(1)
        mixed = kept.sqrt() * points + (1 - kept).sqrt() * noise
        return F.mse_loss(self(mixed, time), noise)

    @torch.no_grad()
    def sample(self, count: int) -> Tensor:
        """Points ``[count, 2]``, from noise to data in all steps."""
        points = torch.randn(count, 2)
        for time in reversed(range(self.steps)):
            kept = self.kept[time]
            before = self.kept[time - 1] if time else torch.ones(())
            noise = self(points, torch.full((count,), time))
            clean = (points - (1 - kept).sqrt() * noise) / kept.sqrt()
            points = before.sqrt() * clean.clamp(-3, 3) + (1 - before).sqrt() * noise
        return points


def main(tracker: object = None) -> dict[str, float]:
    """Train on two moons, and print the median distance of new points from them."""
    torch.manual_seed(1)
    moons = torch.tensor(make_moons(3000, noise=0.03, random_state=0)[0])
    moons = ((moons - moons.mean(0)) / moons.std(0)).float()
    learner = harness.setup(Diffusion, optimizer=torch.optim.Adam)
    fitted = learner.set_opt_hparams(lr=5e-3).fit(
        moons,
        30,
        callbacks=[EMA(0.99)],
        dataloader_options={"batch_size": 64},
        seed=1,
        tracker=tracker,
    )
    found = {"noise": torch.randn(500, 2), "samples": fitted.model.sample(500)}
    away = {n: float(torch.cdist(p, moons).amin(1).median()) for n, p in found.items()}
    print(
        ", ".join(f"{name}: {value:.3f} from the moons" for name, value in away.items())
    )
    return away


if __name__ == "__main__":
    main()
