"""What ranks that differ are told: one clear error on one rank, before training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset

from harness.accelerators.deepspeed.accelerator import DeepSpeedAccelerator
from harness.accelerators.distributed.group import PeerError
from tests.harness.accelerators.cases import Lab, Net, Normed, Rows, adam, seeded


def on_one_rank(
    lab: Lab, match: str, call: Callable[[], object], rank: int = 0
) -> None:
    """The error itself on one rank, word of it on the others."""
    kind: Any = ValueError if lab.rank == rank else PeerError
    with pytest.raises(kind, match=match):
        call()


def case_config_that_is_wrong_everywhere(lab: Lab) -> None:
    on_one_rank(
        lab, "Did you mean 'stage'", lambda: lab.make(zero_optimization={"stag": 1})
    )


def case_config_that_is_wrong_on_one_rank(lab: Lab) -> None:
    config = {"zero_optimization": {"stage": 7 if lab.rank == 1 else 1}}
    on_one_rank(
        lab,
        "stage in 0..3, got 7",
        lambda: DeepSpeedAccelerator(config, device="cpu"),
        rank=1,
    )


def case_config_that_differs(lab: Lab) -> None:
    config = {"zero_optimization": {"stage": lab.rank}}
    on_one_rank(
        lab,
        "expected the same config on every rank, got .*'stage': 0.* on rank 0 and .*'stage': 1",
        lambda: DeepSpeedAccelerator(config, device="cpu"),
    )


def case_model_that_differs(lab: Lab) -> None:
    model = seeded(Normed if lab.rank else Net)
    on_one_rank(
        lab,
        "prepare: expected the same model class on every rank, got 'Net' on rank 0 and 'Normed'",
        lambda: lab.make().prepare(model, adam(model)),
    )


def case_optimizer_that_differs(lab: Lab) -> None:
    model = seeded(Net)
    opt = torch.optim.SGD(model.parameters(), lr=0.1 * (1 + lab.rank))
    on_one_rank(
        lab,
        "expected the same optimizer 'opt' on every rank, got .*0.1.* on rank 0 and .*0.2",
        lambda: lab.make().prepare(model, {"opt": opt}),
    )


def case_data_of_another_length(lab: Lab) -> None:
    loader = DataLoader(Rows(8 + lab.rank), batch_size=4)
    model = seeded(Net)
    on_one_rank(
        lab,
        "expected the same length of data 0 on every rank, got 8 on rank 0 and 9 on rank 1",
        lambda: lab.make().prepare(model, adam(model), [loader]),
    )


def case_split_that_differs(lab: Lab) -> None:
    data = TensorDataset(torch.arange(9))
    loader = DataLoader(Subset(data, [lab.rank, 5]), batch_size=1)
    model = seeded(Net)
    on_one_rank(
        lab,
        "expected the same choice of rows of data 0 on every rank",
        lambda: lab.make().prepare(model, adam(model), [loader]),
    )


def case_batch_size_against_ranks(lab: Lab) -> None:
    loader = DataLoader(Rows(8), batch_size=4)
    model = seeded(Net)
    on_one_rank(
        lab,
        "= 4 micro x 1 accumulation x 2 ranks = 8, got 6",
        lambda: lab.make(train_batch_size=6).prepare(model, adam(model), [loader]),
    )


def case_data_that_fills_no_step(lab: Lab) -> None:
    loader = DataLoader(Rows(7), batch_size=4, drop_last=True)
    model = seeded(Net)
    on_one_rank(
        lab,
        "at least one batch of 2 ranks x 4 rows in data 0, got 7 rows with drop_last",
        lambda: lab.make().prepare(model, adam(model), [loader]),
    )


def case_state_of_another_number_of_ranks(lab: Lab) -> None:
    accelerator = lab.make()
    model = seeded(Net)
    accelerator.prepare(model, adam(model))
    state = accelerator.state_dict() | {"world_size": 3}
    with pytest.raises(Exception, match="expected a state of world_size 2, got 3"):
        accelerator.load_state_dict(state)
    accelerator.finish()


def case_afterwards_ranks_still_talk(lab: Lab) -> None:
    accelerator = lab.make()
    assert accelerator.gather(torch.tensor([lab.rank])).tolist() == [0, 1]


CASES: dict[str, Callable[[Lab], None]] = {
    name.removeprefix("case_"): case
    for name, case in list(globals().items())
    if name.startswith("case_")
}
"""Every case, by name."""
