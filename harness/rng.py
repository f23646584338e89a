"""State of the random generators that a training draws from."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import random
from collections import OrderedDict, deque
from collections.abc import (
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import numpy as np
import torch
from torch import Tensor

from harness.pytree import StateDict, cache_by_identity, is_installed, is_proxy

if TYPE_CHECKING:
    from harness.accelerators.base import Accelerator

T = TypeVar("T")

Generator = (
    torch.Generator | np.random.Generator | np.random.RandomState | random.Random
)
"""A generator that a data set, sampler or model may hold as an attribute."""


class Generators(list[Generator]):
    """Generators in the order in which they were found, and others by name.

    Attributes
    ----------
    named
        Those that functions, modules and other objects hold. A resume finds them by name.
    """

    def __init__(
        self, found: Iterable[Generator] = (), named: Mapping[str, Generator] = {}
    ) -> None:
        super().__init__(found)
        known = {id(own) for own in self}
        self.named = {n: own for n, own in named.items() if id(own) not in known}


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


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators, the latter on all devices."""
    seed = int(seed)  # Python takes no integer of NumPy
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def share_rng_state(accelerator: Accelerator) -> None:
    """Give every rank the random state of rank 0, for what is drawn before the training.

    So a split and a new model are the same on every rank. Afterwards ``prepare`` makes the
    ranks draw different numbers.
    """
    if accelerator.world_size > 1:
        state = accelerator.broadcast(get_cpu_rng_state())
        set_cpu_rng_state(state | {"torch": state["torch"].cpu()})


def is_same_stream(one: Any, two: Any) -> bool:
    """Whether two states of one global generator give the same numbers."""
    if isinstance(one, Tensor):
        return torch.equal(one, two)
    if isinstance(one[1], np.ndarray):  # NumPy's: name, keys, and where it is in them
        return bool(one[2:] == two[2:] and np.array_equal(one[1], two[1]))
    return bool(one == two)


def derive_stream(name: str, state: Any) -> Any:
    """State of another stream of a global generator, by its name; the same one each time."""
    text = (
        state.numpy().tobytes() if isinstance(state, Tensor) else repr(state).encode()
    )
    seed = int.from_bytes(hashlib.sha256(text).digest()[:4])
    return seed_cpu_rng_state([seed] * 3)[name]


def draw_seeds() -> list[int]:
    """Draw a seed from each global CPU generator: Python's, NumPy's and torch's."""
    return [
        random.getrandbits(64),
        int(np.random.randint(2**32, dtype=np.uint32)),
        int(torch.empty((), dtype=torch.int64).random_()),
    ]


def seed_cpu_rng_state(seeds: Sequence[int]) -> StateDict:
    """State of new CPU generators with the seeds from ``draw_seeds``."""
    return {
        "python": random.Random(seeds[0]).getstate(),
        "numpy": np.random.RandomState(seeds[1]).get_state(),
        "torch": torch.Generator().manual_seed(seeds[2]).get_state(),
    }


class RandomStream:
    """Random numbers of its own for the functions that it runs.

    The global CPU generators are swapped while a function runs. So numbers drawn inside and
    outside do not affect each other. Generators of devices are not involved.

    Parameters
    ----------
    state
        First state of the generators, as from ``get_cpu_rng_state`` or ``seed_cpu_rng_state``.
    """

    def __init__(self, state: StateDict) -> None:
        self._inside = state

    def run(self, function: Callable[[], T]) -> T:
        """Call a function that draws from this stream."""
        outside = get_cpu_rng_state()
        set_cpu_rng_state(self._inside)
        try:
            return function()
        finally:
            self._inside = get_cpu_rng_state()
            set_cpu_rng_state(outside)

    def iterate(self, items: Iterator[T]) -> Iterator[T]:
        """Yield the items of an iterator that draws from this stream."""
        nothing = object()
        while (item := self.run(lambda: next(items, nothing))) is not nothing:
            yield item  # type: ignore[misc]


def get_rng_state(
    generators: Iterable[Generator] = (), device: torch.device | None = None
) -> StateDict:
    """State of the global generators, of all devices, and of `generators`.

    Parameters
    ----------
    generators
        Generators beside the global ones.
    device
        Device of the fit on this rank. Its state is found again if the device has another
        index then. None: all devices are found by their index.
    """
    state = get_cpu_rng_state()
    state["generators"] = get_generator_states(generators)
    if isinstance(generators, Generators) and generators.named:
        named = {
            n: [type(g).__name__, _get_state(g)] for n, g in generators.named.items()
        }
        state["named"] = named
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    if device is not None and device.type == "cuda":
        state["device"] = {"state": torch.cuda.get_rng_state(device)}
    return state


def derive_rng_state(state: StateDict, rank: int) -> StateDict:
    """State for a new rank: that of another rank, with different streams."""
    derived = state | seed_cpu_rng_state([_derive_seed(state["torch"], rank)] * 3)
    saved = state.get("cuda", [])  # checkpoints of earlier versions have only these
    own = state.get("device", {}).get("state", saved[0] if saved else None)
    if own is not None:
        derived |= {"cuda": [], "device": {"seed": _derive_seed(own, rank)}}
    return derived


def part_rng_state(rank: int, device: torch.device) -> None:
    """Let the global generators of a rank above 0 draw other numbers than those of rank 0."""
    if rank > 0:
        state = get_rng_state(device=device)
        set_rng_state(derive_rng_state(state, rank), device=device)


def _derive_seed(state: Tensor, rank: int) -> int:
    text = state.numpy().tobytes() + str(rank).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:4])


def set_rng_state(
    state: StateDict,
    generators: Sequence[Generator] = (),
    device: torch.device | None = None,
) -> list[str]:
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
    set_generator_states(generators, state["generators"])
    named = generators.named if isinstance(generators, Generators) else {}
    for name, (kind, own) in state.get("named", {}).items():  # older ones have none
        if name in named and type(named[name]).__name__ == kind:
            _set_state(named[name], own)
        elif isinstance(generators, Generators):
            missing.append(f"the generator {name} was saved, and this fit has none")
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    saved = state.get("cuda", [])
    for index, other in enumerate(saved[:devices]):
        torch.cuda.set_rng_state(other, index)
    if "device" in state and device is not None and device.type == "cuda":
        _set_device_state(state["device"], device)
    elif len(saved) != devices:
        missing.append(f"generators of {len(saved)} GPUs were saved, {devices} found")
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
    return missing


def _set_device_state(state: StateDict, device: torch.device) -> None:
    """Restore the generator of the rank's CUDA device, or seed the one of a new rank."""
    if "state" in state:
        torch.cuda.set_rng_state(state["state"], device)
        return
    with torch.cuda.device(device):
        torch.cuda.manual_seed(state["seed"])


def get_generator_states(generators: Iterable[Generator]) -> list[Any]:
    """State of each generator."""
    return [_get_state(generator) for generator in generators]


def set_generator_states(
    generators: Iterable[Generator], states: Iterable[object]
) -> None:
    """Restore what ``get_generator_states`` returned, as far as there are states."""
    for generator, state in zip(generators, states, strict=False):
        _set_state(generator, state)


def _get_state(generator: Generator) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.get_state()


def _set_state(generator: Generator, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


def find_generators(*roots: object, later: Sequence[object] = ()) -> list[Generator]:
    """Generators held by loaders, their samplers and data sets, and models; each once.

    Those of the user's own objects that hang on them come last.

    Parameters
    ----------
    *roots, later
        What to search; what `later` holds follows what the others do.
    """
    places = [_find_direct(roots), _find_direct(later), _find_held([*roots, *later])]
    found: list[Generator] = []
    for own in itertools.chain(*places):
        if all(own is not other for other in found):
            found.append(own)
    return found


def _find_direct(roots: Sequence[object]) -> list[Generator]:
    """Generators that are attributes of loaders, samplers, data sets and modules."""
    found: list[Generator] = []
    todo, seen = deque(roots), set()
    while todo:
        thing = todo.popleft()
        if thing is None or id(thing) in seen:
            continue
        seen.add(id(thing))
        found += _own_generators(thing)
        todo += _get_all(thing, _HOLDERS)
        if isinstance(thing, torch.nn.Module):
            todo += thing.children()
    return found


def _find_held(roots: Sequence[object]) -> list[Generator]:
    """Generators of the user's own objects, and in lists and dicts, at any depth."""
    found: list[Generator] = []
    todo: list[Any] = list(reversed(roots))
    seen: set[int] = set()
    while todo and len(seen) < MAX_MET:
        thing = todo.pop()
        if (
            type(thing) in _PLAIN
            or is_proxy(thing)
            or isinstance(thing, torch.Tensor)
            or id(thing) in seen
        ):
            continue
        seen.add(id(thing))
        if is_generator(thing):
            found.append(thing)
        elif isinstance(thing, list | tuple | dict):
            values = thing.values() if isinstance(thing, dict) else thing
            todo += reversed([*values]) if len(thing) <= MAX_SEARCHED else ()
        else:
            todo += reversed(_list_held(thing))
    return found


def _list_held(thing: Any) -> list[object]:
    """What an object of the user's, or a module or data set of any package, holds."""
    inner = _get_all(thing, (*_HOLDERS, "transforms", "datasets"))
    if isinstance(thing, torch.nn.Module):
        inner += thing.children()
    elif is_installed(type(thing).__module__):
        return inner
    fields = getattr(thing, "__dict__", {})
    return [*inner, *(fields[n] for n in fields if n not in _NOT_SEARCHED)]


MAX_SEARCHED = 100
"""Longer lists and dicts are data, and are not searched for generators."""

MAX_MET = 10_000
"""Objects that are searched for generators, at most: a tree of data has more."""

_NOT_SEARCHED = frozenset(vars(torch.nn.Module())) | {"ctx"}

_HOLDERS = ("sampler", "batch_sampler", "dataset", "transform")
"""Attributes of loaders, samplers and data sets whose values may hold generators."""

_LOOKED_FOR = frozenset({*_HOLDERS, "transforms", "datasets", "generator"})


def _get_all(thing: Any, names: Sequence[str]) -> list[object]:
    """Attributes of these names, as far as they are there, without a search for each."""
    kind: Any = type(thing)
    fields, on_class = getattr(thing, "__dict__", {}), _find_on_class(kind)
    if not on_class:
        return [fields[name] for name in names if name in fields]
    found = {name: fields.get(name) for name in names}
    for name in on_class & found.keys():
        with contextlib.suppress(Exception):  # a user's object, such as an unread file
            found[name] = getattr(thing, name, None)
    return [*found.values()]


@cache_by_identity
def _find_on_class(kind: Any) -> frozenset[str]:
    """Names that a class may give its objects: by itself, or by a search of its own."""
    # What a module of torch finds is a part of it, which is searched anyway.
    plain: Any = torch.nn.Module.__getattr__
    if getattr(kind, "__getattr__", plain) is not plain:
        return _LOOKED_FOR
    if kind.__getattribute__ is not object.__getattribute__:
        return _LOOKED_FOR
    return frozenset(name for name in _LOOKED_FOR if hasattr(kind, name))


def _own_generators(thing: object) -> Iterator[Generator]:
    fields = getattr(thing, "__dict__", {})
    for value in itertools.chain(_get_all(thing, ["generator"]), fields.values()):
        if type(value) not in _NO_GENERATORS and is_generator(value):
            yield value


def is_generator(value: Any) -> TypeGuard[Generator]:
    """Whether a value is a random generator whose state can be saved."""
    kind: Any = type(value)
    return _is_class_of_generators(kind)


@cache_by_identity
def _is_class_of_generators(kind: type) -> bool:
    """Whether its objects have a state; the random numbers of the system have none."""
    return issubclass(kind, Generator) and not issubclass(kind, random.SystemRandom)


_PLAIN = frozenset({bool, int, float, str, type(None)})
_NO_GENERATORS = _PLAIN | {dict, OrderedDict, list, tuple, set}
