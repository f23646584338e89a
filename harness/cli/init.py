"""The command ``init``, which writes a small project that trains at once."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Final

import click

from tracking.cli import render
from tracking.errors import describe_path

TRAIN: Final = '''"""Two spirals: which one is a point on? Replace data and model with your own.

Train:                harness fit train.py:experiment
with other options:   harness fit train.py:experiment --set hidden=128 --epochs 40
"""

import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

import harness


class Net(nn.Module):
    """Two hidden layers: points [batch, 2] -> scores of the two spirals [batch, 2]."""

    def __init__(self, hidden=64):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 2),
        )

    def forward(self, points):
        return self.layers(points)


def spirals(num_points=2000):
    """Points [num_points, 2] on two spirals with some noise, and the spiral of each."""
    random = torch.Generator().manual_seed(0)
    label = torch.arange(num_points) % 2
    radius = torch.rand(num_points, generator=random).sqrt()
    angle = 3 * torch.pi * radius + torch.pi * label
    points = radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
    return points + 0.02 * torch.randn(points.shape, generator=random), label


def experiment(hidden=64, lr=3e-3, epochs=20, seed=1):
    """What to train, and on which data. Set arguments with --set NAME=VALUE."""
    learner = harness.setup(
        Net,
        loss=nn.CrossEntropyLoss(),
        optimizer=torch.optim.AdamW,
        metrics={"accuracy": MulticlassAccuracy(num_classes=2)},
    )
    learner = learner.set_hparams(hidden=hidden).set_opt_hparams(lr=lr)
    return harness.Experiment(
        learner=learner, data=spirals(), valid_data=0.2, epochs=epochs, seed=seed
    )
'''

README: Final = """# {name}

```text
harness fit train.py:experiment                   # train, with checkpoints
harness runs list                                 # newest runs, the best one marked
harness runs show RUN                             # params, metrics and curves
harness fit train.py:experiment --set hidden=128  # with another argument
harness resume RUN                                # continue a run that was stopped
harness ui                                        # the runs in MLflow
```

`train.py` holds the model, the data and the experiment. RUN is the id of a run, or any
unique part of it.
"""

GITIGNORE: Final = """runs/
mlflow.db
mlruns/
mlartifacts/
__pycache__/
"""


@click.command()
@click.argument("name", type=click.Path(path_type=Path))
def init(name: Path) -> None:
    """Create a small project in the new folder NAME.

    It contains train.py (a model, data and an experiment), a README.md and a .gitignore,
    and trains as it is.
    """
    files = {
        "train.py": TRAIN,
        "README.md": README.format(name=name.resolve().name),
        ".gitignore": GITIGNORE,
    }
    advice = "The files train.py, README.md and .gitignore are written into it"
    if name.suffix.lower() in {".py", ".ipynb"}:
        msg = f"init: expected a name for a new folder, got {str(name)!r}."
        raise click.UsageError(f"{msg} {advice}: try 'harness init digits'.")
    try:
        _check_folder(name, advice)
        name.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (name / file).write_text(text, encoding="utf-8")
    except OSError as error:
        msg = f"init: expected a folder that can be written, got {error}."
        raise click.ClickException(f"{msg} Choose another one.") from error
    render.echo(f"{name}: {', '.join(files)}\n")
    render.echo(
        f"next  cd {shlex.quote(str(name))}\n      harness fit train.py:experiment"
    )


def _check_folder(name: Path, advice: str) -> None:
    """Refuse a folder that is not empty, or a path below a file."""
    over = next(p for p in (name, *name.absolute().parents) if p.exists())
    if over == name and over.is_dir() and any(over.iterdir()):
        msg = f"init: expected a new folder, got {str(name)!r}, which is not empty."
        raise click.UsageError(f"{msg} Choose another name.")
    if not over.is_dir():
        msg = f"init: expected a new folder, got {str(over)!r}, {describe_path(over)}."
        raise click.UsageError(f"{msg} {advice}: choose another name.")
