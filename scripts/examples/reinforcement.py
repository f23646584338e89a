"""Reinforcement learning: a pole is balanced, by games that the model plays in its step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import harness


class Poles:
    """Many carts with a pole; the equations of Barto, Sutton and Anderson (1983)."""

    def __init__(self, count: int) -> None:
        self.state = 0.1 * torch.rand(count, 4) - 0.05  # x, dx, angle, dangle

    def push(self, action: Tensor) -> Tensor:
        """Push each cart to the left (0) or right (1); returns which poles still stand."""
        _, speed, angle, turn = self.state.T
        force = 20.0 * action - 10.0
        inner = (force + 0.05 * turn**2 * angle.sin()) / 1.1
        twist = (9.8 * angle.sin() - angle.cos() * inner) / (
            0.5 * (4 / 3 - 0.1 * angle.cos() ** 2 / 1.1)
        )
        pull = inner - 0.05 * twist * angle.cos() / 1.1
        change = torch.stack([speed, pull, turn, twist], dim=1)
        self.state = self.state + 0.02 * change
        return (self.state[:, 0].abs() < 2.4) & (self.state[:, 2].abs() < math.pi / 15)


class Policy(nn.Module):
    """Pushes left or right."""

    ctx: harness.FitContext

    def __init__(self, num_games: int = 16, longest: int = 120) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 2))
        self.num_games, self.longest = num_games, longest

    def forward(self, state: Tensor) -> Tensor:
        """Scores of both actions."""
        scores: Tensor = self.net(state)
        return scores

    def play(self) -> tuple[Tensor, Tensor]:
        """Log-probability of each action, and which games were still running after it."""
        poles, stands = (
            Poles(self.num_games),
            torch.ones(self.num_games, dtype=torch.bool),
        )
        chosen, alive = [], []
        while stands.any() and len(alive) < self.longest:
            log_shares = self(poles.state).log_softmax(1)
            action = log_shares.exp().multinomial(1)
            chosen.append(log_shares.gather(1, action))
            alive.append(stands)
            stands = stands & poles.push(action.squeeze(1))
        return torch.cat(chosen, dim=1).T, torch.stack(alive).float()

    def step(self) -> Tensor:
        """REINFORCE: actions are better the longer the pole stands afterwards."""
        chosen, alive = self.play()
        left = alive.flip(0).cumsum(0).flip(0)  # steps until each game ends
        mean = (left * alive).sum() / alive.sum()
        spread = ((left - mean).square() * alive).sum() / alive.sum()
        better = (left - mean) / (spread.sqrt() + 1e-6)
        self.ctx.log_metric("steps", alive.sum(0).mean())
        return -(chosen * better * alive).sum() / alive.sum()


def main(tracker: object = None) -> tuple[float, float]:
    """Play, and print how long the pole stands at first and at last."""
    learner = harness.setup(Policy, optimizer=torch.optim.Adam).set_opt_hparams(lr=2e-2)
    games = torch.arange(8)  # only their number counts
    options = {"batch_size": 1}
    fitted = learner.fit(games, 5, dataloader_options=options, seed=1, tracker=tracker)
    steps = [epoch["steps"] for epoch in fitted.records["metrics"]["train"]]
    print(f"the pole stands {steps[0]:.0f} steps at first, {steps[-1]:.0f} at last")
    return steps[0], steps[-1]


if __name__ == "__main__":
    main()
