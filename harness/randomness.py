"""State of every random generator that a training draws from."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch


def random_state(generators: Iterable[torch.Generator] = ()) -> dict[str, Any]:
    """State of Python's, NumPy's and torch's generators, all devices and `generators`."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "generators": [generator.get_state() for generator in generators],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(
    state: Mapping[str, Any], generators: Iterable[torch.Generator] = ()
) -> None:
    """Take back what ``random_state`` gave, as far as this machine has the devices."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    for generator, own in zip(generators, state["generators"], strict=False):
        generator.set_state(own)
    if "cuda" in state and torch.cuda.is_available():
        for device, own in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(own, device)
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])


def generators_of(loader: Any) -> list[torch.Generator]:
    """Generators that a loader and its samplers were given, each once."""
    found: list[torch.Generator] = []
    todo, seen = [loader], set()
    while todo:
        thing = todo.pop(0)
        if thing is None or id(thing) in seen:
            continue
        seen.add(id(thing))
        own = getattr(thing, "generator", None)
        if isinstance(own, torch.Generator) and all(own is not item for item in found):
            found.append(own)
        todo += [getattr(thing, name, None) for name in ("sampler", "batch_sampler")]
    return found
