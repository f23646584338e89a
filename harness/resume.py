"""Going on from a checkpoint: which one, what is taken of it, and what differs since."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.accelerator.forms import is_same_form
from harness.checkpoint import Position, check, read_part
from harness.context import Context
from harness.errors import CheckpointError
from harness.randomness import generators_of, set_random_state
from harness.reshape import check_forms, moved, reshaped


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

    def goes_on_with(self, run: Any) -> bool:
        """True if `run` is the one that recorded the fit so far."""
        found = getattr(run, "id", None)
        return found is not None and bool(found == self.manifest["run"].get("id"))

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

        Raises
        ------
        CheckpointError
            If it is of another model or other optimizers, or was saved on another number
            of ranks or by another accelerator where that matters; with `strict`, if
            anything differs.
        """
        assert ctx.accelerator is not None
        place = f"resume({str(self.place)!r})"
        ranks, saved = ctx.accelerator.world_size, self.manifest["world_size"]
        about, live = self.manifest["about"], ctx.accelerator.state_dict()
        kind = ctx.about["accelerator"]
        is_same = ranks == saved and about.get("accelerator", kind) == kind
        if is_same:
            state = _checked(self.state(ctx), place)["accelerator"]
            is_same = is_same_form(state, live)
        if not is_same:
            parts = [
                _checked(read_part(self.place, rank), place) for rank in range(saved)
            ]
            check_forms(place, parts, live)
            self._moved = moved(place, self.position, parts, about, ctx)
            self._gone = {n: parts[n]["journal"] for n in range(ranks, saved)}
            self._keep(reshaped(place, parts, live, ctx))
            then, now = parts[0]["accelerator"].get("stage"), live.get("stage")
            if None not in {then, now} and then != now:
                self.report.append(("ZeRO stage", "differs", f"{then} then, {now} now"))
        if ranks != saved:
            self.report.append(("ranks", "differs", f"{saved} then, {ranks} now"))
        self._check_form(ctx, live, place)
        self._compare(ctx.about, place)

    def _check_form(self, ctx: Context, live: Mapping[str, Any], place: str) -> None:
        """Names and shapes of weights, names of optimizers."""
        saved = _checked(self.state(ctx), place)["accelerator"]
        if live.keys() != saved.keys():
            name = type(ctx.accelerator).__name__
            msg = f"{place}: expected the state of {name}, got that of another one."
            raise CheckpointError(f"{msg} Resume with the accelerator that was saved.")
        then, now = (
            {name: tuple(value.shape) for name, value in state.get("model", {}).items()}
            for state in (saved, live)
        )
        opts = set(saved.get("optimizers", {}))
        for name in sorted(then.keys() | now.keys()):
            if self.restore_model and then.get(name) != now.get(name):
                want, got = now.get(name, "none"), then.get(name, "none")
                msg = (
                    f"{place}: expected the tensor {name!r} of shape {want}, got {got}."
                )
                raise CheckpointError(f"{msg} Resume with the model that was saved.")
        if self.restore_optimizers and opts and opts != set(ctx.optimizers):
            names, saved_names = sorted(ctx.optimizers), sorted(opts)
            msg = f"{place}: expected optimizers {names}, got {saved_names}."
            raise CheckpointError(f"{msg} Resume with the learner that was saved.")

    def _compare(self, now: Mapping[str, Any], place: str) -> None:
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
            msg = (
                f"{place}, strict: expected no difference, got {'; '.join(differing)}."
            )
            raise CheckpointError(f"{msg} Mend it or drop strict.")

    def restore(self, ctx: Context) -> None:
        """Put the state into the context, its accelerator and callbacks.

        Raises
        ------
        CheckpointError
            If it does not fit the model or the optimizers.
        """
        wanted = {f"restore_{part}": is_on for part, is_on in self._wanted.items()}
        notes = ctx.load_state_dict(self.state(ctx), **wanted)
        assert ctx.accelerator is not None
        is_ours = self.restore_records and self.goes_on_with(ctx.recorder)
        if is_ours and ctx.accelerator.is_main:
            for rank, seq in self._gone.items():
                ctx.recorder.rewind(seq, rank)
        for part, is_on in self._wanted.items():
            self.report.append((part, "restored" if is_on else "left out", ""))
        self.report += [("callbacks", "absent", note) for note in notes]
        if not self.is_exact:
            self._tell(ctx)

    def restore_random(self, ctx: Context) -> None:
        """Set all random generators to where they were; the last thing of a resume."""
        loaders = (ctx.train_data, ctx.valid_data, ctx.model)
        missing = set_random_state(self.state(ctx)["random"], generators_of(*loaders))
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


def _checked(state: Any, place: str) -> dict[str, Any]:
    """The state, if it is that of a fit."""
    lacking = [name for name in _PARTS if name not in state]
    if lacking or not isinstance(state["accelerator"], dict):
        msg = f"{place}: expected the state of a fit, got none: no {lacking}."
        raise CheckpointError(f"{msg} Take another checkpoint.")
    return dict(state)


_PARTS = ("accelerator", "callbacks", "extra", "journal", "pass", "random", "records")
"""What the state of a rank must have."""
