"""Losses that are refused, and the choice of the engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.harness.accelerators.cases import (
    Net,
    prepared,
    regression,
    two_rates,
    windows,
)


def test_engine_is_found_by_name_or_as_the_active_one(make: Any) -> None:
    accelerator = make(0)
    prepared(accelerator, Net, two_rates)
    engines = accelerator._engines
    assert [engine.name for engine in engines] == engines.names == ["body", "head"]
    assert engines.find("head").name == "head"
    with engines.activate("body"):
        assert engines.find(None).name == "body"
    with pytest.raises(ValueError, match=r"got None. Choose from \['body', 'head'\]"):
        engines.find(None)


def test_graph_shared_by_two_optimizers_is_refused(make: Any) -> None:
    accelerator = make(1)
    model, _ = prepared(accelerator, Net, two_rates)
    x, y = windows(1, [1])[0][0][0]
    pred = model(x)
    with (
        pytest.raises(
            ValueError, match=r"separate graph, got one shared with optimizer 'head'"
        ),
        accelerator.optimizing("body"),
    ):
        accelerator.backward((pred - y).square().mean(), "body")


def test_backward_outside_its_section_is_refused(make: Any) -> None:
    accelerator = make(1)
    model, _ = prepared(accelerator, Net, two_rates)
    loss = regression(model, "body", windows(1, [1])[0][0][0])
    with pytest.raises(
        RuntimeError, match=r"with accelerator.optimizing\('body'\)' around it"
    ):
        accelerator.backward(loss, "body")


@pytest.mark.parametrize("make_loss", [lambda x: x, lambda x: x.detach().mean()])
def test_loss_that_is_none_is_refused(make: Any, make_loss: Any) -> None:
    accelerator = make(0)
    model, _ = prepared(accelerator)
    loss = make_loss(model(torch.zeros(2, 5)))
    with pytest.raises(
        ValueError, match=r"backward\('opt'\): expected a scalar with a graph"
    ):
        accelerator.backward(loss)
