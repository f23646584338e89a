"""Each documented line of the seed's context has a test of its own."""

from __future__ import annotations

import copy
import io
import math
import pickle
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import harness
from harness.accelerators.optimizer_step import default_step_opt
from harness.accelerators.single import SingleDevice
from harness.context import Context
from harness.data.pace import NO_LIMIT
from harness.events import EVENTS
from tests.harness.fakes import At, Ear, Line, Tape, fit_context, line_learner, slope


@pytest.fixture
def ctx() -> Context:
    return Context(verbose=False)


# --- log: index, append, overwrite, gap


def test_log_without_index_adds_at_the_end(ctx):
    ctx.log("notes", "train", "first")
    ctx.log("notes", "train", "second")
    assert ctx.records["notes"]["train"] == ["first", "second"]


def test_log_with_index_puts_the_value_there_counting_from_one(ctx):
    ctx.log("notes", "train", "a", index=1)
    ctx.log("notes", "train", "b", index=2)
    assert ctx.records["notes"]["train"] == ["a", "b"]


def test_log_beyond_the_end_fills_the_gap_with_none(ctx):
    ctx.log("notes", "train", 5.0, index=3)
    assert ctx.records["notes"]["train"] == [None, None, 5.0]


def test_log_into_a_gap_takes_the_place_of_none(ctx):
    ctx.log("notes", "train", 5.0, index=3)
    ctx.log("notes", "train", 4.0, index=2)
    assert ctx.records["notes"]["train"] == [None, 4.0, 5.0]


def test_log_without_index_after_a_gap_goes_behind_it(ctx):
    ctx.log("notes", "train", 5.0, index=2)
    ctx.log("notes", "train", 6.0)
    assert ctx.records["notes"]["train"] == [None, 5.0, 6.0]


def test_log_dicts_at_one_index_are_merged(ctx):
    ctx.log("metrics", "train", {"loss": 1.0}, index=1)
    ctx.log("metrics", "train", {"accuracy": 0.5}, index=1)
    assert ctx.records["metrics"]["train"] == [{"loss": 1.0, "accuracy": 0.5}]


def test_log_dicts_with_one_name_twice_keep_the_new_value(ctx):
    ctx.log("metrics", "train", {"loss": 1.0}, index=1)
    ctx.log("metrics", "train", {"loss": 2.0}, index=1)
    assert ctx.records["metrics"]["train"] == [{"loss": 2.0}]


def test_log_scalars_at_one_index_become_a_list(ctx):
    ctx.log("notes", "train", 1.0, index=1)
    ctx.log("notes", "train", 2.0, index=1)
    ctx.log("notes", "train", 3.0, index=1)
    assert ctx.records["notes"]["train"] == [[1.0, 2.0, 3.0]]


def test_log_lists_at_one_index_are_joined(ctx):
    ctx.log("notes", "train", [1, 2], index=1)
    ctx.log("notes", "train", [3], index=1)
    assert ctx.records["notes"]["train"] == [[1, 2, 3]]


def test_log_without_append_overwrites(ctx):
    ctx.log("metrics", "train", {"loss": 1.0, "accuracy": 0.5}, index=1)
    ctx.log("metrics", "train", {"loss": 3.0}, index=1, append=False)
    assert ctx.records["metrics"]["train"] == [{"loss": 3.0}]


def test_log_without_append_leaves_other_indices(ctx):
    for value in (1.0, 2.0, 3.0):
        ctx.log("notes", "train", value)
    ctx.log("notes", "train", 9.0, index=2, append=False)
    assert ctx.records["notes"]["train"] == [1.0, 9.0, 3.0]


def test_log_sets_and_kinds_are_kept_apart(ctx):
    ctx.log("notes", "train", 1.0)
    ctx.log("notes", "anything at all", 2.0)
    ctx.log("other", "train", 3.0)
    assert ctx.records["notes"] == {"train": [1.0], "anything at all": [2.0]}
    assert ctx.records["other"] == {"train": [3.0]}


@pytest.mark.parametrize("index", [0, -1])
def test_log_index_below_one_is_refused(ctx, index):
    with pytest.raises(
        ValueError, match=rf"ctx.log\(index\): expected an index from 1, got {index}"
    ):
        ctx.log("notes", "train", 1.0, index=index)
    assert "notes" not in ctx.records


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        10**30,
        "text",
        "",
        {"deep": {"er": [1, None, {"a": "b"}]}},
        [1.0, [2.0, "x"]],
    ],
)
def test_log_keeps_plain_values_as_they_are(ctx, value):
    ctx.log("notes", "train", value)
    assert ctx.get_log("notes", "train") == value


@pytest.mark.parametrize("value", [math.inf, -math.inf, -0.0, 5e-324])
def test_log_keeps_floats_bit_for_bit(ctx, value):
    ctx.log("notes", "train", value)
    kept = ctx.get_log("notes", "train")
    assert kept == value
    assert math.copysign(1, kept) == math.copysign(1, value)


def test_log_keeps_nan(ctx):
    ctx.log("notes", "train", math.nan)
    assert math.isnan(ctx.get_log("notes", "train"))


def test_log_copies_containers_at_once(ctx):
    items, inner = [1, 2], {"c": 3}
    ctx.log("notes", "train", {"a": items, "b": inner})
    items.append(99)
    inner["c"] = 99
    assert ctx.get_log("notes", "train") == {"a": [1, 2], "b": {"c": 3}}


def test_log_keeps_a_tuple_as_a_list(ctx):
    ctx.log("notes", "train", (1, 2))
    assert ctx.get_log("notes", "train") == [1, 2]


def test_log_copies_tensors_at_once(ctx):
    tensor = torch.tensor(1.0)
    small = torch.tensor([1.0, 2.0])
    ctx.log("notes", "train", {"a": tensor, "b": [small]})
    tensor.fill_(9.0)
    small.fill_(9.0)
    assert ctx.get_log("notes", "train") == {"a": 1.0, "b": [[1.0, 2.0]]}


def test_log_copies_arrays_at_once(ctx):
    array = np.array([1.0, 2.0])
    ctx.log("notes", "train", {"a": array, "b": np.float32(0.5), "c": np.int64(3)})
    array[:] = 9.0
    kept = ctx.get_log("notes", "train")
    assert kept == {"a": [1.0, 2.0], "b": 0.5, "c": 3}
    assert [type(item) for item in kept.values()] == [list, float, int]


def test_log_takes_tensors_off_the_graph(ctx):
    weight = torch.tensor(1.0, requires_grad=True)
    ctx.run = ear = Ear()
    ctx.log("notes", "train", weight * 2)
    assert not ear.heard[0]["value"].requires_grad
    assert ctx.get_log("notes", "train") == 2.0


def test_log_reads_no_device(ctx):
    loss = torch.ones((), device="meta")  # any reading of it is an error
    ctx.epoch = 1
    ctx.log("notes", "train", loss)
    ctx.log("metrics", "train", {"loss": loss, "more": {"a": [loss]}}, index=1)
    ctx.log_metric("accuracy", loss)
    ctx.log_step({"loss": loss})
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        _ = ctx.records


def test_log_tensors_overwritten_or_merged_are_read_out(ctx):
    ctx.log("notes", "train", {"a": torch.tensor(1.0)}, index=1)
    ctx.log("notes", "train", {"b": torch.tensor(2.0)}, index=1)
    ctx.log("other", "train", torch.tensor(3.0), index=1)
    ctx.log("other", "train", torch.tensor(4.0), index=1)
    ctx.log("last", "train", torch.tensor(5.0), index=1)
    ctx.log("last", "train", torch.tensor(6.0), index=1, append=False)
    records = ctx.records
    assert records["notes"]["train"] == [{"a": 1.0, "b": 2.0}]
    assert records["other"]["train"] == [[3.0, 4.0]]
    assert records["last"]["train"] == [6.0]


def test_log_reaches_the_run_each_call(ctx):
    ctx.run = ear = Ear()
    ctx.epoch = 2
    ctx.steps = {"opt": 7}
    ctx.log("notes", "train", "hello")
    ctx.log("notes", "train", "again", index=1, append=False)
    assert ear.heard == [
        {
            "what": "notes",
            "set": "train",
            "value": "hello",
            "index": 1,
            "append": True,
            "epoch": 2,
            "step": 7,
        },
        {
            "what": "notes",
            "set": "train",
            "value": "again",
            "index": 1,
            "append": False,
            "epoch": 2,
            "step": 7,
        },
    ]


def test_log_that_the_run_refuses_leaves_no_trace(ctx):
    class Refusing(Ear):
        def log(self, *args, **kwargs):
            raise TypeError("no")

    ctx.run = Refusing()
    before = copy.deepcopy(ctx.records)
    with pytest.raises(TypeError, match="no"):
        ctx.log("notes", "train", 1.0, index=4)
    assert ctx.records == before


# --- log_metric, log_step


def test_log_metric_in_training_goes_to_train(ctx):
    ctx.epoch = 1
    ctx.log_metric("loss", 1.0)
    assert ctx.records["metrics"] == {"train": [{"loss": 1.0}], "valid": []}


def test_log_metric_outside_training_goes_to_valid(ctx):
    ctx.training, ctx.epoch = False, 1
    ctx.log_metric("loss", 1.0)
    assert ctx.records["metrics"] == {"train": [], "valid": [{"loss": 1.0}]}


def test_log_metric_is_indexed_by_epoch(ctx):
    for ctx.epoch in (1, 2, 4):
        ctx.log_metric("loss", float(ctx.epoch))
    series = ctx.records["metrics"]["train"]
    assert series == [{"loss": 1.0}, {"loss": 2.0}, None, {"loss": 4.0}]


def test_log_metric_several_in_one_epoch_lie_together(ctx):
    ctx.epoch = 1
    ctx.log_metric("loss", 1.0)
    ctx.log_metric("accuracy", 0.5)
    ctx.log_metric("named", {"gen": 1.0, "disc": 2.0})
    assert ctx.get_metrics("train", 1) == {
        "loss": 1.0,
        "accuracy": 0.5,
        "named": {"gen": 1.0, "disc": 2.0},
    }


def test_log_metric_twice_keeps_the_new_value(ctx):
    ctx.epoch = 1
    for value in (1.0, 2.0, 3.0):
        ctx.log_metric("loss", value)
    assert ctx.get_metrics("train") == {"loss": 3.0}


def test_log_metric_reaches_the_run_each_call_alike(ctx):
    # The first call of an epoch and the later ones go different ways inside.
    ctx.run = ear = Ear()
    ctx.epoch, ctx.steps = 1, {"opt": 5}
    ctx.log_metric("loss", 1.0)
    ctx.log_metric("accuracy", 0.5)
    ctx.log_metric("f1", torch.tensor(0.25))
    common = {"what": "metrics", "set": "train", "index": 1, "append": True}
    common |= {"epoch": 1, "step": 5}
    assert ear.heard == [
        common | {"value": {"loss": 1.0}},
        common | {"value": {"accuracy": 0.5}},
        common | {"value": {"f1": torch.tensor(0.25)}},
    ]


def test_log_metric_after_something_that_is_no_dict_joins_it(ctx):
    ctx.epoch = 1
    ctx.log("metrics", "train", 7.0, index=1)
    ctx.log_metric("loss", 1.0)
    assert ctx.records["metrics"]["train"] == [[7.0, {"loss": 1.0}]]


def test_log_metric_without_an_epoch_adds_at_the_end(ctx):
    ctx.log_metric("loss", 1.0)
    ctx.log_metric("loss", 2.0)
    assert ctx.records["metrics"]["train"] == [{"loss": 1.0}, {"loss": 2.0}]


def test_log_step_goes_to_the_run_alone(ctx):
    ctx.run = ear = Ear()
    ctx.epoch, ctx.steps = 2, {"opt": 30}
    ctx.log_step({"loss": 1.5})
    ctx.training = False
    ctx.log_step({"loss": 2.5})
    assert ear.steps == [
        ("train", {"loss": 1.5}, 30, 2),
        ("valid", {"loss": 2.5}, 30, 2),
    ]
    assert ctx.records == {"metrics": {"train": [], "valid": []}}


# --- get_log, get_metrics, get_metric, get_formatted_metrics, get_metrics_df


@pytest.fixture
def logged(ctx):
    for ctx.epoch in (1, 2):
        ctx.training = True
        ctx.log_metric("loss", 1.0 / ctx.epoch)
        ctx.log_metric("acc", 0.123456 * ctx.epoch)
        ctx.training = False
        ctx.log_metric("loss", 2.0 / ctx.epoch)
    return ctx


def test_get_log_with_index_gives_that_value(ctx):
    ctx.log("notes", "train", "a")
    ctx.log("notes", "train", "b")
    assert ctx.get_log("notes", "train", 1) == "a"


def test_get_log_without_index_gives_the_last(ctx):
    ctx.log("notes", "train", "a")
    ctx.log("notes", "train", "b")
    assert ctx.get_log("notes", "train") == "b"


@pytest.mark.parametrize(
    ("what", "set", "index"),
    [("none", "train", None), ("notes", "none", None), ("notes", "train", 2)],
)
def test_get_log_where_nothing_is_gives_none(ctx, what, set, index):
    ctx.log("notes", "train", "a")
    assert ctx.get_log(what, set, index) is None


@pytest.mark.parametrize("index", [0, -1])
def test_get_log_index_below_one_gives_none(ctx, index):
    ctx.log("notes", "train", "a")
    assert ctx.get_log("notes", "train", index) is None


def test_get_log_creates_nothing(ctx):
    ctx.get_log("notes", "train", 3)
    assert ctx.records == {"metrics": {"train": [], "valid": []}}


def test_get_metrics_of_an_epoch_and_set(logged):
    assert logged.get_metrics("train", 1) == {"loss": 1.0, "acc": 0.123456}
    assert logged.get_metrics("valid", 1) == {"loss": 2.0}


def test_get_metrics_without_epoch_gives_the_last(logged):
    assert logged.get_metrics("valid") == {"loss": 1.0}


def test_get_metrics_where_none_were_logged_is_empty(logged):
    assert logged.get_metrics("test") == {}
    assert logged.get_metrics("train", 9) == {}


def test_get_metrics_passes_over_what_has_no_names(ctx):
    ctx.log("metrics", "train", 0.5)
    ctx.log("metrics", "train", {"loss": 1.0})
    assert ctx.get_metrics("train", 1) == {}
    assert ctx.get_metric("loss", "train", 1) is None
    assert ctx.get_metrics_df().values.tolist() == [["train", "loss", 2, 1.0]]
    assert ctx.get_log("metrics", "train", 1) == 0.5


def test_get_metric_of_a_name_set_and_epoch(logged):
    assert logged.get_metric("loss", "valid", 1) == 2.0
    assert logged.get_metric("loss", "train", 2) == 0.5


def test_get_metric_without_epoch_gives_the_last(logged):
    assert logged.get_metric("loss", "valid") == 1.0


def test_get_metric_that_was_not_logged_is_none(logged):
    assert logged.get_metric("recall", "train") is None
    assert logged.get_metric("loss", "test") is None


def test_get_formatted_metrics_has_four_significant_digits(logged):
    assert logged.get_formatted_metrics("train", 1) == {"loss": "1", "acc": "0.1235"}


def test_get_formatted_metrics_without_epoch_gives_the_last(logged):
    assert logged.get_formatted_metrics("train") == {"loss": "0.5", "acc": "0.2469"}


def test_get_formatted_metrics_joins_nested_names(ctx):
    ctx.epoch = 1
    ctx.log_metric("loss", {"gen": 123456.0, "disc": 0.00001234567})
    ctx.log_metric("kind", "good")
    assert ctx.get_formatted_metrics("train") == {
        "loss/gen": "1.235e+05",
        "loss/disc": "1.235e-05",
        "kind": "good",
    }


def test_get_metrics_df_holds_one_row_a_value(logged):
    frame = logged.get_metrics_df()
    assert list(frame.columns) == ["set", "metric", "epoch", "value"]
    assert frame.values.tolist() == [
        ["train", "loss", 1, 1.0],
        ["train", "acc", 1, 0.123456],
        ["train", "loss", 2, 0.5],
        ["train", "acc", 2, 0.246912],
        ["valid", "loss", 1, 2.0],
        ["valid", "loss", 2, 1.0],
    ]


def test_get_metrics_df_without_metrics_has_its_columns(ctx):
    frame = ctx.get_metrics_df()
    assert list(frame.columns) == ["set", "metric", "epoch", "value"]
    assert len(frame) == 0


def test_get_metrics_df_passes_over_gaps_and_joins_nested_names(ctx):
    ctx.epoch = 2
    ctx.log_metric("loss", {"gen": 1.0, "disc": torch.tensor(2.0)})
    assert ctx.get_metrics_df().values.tolist() == [
        ["train", "loss/gen", 2, 1.0],
        ["train", "loss/disc", 2, 2.0],
    ]


# --- set_verbose, clean, call_callbacks


@pytest.mark.parametrize("verbose", [True, False])
def test_set_verbose_takes_a_bool(ctx, verbose):
    ctx.set_verbose(verbose)
    assert ctx.verbose is Context(verbose=verbose).verbose is verbose


def test_set_verbose_none_asks_whether_a_person_watches(ctx):
    ctx.set_verbose(None)
    assert ctx.verbose == (hasattr(sys, "ps1") or sys.stderr.isatty())


def test_verbose_set_as_a_field_is_the_same(ctx):
    ctx.verbose = True
    assert ctx.verbose is True
    ctx.verbose = None
    assert ctx.verbose == (hasattr(sys, "ps1") or sys.stderr.isatty())


KEPT = ("hparams", "opt_hparams", "steps", "min_epochs", "max_epochs", "model")


def test_clean_keeps_what_outlives_training():
    ctx = fit_context(epochs=(1, 3))
    ctx.epoch = 1
    ctx.log_metric("loss", 1.0)
    before = {name: getattr(ctx, name) for name in KEPT}
    ctx.clean()
    assert {name: getattr(ctx, name) for name in KEPT} == before
    assert ctx.records["metrics"]["train"] == [{"loss": 1.0}]


@pytest.mark.parametrize(
    "name",
    [
        "accelerator",
        "train_data",
        "valid_data",
        "data",
        "metrics",
        "step_opt",
        "loss_fn",
        "backward",
        "epoch",
        "iter",
        "batch",
        "input",
        "target",
        "pred",
        "loss",
        "loss_grad",
    ],
)
def test_clean_drops_what_does_not(name):
    ctx = fit_context(valid_data=DataLoader(TensorDataset(*slope(4))))
    ctx.metrics, ctx.step_opt, ctx.backward = {}, default_step_opt, torch.sum
    ctx.epoch = ctx.iter = 1
    ctx.batch = (torch.ones(1), torch.ones(1))
    ctx.pred = ctx.loss = ctx.loss_grad = torch.ones(1)
    assert getattr(ctx, name) is not None
    ctx.clean()
    assert getattr(ctx, name) is None


def test_clean_empties_buffers_handlers_callbacks_and_optimizers():
    ctx = fit_context(callbacks=[Tape()])
    ctx.buffers["mine"] = 1
    ctx.handlers = ctx.epoch_handlers = {ValueError: print}
    ctx.run = ear = Ear()
    ctx.clean()
    assert (ctx.buffers, ctx.handlers, ctx.epoch_handlers) == ({}, {}, {})
    assert (ctx.callbacks, ctx.optimizers) == ((), {})
    assert ctx.training is False
    ctx.log("notes", "train", 1.0)
    assert ear.heard == []


def test_call_callbacks_calls_those_that_listen_in_order_of_weight():
    order = []
    callbacks = [
        At("on_epoch_end", lambda _: order.append("late"), weight=10),
        At("on_epoch_end", lambda _: order.append("first given")),
        At("on_epoch_end", lambda _: order.append("second given")),
        At("on_fit_end", lambda _: order.append("never")),
        At("on_epoch_end", lambda _: order.append("early"), weight=-10),
    ]
    ctx = Context(verbose=False, callbacks=callbacks)
    ctx.call_callbacks("on_epoch_end")
    assert order == ["early", "first given", "second given", "late"]


def test_call_callbacks_nobody_listens_to_does_nothing(ctx):
    for event in EVENTS:
        ctx.call_callbacks(event)


def test_call_callbacks_unknown_event_is_refused():
    ctx = Context(verbose=False, callbacks=[Tape()])
    with pytest.raises(
        ValueError, match="call_callbacks: expected an event, got 'on_epoch_ended'"
    ):
        ctx.call_callbacks("on_epoch_ended")
    ctx.clean()
    with pytest.raises(ValueError, match="call_callbacks: expected an event"):
        ctx.call_callbacks("on_epoch_ended")


class Named(harness.Callback):
    def __init__(self, exception):
        self.exception = exception

    def on_train_batch_end(self):
        raise self.exception


def test_call_callbacks_exception_keeps_its_type_and_gains_a_note():
    ctx = Context(verbose=False, callbacks=[Named(LookupError("mine"))])
    ctx.epoch, ctx.iter = 3, 7
    with pytest.raises(LookupError, match="mine") as caught:
        ctx.call_callbacks("on_train_batch_end")
    assert type(caught.value) is LookupError
    assert caught.value.__notes__ == [
        "in Named.on_train_batch_end, epoch 3, iter 7, training"
    ]


def test_call_callbacks_note_says_where_not_training():
    ctx = Context(verbose=False, callbacks=[Named(ValueError())], training=False)
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the note is the subject
        ctx.call_callbacks("on_train_batch_end")
    assert caught.value.__notes__ == ["in Named.on_train_batch_end"]


@pytest.mark.parametrize("signal", [harness.EarlyStop, harness.SkipEpoch])
def test_call_callbacks_signal_waits_until_the_others_have_heard(signal):
    order = []
    callbacks = [Named(signal()), At("on_train_batch_end", lambda _: order.append(1))]
    ctx = Context(verbose=False, callbacks=callbacks)
    with pytest.raises(signal):
        ctx.call_callbacks("on_train_batch_end")
    assert order == [1]


def test_call_callbacks_early_stop_goes_before_skip_epoch():
    callbacks = [Named(harness.SkipEpoch()), Named(harness.EarlyStop())]
    ctx = Context(verbose=False, callbacks=callbacks)
    with pytest.raises(harness.EarlyStop):
        ctx.call_callbacks("on_train_batch_end")


# --- state_dict, unsafe_set_records


def test_state_dict_holds_model_records_and_hparams():
    ctx = fit_context()
    state = ctx.state_dict()
    assert state["model"] is ctx.model
    assert state["records"] is ctx.records
    assert state["ctx"] == {"hparams": {"w": 0.0}, "opt_hparams": {"lr": 0.1}}


def test_state_dict_unbinds_the_model():
    ctx = fit_context()
    model: Any = ctx.model
    assert model.ctx is ctx
    assert ctx.state_dict()["model"] is model
    with pytest.raises(AttributeError):
        _ = model.ctx


def test_state_dict_without_a_model_holds_none(ctx):
    assert ctx.state_dict()["model"] is None


def test_unsafe_set_records_replaces_all(ctx):
    ctx.unsafe_set_records({"metrics": {"train": [{"loss": 1.0}], "valid": []}})
    assert ctx.get_metric("loss", "train", 1) == 1.0


def test_unsafe_set_records_warns_where_training_metrics_are_lost(ctx):
    ctx.epoch = 1
    ctx.log_metric("loss", 1.0)
    with pytest.warns(
        UserWarning, match="unsafe_set_records: expected no training metrics"
    ):
        ctx.unsafe_set_records({"metrics": {"train": [], "valid": []}})
    assert ctx.records == {"metrics": {"train": [], "valid": []}}


def test_unsafe_set_records_without_training_metrics_is_silent(ctx):
    ctx.training, ctx.epoch = False, 1
    ctx.log_metric("loss", 1.0)
    ctx.unsafe_set_records({"metrics": {"train": [], "valid": []}})


def test_unsafe_set_records_of_another_form_are_still_logged_to(ctx):
    ctx.unsafe_set_records({})
    ctx.epoch = 1
    ctx.log_metric("loss", 1.0)
    assert ctx.records == {"metrics": {"train": [{"loss": 1.0}]}}
    assert ctx.get_metric("loss", "train") == 1.0


# --- read-only fields, checks


def test_records_cannot_be_set(ctx):
    with pytest.raises(
        AttributeError, match=r"ctx.records: .*read-only. Use ctx.log\(\)"
    ):
        ctx.records = {}


def test_device_is_the_accelerators(ctx):
    ctx.accelerator = SingleDevice("cpu")
    assert ctx.device == torch.device("cpu")


def test_device_cannot_be_set(ctx):
    with pytest.raises(
        AttributeError, match=r"ctx.device: .*read-only. Change ctx.accelerator"
    ):
        ctx.device = "cpu"


def test_device_without_an_accelerator_is_an_error(ctx):
    with pytest.raises(
        AttributeError, match=r"ctx.device: expected an accelerator, got None"
    ):
        _ = ctx.device


def test_callbacks_are_bound_and_kept_in_order_of_weight(ctx):
    late, early = At("on_fit_end", print, weight=5), At("on_fit_end", print, weight=-5)
    ctx.callbacks = [late, early]
    assert ctx.callbacks == (early, late)
    assert late.ctx is early.ctx is ctx


def test_callbacks_class_instead_of_instance_is_refused(ctx):
    with pytest.raises(
        TypeError,
        match=r"callbacks\[1\]: expected an instance, got the class Tape. Write Tape\(",
    ):
        ctx.callbacks = [Tape(), Tape]


def test_callbacks_that_are_none_are_refused(ctx):
    with pytest.raises(
        TypeError, match=r"callbacks\[0\]: expected a harness.Callback, got 'tape'"
    ):
        ctx.callbacks = ["tape"]


def test_callbacks_refused_leave_the_earlier_ones(ctx):
    tape = Tape()
    ctx.callbacks = [tape]
    with pytest.raises(TypeError):
        ctx.callbacks = [Tape(), 3]
    ctx.call_callbacks("on_fit_end")
    assert ctx.callbacks == (tape,)
    assert tape.events == ["on_fit_end"]


@pytest.mark.parametrize("value", [1, np.int64(7)])
def test_iter_takes_whole_numbers(ctx, value):
    ctx.iter = value
    assert ctx.iter == value
    assert type(ctx.iter) is int


@pytest.mark.parametrize("value", ["1", 1.5, True, [1]])
def test_iter_of_another_kind_is_refused(ctx, value):
    with pytest.raises(TypeError, match=r"ctx.iter: expected a whole number, got"):
        ctx.iter = value


# --- batch, input, target


def test_input_and_target_are_the_parts_of_the_batch(ctx):
    ctx.batch = ("x", "y")
    assert (ctx.input, ctx.target) == ("x", "y")


def test_input_set_changes_the_batch(ctx):
    ctx.batch = ("x", "y", "weight")
    ctx.input = "other"
    assert list(ctx.batch) == ["other", "y", "weight"]


def test_target_set_changes_the_batch(ctx):
    ctx.batch = ("x", "y", "weight")
    ctx.target = "other"
    assert list(ctx.batch) == ["x", "other", "weight"]


def test_rows_are_those_of_the_batch_or_the_prediction(ctx):
    ctx.batch = {"text": ["a", "b", "c"], "x": torch.zeros(3, 2)}
    assert ctx.rows == 3
    ctx.batch, ctx.pred = object(), torch.zeros(5)
    assert ctx.rows == 5


def test_rows_that_are_set_hold_for_one_batch(ctx):
    ctx.batch = torch.zeros(3)
    ctx.rows = torch.tensor(70)
    assert ctx.rows == 70
    ctx.input = torch.zeros(2)
    assert ctx.rows == 70
    ctx.batch = torch.zeros(4)
    assert ctx.rows == 4


@pytest.mark.parametrize("value", [-1, 1.5, "3", None, torch.tensor([1.0, 2.0])])
def test_rows_that_are_no_count_are_refused(ctx, value):
    with pytest.raises(
        ValueError, match=r"ctx.rows: expected a whole number >= 0, got"
    ):
        ctx.rows = value


def test_rows_that_cannot_be_known_warn_once(ctx):
    ctx.batch = object()
    with pytest.warns(UserWarning, match="ctx.rows: expected tensors or lists in the"):
        assert ctx.rows == 1
    ctx.batch = object()
    assert ctx.rows == 1


def test_input_of_a_lone_tensor_is_the_batch_itself(ctx):
    ctx.batch = torch.ones(3)
    assert ctx.input is ctx.batch
    assert ctx.target is None


def test_input_set_on_a_lone_batch_replaces_it(ctx):
    ctx.batch = torch.ones(3)
    ctx.input = other = torch.zeros(3)
    assert ctx.batch is other


def test_target_set_on_a_lone_batch_makes_a_pair(ctx):
    ctx.batch = x = torch.ones(3)
    ctx.target = y = torch.zeros(3)
    assert ctx.input is x
    assert ctx.target is y


def test_input_may_be_a_mapping(ctx):
    ctx.batch = {"ids": 1, "mask": 2}
    assert ctx.input == {"ids": 1, "mask": 2}
    assert ctx.target is None


# --- epochs


def test_epochs_have_no_limits_at_first(ctx):
    assert (ctx.min_epochs, ctx.max_epochs) == (0, NO_LIMIT)


def test_epochs_can_be_set(ctx):
    ctx.max_epochs = 5
    ctx.min_epochs = 5
    assert (ctx.min_epochs, ctx.max_epochs) == (5, 5)


def test_min_epochs_above_max_is_refused(ctx):
    ctx.max_epochs = 5
    with pytest.raises(
        ValueError, match="epochs: expected min_epochs <= max_epochs, got 6 > 5"
    ):
        ctx.min_epochs = 6
    assert ctx.min_epochs == 0


def test_max_epochs_below_min_is_refused(ctx):
    ctx.min_epochs = 5
    with pytest.raises(
        ValueError, match="epochs: expected min_epochs <= max_epochs, got 5 > 4"
    ):
        ctx.max_epochs = 4
    assert ctx.max_epochs == NO_LIMIT


@pytest.mark.parametrize("value", [1.5, "3", True, None, [1]])
def test_epochs_of_another_kind_are_refused(ctx, value):
    with pytest.raises(TypeError, match="expected min_epochs as a whole number, got"):
        ctx.min_epochs = value
    with pytest.raises(TypeError, match="expected max_epochs as a whole number, got"):
        ctx.max_epochs = value


@pytest.mark.parametrize("value", [0, -3])
def test_max_epochs_below_one_is_refused(ctx, value):
    with pytest.raises(ValueError, match="epochs: expected at least 1 epoch, got"):
        ctx.max_epochs = value


def test_min_epochs_below_zero_is_refused(ctx):
    with pytest.raises(ValueError, match="epochs: expected at least 1 epoch, got"):
        ctx.min_epochs = -1


# --- optimizers, opt, opt_name


def sgd():
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)


def test_optimizers_single_one_is_called_opt(ctx):
    ctx.optimizers = opt = sgd()
    assert ctx.optimizers == {"opt": opt}


def test_optimizers_keep_their_names_and_order(ctx):
    ctx.optimizers = {"gen": sgd(), "disc": sgd()}
    assert list(ctx.optimizers) == ["gen", "disc"]


@pytest.mark.parametrize("form", [list, tuple])
def test_optimizers_without_names_are_refused(ctx, form):
    with pytest.raises(
        TypeError,
        match=rf"set_optimizers\(\): expected a dict of named .* got a {form.__name__}",
    ):
        ctx.optimizers = form([sgd(), sgd()])


@pytest.mark.parametrize("wrong", [None, "adam", torch.optim.SGD])
def test_optimizers_that_are_none_are_refused(ctx, wrong):
    with pytest.raises(TypeError, match="expected a torch optimizer at 'gen', got"):
        ctx.optimizers = {"disc": sgd(), "gen": wrong}
    with pytest.raises(TypeError, match="expected a torch optimizer at 'opt', got"):
        ctx.optimizers = wrong


def test_optimizers_empty_are_refused(ctx):
    with pytest.raises(TypeError, match="expected at least one optimizer, got none"):
        ctx.optimizers = {}


def test_opt_is_the_only_one_where_none_was_set(ctx):
    ctx.optimizers = opt = sgd()
    assert ctx.opt is opt
    assert ctx.opt_name == "opt"


def test_opt_that_was_set_goes_first(ctx):
    ctx.optimizers = {"gen": sgd(), "disc": sgd()}
    ctx.opt, ctx.opt_name = ctx.optimizers["disc"], "disc"
    assert ctx.opt is ctx.optimizers["disc"]
    assert ctx.opt_name == "disc"


def test_opt_of_several_without_one_set_is_an_error(ctx):
    ctx.optimizers = {"gen": sgd(), "disc": sgd()}
    with pytest.raises(AttributeError, match=r"ctx.opt: .*got \['gen', 'disc'\]"):
        _ = ctx.opt
    with pytest.raises(AttributeError, match=r"ctx.opt_name: .*got \['gen', 'disc'\]"):
        _ = ctx.opt_name


def test_opt_without_optimizers_is_an_error(ctx):
    with pytest.raises(AttributeError, match=r"ctx.opt: .*got \[\]"):
        _ = ctx.opt
    with pytest.raises(AttributeError, match=r"ctx.opt_name: .*got \[\]"):
        _ = ctx.opt_name


def test_step_is_the_most_steps_of_one_optimizer(ctx):
    assert ctx.step == 0
    ctx.steps = {"opt": 4}
    assert ctx.step == 4
    ctx.steps = {"gen": 4, "disc": 9}
    assert ctx.step == 9


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda ctx: setattr(ctx, "opt", sgd()), "ctx.opt: .*, got another SGD"),
        (lambda ctx: setattr(ctx, "optimizers", sgd()), "ctx.optimizers: .* another"),
        (lambda ctx: ctx.optimizers.update(opt=sgd()), "no attribute 'update'"),
        (lambda ctx: setattr(ctx, "model", Line()), "ctx.model: .*, got others"),
    ],
)
def test_what_a_running_fit_would_not_train_is_refused(change, match):
    class Change(harness.Callback):
        def on_epoch_begin(self):
            self.ctx.model = nn.Sequential(self.ctx.model)  # the same weights
            self.ctx.model = self.ctx.model[0]

        def on_train_begin(self):
            change(self.ctx)

    with pytest.raises((ValueError, AttributeError), match=match):
        line_learner().fit(slope(4), 1, callbacks=[Change()], tracker=False, seed=1)


# --- model binding


def test_evaluation_within_a_fit_gives_the_model_back_to_the_fit():
    learner, found = line_learner(), []

    class Evaluate(harness.Callback):
        def on_train_batch_end(self):
            learner.with_model(self.ctx.model).evaluate(slope(4))
            found.append(vars(self.ctx.model)["ctx"] is self.ctx)

    fitted = learner.fit(slope(4), 1, callbacks=[Evaluate()], tracker=False)
    assert found == [True]
    assert not hasattr(fitted.model, "ctx")


def test_model_set_is_bound_to_the_context(ctx):
    ctx.model = model = Line()
    assert model.ctx is ctx


def test_model_set_to_none_is_none(ctx):
    ctx.model = None
    assert ctx.model is None


def test_model_bound_has_no_context_among_its_parts(ctx):
    ctx.model = model = Line()
    assert set(model.state_dict()) == {"w", "b"}
    assert [name for name, _ in model.named_modules()] == [""]


def test_model_unbound_has_no_context():
    with pytest.raises(AttributeError):
        _ = Line().ctx


def test_model_bound_can_be_deep_copied(ctx):
    ctx.model = model = Line(w=3.0)
    twin = copy.deepcopy(model)
    assert twin is not model
    assert twin.w is not model.w
    assert twin.ctx is ctx


def test_model_bound_is_pickled_without_its_context(ctx):
    ctx.model = Line(w=3.0)
    ctx.buffers["not picklable"] = lambda: None
    back = pickle.loads(pickle.dumps(ctx.model))
    assert back.w.item() == 3.0
    assert back.ctx is None


def test_model_bound_weights_can_be_saved(ctx):
    ctx.model = Line(w=3.0)
    file = io.BytesIO()
    torch.save(ctx.model.state_dict(), file)
    assert file.tell() > 0


# --- unknown fields, plain fields


def test_unknown_field_is_refused_with_the_nearest_name(ctx):
    with pytest.raises(
        AttributeError,
        match=r"Context.epok: expected a field of the context, got 'epok'. "
        r"Did you mean 'epoch'\? Put your own values into ctx.buffers",
    ):
        ctx.epok = 1


def test_unknown_field_without_anything_alike_names_buffers(ctx):
    with pytest.raises(AttributeError, match=r"got 'zzzzz'\. Put your own values"):
        ctx.zzzzz = 1


def test_unknown_field_of_every_context_is_refused():
    ctx = fit_context()
    with pytest.raises(AttributeError, match="Did you mean 'optimizers'"):
        ctx.optimizer = 1


def test_buffers_take_what_callbacks_put_there(ctx):
    ctx.buffers["mine"] = [1]
    assert ctx.buffers == {"mine": [1]}


@pytest.mark.parametrize(
    "name",
    [
        "accelerator",
        "backward",
        "data",
        "epoch",
        "epoch_handlers",
        "handlers",
        "hparams",
        "loss",
        "loss_fn",
        "loss_grad",
        "metrics",
        "opt_hparams",
        "pred",
        "step_opt",
        "train_data",
        "training",
        "valid_data",
    ],
)
def test_field_that_is_set_is_given_back(ctx, name):
    value = object()
    setattr(ctx, name, value)
    assert getattr(ctx, name) is value


def test_context_at_first_has_its_defaults(ctx):
    assert (ctx.hparams, ctx.opt_hparams, ctx.buffers) == ({}, {}, {})
    assert (ctx.handlers, ctx.epoch_handlers, ctx.callbacks) == ({}, {}, ())
    assert (ctx.model, ctx.optimizers, ctx.accelerator) == (None, {}, None)
    assert ctx.records == {"metrics": {"train": [], "valid": []}}
    assert ctx.training is True
    assert (ctx.epoch, ctx.iter, ctx.batch, ctx.pred) == (None, None, None, None)
