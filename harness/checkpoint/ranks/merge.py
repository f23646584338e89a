"""Whole weights of a checkpoint, one parameter at a time, from the files of all ranks.

Nothing is mapped or kept: a parameter is read when it is asked for, so that the memory for
one is enough, however large the model is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor

from harness.checkpoint.format import (
    FILE_DTYPES,
    MAX_JSON_BYTES,
    Manifest,
    list_rank_files,
    read_json,
    verify_checkpoint,
)
from harness.checkpoint.ranks.states import SavedRanks
from harness.errors import CheckpointError
from harness.pytree import StateDict, restore
from harness.reshard.consolidated import STATE_ERRORS, ConsolidatedState, is_master_name
from harness.reshard.index import PartIndex

_TENSORS = {"$tensor", "$permuted", "$view", "$complex", "$sparse"}
"""Plans of tensors; see ``harness.pytree.flatten``."""

_DTYPES = {text: dtype for dtype, text in FILE_DTYPES.items()}

_FACTS = ("shapes", "layouts", "members", "facts", "dtypes")
"""What tells in a rank's state where the pieces of parameters are."""


class MergedWeights(Mapping[str, Tensor]):
    """The parameters and buffers of a checkpoint by name; each is read when it is asked for.

    Averaged weights that the fit validated take the place of those of training.

    Parameters
    ----------
    manifest
        Manifest that the files were compared with; None: they are compared here.
    in_model_dtype
        Whether a weight has the dtype of the model, where the checkpoint tells it. Otherwise
        it has the precision in which the optimizer steps it.
    skipped
        Names that are left out.

    Attributes
    ----------
    specs
        Tensors without memory that have the shapes and dtypes of the weights, by name.
    extra
        State of modules beside tensors, by module name.

    Raises
    ------
    CheckpointError
        If the checkpoint is damaged, or has no weights.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest | None = None,
        *,
        in_model_dtype: bool = True,
        skipped: Collection[str] = (),
    ) -> None:
        self.path = path
        manifest = manifest or verify_checkpoint(path)
        self._files = []
        try:
            plans = []
            for rank in range(manifest.world_size):
                tensors_name, plan_name = list_rank_files(rank)
                self._files.append(TensorFile(path / tensors_name))
                plans.append(read_json(path, plan_name))
            self._stand_ins = _StandIns(self._files)
            index = SavedRanks(path, manifest).written_index
            found = self._find_pieces(plans, index)
            dtypes = plans[0]["accelerator"].get("dtypes", {}) if in_model_dtype else {}
            self.specs: dict[str, Tensor] = {}
            self._pieces: dict[str, list[Tensor]] = {}
            for name in found:
                if name in skipped:
                    continue
                shape, self._pieces[name] = found[name]
                dtype = self._pieces[name][0].dtype
                if name in dtypes:
                    dtype = getattr(torch, dtypes[name].removeprefix("torch."))
                self.specs[name] = torch.empty(shape, dtype=dtype, device="meta")
            self.extra: StateDict = restore(plans[0].get("extra", {}), self._files[0])
            self.left_out = frozenset(plans[0].get("left_out", ()))
        except STATE_ERRORS as error:
            raise _make_error(path, error) from error

    def _find_pieces(
        self, plans: list[Any], index: PartIndex | None
    ) -> dict[str, tuple[Size, list[Tensor]]]:
        """Shape of each tensor, and stand-ins for its pieces in order."""
        states = [
            self._read_state(plan["accelerator"], rank)
            for rank, plan in enumerate(plans)
        ]
        merged = ConsolidatedState(states, index)
        nothing = [torch.empty(0, device="meta")]  # of a parameter without elements
        found = {
            name: (own.shape, [piece.read() for piece in own.list_pieces()] or nothing)
            for name, own in merged.weights.items()
        }
        whole = dict(merged.buffers)
        for plan in plans[0].get("callbacks", {}).values():
            if isinstance(plan, dict) and plan.get("is_validated") is True:
                whole |= self._stand_ins.make_all(0, plan["averages"])
        for name, own in whole.items():
            found[name] = (own.shape, [own.reshape(-1)])
        return found

    def _read_state(self, plan: Any, rank: int) -> StateDict:
        """The state of an accelerator on one rank, with stand-ins in place of weights."""
        state = {
            key: restore(plan[key], self._files[rank]) for key in _FACTS if key in plan
        }
        if "model" in plan:
            return {"model": self._stand_ins.make_all(rank, plan["model"])}
        for side in ("shared", "own"):
            state[side] = {
                kind: self._stand_ins.make_all(rank, own, masters=kind == "optimizers")
                for kind, own in plan[side].items()
            }
        return state

    def __len__(self) -> int:
        return len(self._pieces)

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __getitem__(self, name: str) -> Tensor:
        spec, pieces = self.specs[name], self._pieces[name]
        found = torch.empty(spec.numel(), dtype=pieces[0].dtype)
        try:
            for piece, part in zip(
                pieces, torch.split(found, [*map(len, pieces)]), strict=True
            ):
                self._stand_ins.read(piece, part)
        except (OSError, *STATE_ERRORS) as error:
            raise _make_error(self.path, error) from error
        return found.reshape(spec.shape).to(spec.dtype)


class _StandIns:
    """Tensors without memory in place of those in files, which they tell the place of."""

    def __init__(self, files: list[TensorFile]) -> None:
        self._files = files
        self._plans: dict[int, tuple[int, Any]] = {}
        self._made: list[Tensor] = []  # kept, so that no other has the same number

    def make(self, rank: int, plan: Any) -> Tensor:
        """A contiguous tensor without memory, of the shape and dtype of a planned one."""
        ((key, _),) = plan.items()
        if key not in _TENSORS:
            raise ValueError(f"a tensor, got {plan!s:.80}")
        form = restore(plan, self._files[rank].meta)
        made = torch.empty(form.shape, dtype=form.dtype, device="meta")
        self._made.append(made)
        self._plans[made.untyped_storage()._cdata] = rank, plan
        return made

    def make_all(
        self, rank: int, plans: Any, *, masters: bool = False
    ) -> dict[str, Tensor]:
        """Stand-ins by name; `masters`: only for master weights."""
        return {
            name: self.make(rank, plan)
            for name, plan in plans.items()
            if not masters or is_master_name(name)
        }

    def read(self, piece: Tensor, out: Tensor) -> None:
        """Read the values that a stand-in, or a part of one, stands for."""
        if not len(out):
            return
        rank, plan = self._plans[piece.untyped_storage()._cdata]
        at = int(piece.storage_offset())
        if plan.keys() == {"$tensor"}:
            self._files[rank].read_into(plan["$tensor"], at, out)
        else:
            whole = restore(plan, self._files[rank])
            whole = whole.to_dense() if whole.is_sparse else whole
            out.copy_(whole.reshape(-1)[at : at + len(out)])


class TensorFile(Mapping[str, Tensor]):
    """A safetensors file, from which tensors and parts of them are read; nothing is mapped.

    Attributes
    ----------
    meta
        Tensors without memory that have the shapes and dtypes of those in the file.

    References
    ----------
    safetensors format, https://github.com/huggingface/safetensors#format
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.meta: dict[str, Tensor] = {}
        self._starts: dict[str, int] = {}
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(MAX_JSON_BYTES, size - 8):
                raise ValueError(f"a header in {path.name}, got {length} bytes")
            header = json.loads(file.read(length))
        for name, about in header.items():
            if name == "__metadata__":
                continue
            dtype, shape = _DTYPES[about["dtype"]], about["shape"]
            start, end = about["data_offsets"]
            if min([*shape, start]) < 0 or 8 + length + end > size:
                raise ValueError(f"{name!r} in {path.name}, got the end of the file")
            if end - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(
                    f"{shape} of {dtype} in {name!r}, got {end - start} bytes"
                )
            self.meta[name] = torch.empty(shape, dtype=dtype, device="meta")
            self._starts[name] = 8 + length + start

    def __len__(self) -> int:
        return len(self.meta)

    def __iter__(self) -> Iterator[str]:
        return iter(self.meta)

    def __getitem__(self, name: str) -> Tensor:
        form = self.meta[name]
        found = torch.empty(form.numel(), dtype=form.dtype)
        self.read_into(name, 0, found)
        return found.reshape(form.shape)

    def read_into(self, name: str, at: int, out: Tensor) -> None:
        """Read ``len(out)`` values of the flattened tensor from position `at` on."""
        if not len(out):
            return
        memory = memoryview(out.view(torch.uint8).numpy())  # type: ignore[arg-type]
        with self._path.open("rb", buffering=0) as file:
            file.seek(self._starts[name] + at * out.element_size())
            while len(memory):
                count = file.readinto(memory)
                if not count:
                    raise ValueError(f"{name!r} in {self._path.name}, got its end")
                memory = memory[count:]


def _make_error(path: Path, error: Exception) -> CheckpointError:
    got = str(error) if isinstance(error, ValueError) else repr(error)
    msg = f"checkpoint {str(path)!r}: expected weights, got none: {got}."
    return CheckpointError(f"{msg} Take another checkpoint.")
