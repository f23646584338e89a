"""Physics-informed net: solve an equation by its residual, with Adam first, then LBFGS."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import harness


class PINN(nn.Module):
    """A function u with u'' = -pi^2 sin(pi x) on [-1, 1], and 0 at both ends."""

    ctx: harness.FitContext

    def __init__(self, width: int = 20) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()),
            nn.Linear(width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """U at each x."""
        u: Tensor = self.net(x)
        return u

    def loss(self, _: Tensor, target: object) -> dict[str, Tensor]:
        """Return how far u is from the equation, and from the values at the ends."""
        with torch.enable_grad():  # derivatives are needed in validation too
            x = self.ctx.input.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self(x).sum(), x, create_graph=True)
            (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        residual = bend + math.pi**2 * (math.pi * x).sin()
        ends = self(torch.tensor([[-1.0], [1.0]], device=x.device))
        return {"residual": residual.square().mean(), "ends": 10 * ends.square().mean()}


def main(tracker: object = None) -> dict[str, float]:
    """Train with both optimizers, and compare with the solution, sin(pi x)."""
    x = torch.linspace(-1, 1, 64).unsqueeze(1)
    options = {"batch_size": 64, "shuffle": False}  # all points at once
    adam = harness.setup(PINN, optimizer=torch.optim.Adam).set_opt_hparams(lr=5e-3)
    rough = adam.fit(x, 200, dataloader_options=options, seed=1, tracker=tracker)
    lbfgs = harness.setup(PINN, optimizer=torch.optim.LBFGS)
    fine = lbfgs.set_opt_hparams(max_iter=20, line_search_fn="strong_wolfe").fit(
        x, 12, start=rough, dataloader_options=options, tracker=tracker
    )
    solution = (math.pi * x).sin()
    found = {
        name: float((fitted.predict(x) - solution).abs().max())
        for name, fitted in {"Adam": rough, "LBFGS": fine}.items()
    }
    for name, error in found.items():
        print(f"after {name}: at most {error:.5f} from the solution")
    return found


if __name__ == "__main__":
    main()
