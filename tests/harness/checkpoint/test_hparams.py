"""Secrets among the hparams: never saved, and never replayed as a mask."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import harness
from harness.checkpoint.hparams import encode_hparams
from harness.errors import CheckpointError


class Private(nn.Linear):
    def __init__(self, api_key: str, num_tokens: int, url: str = "") -> None:
        assert api_key == "hunter22"
        super().__init__(num_tokens, 1)


def fit(folder: Path) -> Any:
    learner = harness.setup(Private, loss=nn.MSELoss(), optimizer=torch.optim.SGD)
    learner = learner.set_hparams(
        api_key="hunter22", num_tokens=2, url="https://me:pass55@h/x"
    ).set_opt_hparams(lr=0.1)
    data = (torch.zeros(8, 2), torch.zeros(8, 1))
    checkpoints = harness.callbacks.ModelCheckpoint(folder / "saved")
    tracker = {"runs_dir": folder / "runs", "delivery": False}
    return learner.fit(
        data, epochs=1, callbacks=[checkpoints], tracker=tracker, verbose=False
    )


def test_secret_hparam_is_written_nowhere_and_asked_for_again(tmp_path: Path) -> None:
    fitted = fit(tmp_path)
    fitted.save(tmp_path / "model")
    for file in tmp_path.rglob("*"):
        if file.suffix in (".json", ".txt"):
            text = file.read_text()
            assert "hunter22" not in text, file
            assert "pass55" not in text, file
    with pytest.raises(CheckpointError, match=r"none for \['api_key', 'url'\]"):
        harness.load(tmp_path / "model")
    loaded = harness.load(tmp_path / "model", partial(Private, api_key="hunter22"))
    assert loaded.hparams == {"num_tokens": 2}


def test_hparam_that_is_no_secret_is_kept_as_it_is() -> None:
    hparams = {
        "num_tokens": 8,
        "token": "<eos>",
        "nested": {"a": (1, 2.5)},
        "list": [torch.zeros(2), "x"],
        "url": "https://example.org/x?n=1",
    }
    found = encode_hparams(hparams)
    assert found["url"] == hparams["url"]
    assert found["nested"] == {"a": {"$tuple": [1, 2.5]}}
    assert found["token"] == "<eos>"
    assert {"$secret": True} not in found.values()
