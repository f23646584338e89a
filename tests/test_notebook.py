"""The notebook of the docs runs, and shows progress, results and curves."""

from __future__ import annotations

from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parent.parent / "docs" / "notebook.ipynb"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of Jupyter's own packages
def test_notebook_of_the_docs_runs_and_shows_what_it_should(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parent.parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "strip the outputs"
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=500, resources=resources).execute()
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    shown = [[dict(one.get("data", {})) for one in some] for some in outputs]
    learner, fit, plot, rates, wide, resumed, past, table, rows = shown
    assert "Learner of Net" in learner[0]["text/html"]
    # One output for the progress, updated in place, and one for the result.
    assert len(fit) == 2
    assert "ended  4 epochs" in fit[0]["text/html"]
    assert "<table>" in fit[1]["text/html"]
    assert plot[0]["image/png"]
    assert "<img src=" in rates[0]["text/html"]
    assert "weight_norm" in wide[1]["text/html"]
    assert "ended  2 epochs" in resumed[0]["text/html"]
    assert "finished" in past[0]["text/html"]
    assert "valid/accuracy" in table[0]["text/html"]
    assert "accuracy" in rows[0]["text/html"]
    for html in (one.get("text/html", "") for some in shown for one in some):
        # Jupyter's own style for HTML is not monospaced everywhere; columns need it.
        assert html.count("<pre") == html.count('<pre style="font-family: monospace')
        # A notebook has its own colours, on a light or a dark ground.
        assert "color" not in html.replace("border-color", "")
