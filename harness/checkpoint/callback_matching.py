"""Find for each callback of a resumed fit the state that it saved."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path

from harness.callback import Callback
from harness.checkpoint.held.values import PLAIN_TYPES
from harness.checkpoint.hparams import encode_hparams
from harness.errors import CheckpointError

MAX_ITEMS = 20
"""Longer containers are data and no options."""

Options = Mapping[str, str]
"""Digests of a callback's attributes, as they were before the fit began."""


def name_callbacks(callbacks: Iterable[Callback]) -> Iterator[tuple[str, Callback]]:
    """Pair callbacks with their names in a state: the class, numbered from the second on."""
    counts: dict[str, int] = {}
    for callback in callbacks:
        name = type(callback).__name__
        counts[name] = counts.get(name, 0) + 1
        yield (name if counts[name] == 1 else f"{name}.{counts[name]}"), callback


def describe_callbacks(callbacks: Iterable[Callback]) -> dict[str, dict[str, str]]:
    """Digests of the attributes of callbacks: numbers, texts, functions and the like.

    Digests are enough to compare them, and do not give away secrets, such as the address
    of a webhook.
    """
    return {
        name: {
            key: hashlib.sha256(str(value).encode()).hexdigest()[:16]
            for key, value in encode_hparams(
                {k: v for k, v in vars(callback).items() if _is_option(v)}
            ).items()
        }
        for name, callback in name_callbacks(callbacks)
    }


def _is_option(value: object) -> bool:
    if isinstance(value, list | tuple | dict | set | frozenset):
        items = value.values() if isinstance(value, dict) else value
        return len(value) <= MAX_ITEMS and all(map(_is_option, items))
    return isinstance(value, (*PLAIN_TYPES, Path, Enum)) or callable(value)


def match_callbacks(
    saved: Iterable[str],
    live: Iterable[str],
    options: Mapping[str, Options],
    live_options: Mapping[str, Options],
    stateful: Collection[str],
) -> dict[str, str]:
    """Find the saved name of each callback: of its class, with its options.

    Parameters
    ----------
    saved, live
        Names of the callbacks that were saved, and of those of this fit.
    options, live_options
        From ``describe_callbacks``; empty in a checkpoint of an older version.
    stateful
        Names of the saved callbacks that have a state. Where no callback of a class has
        one, any of them matches.

    Returns
    -------
    saved names by live ones; callbacks that are new are left out
    """
    found: dict[str, str] = {}
    saved, live = _by_class(saved), _by_class(live)
    for kind in live.keys() & saved.keys():
        then, now = saved[kind], live[kind]
        is_known = options.keys() >= {*then} and live_options.keys() >= {*now}
        is_stateless = not any(name in stateful for name in then)
        if not is_known or is_stateless or len(then) == len(now) == 1:
            found |= dict(zip(now, then, strict=False))
            continue
        old, new = [options[name] for name in then], [live_options[n] for n in now]
        for place, match in _match(kind, old, new):
            found[now[place]] = then[match]
    return found


def _by_class(names: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.partition(".")[0], []).append(name)
    return found


def _match(
    kind: str, old: Sequence[Options], new: Sequence[Options]
) -> Iterator[tuple[int, int]]:
    """Pair new callbacks of a class with old ones by the attributes that they share.

    An attribute tells callbacks apart if both fits have the same values of it. Others,
    such as a time, are different in each fit.
    """
    keys = set.intersection(*map(set, (*old, *new)))
    shared = [key for key in sorted(keys) if _has_same_values(key, old, new)]
    left = list(range(len(old)))
    for place, own in enumerate(new):
        alike = [n for n in left if _agree(old[n], own, shared)]
        if not alike:
            continue
        others = [n for n, other in enumerate(new) if _agree(own, other, shared)]
        if len(alike) > 1 and len(old) != len(new) and len(others) != len(alike):
            raise _refuse(kind)
        match = alike[0]
        for key in keys.difference(shared):
            is_elsewhere = any(o[key] == own[key] for o in old)
            if is_elsewhere and old[match][key] != own[key]:
                raise _refuse(kind)
        left.remove(match)
        yield place, match


def _has_same_values(key: str, old: Sequence[Options], new: Sequence[Options]) -> bool:
    """Whether the smaller of two fits has only values that the other one has too."""
    then, now = (Counter(options[key] for options in side) for side in (old, new))
    return then <= now or now <= then


def _agree(one: Options, two: Options, keys: Sequence[str]) -> bool:
    return all(one[key] == two[key] for key in keys)


def _refuse(kind: str) -> CheckpointError:
    msg = f"resume: expected to tell the callbacks of class {kind} apart by the options"
    msg = f"{msg} that they were saved with, got others."
    return CheckpointError(
        f"{msg} Pass the callbacks that were saved, or restore_callbacks=False."
    )
