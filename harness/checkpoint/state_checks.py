"""The form of a saved state: whether a fit can restore it, checked before anything changes.

A checkpoint's digests say that its files are complete. They do not say that the values in
them are those of a fit: another program may have written them.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from numbers import Number

import torch
from torch import Tensor
from torch.optim import Optimizer

from harness.accelerators.base import HOW_TO_STEP
from harness.accelerators.single import get_optimizer_state
from harness.checkpoint.callback_matching import name_callbacks
from harness.checkpoint.format import Phase
from harness.checkpoint.state import get_generators
from harness.context import Context
from harness.pytree import StateDict
from harness.records import unpack_records
from harness.reshard.index import select_named
from harness.rng import Generator, find_generators, get_rng_state, set_rng_state


def check_structure(
    saved: object,
    live: object,
    place: str,
    *,
    num_optional: int = 0,
    keeps_dims: bool = True,
) -> None:
    """Raise ``ValueError`` unless a saved value has the form of a live one.

    Parameters
    ----------
    saved, live
        Nested states. Where the live value is None or an empty list, any value will do.
    num_optional
        Levels of mappings from here whose keys may be missing in the saved value, as they
        are in a checkpoint of an earlier version.
    keeps_dims
        Whether tensors keep their number of dims. Those of a metric such as ``R2Score`` are
        numbers until its first update.
    """
    if live is None:
        return
    are_tensors = isinstance(saved, Tensor) and isinstance(live, Tensor)
    if _kind(saved) != _kind(live) and (keeps_dims or not are_tensors):
        raise _mismatch(place, f"a {_kind(live)}", saved)
    if isinstance(live, Mapping) and isinstance(saved, Mapping):
        for key, item in live.items():
            if key in saved:
                check_structure(
                    saved[key],
                    item,
                    f"{place}/{key}",
                    num_optional=num_optional - 1,
                    keeps_dims=keeps_dims,
                )
            elif num_optional <= 0 and item is not None:
                raise _mismatch(place, f"the key {key!r}", "none")
    elif isinstance(live, list | tuple) and isinstance(saved, list | tuple) and live:
        pairs = list(live) if len(live) == len(saved) else [live[0]] * len(saved)
        for number, (own, item) in enumerate(zip(saved, pairs, strict=True)):
            check_structure(own, item, f"{place}/{number}", keeps_dims=keeps_dims)


def _kind(value: object) -> str:
    """What a value is, as far as another one can take its place."""
    if isinstance(value, Tensor):
        return "tensor" if value.dim() else "number"
    for kind, types in _KINDS.items():
        if isinstance(value, types):
            return kind
    return "value of another kind" if value is not None else "None"


_KINDS: dict[str, type | tuple[type, ...]] = {
    "number": Number,
    "text": str,
    "list": (list, tuple),
    "mapping": Mapping,
}


def _mismatch(place: str, expected: str, got: object) -> ValueError:
    text = "none" if got == "none" else repr(got)
    return ValueError(f"state: expected {expected} in {place}, got {text:.80}.")


# ------------------------------------------------------------- before the run is opened


def check_state(state: StateDict, ctx: Context, phase: Phase) -> None:
    """Check the parts of a rank's state that are the same in every fit.

    Parameters
    ----------
    state
        As ``capture_state`` returned it.
    ctx
        Context of the fit that will restore it; unchanged afterwards.
    phase
        Where in the epoch it was captured.
    """
    for what, sets in _mapping(state["records"], "records").items():
        _mapping(sets, f"records/{what}")
    unpack_records(state["records"])
    _check_count(state["journal"], "journal", lowest=-1)
    _check_indices(state.get("indices"))
    _mapping(state["extra"], "extra")
    for name, own in _mapping(state["callbacks"], "callbacks").items():
        _mapping(own, f"callbacks/{name}")
    for part in ("held", "fields", "metrics", "groups", "lost", "not_kept"):
        _mapping(state.get(part, {}), part)  # older checkpoints have none
    for name, own in state.get("held", {}).items():
        _mapping(own, f"held/{name}")
    _check_fields(state, "fields")
    _check_places(state)
    _try_random(state["random"], get_generators(ctx), "random", ctx.device)
    if phase == "train" or (phase == "valid" and state["pass"] is not None):
        _check_pass(state["pass"], ctx)
    _check_accelerator(state["accelerator"], state.get("groups", {}), ctx)


def _check_indices(indices: StateDict | None) -> None:
    """Check the highest indices of the run's series, which older checkpoints do not have."""
    if indices is None:
        return
    _check_count(_mapping(indices, "indices")["fit"], "indices/fit", lowest=1)
    for what, split, highest in indices["highest"]:
        if not isinstance(what, str) or not isinstance(split, str):
            raise TypeError(f"indices: expected names, got {what!r}, {split!r}")
        _check_count(highest, "indices/highest", lowest=-(2**63))


def _check_fields(state: StateDict, place: str) -> None:
    """Check attributes by root, owner and name, which older checkpoints do not have."""
    for root, owners in _mapping(state.get("fields", {}), place).items():
        for path, own in _mapping(owners, f"{place}/{root}").items():
            _mapping(own, f"{place}/{root}{path}")


def _check_places(state: StateDict) -> None:
    """Check where objects are that are shared or were replaced; older checkpoints have none."""
    shared = [place for places in state.get("same", ()) for place in places]
    for part, places, size in (
        ("same", shared, 3),
        ("replaced", state.get("replaced", ()), 2),
    ):
        for place in places:
            names = place[:size] if isinstance(place, list) else []
            if len(names) < size or not all(isinstance(name, str) for name in names):
                raise TypeError(
                    f"{part}: expected the place of an object, got {place!r}"
                )


def _check_pass(state: StateDict, ctx: Context) -> None:
    """Check the position in the data."""
    _check_count(_mapping(state, "pass")["window"], "pass/window", lowest=1)
    _check_fields(state, "pass/fields")
    loader = ctx.train_data
    if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"):
        check_structure(state["ahead"], [], "pass/ahead")
        return
    _check_count(state["ahead"], "pass/ahead")
    _try_random(state["began"], find_generators(loader), "pass/began", ctx.device)


def _try_random(
    state: StateDict, generators: Sequence[Generator], place: str, device: torch.device
) -> None:
    """Set the random generators, and then set them back."""
    before = copy.deepcopy(get_rng_state(generators, device))
    try:
        set_rng_state(_mapping(state, place), generators, device)
    finally:
        set_rng_state(before, generators, device)


def _check_accelerator(state: StateDict, groups: StateDict, ctx: Context) -> None:
    """Check counters, gradients and optimizers; weights are compared with the model."""
    for part in ("steps", "done"):
        for name, count in _mapping(state[part], part).items():
            _check_count(count, f"accelerator/{part}/{name}")
    if "optimizers" not in state:  # of engines
        return
    params = dict(ctx.model.named_parameters())
    for name, grad in _mapping(state["grads"], "grads").items():
        if name in params and grad.shape != params[name].shape:
            raise _mismatch(f"accelerator/grads/{name}", f"{params[name].shape}", grad)
    check_structure(state["frozen"], [""], "accelerator/frozen")
    for name, opt in ctx.optimizers.items():
        if isinstance(opt, Optimizer) and name in state["optimizers"]:
            own = state["optimizers"][name]
            found = _find_stepped(opt, groups.get(name), params)
            _check_optimizer(own, opt, found, f"optimizers/{name}")


def _find_stepped(
    opt: Optimizer, names: Sequence[Sequence[str | None]] | None, params: StateDict
) -> list[list[Tensor | None]]:
    """Parameters of each saved group, by their names; None for one outside the model."""
    if names is None:  # a checkpoint of an earlier version
        return [list(group["params"]) for group in opt.param_groups]
    return [[params.get(str(name)) for name in own] for own in names]


def _check_optimizer(
    saved: StateDict,
    opt: Optimizer,
    stepped: Sequence[Sequence[Tensor | None]],
    place: str,
) -> None:
    """Check an optimizer's groups and what it keeps for each parameter."""
    if len(saved["param_groups"]) != len(stepped):
        return  # load_state_dict says more about it
    _check_groups(saved, opt, place)
    for own, group in zip(saved["param_groups"], stepped, strict=True):
        if len(own["params"]) != len(group):
            return
        samples: dict[int, StateDict | None] = {}
        for number, param in zip(own["params"], group, strict=True):
            _check_count(number, f"{place}/param_groups/params")
            entry = saved["state"].get(number)
            if entry is not None and param is not None:
                if param.dim() not in samples:
                    samples[param.dim()] = _sample_entry(opt, own, param.dim())
                sample = samples[param.dim()]
                _check_entry(entry, sample, param, f"{place}/state/{number}")
    numbers = {number for own in saved["param_groups"] for number in own["params"]}
    named = select_named(saved["state"])
    for key in saved["state"]:
        if key not in named and (type(key) is not int or key not in numbers):
            raise _mismatch(f"{place}/state", "the number of a parameter", key)


def _check_groups(saved: StateDict, opt: Optimizer, place: str) -> None:
    """Compare the options of groups with the live ones; a new scheduler adds others."""
    required = {"params", *opt.defaults}
    live = get_optimizer_state(opt)["param_groups"]
    for own, group in zip(saved["param_groups"], live, strict=False):
        options = {
            name: value
            for name, value in group.items()
            if (name in own or name in required) and _can_check(own, name, value)
        }
        check_structure(own, options, f"{place}/param_groups")
        for name, value in own.items():
            if isinstance(value, int) and value.bit_length() > 63:
                raise _mismatch(f"{place}/param_groups/{name}", "a number", value)


def _can_check(own: Mapping[str, object], name: str, value: object) -> bool:
    """Whether an option must be like the live one; None often means a default."""
    return not isinstance(value, bool) or own.get(name, value) is not None


_TINY = 2
"""Size of each dim of the parameter of ``_sample_entry``."""


def _sample_entry(opt: Optimizer, group: StateDict, dim: int) -> StateDict | None:
    """What an optimizer of torch keeps for a parameter after a step; None if unknown."""
    if not type(opt).__module__.startswith("torch.optim"):
        return None
    known = inspect.signature(type(opt).__init__).parameters
    kept = known.keys() - HOW_TO_STEP - {"params"}  # some work on a GPU alone
    options = {name: group[name] for name in kept if name in group}
    tiny = torch.zeros((_TINY,) * dim, requires_grad=True)
    tiny.grad = torch.zeros_like(tiny)
    with suppress(RuntimeError, NotImplementedError):
        fresh = type(opt)([tiny], **options)
        with suppress(TypeError):  # one whose step needs a closure
            fresh.step()
            return dict(fresh.state[tiny])
    return None


def _check_entry(
    entry: StateDict, sample: StateDict | None, param: Tensor, place: str
) -> None:
    check_structure(_mapping(entry, place), sample, place)
    for key, tiny in (sample or {}).items():
        if not isinstance(tiny, Tensor) or not tiny.dim():
            continue
        shape = tuple(tiny.shape)
        if len(shape) == param.dim():
            shape = tuple(
                m if n == _TINY else n for n, m in zip(shape, param.shape, strict=True)
            )
        if tuple(entry[key].shape) != shape:
            expected = f"a tensor of shape {shape}"
            raise _mismatch(f"{place}/{key}", expected, tuple(entry[key].shape))


# ------------------------------------------------------- before anything is restored


def check_live_states(state: StateDict, ctx: Context) -> None:
    """Compare states with those of the callbacks and schedulers, which are ready now.

    The state of a user's callback may change its form at any time.
    """
    for name, opt in ctx.optimizers.items():
        saved = state["accelerator"].get("optimizers", {}).get(name)
        if isinstance(opt, Optimizer) and saved is not None:
            _check_groups(saved, opt, f"optimizers/{name}")
    saved, callbacks = state["callbacks"], dict(name_callbacks(ctx.callbacks))
    for name in saved.keys() & callbacks.keys():
        if not type(callbacks[name]).__module__.startswith("harness."):
            continue
        if saved[name]:
            place, live = f"callbacks/{name}", callbacks[name].state_dict()
            check_structure(saved[name], live, place, num_optional=3, keeps_dims=False)


def _mapping(value: StateDict, place: str) -> StateDict:
    if not isinstance(value, Mapping):
        raise _mismatch(place, "a mapping", value)
    return value


def _check_count(value: object, place: str, *, lowest: int = 0) -> None:
    if type(value) is not int or not lowest <= value < 2**63:
        raise _mismatch(place, f"a whole number from {lowest}", value)
