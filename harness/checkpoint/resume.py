"""Resume a fit from a checkpoint: what is restored, and what differs from the saved fit."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from harness.checkpoint.callback_matching import match_callbacks, name_callbacks
from harness.checkpoint.description import read_description
from harness.checkpoint.format import Manifest, Position, read_rank
from harness.checkpoint.param_groups import ChangedOption, check_groups, list_changes
from harness.checkpoint.ranks.errors import raise_together
from harness.checkpoint.ranks.states import SavedRanks, check_keys
from harness.checkpoint.resharding import (
    check_convertible,
    convert_position,
    has_same_batches,
    reshard_state,
)
from harness.checkpoint.start_weights import load_on_main
from harness.checkpoint.state import (
    begin_fit,
    get_generators,
    list_new,
    list_unmatched,
    restore_data,
    restore_data_fields,
    restore_state,
)
from harness.checkpoint.state_checks import check_live_states, check_state
from harness.checkpoint.weights import (
    WeightsReport,
    open_checkpoint_weights,
    put_weights,
)
from harness.context import Context
from harness.data.stateful import Note, Outcome, compare_parts
from harness.errors import CheckpointError
from harness.metrics.state import check_saved_metrics
from harness.pytree import StateDict
from harness.records import NullRun, RecordBook, unpack_records
from harness.reshard.consolidated import (
    STATE_ERRORS,
    shape_buffers,
    shape_lazy_parameters,
)
from harness.reshard.convert import check_same, has_same_layout
from harness.rng import set_rng_state
from tracking.errors import escape_control, write_stderr

if TYPE_CHECKING:
    import tracking
    from harness.accelerators.base import Accelerator

PARTS = ("model", "optimizers", "records", "callbacks")
"""What a resume can restore."""

OBSERVERS = frozenset({"AutoResume", "CSVLogger", "ModelCheckpoint"})
"""Callbacks that a strict resume may lack: training does not depend on them."""

SAVED = " (saved)"
"""End of the name of a callback that was saved, and that this fit does not have."""

COMPARED_APART = frozenset({"groups", "frozen", "callbacks", "kernels"})
"""Parts of the description of a fit whose differences are not reported as a whole."""


LATER = frozenset({"loss", "sampler", "validation"})
"""Parts of the description that checkpoints of earlier versions do not have."""


@dataclass(kw_only=True)
class Resume:
    """A checkpoint to resume from, chosen by ``choose_checkpoint``.

    Attributes
    ----------
    parts
        What is restored, some of `PARTS`. If not all are, the fit starts at epoch 1 with
        what was restored.
    strict
        Refuse differences between the saved fit and this one. Otherwise they are reported.
    report
        Name of a part, its outcome, and details.
    state
        State for this rank, from ``check`` until it is restored.
    position
        Where the checkpoint was taken, counted in batches of this fit's ranks.
    """

    path: Path
    manifest: Manifest
    parts: Sequence[str] = PARTS
    strict: bool = False
    report: list[Note] = field(default_factory=list)
    state: StateDict = field(default_factory=dict)
    position: Position = field(init=False)
    _is_converted: bool = False
    # What the learner of this fit defines otherwise than that of the saved one.
    _changed_options: list[ChangedOption] = field(default_factory=list)
    _changed_frozen: set[str] = field(default_factory=set)
    # Positions in the run of ranks that saved, and that this fit does not have.
    _surplus_ranks: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.position = self.manifest.position

    @property
    def is_exact(self) -> bool:
        """Whether everything is restored, so that the fit continues where it stopped."""
        return {*self.parts} == {*PARTS}

    @property
    def is_weights_only(self) -> bool:
        """Whether only the model is restored, which works on any number of ranks."""
        return [*self.parts] == ["model"]

    def is_recorded_in(self, run: tracking.Run | NullRun) -> bool:
        """Whether `run` recorded the fit that the checkpoint is from."""
        return run.id is not None and run.id == self.manifest.run.id

    def continues(self, run: tracking.Run | NullRun) -> bool:
        """Whether the resumed fit continues the one that `run` recorded."""
        return self.is_exact and self.is_recorded_in(run)

    # --- before the fit

    def restore_split_state(self, ranks: Accelerator) -> None:
        """Set torch's random state to that before a fraction of the data was drawn.

        Every rank must call it; rank 0 reads it.
        """
        saved = None
        if ranks.is_main:
            saved = read_rank(self.path, 0, is_mapped=True).get("split_random")
        saved = ranks.broadcast(saved)
        if saved is not None:
            with self._refuse_bad_state():
                torch.set_rng_state(saved.cpu().clone())

    def load_weights(self, model: nn.Module, accelerator: Accelerator) -> None:
        """Load the weights alone into a new model; every rank must call it."""
        place = f"resume({str(self.path)!r})"

        def load() -> WeightsReport:
            saved = open_checkpoint_weights(self.path, self.manifest, model)
            return put_weights(model, saved, place, strict=True)

        load_on_main(model, load, accelerator)

    def check(self, ctx: Context) -> None:
        """Compare the checkpoint with the fit that resumes from it; nothing is changed.

        Every rank has to call it.

        Raises
        ------
        CheckpointError
            If it is from another model, other optimizers or metrics, or cannot be converted
            to the ranks and precision of this fit; with `strict`, if anything differs.
        """
        place = f"resume({str(self.path)!r})"
        msg = f"{place}: expected a checkpoint that fits all ranks, got one"
        with raise_together(ctx.accelerator, f"{msg} that another rank refuses."):
            try:
                self._check_on_this_rank(ctx)
            except CheckpointError as error:
                text = str(error).removeprefix("resume: ")
                raise CheckpointError(f"{place}: {text}") from error
            except STATE_ERRORS as error:
                msg = (
                    f"{place}: expected the state of a fit, got a state with {error!r}"
                )
                raise CheckpointError(f"{msg}. Take another checkpoint.") from error

    def _check_on_this_rank(self, ctx: Context) -> None:
        ranks, saved_ranks = ctx.accelerator.world_size, self.manifest.world_size
        parts = SavedRanks(self.path, self.manifest)
        self._take_shapes(ctx, parts)
        live = ctx.accelerator.state_dict()
        keeps_batches = self.position.phase == "epoch" or has_same_batches(
            saved_ranks, self.manifest.about, ctx
        )
        is_same = self._has_same_ranks(ctx)
        if is_same:
            self.state = check_keys(read_rank(self.path, ctx.accelerator.rank))
            is_same = has_same_layout(self.state["accelerator"], live)
        if is_same and (keeps_batches or not self.is_exact):
            check_same(self.state["accelerator"], live, self.parts)
        else:
            self._convert(parts, ctx, live, keeps_batches=keeps_batches)
        phase = self.position.phase if self.is_exact else "epoch"
        check_state(self.state, ctx, phase)
        if self.is_exact:
            _check_metrics(self.state, ctx, is_merged=ranks < saved_ranks)
        if ranks != saved_ranks:
            self._report_difference("ranks", saved_ranks, ranks)
        self._compare_descriptions(read_description(ctx))
        self._check_unit(ctx)
        if "optimizers" in self.parts:
            self._compare_groups(ctx)
        self._compare_data(ctx)
        self._match_callbacks(ctx)  # raises where they cannot be told apart
        self._check_strict()

    def _take_shapes(self, ctx: Context, parts: SavedRanks) -> None:
        """Give lazy layers and changed buffers of a new model the saved shapes."""
        if "model" not in self.parts:
            return
        rank = ctx.accelerator.rank
        own = parts.states[rank if rank < len(parts.states) else 0]
        saved = own["accelerator"].get("model", {})  # engines have none
        shape_lazy_parameters(ctx.model, saved)
        for name in shape_buffers(ctx.model, saved):
            shape = tuple(saved[name].shape)
            self.report.append((name, "restored", f"with the saved shape {shape}"))

    def _has_same_ranks(self, ctx: Context) -> bool:
        """Whether as many ranks saved, with the same kind of accelerator."""
        kind = ctx.about["accelerator"]
        is_same_kind = self.manifest.about.get("accelerator", kind) == kind
        return is_same_kind and ctx.accelerator.world_size == self.manifest.world_size

    def _convert(
        self, parts: SavedRanks, ctx: Context, live: StateDict, *, keeps_batches: bool
    ) -> None:
        """Convert the states of the ranks that saved to the state of this rank."""
        check_convertible(parts, live, is_exact=self.is_exact)
        states = parts.states
        if self.is_exact and not keeps_batches:
            self.position = convert_position(
                self.position, states, self.manifest.about, ctx
            )
        surplus = range(ctx.accelerator.world_size, self.manifest.world_size)
        self._surplus_ranks = {rank: parts.index.journals[rank] for rank in surplus}
        self.state = reshard_state(
            parts, live, ctx, self.parts, keeps_batches=keeps_batches
        )
        self._is_converted = True
        saved_stage = states[0]["accelerator"].get("stage")
        stage = live.get("stage")
        if None not in {saved_stage, stage} and saved_stage != stage:
            self._report_difference("ZeRO stage", saved_stage, stage)

    def _compare_descriptions(self, about: Mapping[str, Any]) -> None:
        saved = self.manifest.about
        names = {*saved, *about} - COMPARED_APART
        if "code" not in about:  # which rank 0 compares
            names.discard("code")
        names -= LATER - saved.keys()
        for name in sorted(names):
            if saved.get(name) != about.get(name):
                self._report_difference(
                    name, repr(saved.get(name)), repr(about.get(name))
                )
        # Checkpoints of earlier versions, and of other kinds of device, name fewer.
        then, now = saved.get("kernels", {}), about["kernels"]
        for name in sorted(then.keys() & now.keys()):
            if then[name] != now[name]:
                self._report_difference(name, then[name], now[name])

    def _check_unit(self, ctx: Context) -> None:
        """Refuse to continue series of records by epochs that were by steps, or the reverse."""
        saved = self.manifest.about.get("valid_every", "")
        was_by_step = "step" in str(saved)
        if self.is_exact and was_by_step != (ctx.pace.unit == "step"):
            msg = f"resume: expected valid_every={saved or '1 epoch'!r} as in the saved fit"
            advice = "Validate by the same unit, steps or epochs."
            raise CheckpointError(f"{msg}, got {str(ctx.pace)!r}. {advice}")

    def _compare_groups(self, ctx: Context) -> None:
        """Compare the groups that the learners define; note options that this one changes."""
        saved, live = self.manifest.about.get("groups", {}), ctx.about["groups"]
        check_groups(saved, live)
        self._changed_options = list(list_changes(saved, live, ctx.optimizers))
        for change in self._changed_options:
            where = f"{change.optimizer}, group {change.group}"
            self.report.append((f"{change.key} ({where})", "differs", str(change)))

        now: list[str] = ctx.about["frozen"]
        self._changed_frozen = set(self.manifest.about.get("frozen", now)) ^ set(now)
        if self._changed_frozen:
            names = ", ".join(sorted(self._changed_frozen)[:5])
            text = f"{names} are frozen in one of the two fits; they are as in this one"
            self.report.append(("frozen parameters", "differs", text))

    def _compare_data(self, ctx: Context) -> None:
        """Report, first of all, data sets and samplers whose state will not be exact."""
        if not self.is_exact:
            return
        state = self.state
        in_pass, after = state["pass"], state.get("data") or {}
        saved = (in_pass or {}).get("parts", {}).get("began") or after.get("parts", {})
        is_late = getattr(ctx.train_data, "persistent_workers", False) and (
            in_pass is None or in_pass.get("has_workers", False)
        )
        self.report[:0] = compare_parts(ctx.train_data, saved, is_late=is_late)
        if is_late:
            note = "persistent workers start new, so their random numbers differ"
            self.report.append(("loader workers", "missing", note))
        has_own = hasattr(ctx.train_data, "load_state_dict")
        if has_own and in_pass is None and "loader" not in saved:
            text = "the loader's state was not saved, since a limit ended its last pass"
            self.report.insert(0, ("loader position", "not kept", text))

    def _match_callbacks(self, ctx: Context) -> dict[str, str]:
        """Find the saved name of each callback."""
        state = self.state
        parts = [state.get(part, {}) for part in ("callbacks", "held", "fields")]
        return match_callbacks(
            state["callbacks"],
            [name for name, _ in name_callbacks(ctx.callbacks)],
            self.manifest.about.get("callbacks", {}),
            ctx.about["callbacks"],
            {name for part in parts for name, own in part.items() if own},
        )

    def _report_difference(self, name: str, saved: object, now: object) -> None:
        self.report.append((name, "differs", f"saved {saved}, now {now}"))

    def _check_strict(self) -> None:
        differing = [
            f"{name}: {text}"
            for name, outcome, text in self.report
            if outcome in {"differs", "missing"}
        ]
        if self.strict and differing:
            got = "; ".join(differing)
            msg = f"resume: strict: expected no difference, got {got}."
            raise CheckpointError(f"{msg} Undo the change, or drop strict.")

    # --- in the fit

    def restore(self, ctx: Context) -> None:
        """Restore the state into the context, its accelerator and callbacks.

        Raises
        ------
        CheckpointError
            If it does not fit the model or the optimizers; with `strict`, if anything has
            no saved state, or no owner.
        """
        state = self.name_state(ctx)
        if "callbacks" in self.parts:
            self._report_unmatched(ctx, state)
        self._use_changes(ctx, state["accelerator"])
        if not self.is_exact:  # the epoch starts again, and so do its metrics
            state["callbacks"] = {**state["callbacks"], "Metrics": {}}
        with self._refuse_bad_state():
            if self.is_exact and not self._is_converted:
                check_live_states(state, ctx)
            is_same_run = self.is_recorded_in(ctx.run)
            restore_state(ctx, state, self.parts, is_same_run=is_same_run)
        self._rewind_surplus_ranks(ctx)
        if not self.is_exact and "records" in self.parts:
            begin_fit(ctx)  # behind the restored records, as its epochs begin anew
        for name in PARTS:
            outcome: Outcome = "restored" if name in self.parts else "left out"
            self.report.append((name, outcome, ""))
        for name, why in state.get("not_kept", {}).items():
            self.report.append((name, "not kept", why))
        if not self.is_exact:
            self._show_report(ctx)

    def has_pass(self, ctx: Context) -> bool:
        """Whether training batches remain in the epoch, after a validation too."""
        return self.state["pass"] is not None

    def is_after_training(self, ctx: Context) -> bool:
        """Whether the checkpoint was taken after ``on_train_end``."""
        train_pass = self.state["pass"] or {}
        return self.position.phase == "valid" or train_pass.get("is_paused", False)

    def restore_pass(self, ctx: Context) -> None:
        """Restore the position in the data."""
        assert ctx.train_pass is not None
        state = self.state["pass"]
        with self._refuse_bad_state():
            restore_data_fields(ctx, state.get("fields", {}))
            ctx.train_pass.load_state_dict(state, ctx.trained)

    def restore_data(self, ctx: Context) -> None:
        """Restore data sets and samplers that save their state, after a whole pass."""
        state = self.state
        with self._refuse_bad_state():
            restore_data(ctx, state)
        if (state.get("data") or {"is_at_end": True})["is_at_end"]:
            return
        for place, own in state["data"]["parts"].items():
            text = (
                "its next pass begins where its state_dict says: a limit ended the last"
            )
            self.report.insert(0, (f"{place} {own['class']}", "restored", text))

    @contextmanager
    def _refuse_bad_state(self) -> Iterator[None]:
        try:
            yield
        except STATE_ERRORS as error:
            msg = f"resume({str(self.path)!r}): expected the state of this fit, got an"
            raise CheckpointError(
                f"{msg} error: {error!r}. Take another checkpoint."
            ) from error

    def _report_unmatched(self, ctx: Context, state: StateDict) -> None:
        """Report states without an owner, which `strict` refuses, and new callbacks."""
        gone = list_unmatched(ctx, state)
        harmless = {
            name
            for name in gone
            if name.removesuffix(SAVED).partition(".")[0] in OBSERVERS
        }
        notes = {name: f"{name.replace(SAVED, '')} {why}" for name, why in gone.items()}
        self.report += [
            ("callbacks", "missing", note)
            for name, note in notes.items()
            if name not in harmless
        ]
        self._check_strict()
        new = [f"{name} is new and has no saved state" for name in list_new(ctx, state)]
        late = [*(notes[name] for name in sorted(harmless)), *new]
        self.report += [("callbacks", "missing", note) for note in late]

    def name_state(self, ctx: Context) -> StateDict:
        """The state with the names that callbacks have in this fit."""
        state = self.state
        found = {then: now for now, then in self._match_callbacks(ctx).items()}
        saved = state["callbacks"]
        free = (name for name in saved if name not in found)
        names = found | {name: f"{name}{SAVED}" for name in free}
        renamed: StateDict = {
            part: {names.get(root, root): own for root, own in state[part].items()}
            for part in ("callbacks", "held", "fields")
            if part in state
        }
        return {**state, **renamed}

    def _use_changes(self, ctx: Context, accelerator: StateDict) -> None:
        """Put what this fit's learner changed into the saved groups."""
        if "optimizers" not in self.parts or "frozen" not in accelerator:
            return
        for change in self._changed_options:
            if "facts" in accelerator:
                groups = accelerator["facts"][change.optimizer]["groups"]
            else:
                groups = accelerator["optimizers"][change.optimizer]["param_groups"]
            if change.group < len(groups):
                change.put_into(groups[change.group])
        now = self._changed_frozen & {*ctx.about["frozen"]}
        kept = (n for n in accelerator["frozen"] if n not in self._changed_frozen)
        accelerator["frozen"] = [*kept, *sorted(now)]

    def restore_before_epoch(self, ctx: Context) -> None:
        """Put back what the events at the beginning of the epoch saw.

        Those are the records and the random state. The rest is restored after them.
        """
        state = self.state
        with self._refuse_bad_state():
            if "records" in self.parts:
                records = unpack_records(copy.deepcopy(state["records"]))
                ctx.record_book = RecordBook(records)
            if state.get("epoch_random") is not None:
                random, own = state["epoch_random"], get_generators(ctx)
                set_rng_state(random, own, ctx.device)

    def _rewind_surplus_ranks(self, ctx: Context) -> None:
        """Supersede what ranks that no longer exist recorded after the checkpoint."""
        is_same_run = "records" in self.parts and self.is_recorded_in(ctx.run)
        if is_same_run and ctx.accelerator.is_main:
            for rank, seq in self._surplus_ranks.items():
                ctx.run.rewind(seq, rank)

    def restore_random(self, ctx: Context) -> None:
        """Restore all random generators, and the data's attributes: the last step."""
        random = self.state["random"]
        with self._refuse_bad_state():
            restore_data_fields(ctx, self.state.get("fields", {}))
        missing = set_rng_state(random, get_generators(ctx), ctx.device)
        if ctx.train_pass is not None:
            self.report[:0] = ctx.train_pass.notes
        self.report.append(("random generators", "restored", ""))
        self.report += [("random generators", "missing", note) for note in missing]
        done = f"{self.position.iter} batches done"
        self.report.append(("loader position", "restored", done))
        self._show_report(ctx)

    def _show_report(self, ctx: Context) -> None:
        """Show the report if progress is shown; drop the state, which is restored now."""
        self.state = {}
        if ctx.verbose and ctx.accelerator.is_main:
            write_stderr(f"{escape_control(str(self))}\n")

    def __str__(self) -> str:
        lines = [
            f"  {name:<20} {outcome:<9} {text}".rstrip()
            for name, outcome, text in self.report
        ]
        head = f"resumed from {self.path.name}: {self.position}"
        return "\n".join([head, *lines])


def _check_metrics(state: StateDict, ctx: Context, *, is_merged: bool) -> None:
    """Raise if the interrupted epoch had other metrics, or metrics that cannot be merged."""
    callbacks: dict[str, Any] = dict(name_callbacks(ctx.callbacks))
    found = state["callbacks"].get("Metrics", {}).get("train", {})
    for saved in found if isinstance(found, list) else [found]:
        if "metrics" in saved:
            metrics = callbacks["Metrics"].metric_set.train
            check_saved_metrics(metrics, saved["metrics"], is_merged=is_merged)
