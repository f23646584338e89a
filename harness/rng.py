"""State of the random generators that a training draws from."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from harness.pytree import StateDict

Generator = (
    torch.Generator | np.random.Generator | np.random.RandomState | random.Random
)
"""A generator that a data set, sampler or model may hold as an attribute."""


def get_cpu_rng_state() -> StateDict:
    """State of Python's, NumPy's and torch's global CPU generators."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }


def set_cpu_rng_state(state: StateDict) -> None:
    """Restore what ``get_cpu_rng_state`` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])


def is_same_stream(one: Any, two: Any) -> bool:
    """Whether two states of one global generator give the same numbers."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one[1], np.ndarray):  # NumPy's: name, keys, and where it is in them
        return bool(one[2:] == two[2:] and np.array_equal(one[1], two[1]))
    return bool(one == two)


def derive_stream(state: Any) -> Any:
    """State of another stream of the same global generator; the same one each time."""
    text = state.numpy().tobytes() if isinstance(state, torch.Tensor) else repr(state)
    digest = hashlib.sha256(text if isinstance(text, bytes) else text.encode()).digest()
    seed = int.from_bytes(digest[:4])
    if isinstance(state, torch.Tensor):
        return torch.Generator().manual_seed(seed).get_state()
    if isinstance(state[1], np.ndarray):
        return np.random.RandomState(seed).get_state()
    return random.Random(seed).getstate()


def get_rng_state(generators: Iterable[Generator] = ()) -> StateDict:
    """State of the global generators, of all devices, and of `generators`."""
    state = get_cpu_rng_state()
    state["generators"] = [_get_state(generator) for generator in generators]
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def derive_rng_state(state: StateDict, rank: int) -> StateDict:
    """State for a new rank: that of another rank, with different CPU streams."""
    text = state["torch"].numpy().tobytes() + str(rank).encode()
    seed = int.from_bytes(hashlib.sha256(text).digest()[:4])
    return {
        **state,
        "python": random.Random(seed).getstate(),
        "numpy": np.random.RandomState(seed).get_state(),
        "torch": torch.Generator().manual_seed(seed).get_state(),
    }


def set_rng_state(state: StateDict, generators: Sequence[Generator] = ()) -> list[str]:
    """Restore what ``get_rng_state`` returned, for the devices that this machine has.

    Returns
    -------
    list of str
        What could not be restored, for the resume report.
    """
    set_cpu_rng_state(state)
    missing = []
    if len(generators) != len(state["generators"]):
        have, want = len(generators), len(state["generators"])
        missing.append(
            f"{want} generators of loaders and model were saved, {have} found"
        )
    for generator, own in zip(generators, state["generators"], strict=False):
        _set_state(generator, own)
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    saved = state.get("cuda", [])
    for device, own in enumerate(saved[:devices]):
        torch.cuda.set_rng_state(own, device)
    if len(saved) != devices:
        missing.append(f"generators of {len(saved)} GPUs were saved, {devices} found")
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
    return missing


def _get_state(generator: Generator) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, np.random.RandomState):
        return generator.get_state()
    return generator.getstate()


def _set_state(generator: Generator, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    else:
        generator.setstate(state)


def find_generators(*roots: object) -> list[Generator]:
    """Generators held by loaders, their samplers and data sets, and models; each once."""
    found: list[Generator] = []
    todo, seen = list(roots), set()
    while todo:
        thing = todo.pop(0)
        if thing is None or id(thing) in seen:
            continue
        seen.add(id(thing))
        for own in _own_generators(thing):
            if all(own is not other for other in found):
                found.append(own)
        todo += [getattr(thing, name, None) for name in _HOLDERS]
        if isinstance(thing, torch.nn.Module):
            todo += thing.children()
    return found


_HOLDERS = ("sampler", "batch_sampler", "dataset", "transform")
"""Attributes of loaders, samplers and data sets whose values may hold generators."""


def _own_generators(thing: object) -> Iterator[Generator]:
    for value in (
        getattr(thing, "generator", None),
        *getattr(thing, "__dict__", {}).values(),
    ):
        if isinstance(value, Generator):
            yield value
