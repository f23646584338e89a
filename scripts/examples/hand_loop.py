"""A hand-written loop, with the accelerator and the records of this library."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import harness
import tracking


def main(tracker: object = None) -> float:
    """Train without ``fit``; the same loop runs on several ranks and in bfloat16."""
    torch.manual_seed(1)
    data = load_digits()
    images = torch.tensor(data.data, dtype=torch.float32) / 16
    dataset = TensorDataset(images, torch.tensor(data.target))
    train, valid = torch.utils.data.random_split(dataset, [0.8, 0.2])
    model: nn.Module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    loss_fn = nn.CrossEntropyLoss()

    accelerator = harness.accelerator(accumulate=2)
    loaders = [DataLoader(train, 16, shuffle=True), DataLoader(valid, 256)]
    model, _, loaders = accelerator.prepare(model, {"opt": optimizer}, loaders)
    settings = {} if tracker is None else {"delivery": False}
    with tracking.start(experiment="digits", params={"lr": 3e-3}, **settings) as run:
        for epoch in range(1, 6):
            model.train()
            for batch in loaders[0]:
                x, y = accelerator.to_device(batch)
                with accelerator.optimizing():
                    loss = loss_fn(model(x), y)
                    accelerator.backward(loss)
                if accelerator.is_boundary():
                    accelerator.clip(1.0)
                    accelerator.step()  # also clears the gradients
                    step = accelerator.steps["opt"]
                    run.log_step({"loss": loss.detach()}, step=step, set="train")
            accelerator.drop_window()  # the last window may be short
            model.eval()
            right = count = torch.zeros(())
            with torch.no_grad():
                for batch in loaders[1]:
                    x, y = accelerator.to_device(batch)
                    right = right + (model(x).argmax(1) == y).sum()
                    count = count + len(y)
            accuracy = accelerator.reduce(right) / accelerator.reduce(count)
            run.log_metric("accuracy", float(accuracy), set="valid", index=epoch)
    print(f"validation accuracy {float(accuracy):.1%}")
    return float(accuracy)


if __name__ == "__main__":
    main()
