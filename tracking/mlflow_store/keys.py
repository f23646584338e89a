"""Names in MLflow: one valid, unique key for each series of the journal.

MLflow accepts letters, digits, ``_ - . : /`` and space, at most 250 characters, and
only plain relative paths. Any other name becomes a readable form with a hash at its
end. So does a name whose key is already taken: ``train/a`` and ``b`` would have the
same key as ``train`` and ``a/b``. The first one in the journal gets the plain key, so
the same journal always gives the same keys.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from tracking.journal.fits import name_in_fit


class SeriesId(NamedTuple):
    """Series of records; ``fit`` counts the fits of the run from 1."""

    what: str
    set: str
    name: str
    fit: int = 1


LATEST: Final = 3
"""Layout of the keys of new runs. A run keeps the layout that it was delivered with first.

1: ``what`` begins a key, if it is not that of metrics or steps. 2: so it does, but times and
throughput (``profile``) are below ``system/``, which MLflow shows on a page of their own, and
learning rates are ``<set>/lr``. 3: what is below ``system/`` has no other slash. MLflow's page
of an experiment begins with ``system/train``, but has ``system`` itself at its end.
"""

MAX_KEY_LENGTH: Final = 250
_VALID: Final = re.compile(r"[/\w.\- :]+")
_INVALID: Final = re.compile(r"[^/\w.\- :]+")


@dataclass
class KeyMap:
    """MLflow's key for each series, in one of its name spaces."""

    #: keys that begin with this are never given to the user's names
    reserved_prefix: str = "\0"
    layout: int = LATEST  #: see ``LATEST``
    #: key of each series, in the order of first use
    by_series: dict[SeriesId, str] = field(default_factory=dict)
    _taken: dict[str, SeriesId] = field(default_factory=dict)

    def key_for(self, series: SeriesId) -> str:
        """Key of a series; the same in every call."""
        key = self.by_series.get(series)
        if key is None:
            key = self._new_key(series)
            self.by_series[series] = key
            self._taken[key] = series
        return key

    def renamed(self) -> dict[str, list[str]]:
        """What, set and name by key, where the key does not tell them, or another fit.

        The number of a later fit is the fourth word.
        """
        return {
            key: list(map(str, series if series.fit > 1 else series[:3]))
            for series, key in self.by_series.items()
            if series.fit > 1 or key != plain_key(series, self.layout)
        }

    def _new_key(self, series: SeriesId) -> str:
        plain = plain_key(series, self.layout)
        is_reserved = plain.startswith(self.reserved_prefix)
        if is_valid(plain) and not is_reserved and plain not in self._taken:
            return plain
        return _hashed_key(plain, series, self._taken)


def plain_key(series: SeriesId, layout: int = LATEST) -> str:
    """Key of a series if MLflow accepts it and no other series has it.

    Examples
    --------
    >>> plain_key(SeriesId("metrics", "train", "loss"))
    'train/loss'
    >>> plain_key(SeriesId("steps", "train", "loss", fit=2))
    'train/loss_step_fit2'
    >>> plain_key(SeriesId("profile", "train", "epoch_s"))
    'system/train_epoch_s'
    >>> plain_key(SeriesId("lr", "train", "opt"))
    'train/lr'
    """
    what, set_, name, fit = series
    suffix = "_step" if what == "steps" else ""
    if layout > 1:
        if what == "profile":
            what = "system"
        elif what == "lr" and set_:
            groups = name.removeprefix("opt").removeprefix("/")  # of the only optimizer
            what, name = "", f"lr/{groups}" if groups else "lr"
    if layout > 2 and what == "system":
        set_, name = "", _join_below_system(set_, name)
    if what in ("metrics", "steps", "params", "tags"):
        what = ""
    key = "/".join(word for word in (what, set_, name) if word) + suffix
    return name_in_fit(key, fit)


def _join_below_system(set_: str, name: str) -> str:
    """``train`` and ``batches`` as ``train_batches``; ``epoch`` and ``epoch_s`` as the latter."""
    is_told = not set_ or name.startswith(f"{set_}_")
    return (name if is_told else f"{set_}_{name}").replace("/", "_")


def is_valid(key: str) -> bool:
    """Whether MLflow accepts a key unchanged."""
    return (
        len(key) <= MAX_KEY_LENGTH
        and _VALID.fullmatch(key) is not None
        and posixpath.normpath(key) == key
        and key not in (".", "..")
        and not key.startswith(("/", "../"))
    )


def _hashed_key(plain: str, series: SeriesId, taken: Collection[str]) -> str:
    """Readable form of a key, with a hash of the series at its end."""
    readable = _INVALID.sub("_", plain)[:200]
    words = [word for word in readable.split("/") if word not in ("", ".", "..")]
    words_of = series if series.fit > 1 else series[:3]
    digest = hashlib.sha256(json.dumps(words_of).encode()).hexdigest()
    for length in range(8, len(digest)):
        key = "-".join(["/".join(words) or "name", digest[:length]])
        if key not in taken:
            return key
    raise AssertionError(f"no free key for {series!r}")
