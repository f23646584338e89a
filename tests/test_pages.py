"""MLflow's pages of a real fit, in a real browser."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.browser

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
    None,
)
WAIT_MS = 120_000

PROGRAM = """
import harness, torch
from harness import callbacks as cb

def accuracy(pred, target):
    return (pred.argmax(1) == target).float().mean()

x = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
found = harness.setup(
    torch.nn.Linear, loss=torch.nn.CrossEntropyLoss(), optimizer=torch.optim.SGD,
    metrics={"accuracy": accuracy},
).set_hparams(in_features=4, out_features=2).set_opt_hparams(lr=0.1)
found.fit(
    (x, (x[:, 0] > 0).long()), epochs=3, valid_data=0.25, seed=1, verbose=False,
    callbacks=[
        cb.LRScheduler(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5), cb.Profile()
    ],
    tracker={"experiment": "digits", "name": "odd <b>name</b>"},
)
"""


@pytest.fixture(scope="module")
def addresses(browser, tmp_path_factory):
    """Address of a run's page, as ``harness ui`` prints it, and of its experiment's charts."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "train.py").write_text(PROGRAM)
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HARNESS_", "MLFLOW_"))
    }
    env = kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "train.py"], cwd=folder, env=env, check=True)
    (run,) = (folder / "runs").iterdir()
    command = [sys.executable, "-m", "harness.cli", "ui", "--port", "0", run.name]
    ui = subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, text=True
    )
    try:
        assert ui.stdout is not None
        page = ui.stdout.readline().strip()
        base = page.partition("/runs/")[0]
        query = "workflowType=machine_learning&compareRunsMode=CHART"
        yield page, f"{base}/runs?{query}"
    finally:
        ui.terminate()
        ui.wait()
        ui.stdout.close()


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed"
    )
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with sync_api.sync_playwright() as tool:
        opened = tool.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"], timeout=WAIT_MS
        )
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser):
    """Opens an address, and gives the page once it shows a text."""
    pages = []

    def open_at(address: str, text: str):
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        pages.append(page)
        page.goto(address, timeout=WAIT_MS)
        page.get_by_text(text, exact=True).first.wait_for(timeout=WAIT_MS)
        return page

    yield open_at
    for page in pages:
        page.close()


def find_sections(page) -> list[str]:
    """Titles of the sections of charts, in the order of the page."""
    return re.findall(r"^(.+)\n\(\d+\)$", page.inner_text("body"), re.MULTILINE)


def test_charts_of_a_run_are_those_of_train_then_valid(addresses, open_page):
    page = open_page(addresses[0], "loss")
    assert find_sections(page)[:2] == ["train", "valid"]
    shown = page.inner_text("body")
    assert "system/" not in shown
    assert shown.index("\nloss\n") < shown.index("\nlr\n")  # the rate is beside its set
    assert "odd <b>name</b>" in shown
    assert "\nGenAI\nModel training\n" in shown
    page.get_by_text("System metrics", exact=True).first.click()
    page.get_by_text("train_epoch_s").first.wait_for(timeout=WAIT_MS)


def test_charts_of_an_experiment_begin_with_train_and_end_with_times(
    addresses, open_page
):
    page = open_page(addresses[1], "train/loss")
    sections = find_sections(page)
    assert sections[:2] == ["train", "valid"]
    assert sections[-1] == "System metrics"
    assert not [name for name in sections if name.startswith("system/")]


def test_overview_of_a_run_tells_results_data_and_what_to_type(addresses, open_page):
    page = open_page(addresses[0].replace("/model-metrics", ""), "Description")
    page.get_by_text("Results", exact=True).wait_for(timeout=WAIT_MS)
    shown = page.inner_text("body")
    assert "after epoch 3" in shown
    for text in ("lowest", "valid/loss", "train.py", "harness runs show", "Finished"):
        assert text in shown
    assert re.search(r"train \([0-9a-f]{8}\)", shown)  # the digest of the data
