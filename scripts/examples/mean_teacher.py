"""Mean teacher: the average of a student's own weights keeps it from learning wrong labels."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchmetrics.classification import MulticlassAccuracy

import harness


class MeanTeacher(nn.Module):
    """A student and its teacher, which is a moving average and has no gradients."""

    ctx: harness.FitContext

    def __init__(self, weight: float, noise: float = 0.2) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
        average = get_ema_multi_avg_fn(0.99)
        self.teacher = AveragedModel(self.student, multi_avg_fn=average)
        self.teacher.requires_grad_(False)
        self.weight, self.noise = weight, noise

    def set_optimizers(self, lr: float) -> torch.optim.Optimizer:
        """Only the student is optimized."""
        return torch.optim.Adam(self.student.parameters(), lr=lr)

    def forward(self, images: Tensor) -> Tensor:
        """Scores of the teacher, if there is one."""
        scores: Tensor = (self.teacher if self.weight else self.student)(images)
        return scores

    def blur(self, images: Tensor) -> Tensor:
        """Add new noise."""
        return images + self.noise * torch.randn_like(images)

    def step(self) -> None:
        """Learn from the labels and from the teacher, then update the teacher."""
        ctx = self.ctx
        images, digits = ctx.batch
        ctx.pred = self(images)  # for the metrics
        if not ctx.training:
            ctx.optimize(F.cross_entropy(ctx.pred, digits))
            return
        student = self.student(self.blur(images))
        parts = {"labels": F.cross_entropy(student, digits)}
        if self.weight:
            apart = student.softmax(1) - self.teacher(self.blur(images)).softmax(1)
            weight = self.weight * min(1.0, ctx.epoch / 5)
            parts["apart"] = weight * apart.square().sum(1).mean()
        ctx.optimize(parts)
        self.teacher.update_parameters(self.student)


def main(tracker: object = None) -> dict[str, float]:
    """Train on labels of which 40 % are drawn at random, with and without a teacher."""
    data = load_digits()
    images = torch.tensor(data.data, dtype=torch.float32) / 16
    digits = torch.tensor(data.target)
    torch.manual_seed(1)
    is_wrong = torch.rand(1400) < 0.4
    labels = torch.where(is_wrong, torch.randint(10, (1400,)), digits[:1400])
    accuracy = MulticlassAccuracy(num_classes=10, average="micro")
    metrics = harness.MetricSet(valid={"accuracy": accuracy})
    learner = harness.setup(MeanTeacher, metrics=metrics).set_opt_hparams(lr=1e-2)
    found = {}
    for name, weight in {"student alone": 0.0, "mean teacher": 10.0}.items():
        train, test = (images[:1400], labels), (images[1400:], digits[1400:])
        one = learner.set_hparams(weight=weight)
        fitted = one.fit(train, 20, test, seed=1, tracker=tracker)
        found[name] = fitted.records["metrics"]["valid"][-1]["accuracy"]
        print(f"{name}: {found[name]:.1%}")
    return found


if __name__ == "__main__":
    main()
