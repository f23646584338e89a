"""The part of an accelerator's state that a model's weights can be made of again."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from harness.pytree import StateDict
from harness.reshard.consolidated import is_master_name

_KEPT = ("world_size", "stage", "layouts", "members", "shapes", "dtypes", "frozen")
"""What tells where the pieces of parameters are."""


def take_model_part(state: StateDict) -> StateDict:
    """Take weights, buffers and master weights from the state of an accelerator on one rank.

    The tensors are those of the state, and live. ``ConsolidatedState`` reads what the ranks
    took.
    """
    if "shared" not in state:
        return {"world_size": state.get("world_size", 1), "model": state["model"]}
    kept = {name: state[name] for name in _KEPT if name in state}
    sides = {
        side: {kind: _take(kind, own) for kind, own in state[side].items()}
        for side in ("shared", "own")
    }
    facts = {
        name: {
            "kind": own["kind"],
            "form": own["form"],
            "groups": own["groups"],
            "state": [{} for _ in own["state"]],
            "scheduler": None,
        }
        for name, own in state["facts"].items()
    }
    return {**kept, **sides, "facts": facts}


def _take(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: value
        for name, value in tensors.items()
        if kind != "optimizers" or is_master_name(name)
    }
