"""Checkpoints whose digests are right and whose contents are not those of a fit."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import harness
import tracking
from harness.callbacks import ModelCheckpoint, ResumeFromCheckpoint
from harness.checkpoint.format import list_checkpoints
from harness.checkpoint.state_checks import check_structure
from harness.errors import CheckpointError
from tests.harness.exact import CASES, Net, Stop

FORMS = [None, -1, 10**30, 0.5, "x", [], {}, True, [1, 2], {"a": 1}, {"$tensor": "no"}]


def fit(case: str, folder: Path, *callbacks: Any) -> Any:
    what = CASES[case]
    return what.learner().fit(
        what.data(),
        valid_data=what.valid,
        epochs=what.epochs,
        callbacks=[*what.callbacks(folder), *callbacks],
        tracker={"runs_dir": folder / "runs", "delivery": False},
        verbose=False,
        dataloader_options=what.options,
        seed=3,
    )


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folders of fits that stopped in the middle of an epoch; made once for each case."""
    made: dict[str, Path] = {}

    def make(case: str, to: Path) -> tuple[Path, Path]:
        if case not in made:
            made[case] = tmp_path_factory.mktemp(case)
            fit(
                case,
                made[case],
                Stop("on_train_batch_end", 8),
                ModelCheckpoint(made[case] / "saved"),
            )
        shutil.copytree(made[case], to)
        (path,) = list_checkpoints(to / "saved")
        (run,) = (to / "runs").iterdir()
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["run"]["path"] = str(run)
        del manifest["sha256"]
        (path / "manifest.json").write_text(json.dumps(manifest))
        return path, run

    return make


def rewrite(path: Path, plan: Any) -> None:
    """Write another plan of rank 0, with the digest that fits it."""
    text = json.dumps(plan).encode()
    (path / "rank-0.json").write_bytes(text)
    manifest = json.loads((path / "manifest.json").read_text())
    digest = hashlib.sha256(text).hexdigest()
    manifest["files"]["rank-0.json"] = {"bytes": len(text), "sha256": digest}
    manifest.pop("sha256", None)
    (path / "manifest.json").write_text(json.dumps(manifest))


def places(value: Any, path: tuple[Any, ...] = ()) -> Any:
    """Paths to all nodes; of a long list, to its first ones."""
    if path:
        yield path
    pairs: Any = ()
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, list):
        pairs = list(enumerate(value))[:6]
    for key, item in pairs:
        yield from places(item, (*path, key))


def change_form(plan: Any, chance: random.Random) -> str:
    """Drop or rename a key, or put a value of another kind in a place."""
    path = chance.choice(list(places(plan)))
    above = plan
    for key in path[:-1]:
        above = above[key]
    last = path[-1]
    action = chance.choice(["drop", "rename", "replace", "replace"])
    if isinstance(above, list) or action == "replace":
        kinds = [form for form in FORMS if type(form) is not type(above[last])]
        above[last] = copy.deepcopy(chance.choice(kinds))
    elif action == "drop":
        del above[last]
    else:
        above[f"{last}?"] = above.pop(last)
    return f"{action} {path}"


def check_mutations(case: str, seed: int, count: int, stopped: Any, folder: Path):
    """Each is refused before the run is rewound, or what it changed is not used."""
    chance = random.Random(seed)
    path, _ = stopped(case, folder / "whole")
    whole = json.loads((path / "rank-0.json").read_text())
    refused = 0
    for number in range(count):
        path, run = stopped(case, folder / str(number))
        plan = copy.deepcopy(whole)
        what = change_form(plan, chance)
        rewrite(path, plan)
        before = tracking.open(run).records(superseded=True)
        try:
            fit(case, folder / str(number), ResumeFromCheckpoint(path))
        except CheckpointError as error:
            refused += 1
            message = str(error)
        except Exception as error:
            error.add_note(f"seed {seed}, mutation {number}: {what}")
            raise
        else:
            continue
        assert re.search("xpected .*[.]", message), what
        assert tracking.open(run).records(superseded=True).equals(before), what
        shutil.rmtree(folder / str(number))
    assert refused > count // 3


def test_checkpoint_of_a_wrong_form_is_refused_before_the_run_is_rewound(
    stopped: Any, tmp_path: Path
) -> None:
    check_mutations("callbacks", 1, 15, stopped, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
@pytest.mark.parametrize(
    "case", ["callbacks", "adam-onecycle-metrics", "two-optimizers", "own-loader"]
)
def test_checkpoints_of_many_wrong_forms_are_refused(
    case: str, seed: int, stopped: Any, tmp_path: Path
) -> None:
    check_mutations(case, seed, 50, stopped, tmp_path)


@pytest.mark.filterwarnings("ignore:save")  # of the metric that is a lambda
def test_saved_model_of_a_wrong_form_is_refused(tmp_path: Path) -> None:
    fit("adam-onecycle-metrics", tmp_path).save(tmp_path / "model")
    path, chance, refused = tmp_path / "model" / "fitted.json", random.Random(4), 0
    whole = json.loads(path.read_text())
    for number in range(60):
        about = copy.deepcopy(whole)
        what = change_form(about, chance)
        path.write_text(json.dumps(about))
        try:
            loaded = harness.load(tmp_path / "model", Net)
            str(loaded)
            loaded.get_metrics()
        except CheckpointError:
            refused += 1
        except Exception as error:
            error.add_note(f"mutation {number}: {what}")
            raise
    assert refused > 20


@pytest.mark.parametrize("at", [9, 60, -5])
def test_saved_model_with_a_flipped_bit_in_its_weights_is_refused(
    at: int, tmp_path: Path
) -> None:
    fit("own-loader", tmp_path).save(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="expected the SHA-256 of model"):
        harness.load(tmp_path / "model", Net)


def test_saved_model_of_an_earlier_version_has_no_digest(tmp_path: Path) -> None:
    fit("own-loader", tmp_path).save(tmp_path / "model")
    path = tmp_path / "model" / "fitted.json"
    about = json.loads(path.read_text())
    del about["weights"]
    path.write_text(json.dumps(about))
    assert harness.load(tmp_path / "model", Net).records


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("journal", []),
        ("records/metrics", True),
        ("random/torch", {"a": 1}),
        ("random/numpy/$tuple/2", None),
        ("pass/began/python/$tuple/1/$tuple/0", -1),
        ("pass/window", 0),
        ("pass/fields/data/.train.batch_sampler", 1),
        ("same", [[["model", ""]]]),
        ("replaced", 1),
        ("accelerator/steps", []),
        ("accelerator/optimizers/opt/param_groups/0/lr", "x"),
        ("accelerator/optimizers/opt/param_groups/0/betas", 0.5),
        ("accelerator/optimizers/opt/state/$dict/0/1/exp_avg", 1),
        ("accelerator/optimizers/opt/state/$dict/0/1", {}),
        ("accelerator/optimizers/opt/state/$dict/2/0", -1),
        ("accelerator/optimizers/opt/state/$dict/2/0", 0),
        ("accelerator/grads", None),
        ("callbacks/EarlyStopping/waited", None),
        ("callbacks/KeepBestModel/best", "x"),
        ("callbacks/LRScheduler/scheduler/num_bad_epochs", "x"),
        ("callbacks/Metrics/train/metrics/accuracy", {}),
        ("callbacks/Metrics/train/loss/opt/rows", [1]),
        ("callbacks/Profile", {"rows": 1}),
    ],
)
def test_part_of_a_wrong_form_is_named(
    place: str, value: object, stopped: Any, tmp_path: Path
) -> None:
    path, run = stopped("callbacks", tmp_path / "one")
    plan = json.loads((path / "rank-0.json").read_text())
    *above, last = [int(word) if word.isdigit() else word for word in place.split("/")]
    owner = plan
    for key in above:
        owner = owner[key]
    owner[last] = value
    rewrite(path, plan)
    before = tracking.open(run).records(superseded=True)
    with pytest.raises(CheckpointError, match=r"expected .* got"):
        fit("callbacks", tmp_path / "one", ResumeFromCheckpoint(path))
    assert tracking.open(run).records(superseded=True).equals(before)


@pytest.mark.parametrize(
    ("saved", "live"),
    [
        (3, 0.5),
        (torch.tensor(3.0), 0.5),
        ((1, 2), [3.0]),
        ([], [1]),
        ({"a": 1, "more": 2}, {"a": 0}),
        ("text", None),
        ({"a": [{"b": 1}]}, {"a": [{"b": 2}]}),
    ],
)
def test_value_of_the_same_form_is_accepted(saved: object, live: object) -> None:
    check_structure(saved, live, "here")


@pytest.mark.parametrize(
    ("saved", "live", "message"),
    [
        ("3", 3, "a number in here, got '3'"),
        (None, 3, "a number in here, got None"),
        ({"a": 1}, {"b": 1}, "the key 'b' in here, got none"),
        ({"a": [1, "x"]}, {"a": [1]}, "a number in here/a/1, got 'x'"),
        (torch.zeros(2), 1.0, "a number in here"),
    ],
)
def test_value_of_another_form_is_refused(
    saved: object, live: object, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_structure(saved, live, "here")


def test_key_that_an_earlier_version_lacks_is_accepted_at_the_top() -> None:
    check_structure({"a": {}}, {"a": {"b": 1}, "c": 1}, "here", num_optional=2)
