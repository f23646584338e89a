"""Graph net: padded graphs with masks; metrics and losses count nodes, not graphs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import harness


class GraphNet(nn.Module):
    """Each node gets messages from its neighbours, a few times."""

    ctx: harness.FitContext

    def __init__(self, width: int = 32, rounds: int = 3) -> None:
        super().__init__()
        self.enter = nn.Linear(1, width)
        self.rounds = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(rounds))
        self.leave = nn.Linear(width, 1)

    def forward(self, nodes: Tensor, edges: Tensor, mask: Tensor) -> Tensor:
        """Scores ``[graphs, nodes]`` of nodes ``[graphs, nodes, 1]``."""
        hidden = self.enter(nodes)
        edges = edges * mask.unsqueeze(1)  # padding sends no messages
        for layer in self.rounds:
            heard = edges @ hidden
            hidden = hidden + F.relu(layer(torch.cat([hidden, heard], dim=2)))
        return self.leave(hidden).squeeze(2)

    def loss(self, pred: Tensor, target: Tensor) -> Tensor:
        """Mean over the nodes that are not padding."""
        mask = self.ctx.input["mask"]
        right = (pred > 0) == (target > 0)
        self.ctx.rows = int(mask.sum())  # what the averages of the epoch count
        self.ctx.log_metric("accuracy", right[mask].float().mean())
        return F.binary_cross_entropy_with_logits(pred[mask], target[mask])


def graphs(count: int, most: int = 12) -> tuple[dict[str, Tensor], Tensor]:
    """Random graphs with one marked node, and which nodes are at most two edges away."""
    mask = torch.arange(most) < torch.randint(5, most + 1, (count, 1))
    is_edge = torch.rand(count, most, most) < 0.12
    is_edge = (
        (is_edge | is_edge.transpose(1, 2)) & mask.unsqueeze(1) & mask.unsqueeze(2)
    )
    edges = is_edge.float()
    nodes = torch.zeros(count, most, 1)
    nodes[:, 0] = 1
    near = nodes + edges @ nodes + edges @ edges @ nodes
    return {"nodes": nodes, "edges": edges, "mask": mask}, (near > 0).float().squeeze(2)


def main(tracker: object = None) -> float:
    """Train, and print the share of nodes that are classified correctly."""
    torch.manual_seed(1)
    learner = harness.setup(GraphNet, optimizer=torch.optim.Adam)
    fitted = learner.set_opt_hparams(lr=5e-3).fit(
        graphs(1500), 6, graphs(300), seed=1, tracker=tracker
    )
    accuracy: float = fitted.records["metrics"]["valid"][-1]["accuracy"]
    print(f"{accuracy:.1%} of the nodes are correct")
    return accuracy


if __name__ == "__main__":
    main()
