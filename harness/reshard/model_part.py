"""The part of an accelerator's state that a model's weights can be made of again.

Each rank takes its own: the final checkpoint of a fit and ``KeepBestModel`` hold no more.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from harness.pytree import StateDict
from harness.reshard.consolidated import check_shapes, is_master_name, shape_buffers

MODEL_PART = "model_part"
"""Where a callback's state has such a part. A resume on other ranks then converts it."""

_KEPT = ("world_size", "stage", "shapes", "dtypes")
_OF_MASTERS = ("layouts", "members", "frozen")
"""What tells where the pieces of master weights are."""


def take_model_part(state: StateDict) -> StateDict:
    """Take weights, buffers and master weights from the state of an accelerator on one rank.

    The tensors are those of the state, and live. ``ConsolidatedState`` reads what the ranks
    took, and ``Accelerator.load_state_dict`` restores it as ``model``. Master weights of
    float32 weights are left out: they are equal, or else older, because averaged weights are
    put into the model alone.
    """
    if "shared" not in state:
        return {"world_size": state.get("world_size", 1), "model": state["model"]}
    part = {name: state[name] for name in _KEPT if name in state}
    has_masters = _has_precise_masters(state)
    for side in ("shared", "own"):
        part[side] = {
            kind: _take(kind, own)
            for kind, own in state[side].items()
            if has_masters or kind != "optimizers"
        }
    if not has_masters:
        return part
    part |= {name: state[name] for name in _OF_MASTERS}
    part["facts"] = {
        name: {
            "kind": own["kind"],
            "form": own["form"],
            "groups": own["groups"],
            "state": [{} for _ in own["state"]],
            "scheduler": None,
        }
        for name, own in state["facts"].items()
    }
    return part


def _has_precise_masters(state: StateDict) -> bool:
    """Whether master weights have another dtype than the weights; the same on each rank."""
    dtypes = {*state.get("dtypes", {}).values(), "torch.float32"}
    return dtypes | {own["form"][1] for own in state["facts"].values()} != {
        "torch.float32"
    }


def _take(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: value
        for name, value in tensors.items()
        if kind != "optimizers" or is_master_name(name)
    }


def check_model_part(part: StateDict, live: StateDict, model: nn.Module) -> None:
    """Raise ``CheckpointError`` if a rank's part does not have the weights of a live one."""
    then, now = (
        {name: value.shape for name, value in _list_weights(own, model).items()}
        for own in (part, live)
    )
    check_shapes(then, now)


def _list_weights(part: StateDict, model: nn.Module) -> dict[str, Tensor]:
    if "model" in part:
        names = dict(model.named_parameters())
        return {name: value for name, value in part["model"].items() if name in names}
    kinds = {**part["shared"], **part["own"]}
    return {**kinds.get("weights", {}), **kinds.get("optimizers", {})}


def match_buffers(part: StateDict, model: nn.Module) -> StateDict:
    """A part with the buffers that the model has now, which take the shapes of the part's."""
    saved = part["model"] if "model" in part else part["own"]["buffers"]
    shape_buffers(model, saved)
    params = dict(model.named_parameters())
    found = {name: value for name, value in saved.items() if name in params}
    found |= {name: saved.get(name, live) for name, live in model.named_buffers()}
    if "model" in part:
        return {**part, "model": found}
    return {**part, "own": {**part["own"], "buffers": found}}
