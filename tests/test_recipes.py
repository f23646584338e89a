"""The programs of the recipes learn what they promise, and each has a page."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "scripts" / "examples"
PAGES = ROOT / "docs" / "recipes"

Check = Callable[[Any], object]

CHECKS: dict[str, Check] = {
    "own_step": lambda found: found["adversarial"] > found["plain"] + 0.05,
    "gan": lambda found: found[0] == 6 and found[1] > 0.5,
    "vae": lambda found: found[0] < 26,  # nats; the mean image alone needs 33
    "char_transformer": lambda found: found[0] < 2.4 and len(found[1]) == 81,
    "triplet": lambda found: found > 0.8,
    "segmentation": lambda found: min(found.values()) > 0.75,
    "finetune": lambda found: found > 0.9,
    "distillation": lambda found: found["student"] > found["without a teacher"] + 0.05,
    "mean_teacher": lambda found: found["mean teacher"] > found["student alone"],
    "contrastive": lambda found: found["features"] > found["pixels"] + 0.05,
    "seq2seq": lambda found: found > 0.75,
    "graph": lambda found: found > 0.97,
    "multitask": lambda found: found["accuracy"] > 0.7 and found["ink_error"] < 0.4,
    "diffusion": lambda found: found["samples"] < found["noise"] / 2,
    "pinn": lambda found: found["LBFGS"] < found["Adam"] / 5,
    "reinforcement": lambda found: found[1] > 2 * found[0],
    "k_folds": lambda found: found[0] > 0.94 and 0 < found[1] < 0.05,
    "curriculum": lambda found: (
        found["curriculum"] > 0.9 > found["long from the start"]
    ),
    "hand_loop": lambda found: found > 0.9,
    "case_weights": lambda found: found["weighted"] > found["equal"] + 0.1,
}

QUICK = ("case_weights", "hand_loop", "multitask")


def load_program(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in CHECKS
    ],
)
def test_recipe_learns(name: str) -> None:
    found = load_program(name).main(tracker=False)
    assert CHECKS[name](found), found


@pytest.mark.slow
def test_transformer_trains_in_bfloat16() -> None:
    program = load_program("char_transformer")
    program.TEXT = program.TEXT[:12_000]
    loss, _ = program.main(tracker=False, precision="bf16", epochs=1)
    assert loss < 3.6  # chance: log of 60 to 90 letters, above 4


def test_every_program_is_a_recipe() -> None:
    programs = {path.stem for path in EXAMPLES.glob("*.py")}
    assert programs - set(CHECKS) == {"digits", "train_deepspeed"}


def test_every_recipe_has_a_page_with_its_program() -> None:
    for name in CHECKS:
        text = (PAGES / f"{name}.md").read_text()
        assert (EXAMPLES / f"{name}.py").read_text() in text, name
        assert f"({name}.md)" in (PAGES / "README.md").read_text(), name
