"""Capture and restore the state of a fit: everything that the rest of it depends on."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Container, Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from harness.checkpoint.callback_matching import name_callbacks
from harness.checkpoint.format import Phase, Position
from harness.checkpoint.held.attributes import (
    Attributes,
    capture_attributes,
    copy_attributes,
    list_changed,
)
from harness.checkpoint.held.objects import (
    Marks,
    capture_metrics,
    capture_objects,
    get_extra_states,
    list_missing,
    mark_modules,
    restore_metrics,
    restore_objects,
    set_extra_states,
)
from harness.checkpoint.held.restore import restore_attributes
from harness.checkpoint.held.search import (
    DATA,
    OPTIMIZERS,
    Search,
    name_parameters,
    search_fit,
    search_loss,
)
from harness.checkpoint.hparams import encode_hparams
from harness.checkpoint.param_groups import name_groups, regroup
from harness.context import Context
from harness.data.stateful import find_stateful, get_states, set_states
from harness.pytree import StateDict, map_tensors
from harness.records import RecordBook, iter_filled, pack_records, unpack_records
from harness.rng import Generators, find_generators, get_rng_state


def get_position(ctx: Context, phase: Phase) -> Position:
    """Where in the fit this is."""
    assert ctx.epoch is not None
    return Position(epoch=ctx.epoch, iter=ctx.trained, step=ctx.step, phase=phase)


def get_generators(ctx: Context, search: Search | None = None) -> Generators:
    """Random generators of loaders, model, loss and callbacks, and of code that they run.

    Parameters
    ----------
    search
        Of ``search_context``, if it was made already.
    """
    found = find_generators(
        ctx.train_data,
        *ctx.valid_sets.values(),
        ctx.model,
        later=(ctx.loss_fn, *ctx.callbacks),
    )
    return Generators(found, (search or search_context(ctx)).generators)


def get_pass_generators(ctx: Context) -> Generators:
    """Those of the training data first, and all others, which its order may depend on."""
    return Generators(find_generators(ctx.train_data), search_context(ctx).generators)


def search_context(ctx: Context) -> Search:
    """Search the loss, the model and the callbacks of a fit for state."""
    return search_fit(ctx, dict(name_callbacks(ctx.callbacks)))


@dataclass(frozen=True)
class FitStart:
    """What of a fit's own objects was there when it began, to keep only what changes."""

    attributes: Attributes
    modules: Marks
    #: objects of the user's own, by root and path
    owners: dict[tuple[str, str], Callable[[], object]]


def mark_start(ctx: Context) -> FitStart:
    """Remember how a fit began; see ``capture_state``."""
    search = search_context(ctx)
    owners = {(root, path): _refer(own) for root, path, own in search.iter_held()}
    began = FitStart(copy_attributes(search), mark_modules(search), owners)
    if ctx.resume is not None:
        _count_as_changed(began, ctx.resume.name_state(ctx))
    return began


def _refer(thing: object) -> Callable[[], object]:
    """Refer to an object without keeping it alive, if its class allows that."""
    try:
        return weakref.ref(thing)
    except TypeError:
        return lambda: thing


def _list_replaced(search: Search, began: FitStart) -> list[list[str]]:
    """Root and path of objects that others have replaced since the fit began."""
    return [
        [root, path]
        for root, path, owner in search.iter_held()
        if (root, path) in began.owners and began.owners[root, path]() is not owner
    ]


def _count_as_changed(began: FitStart, state: StateDict) -> None:
    """Let later checkpoints hold what a resume restores.

    This process may have had the same values already. Another one starts with others.
    """
    in_pass = state["pass"] or {}
    for fields in (state.get("fields", {}), in_pass.get("fields", {})):
        for root, owners in fields.items():
            for path, own in owners.items():
                known = began.attributes.get(root, {}).get(path, {})
                for name in own:
                    known.pop(name, None)
    for root, found in state.get("held", {}).items():
        for path in found:
            began.modules.pop(f"{root}{path}", None)


def capture_state(ctx: Context, phase: Phase, began: FitStart) -> StateDict:
    """Capture all that the rest of a fit depends on; tensors are live.

    Parameters
    ----------
    phase
        Where in the epoch this is; see ``Position``.
    began
        From ``mark_start``, when the fit began.

    Returns
    -------
    dict
        ``records``, ``ctx`` (hparams and opt_hparams), ``position``, ``accelerator``
        (weights, optimizers, gradients of an open window), ``extra`` (state of modules
        beside tensors), ``callbacks`` (metrics among them), ``random``, ``pass`` (position
        and order of the loader), ``journal`` (position in the run) and ``indices`` (the
        highest ones there; None if not known).
        After a pass, ``data`` (states of data sets and samplers that have any).
        Also ``groups`` (names of the parameters that each optimizer steps),
        ``epoch_random`` (random state before the events of the epoch), ``held``,
        ``fields`` and ``metrics`` (what hangs on the model, the loss and callbacks),
        ``same`` (places of ``fields`` that hold one object), ``replaced`` (root and path of
        objects that are others than when the fit began), and
        ``lost`` and ``not_kept`` (why other such state is not in the checkpoint). Where
        validation data are a fraction, ``split_random`` (random state before the split).
    """
    assert ctx.train_pass is not None
    is_in_pass = phase == "train" or (phase == "valid" and ctx.train_pass.is_paused)
    states = {
        name: callback.state_dict() for name, callback in name_callbacks(ctx.callbacks)
    }
    search = search_context(ctx)
    params = name_parameters(ctx.model, search)
    objects, lost = capture_objects(search, params, states, began.modules)
    own, not_kept, same = capture_attributes(search, began.attributes)
    replaced = _list_replaced(search, began)
    state: StateDict = {
        "records": ctx.records,
        "ctx": {
            "hparams": encode_hparams(ctx.hparams),
            "opt_hparams": encode_hparams(ctx.opt_hparams),
        },
        "position": asdict(get_position(ctx, phase)),
        "accelerator": ctx.accelerator.state_dict(),
        "extra": get_extra_states(ctx.model),
        **describe_left_out(ctx.model),
        "callbacks": states,
        "held": objects,
        "fields": own,
        **({"same": same} if same else {}),
        **({"replaced": replaced} if replaced else {}),
        "metrics": capture_metrics(ctx.model),
        "lost": lost,
        "not_kept": not_kept,
        "groups": {
            name: name_groups(opt, params) for name, opt in ctx.optimizers.items()
        },
        "random": ctx.train_random
        or get_rng_state(get_generators(ctx, search), ctx.device),
        "epoch_random": ctx.epoch_start,
        "pass": ctx.train_pass.state_dict() if is_in_pass else None,
        "journal": ctx.run.position(),
        "indices": ctx.run.get_indices(),
    }
    if phase == "valid" and ctx.valid_start is not None:
        ctx.valid_start.rewind(state)
    state["records"] = pack_records(state["records"])
    if not is_in_pass:
        state |= capture_data(ctx)
    elif ctx.train_pass.fields:
        state["pass"]["fields"] = list_changed(ctx.train_pass.fields, began.attributes)
    split_state = getattr(ctx, "split_state", None)
    return state if split_state is None else state | {"split_random": split_state}


def capture_data(ctx: Context) -> StateDict:
    """State of training data after a pass, as ``data``; empty if no part of it has any.

    A loader that saves its own state counts only if it has read all data. After a pass that
    was ended early, nothing tells whether its next pass would continue or begin.
    """
    assert ctx.train_pass is not None
    is_at_end = ctx.train_pass.is_at_end
    parts = find_stateful(ctx.train_data)
    if is_at_end and hasattr(ctx.train_data, "load_state_dict"):
        parts = {"loader": ctx.train_data}
    return (
        {"data": {"parts": get_states(parts), "is_at_end": is_at_end}} if parts else {}
    )


def mark_pass(ctx: Context) -> None:
    """Remember the attributes of data sets and samplers before a pass that may be saved."""
    if ctx.is_saved and ctx.train_pass is not None:
        ctx.train_pass.fields = copy_attributes(_search_data(ctx))


def restore_data_fields(ctx: Context, fields: Attributes) -> None:
    """Restore attributes of data sets and samplers."""
    if fields.get(DATA):
        own = {DATA: fields[DATA]}
        restore_attributes(_search_data(ctx), own, torch.device("cpu"))


def _search_data(ctx: Context) -> Search:
    """What data sets and samplers hold, as a search of the whole fit finds it."""
    search = search_context(ctx)
    search.owners = {DATA: search.owners[DATA]}
    return search


def restore_data(ctx: Context, state: StateDict) -> None:
    """Restore what ``capture_data`` returned; the caller then restores the random state."""
    saved = state.get("data")  # older checkpoints have none
    if saved is None:
        return
    parts = find_stateful(ctx.train_data)
    if "loader" in saved["parts"] and hasattr(ctx.train_data, "load_state_dict"):
        parts = {"loader": ctx.train_data}
    ctx.is_data_at_end = saved["is_at_end"]
    if ctx.train_pass is not None:  # of the epoch whose validation follows
        ctx.train_pass.is_at_end = saved["is_at_end"]
    set_states(ctx.train_data, parts, saved["parts"], is_after_end=ctx.is_data_at_end)


def restore_state(
    ctx: Context, state: StateDict, parts: Iterable[str], *, is_same_run: bool
) -> None:
    """Restore what ``capture_state`` returned; loader and random state are not restored.

    Parameters
    ----------
    state
        From ``capture_state`` or a checkpoint, with the names of this fit's callbacks.
    parts
        Any of ``model``, ``optimizers``, ``records`` and ``callbacks``. Step counters
        belong to the optimizers. What hangs on the loss belongs to the model.
    is_same_run
        Whether ``ctx.run`` recorded the saved fit.
    """
    wanted = set(parts)
    accelerator_parts = [part for part in ("model", "optimizers") if part in wanted]
    if "optimizers" in wanted and "shared" not in state["accelerator"]:
        _restore_groups(ctx, state.get("groups", {}))
    ctx.accelerator.load_state_dict(state["accelerator"], accelerator_parts)
    if "model" in wanted:
        set_extra_states(ctx.model, state["extra"])
        restore_metrics(ctx.model, state.get("metrics", {}))
    if "records" in wanted:
        ctx.record_book = RecordBook(unpack_records(state["records"]))
    if "callbacks" in wanted:
        for name, callback in name_callbacks(ctx.callbacks):
            if name in state["callbacks"]:
                callback.load_state_dict(state["callbacks"][name])
    _restore_attached(ctx, state, wanted)
    if "records" in wanted:  # last: nothing above may fail once the run is rewound
        _restore_journal(ctx, state, is_same_run=is_same_run)


def _restore_groups(ctx: Context, saved: StateDict) -> None:
    """Give the optimizers the groups that they had."""
    params = name_parameters(ctx.model, search_context(ctx))
    for name, opt in ctx.optimizers.items():
        if name in saved:
            regroup(opt, saved[name], params, name)


def _restore_attached(ctx: Context, state: StateDict, wanted: set[str]) -> None:
    """Restore what hangs on the model and the loss, and on callbacks."""
    search = search_context(ctx)
    of_callbacks = {name for name, _ in name_callbacks(ctx.callbacks)}
    roots = {root for root in search.objects if _get_part(root, of_callbacks) in wanted}
    objects, attributes = (
        {root: own for root, own in state.get(part, {}).items() if root in roots}
        for part in ("held", "fields")
    )
    held = state.get("replaced", [])
    search.replace([place for place in held if place[0] in attributes])
    restore_attributes(search, attributes, ctx.device, state.get("same", ()))
    restore_objects(search, objects, name_parameters(ctx.model, search))


def _get_part(root: str, of_callbacks: Container[str]) -> str:
    """Part of a checkpoint that what hangs on a root belongs to."""
    if root in of_callbacks:
        return "callbacks"
    if root == DATA:  # see ``restore_data_fields``
        return DATA
    return OPTIMIZERS if root.startswith(f"{OPTIMIZERS}.") else "model"


def _restore_journal(ctx: Context, state: StateDict, *, is_same_run: bool) -> None:
    """Go back in the run that recorded the fit; record everything again in another one."""
    if is_same_run:
        # Without the highest indices the whole journal is read for them.
        ctx.run.rewind(state["journal"], indices=state.get("indices"))
        return
    for what, sets in ctx.records.items():
        for split, series in sets.items():
            for index, value in iter_filled(series):
                # Of the epoch and the step, only what the index counts is known.
                by_step = ctx.pace.unit == "step"
                epoch, step = (None, index) if by_step else (index, None)
                ctx.run.log(what, split, value, index, epoch=epoch, step=step)


def begin_fit(ctx: Context) -> None:
    """Count what is logged from now on as another fit of the run, the same on all ranks."""
    number = ctx.run.begin_fit() if ctx.accelerator.is_main else None
    ctx.run.begin_fit(ctx.accelerator.broadcast(number))


def copy_loss_state(ctx: Context) -> StateDict:
    """Copy the state of the loss: of what it holds, and plain attributes of its modules."""
    search = search_loss(ctx.loss_fn, ctx.model)
    state = {
        "held": capture_objects(search, {}, {})[0],
        "fields": capture_attributes(search, {})[0],
    }
    copied: StateDict = copy.deepcopy(map_tensors(state, Tensor.detach))
    return copied


def restore_loss_state(ctx: Context, state: StateDict) -> None:
    """Restore what ``copy_loss_state`` returned."""
    search = search_loss(ctx.loss_fn, ctx.model)
    restore_attributes(search, state["fields"], ctx.device)
    restore_objects(search, state["held"], {})


def list_unmatched(ctx: Context, state: StateDict) -> dict[str, str]:
    """List saved states that cannot be restored: name, and why."""
    named = dict(name_callbacks(ctx.callbacks))
    notes = {
        name: "was saved, but this fit has none"
        for name, own in state["callbacks"].items()
        if own and name not in named
    }
    search = search_context(ctx)
    notes |= list_missing(search.objects, state.get("held", {}))
    search.add_tensors(state.get("fields", {}))
    notes |= list_missing(search.owners, state.get("fields", {}))
    notes |= state.get("lost", {})
    return notes


def list_new(ctx: Context, state: StateDict) -> list[str]:
    """List callbacks with a state that was not saved."""
    return [
        name
        for name, callback in name_callbacks(ctx.callbacks)
        if name not in state["callbacks"] and callback.state_dict()
    ]


def describe_left_out(model: nn.Module) -> dict[str, list[str]]:
    """Name the buffers that a state dict leaves out, if there are any."""
    names = [
        f"{place}.{name}".removeprefix(".")
        for place, module in model.named_modules()
        for name in module._non_persistent_buffers_set
        if module._buffers.get(name) is not None
    ]
    return {"left_out": names} if names else {}
