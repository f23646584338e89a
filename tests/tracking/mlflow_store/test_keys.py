from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.tracking.stores import get_run
from tracking.mlflow_store.keys import (
    MAX_KEY_LENGTH,
    KeyMap,
    SeriesId,
    is_valid,
    plain_key,
)


@pytest.mark.parametrize(
    ("series", "key"),
    [
        (("metrics", "train", "loss"), "train/loss"),
        (("steps", "train", "loss"), "train/loss_step"),
        (("profile", "train", "epoch_s"), "system/train_epoch_s"),
        (("profile", "fit", "fit_s"), "system/fit_s"),
        (("profile", "train", "opt/steps"), "system/train_opt_steps"),
        (("system", "", "cpu_frac"), "system/cpu_frac"),
        (("lr", "train", "opt"), "train/lr"),
        (("lr", "train", "opt/1"), "train/lr/1"),
        (("lr", "train", "gen"), "train/lr/gen"),
        (("lr", "", "x"), "lr/x"),
        (("other", "train", "x"), "other/train/x"),
        (("metrics", "", "loss"), "loss"),
        (("metrics", "train", ""), "train"),
        (("params", "", "lr"), "lr"),
        (("metrics", "valid", "loss", 2), "valid/loss_fit2"),
        (("steps", "train", "loss", 10), "train/loss_step_fit10"),
    ],
)
def test_plain_key_joins_what_there_is(series, key):
    assert plain_key(SeriesId(*series)) == key
    assert KeyMap().key_for(SeriesId(*series)) == key


def test_keys_of_a_run_that_an_earlier_version_delivered_stay_as_they_are():
    assert plain_key(SeriesId("profile", "fit", "fit_s"), 2) == "system/fit/fit_s"
    keys = KeyMap(layout=1)
    assert keys.key_for(SeriesId("profile", "fit", "epoch_s")) == "profile/fit/epoch_s"
    assert keys.key_for(SeriesId("lr", "train", "opt")) == "lr/train/opt"
    assert keys.renamed() == {}


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "/a", "a/", "a//b", "a/../b", "../a", "a\n", "a#", "x" * 251],
)
def test_name_that_mlflow_refuses_is_not_valid(name):
    assert not is_valid(name)


word = st.text(st.sampled_from("ab/.#_ -:ü0"), max_size=6)


whats, fits = st.sampled_from(["metrics", "steps", "x"]), st.integers(1, 3)


@given(st.lists(st.tuples(whats, word, word, fits)))
@example([("metrics", "train/a", "b"), ("metrics", "train", "a/b")])
@example([("metrics", "train", "loss_step"), ("steps", "train", "loss")])
@example([("metrics", "", ""), ("metrics", "#", ""), ("metrics", "", "#")])
@example([("metrics", "", "a_fit2"), ("metrics", "", "a", 2), ("metrics", "a", "")])
def test_keys_are_valid_and_one_for_each_series(found):
    keys, found = KeyMap(), [SeriesId(*words) for words in found]
    given = {series: keys.key_for(series) for series in found}
    assert all(is_valid(key) for key in given.values())
    assert len(set(given.values())) == len(given)
    assert {series: KeyMap().key_for(series) for series in found[:1]} == dict(
        list(given.items())[:1]
    )
    again = KeyMap()
    assert {series: again.key_for(series) for series in found} == given
    mapped = keys.renamed()
    for key, (what, set_, name, *fit) in mapped.items():
        assert given[SeriesId(what, set_, name, *map(int, fit))] == key
    assert all(
        key == plain_key(series) and series.fit == 1
        for series, key in given.items()
        if key not in mapped
    )


def test_key_that_was_given_is_never_given_again():
    keys = KeyMap()
    odd = keys.key_for(SeriesId("metrics", "train", "a#b"))
    other = keys.key_for(SeriesId("metrics", "", odd))
    assert other != odd


def test_reserved_beginning_is_not_given():
    keys = KeyMap(reserved_prefix="luz.")
    assert keys.key_for(SeriesId("tags", "", "luz.run_id")) != "luz.run_id"


@given(st.text(max_size=400))
def test_any_text_gets_a_key(name):
    key = KeyMap().key_for(SeriesId("metrics", "train", name))
    assert is_valid(key)
    assert len(key) <= MAX_KEY_LENGTH


def test_names_that_mlflow_refuses_are_mapped_and_the_mapping_kept(
    record, deliver, store, in_mlflow, client
):
    run = record()
    names = [
        "a#b",
        "a%b",
        "",
        "x" * 300,
        "../up",
        "/abs",
        "a//b",
        "ü",
        ".",
        "two\nlines",
    ]
    for number, name in enumerate(names):
        run.run.log("metrics", "train", {name: float(number)}, index=1)
    run.run.log("metrics", "train/a", {"b": 100.0}, index=1)
    run.run.log("metrics", "train", {"a/b": 101.0}, index=1)
    run.run.log("metrics", "", {"": 102.0}, index=1)
    run.run.finish()
    made = deliver(run.path, store)
    keys = {v: k for k, _, v, _ in in_mlflow(store, made.state.mlflow_run_id)}
    assert len(keys) == len(names) + 3
    assert keys[7.0] == "train/ü"
    assert keys[100.0] == "train/a/b"
    assert keys[101.0].startswith("train/a/b-")
    mapping = json.loads(get_run(client, store, made.state).data.tags["luz.names"])
    assert mapping[keys[0.0]] == ["metrics", "train", "a#b"]
    assert mapping[keys[101.0]] == ["metrics", "train", "a/b"]
    assert set(mapping) == set(made.state.names)
    assert keys[7.0] not in mapping
