"""Going on from a checkpoint: which one, what is taken of it, and what differs since."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.checkpoint import Position, check, read_part
from harness.context import Context
from harness.errors import CheckpointError
from harness.randomness import generators_of, set_random_state


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

    @classmethod
    def of(cls, place: Path, **options: Any) -> Resume:
        """The checkpoint in a folder, after every file was compared with its manifest."""
        return cls(place=place, manifest=check(place), **options)

    @property
    def position(self) -> Position:
        """Where it was taken."""
        return Position(**self.manifest["position"])

    @property
    def is_exact(self) -> bool:
        """True if everything is taken, so that the fit goes on where it was."""
        return all(self._wanted.values())

    @property
    def _wanted(self) -> dict[str, bool]:
        """What is taken, by part."""
        parts = ("model", "optimizers", "records", "callbacks")
        return {part: getattr(self, f"restore_{part}") for part in parts}

    def state(self, ctx: Context) -> Mapping[str, Any]:
        """The part of this rank.

        Raises
        ------
        CheckpointError
            If it was saved on another number of ranks.
        """
        assert ctx.accelerator is not None
        ranks, saved = ctx.accelerator.world_size, self.manifest["world_size"]
        if ranks != saved:
            place = f"resume({str(self.place)!r})"
            msg = f"{place}: expected the {saved} ranks it was saved on, got {ranks}."
            advice = (
                f"Resume on {saved}, or begin anew with the weights of a saved model."
            )
            raise CheckpointError(f"{msg} {advice}")
        if self._state is None:
            self._state = read_part(self.place, ctx.accelerator.rank)
        return self._state

    def compare(self, now: Mapping[str, Any]) -> None:
        """Tell what differs between the fit that was saved and this one.

        Raises
        ------
        CheckpointError
            If something differs and `strict` is set.
        """
        then = self.manifest.get("about", {})
        for name in sorted({*then, *now}):
            if then.get(name) != now.get(name):
                detail = f"{then.get(name)!r} then, {now.get(name)!r} now"
                self.report.append((name, "differs", detail))
        differing = [
            f"{name}: {text}" for name, state, text in self.report if state == "differs"
        ]
        if self.strict and differing:
            msg = f"resume({str(self.place)!r}, strict): expected no difference, got "
            raise CheckpointError(
                f"{msg}{'; '.join(differing)}. Mend it or drop strict."
            )

    def restore(self, ctx: Context) -> None:
        """Put the state into the context, its accelerator and callbacks.

        Raises
        ------
        CheckpointError
            If it does not fit the model, the optimizers or the ranks.
        """
        wanted = {f"restore_{part}": is_on for part, is_on in self._wanted.items()}
        notes = ctx.load_state_dict(self.state(ctx), **wanted)
        for part, is_on in self._wanted.items():
            self.report.append((part, "restored" if is_on else "left out", ""))
        self.report += [("callbacks", "differs", note) for note in notes]

    def restore_random(self, ctx: Context) -> None:
        """Set all random generators to where they were."""
        set_random_state(self.state(ctx)["random"], generators_of(ctx.train_data))
        self._state = None
        self.report.append(("random generators", "restored", ""))
        done = f"{self.position.iter} batches done"
        self.report.append(("loader position", "restored", done))
        if ctx.verbose and ctx.accelerator is not None and ctx.accelerator.is_main:
            sys.stderr.write(f"{self}\n")

    def __str__(self) -> str:
        where = self.position
        head = (
            f"resumed from {self.place.name}: epoch {where.epoch}, batch {where.iter}"
        )
        lines = [
            f"  {part:<20} {state:<9} {text}".rstrip()
            for part, state, text in self.report
        ]
        return "\n".join([f"{head}, step {where.step}", *lines])
