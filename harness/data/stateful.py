"""Data sets and samplers that save their own state, in a loader that does not.

A resume gives them the state that they had before the pass, and reads again what was read.
Then it compares what they say with what they said when the checkpoint was taken.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch

from harness.data.workers import iter_batches
from harness.pytree import StateDict, flatten, has_state

Outcome = Literal["restored", "left out", "missing", "not kept", "differs"]
"""What became of a part of the saved state."""

Note = tuple[str, Outcome, str]
"""A line of the report of a resume: name of a part, its outcome, and details."""


def find_stateful(loader: object) -> dict[str, Any]:
    """Find the parts of a loader with ``state_dict`` and ``load_state_dict``, by their place.

    They are its data set and samplers, also behind wrappers; not what such a part holds. A
    loader that saves its own state has none, except where it is divided over ranks, which
    read its batches again in a resume: it is a part itself, as ``loader``.
    """
    whole = getattr(loader, "undivided", loader)
    if hasattr(whole, "state_dict"):
        return {"loader": whole} if whole is not loader and has_state(whole) else {}
    loader = whole
    parts = walk_parts(loader, has_state)
    return {place: part for place, part in parts if place and has_state(part)}


def walk_parts(
    loader: object, is_end: Callable[[object], bool]
) -> Iterator[tuple[str, object]]:
    """Yield a loader and its data set and samplers, also behind wrappers, with their places.

    Parameters
    ----------
    is_end
        Whether a part is not looked into.
    """
    waiting, seen = deque([("", loader)]), set[int]()
    while waiting:
        place, part = waiting.popleft()
        if part is None or id(part) in seen:
            continue
        seen.add(id(part))
        yield place, part
        if is_end(part):
            continue
        inner = [(name, getattr(part, name, None)) for name in _PARTS]
        several = getattr(part, "datasets", None)  # of torch's ConcatDataset and others
        if isinstance(several, list | tuple):
            inner += [(f"datasets.{n}", one) for n, one in enumerate(several)]
        waiting += [(f"{place}.{name}".lstrip("."), one) for name, one in inner]


_PARTS = ("dataset", "sampler", "batch_sampler")


def get_states(parts: Mapping[str, Any]) -> StateDict:
    """Copies of the states of parts, with their classes.

    A state that a checkpoint cannot hold is replaced by the reason, as ``why``.
    """
    found: StateDict = {}
    for place, part in parts.items():
        own: StateDict = {"class": type(part).__qualname__}
        try:
            own["state"] = copy.deepcopy(part.state_dict())
            flatten(own, place)
        except Exception as error:  # noqa: BLE001  a user's object; a save goes on
            own = {"class": own["class"], "why": f"{type(error).__name__}: {error}"}
        found[place] = own
    return found


def set_states(
    loader: object, parts: Mapping[str, Any], states: StateDict, *, is_after_end: bool
) -> None:
    """Load states that ``get_states`` returned before a pass, or after the pass before.

    Parameters
    ----------
    loader
        The loader that they belong to. One batch is read from it if `is_after_end`. So the
        caller restores the random state afterwards.
    parts
        The parts, as in ``get_states``.
    states
        Their states. Only those that differ from the present ones are loaded.
    is_after_end
        Whether the states are those after a pass that read all there is. Some data sets
        then say where the next pass begins, and others where the last one ended.
    """
    if not states:
        return
    before = get_states({place: parts[place] for place in states if place in parts})
    changed = {p: s for p, s in states.items() if not _is_same(s, before.get(p))}
    _load(parts, changed)
    is_sampled = any("sampler" in place for place in parts)
    is_read_here = is_sampled or not getattr(loader, "num_workers", 0)
    is_tried = is_after_end and (is_read_here or "loader" in parts)
    # Without a batch, the state was that of the end, which is now behind.
    if is_tried and _has_batch(loader):
        _load(parts, states)
        if "_iterator_finished" in states.get("loader", {}).get("state", {}):
            # torchdata 0.11 takes it up with one random number more than a new pass draws.
            iter_batches(loader)


def _has_batch(loader: object) -> bool:
    nothing = object()
    return next(iter_batches(loader), nothing) is not nothing


def update_states(
    parts: Mapping[str, Any], states: StateDict
) -> tuple[list[Note], bool]:
    """Compare parts with the states that they had after the same batches; load the others.

    Returns
    -------
    notes for the report, and whether the loader has to be iterated anew, because a part
    takes up its state only then
    """
    notes: list[Note] = []
    now, is_late = get_states(parts), False
    for place, saved in states.items():
        if "state" not in saved or place not in parts or _is_same(saved, now[place]):
            continue
        _load(parts, {place: saved})
        if place == "loader":
            is_late = True
            text = "by its state_dict, since reading its batches again led to another"
            notes.append((f"loader {saved['class']}", "restored", text))
            continue
        found = get_states({place: parts[place]})[place]
        if not _is_same(saved, found):
            is_late = True
            got = f"{now[place].get('state')!r:.60} and not to {saved['state']!r:.60}"
            text = "it continues from its state_dict, since reading its batches again"
            name = f"{place} {saved['class']}"
            notes.append((name, "differs", f"{text} led to {got}"))
    return notes, is_late


def _load(parts: Mapping[str, Any], states: StateDict) -> None:
    for place, saved in states.items():
        if "state" in saved and place in parts:
            parts[place].load_state_dict(copy.deepcopy(saved["state"]))


def _is_same(one: StateDict, two: StateDict | None) -> bool:
    """Whether two states have the same values."""
    (plan, tensors), (other, others) = flatten(one), flatten(two)
    return bool(
        repr(plan) == repr(other)
        and tensors.keys() == others.keys()
        and all(torch.equal(tensors[name], others[name]) for name in tensors)
    )


def compare_parts(loader: object, states: StateDict, *, is_late: bool) -> list[Note]:
    """Notes on parts whose state is not restored exactly, before anything is restored.

    Parameters
    ----------
    states
        Saved states, from ``get_states``.
    """
    parts = find_stateful(loader)
    notes: list[Note] = []
    for place in sorted({*parts, *states} - {"loader"}):
        saved, kind = states.get(place), type(parts.get(place)).__qualname__
        name = f"{place} {saved['class'] if saved else kind}"
        if saved is None:
            notes.append((name, "missing", "it has a state_dict, and none was saved"))
        elif place not in parts or kind != saved["class"]:
            got = kind if place in parts else "none"
            notes.append((name, "missing", f"was saved, and this fit has {got}"))
        elif "why" in saved:
            notes.append(
                (name, "missing", f"its state could not be saved: {saved['why']}")
            )
        elif is_late and place.startswith("dataset"):
            why = "persistent workers had its state, and start new"
            notes.append((name, "missing", why))
    return notes
