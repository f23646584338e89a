from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from harness.rng import (
    MAX_SEARCHED,
    RandomStream,
    derive_rng_state,
    derive_stream,
    draw_seeds,
    find_generators,
    get_cpu_rng_state,
    get_rng_state,
    is_same_stream,
    seed_cpu_rng_state,
    set_cpu_rng_state,
    set_rng_state,
)


def draws() -> list[float]:
    return [random.random(), np.random.random(), torch.rand(()).item()]


def generators() -> dict[str, Any]:
    return {
        "torch": torch.Generator().manual_seed(1),
        "numpy": np.random.default_rng(2),
        "numpy's older": np.random.RandomState(3),
        "python": random.Random(4),
    }


def draw(generator: Any) -> float:
    if isinstance(generator, torch.Generator):
        return torch.rand((), generator=generator).item()
    if isinstance(generator, np.random.RandomState):
        return float(generator.random_sample())
    return float(generator.random())


def test_set_random_state_brings_all_generators_back() -> None:
    own = list(generators().values())
    state = get_rng_state(own)
    first = draws(), [draw(one) for one in own]
    assert draws() != first[0]
    assert set_rng_state(state, own) == []
    assert (draws(), [draw(one) for one in own]) == first


def test_set_random_state_tells_what_is_missing() -> None:
    own = list(generators().values())
    state = get_rng_state(own) | {"cuda": [torch.zeros(16, dtype=torch.uint8)] * 99}
    found = set_rng_state(state, own[:1])
    assert found[0] == "4 generators of loaders and model were saved, 1 found"
    assert found[1].startswith("generators of 99 GPUs were saved, ")


def test_derive_stream_depends_on_the_generator_and_changes_nothing() -> None:
    begin = get_cpu_rng_state()
    before = draws()
    found = []
    for change in (lambda: None, draws):
        set_cpu_rng_state(begin)
        change()
        state = get_cpu_rng_state()
        set_cpu_rng_state(
            {name: derive_stream(name, own) for name, own in state.items()}
        )
        found.append(draws())
        set_cpu_rng_state(
            {name: derive_stream(name, own) for name, own in state.items()}
        )
        assert draws() == found[-1]
    for place in range(3):
        assert len({before[place], found[0][place], found[1][place]}) == 3


def test_is_same_stream_holds_until_a_generator_is_used() -> None:
    begin = get_cpu_rng_state()
    uses = {"python": random.random, "numpy": np.random.random, "torch": torch.rand}
    for used, draw in uses.items():
        set_cpu_rng_state(begin)
        draw(1) if used == "torch" else draw()
        now = get_cpu_rng_state()
        for name in uses:
            assert is_same_stream(begin[name], now[name]) is (name != used)


@pytest.mark.parametrize("kind", generators())
def test_find_generators_finds_those_of_loaders_data_sets_and_models_once(
    kind: str,
) -> None:
    one, two, three = (generators()[kind] for _ in range(3))

    class Data(TensorDataset):
        def __init__(self) -> None:
            super().__init__(torch.zeros(4))
            self.noise, self.same = one, one

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(1, 1)
            self.inner.noise = two  # type: ignore[assignment]

    data = Data()
    shuffled = torch.Generator()
    loader = DataLoader(data, sampler=RandomSampler(data, generator=shuffled))
    loader.own = three  # type: ignore[attr-defined]
    found = find_generators(loader, None, Noisy())
    assert len(found) == 4
    assert {id(item) for item in found} == {id(g) for g in (one, two, three, shuffled)}


class Flip:
    """A transform with a generator of its own."""

    def __init__(self) -> None:
        self.random = random.Random(1)


def test_find_generators_finds_those_of_the_users_objects_after_the_others() -> None:
    data, model = TensorDataset(torch.zeros(4)), nn.Linear(1, 1)
    data.transform = nn.Sequential()  # type: ignore[attr-defined]
    data.transform.transforms = [one := Flip(), {"a": (two := Flip(),)}]  # type: ignore[attr-defined]
    three, direct = Flip(), random.Random(2)
    vars(model).update(env=three, noise=direct)
    data.rows = [Flip()] * (MAX_SEARCHED + 1)  # type: ignore[attr-defined]
    found = find_generators(data, later=[model])
    expected = [direct, *(held.random for held in (one, two, three))]
    assert [id(item) for item in found] == [id(item) for item in expected]


def test_random_stream_and_what_is_outside_do_not_affect_each_other() -> None:
    set_cpu_rng_state(seed_cpu_rng_state([1, 2, 3]))
    outside = [draws(), draws()]
    set_cpu_rng_state(seed_cpu_rng_state([4, 5, 6]))
    inside = [draws(), draws()]
    set_cpu_rng_state(seed_cpu_rng_state([1, 2, 3]))
    stream = RandomStream(seed_cpu_rng_state([4, 5, 6]))
    found = []
    for own in stream.iterate(draws() for _ in range(2)):
        found.append((own, draws()))
    assert found == list(zip(inside, outside, strict=True))


def test_drawn_seeds_depend_on_each_generator() -> None:
    begin = get_cpu_rng_state()
    found = []
    for change in (lambda: None, draws):
        set_cpu_rng_state(begin)
        change()
        found.append(draw_seeds())
    for place in range(3):
        assert len({seeds[place] for seeds in found}) == 2


class TwoGpus:
    """Generators of two CUDA devices that are not there: the states, and how they are set."""

    def __init__(self, patch: pytest.MonkeyPatch, count: int = 2) -> None:
        self.states = [self.after(n) for n in range(count)]
        self.current = 0
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: count)
        patch.setattr(torch.cuda, "get_rng_state_all", lambda: list(self.states))
        patch.setattr(torch.cuda, "get_rng_state", lambda at: self.states[_index(at)])
        patch.setattr(torch.cuda, "set_rng_state", self._set)
        patch.setattr(torch.cuda, "device", self._enter)
        patch.setattr(torch.cuda, "manual_seed", self._seed)

    @staticmethod
    def after(seed: int) -> torch.Tensor:
        """State after this seed, in the form that torch has."""
        return torch.tensor([seed, 0]).view(torch.uint8)

    def _set(self, state: torch.Tensor, device: Any) -> None:
        self.states[_index(device)] = state

    @contextmanager
    def _enter(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, _index(device)
        yield
        self.current = before

    def _seed(self, seed: int) -> None:
        self.states[self.current] = self.after(seed)


def _index(device: Any) -> int:
    return device if isinstance(device, int) else device.index or 0


def test_random_state_of_a_rank_is_found_on_a_device_with_another_index(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    TwoGpus(monkeypatch)
    saved = get_rng_state(device=torch.device("cuda:1"))
    alone = TwoGpus(monkeypatch, count=1)  # as a scheduler shows it
    assert set_rng_state(saved, device=torch.device("cuda:0")) == []
    assert torch.equal(alone.states[0], alone.after(1))


def test_random_state_without_a_role_is_restored_by_index(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpus = TwoGpus(monkeypatch)
    saved = get_rng_state(device=torch.device("cuda:1"))
    del saved["device"]  # as in a checkpoint of an earlier version
    gpus.states = [gpus.after(7), gpus.after(8)]
    assert set_rng_state(saved, device=torch.device("cuda:1")) == []
    assert [int(state.view(torch.int64)[0]) for state in gpus.states] == [0, 1]


@pytest.mark.parametrize("is_older", [False, True])
def test_new_ranks_draw_other_numbers_on_their_devices(
    is_older: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = TwoGpus(monkeypatch)
    saved = get_rng_state(device=torch.device("cuda:0"))
    if is_older:
        del saved["device"]
    found = {0}
    for rank in (1, 2):
        set_rng_state(derive_rng_state(saved, rank), device=torch.device("cuda:1"))
        assert gpus.states[0] is saved["cuda"][0]
        found.add(int(gpus.states[1].view(torch.int64)[0]))
    assert len(found) == 3
