"""Going on from a checkpoint: which one, what is taken of it, and what differs since."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from harness.checkpoint.format import Position, check, read_part
from harness.checkpoint.resharding import (
    check_convertible,
    convert_position,
    has_same_batches,
    reshard_state,
)
from harness.checkpoint.state import get_generators, name_callbacks, restore_state
from harness.context import Context
from harness.errors import CheckpointError
from harness.metrics.state import check_saved_metrics
from harness.pytree import map_tensors
from harness.records import NullRun
from harness.reshard.consolidated import STATE_ERRORS
from harness.reshard.convert import check_same, has_same_layout
from harness.rng import set_rng_state

if TYPE_CHECKING:
    import tracking


@dataclass(kw_only=True)
class Resume:
    """A checkpoint to go on from.

    Attributes
    ----------
    place
        Folder of the checkpoint.
    manifest
        What it says of itself.
    restore_model, restore_optimizers, restore_records, restore_callbacks
        What is taken from it. Without all of them the fit begins at epoch 1 with what was
        taken.
    strict
        Refuse differences between then and now instead of telling them.
    report
        Part, state (``restored``, ``left out``, ``absent``, ``differs``) and detail.
    """

    place: Path
    manifest: Mapping[str, Any]
    restore_model: bool = True
    restore_optimizers: bool = True
    restore_records: bool = True
    restore_callbacks: bool = True
    strict: bool = False
    report: list[tuple[str, str, str]] = field(default_factory=list)
    _state: Mapping[str, Any] | None = None
    _moved: Position | None = None
    _gone: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, place: Path, **options: Any) -> Resume:
        """The checkpoint in a folder, after every file was compared with its manifest."""
        return cls(place=place, manifest=check(place), **options)

    @property
    def position(self) -> Position:
        """Where it was taken, counted in batches of the ranks that there are now."""
        return self._moved or Position(**self.manifest["position"])

    @property
    def is_exact(self) -> bool:
        """True if everything is taken, so that the fit goes on where it was."""
        return all(self._wanted.values())

    @property
    def is_weights_only(self) -> bool:
        """True if the model alone is taken, which any number of ranks can."""
        return [part for part, is_on in self._wanted.items() if is_on] == ["model"]

    @property
    def _wanted(self) -> dict[str, bool]:
        """What is taken, by part."""
        parts = ("model", "optimizers", "records", "callbacks")
        return {part: getattr(self, f"restore_{part}") for part in parts}

    def is_recorded_in(self, run: tracking.Run | NullRun) -> bool:
        """Whether `run` recorded the fit that the checkpoint is from."""
        return run.id is not None and bool(run.id == self.manifest["run"].get("id"))

    def state(self, ctx: Context) -> Mapping[str, Any]:
        """The part of this rank."""
        assert ctx.accelerator is not None
        if self._state is None:
            self._keep(read_part(self.place, ctx.accelerator.rank))
        assert self._state is not None
        return self._state

    def _keep(self, state: Mapping[str, Any]) -> None:
        """Hold the state of this rank until it is restored."""
        self._state = {**state, "run": self.manifest["run"].get("id")}

    def check(self, ctx: Context) -> None:
        """Compare the checkpoint with the fit that is to go on from it, before any change.

        Every rank has to call it.

        Raises
        ------
        CheckpointError
            If it is of another model, other optimizers or metrics, or in a form that cannot
            be brought into that of the fit; with `strict`, if anything differs.
        """
        assert ctx.accelerator is not None
        error = None
        try:
            self._check(ctx)
        except CheckpointError as found:
            text = str(found).removeprefix("resume: ")
            error = CheckpointError(f"resume({str(self.place)!r}): {text}")
        except STATE_ERRORS as found:
            msg = f"resume({str(self.place)!r}): expected the state of a fit, got one that"
            error = CheckpointError(f"{msg} lacks {found!r}. Take another checkpoint.")
        # One rank that stops alone would leave the others waiting for it.
        if ctx.accelerator.any(error is not None):
            msg = f"resume({str(self.place)!r}): expected a checkpoint that fits all ranks"
            raise error or CheckpointError(f"{msg}, got one that another rank refuses.")

    def _check(self, ctx: Context) -> None:
        """The same, on this rank alone."""
        assert ctx.accelerator is not None
        ranks, saved = ctx.accelerator.world_size, self.manifest["world_size"]
        about, live = self.manifest["about"], ctx.accelerator.state_dict()
        kind = ctx.about["accelerator"]
        wanted = [part for part in ("model", "optimizers") if self._wanted[part]]
        is_alike = has_same_batches(saved, about, ctx) or self.position.phase == "epoch"
        is_same = ranks == saved and about.get("accelerator", kind) == kind
        if is_same:
            state = _checked(self.state(ctx))["accelerator"]
            is_same = has_same_layout(state, live)
        if is_same and (is_alike or not self.is_exact):
            check_same(state, live, wanted)
            parts = [dict(self.state(ctx))]
        else:
            parts = [
                _checked(read_part(self.place, rank, is_mapped=True))
                for rank in range(saved)
            ]
            check_convertible(parts, live, is_exact=self.is_exact)
            if self.is_exact and not is_alike:
                self._moved = convert_position(self.position, parts, about, ctx)
            self._gone = {n: parts[n]["journal"] for n in range(ranks, saved)}
            state = reshard_state(parts, live, ctx, wanted, is_alike=is_alike)
            self._keep(map_tensors(state, Tensor.clone))
            then, now = parts[0]["accelerator"].get("stage"), live.get("stage")
            if None not in {then, now} and then != now:
                self.report.append(("ZeRO stage", "differs", f"{then} then, {now} now"))
        if self.is_exact:
            _check_metrics(parts, ctx, is_merged=ranks < saved)
        if ranks != saved:
            self.report.append(("ranks", "differs", f"{saved} then, {ranks} now"))
        self._compare(ctx.about)

    def _compare(self, now: Mapping[str, Any]) -> None:
        """Put into the report what differs between then and now; with `strict` refuse it."""
        then = self.manifest["about"]
        for name in sorted({*then, *now}):
            if then.get(name) != now.get(name):
                detail = f"{then.get(name)!r} then, {now.get(name)!r} now"
                self.report.append((name, "differs", detail))
        differing = [
            f"{name}: {text}" for name, state, text in self.report if state == "differs"
        ]
        if self.strict and differing:
            got = "; ".join(differing)
            msg = f"resume: strict: expected no difference, got {got}."
            raise CheckpointError(f"{msg} Mend it or drop strict.")

    def restore(self, ctx: Context) -> None:
        """Put the state into the context, its accelerator and callbacks.

        Raises
        ------
        CheckpointError
            If it does not fit the model or the optimizers.
        """
        parts = [part for part, is_on in self._wanted.items() if is_on]
        state = dict(self.state(ctx))
        if not self.is_exact:  # an epoch that is begun anew counts anew
            state["callbacks"] = {**state["callbacks"], "Metrics": {}}
        notes = restore_state(ctx, state, parts)
        assert ctx.accelerator is not None
        is_ours = self.restore_records and self.is_recorded_in(ctx.run)
        if is_ours and ctx.accelerator.is_main:
            for rank, seq in self._gone.items():
                ctx.run.rewind(seq, rank)
        for part, is_on in self._wanted.items():
            self.report.append((part, "restored" if is_on else "left out", ""))
        self.report += [("callbacks", "absent", note) for note in notes]
        if not self.is_exact:
            self._tell(ctx)

    def restore_random(self, ctx: Context) -> None:
        """Set all random generators to where they were; the last thing of a resume."""
        missing = set_rng_state(self.state(ctx)["random"], get_generators(ctx))
        self.report.append(("random generators", "restored", ""))
        self.report += [("random generators", "absent", note) for note in missing]
        done = f"{self.position.iter} batches done"
        self.report.append(("loader position", "restored", done))
        workers = getattr(ctx.train_data, "persistent_workers", False)
        if workers and self.position.epoch > 1:
            note = "persistent workers begin afresh: what they draw differs"
            self.report.append(("loader workers", "absent", note))
        self._tell(ctx)

    def _tell(self, ctx: Context) -> None:
        """Show the report to who watches; forget the state."""
        self._state = None
        if ctx.verbose and ctx.accelerator is not None and ctx.accelerator.is_main:
            sys.stderr.write(f"{self}\n")

    def __str__(self) -> str:
        lines = [
            f"  {part:<20} {state:<9} {text}".rstrip()
            for part, state, text in self.report
        ]
        head = f"resumed from {self.place.name}: {self.position}"
        return "\n".join([head, *lines])


def _check_metrics(
    parts: Sequence[Mapping[str, Any]], ctx: Context, *, is_merged: bool
) -> None:
    """Raise if an epoch was under way with other metrics, or theirs cannot be joined."""
    callbacks: dict[str, Any] = dict(name_callbacks(ctx.callbacks))
    for part in parts:
        saved = part["callbacks"].get("Metrics", {}).get("train", {})
        if "metrics" in saved:
            metrics = callbacks["Metrics"].metric_set.train
            check_saved_metrics(metrics, saved["metrics"], is_merged=is_merged)


def _checked(state: Any) -> dict[str, Any]:
    """The state, if it is that of a fit."""
    lacking = [name for name in _PARTS if name not in state]
    if lacking or not isinstance(state["accelerator"], dict):
        msg = f"resume: expected the state of a fit, got none: no {lacking}."
        raise CheckpointError(f"{msg} Take another checkpoint.")
    return dict(state)


_PARTS = ("accelerator", "callbacks", "extra", "journal", "pass", "random", "records")
"""What the state of a rank must have."""
