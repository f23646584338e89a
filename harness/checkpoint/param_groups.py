"""Parameter groups of optimizers: what they step, by name, and with which options.

A fit may change the groups that its learner defines: callbacks add some, schedulers set
options. So a checkpoint keeps both, the groups as the learner defined them (``describe``)
and as they were when it was saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from harness.accelerators.single import list_all_state
from harness.checkpoint.hparams import encode_hparams
from harness.errors import CheckpointError
from harness.pytree import StateDict

Names = list[list[str | None]]
"""Names of the parameters of each group; None for one that hangs on nothing known."""

ADVICE = "Resume with the learner that was saved, or restore_optimizers=False."


def name_groups(opt: Any, params: Mapping[str, Tensor]) -> Names:
    """Names of the parameters in each group of an optimizer, and of those it no longer steps."""
    names = {id(param): name for name, param in params.items()}
    with list_all_state(opt):
        return [
            [names.get(id(param)) for param in group["params"]]
            for group in opt.param_groups
        ]


def describe_groups(
    optimizers: Mapping[str, Any], params: Mapping[str, Tensor]
) -> StateDict:
    """Describe the groups of optimizers as the learner defines them.

    Returns
    -------
    Names of parameters, and options as text, of each group by optimizer. The names are None
    where an engine steps other tensors than the parameters.
    """
    found: StateDict = {}
    for name, opt in optimizers.items():
        names = name_groups(opt, params)
        are_known = all(own and None not in own for own in names)
        found[name] = [
            {"params": own if are_known else None, "options": _describe_options(group)}
            # A last one may be of parameters that are no longer stepped: at ZeRO those that
            # have state before the engine gives the optimizer others, as Adagrad's.
            for own, group in zip(names, opt.param_groups, strict=False)
        ]
    return found


def _describe_options(group: Mapping[str, object]) -> dict[str, str]:
    options = {key: value for key, value in group.items() if key != "params"}
    return {key: str(value) for key, value in encode_hparams(options).items()}


def check_groups(saved: StateDict, live: StateDict) -> None:
    """Raise if learners define groups of other parameters."""
    for name in saved.keys() & live.keys():
        then, now = (_sets_of(side[name]) for side in (saved, live))
        if then == now or None in (*then, *now):
            continue
        one, two = (set().union(*filter(None, side)) for side in (then, now))
        moved = sorted(one ^ two)
        got = f"{moved[:5]} in one of both only" if moved else "other groups of them"
        msg = f"resume: expected optimizer {name!r} to step the parameters that it stepped"
        raise CheckpointError(f"{msg} when it was saved, got {got}. {ADVICE}")


def _sets_of(groups: Sequence[StateDict]) -> list[frozenset[str] | None]:
    names = [group["params"] for group in groups]
    return [None if own is None else frozenset(own) for own in names]


@dataclass(frozen=True, kw_only=True)
class ChangedOption:
    """An option of a group that the learner of the resumed fit sets to another value."""

    optimizer: str
    group: int
    key: str
    saved: str  #: text of the value that the saved learner set
    value: Any  #: the value that this learner sets

    def __str__(self) -> str:
        return f"saved {self.saved}, now {self.value}, which is used"

    def put_into(self, options: StateDict) -> None:
        """Put the value into the saved options of the group.

        A learning rate that a schedule changed keeps its ratio to the one that was set.
        """
        value, began = self.value, _as_float(self.saved)
        current = options.get(self.key)
        if self.key == "lr" and "initial_lr" in options:
            options["initial_lr"] = value
            if began and isinstance(current, float) and current != began:
                value = current * float(value) / began
        options[self.key] = value


def _as_float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def list_changes(
    saved: StateDict, live: StateDict, optimizers: Mapping[str, Any]
) -> Iterator[ChangedOption]:
    """List the options that the learner of the resumed fit sets to other values."""
    for name in saved.keys() & live.keys():
        for n, (then, now) in enumerate(zip(saved[name], live[name], strict=False)):
            for key, text in then["options"].items():
                if now["options"].get(key, text) != text:
                    yield ChangedOption(
                        optimizer=name,
                        group=n,
                        key=key,
                        saved=text,
                        value=optimizers[name].param_groups[n][key],
                    )


def regroup(opt: Any, saved: Names, params: Mapping[str, Tensor], place: str) -> None:
    """Give an optimizer the groups that it had when it was saved; options are not set.

    Parameters
    ----------
    opt
        Changed in place.
    """
    live = name_groups(opt, params)
    if live == saved:
        return
    groups = opt.param_groups
    found: list[list[Tensor]] = []
    for n, names in enumerate(saved):
        own = groups[n]["params"] if n < len(groups) else []
        found.append([])
        for k, name in enumerate(names):
            is_same = name is None and k < len(own) and live[n][k] is None
            param = own[k] if is_same else params.get(str(name))
            if param is None:
                msg = f"resume: expected optimizer {place!r} to step"
                what = repr(name) if name else f"parameter {k} of group {n}"
                msg = f"{msg} {what}, which no module of this fit has."
                raise CheckpointError(f"{msg} {ADVICE}")
            found[-1].append(param)
    del groups[len(saved) :]
    groups += [{**opt.defaults, "params": []} for _ in saved[len(groups) :]]
    for group, own in zip(groups, found, strict=True):
        group["params"][:] = own  # LBFGS keeps the list
