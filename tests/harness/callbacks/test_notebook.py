"""Progress in a notebook; what IPython gives is stood for by a list of what it shows."""

from __future__ import annotations

from harness.callbacks.display.notebook import NotebookBar, NotebookOutput, open_output


class Display(list):
    """What a cell shows: the last text of each output."""

    def __call__(self, shown: str, *, display_id: bool) -> Display:
        assert display_id
        self.append(shown)
        return self

    def update(self, shown: str) -> None:
        self[-1] = shown


def test_notebook_output_is_updated_in_place():
    display = Display()
    output = NotebookOutput(display, str)
    assert display == []  # nothing to show, no output
    output.write("model <Net>")
    bar = NotebookBar("epoch 1/2 train", 4, 0.0, output)
    bar.draw(2, ["loss 1"], 1.0, 60)
    assert len(display) == 1
    first, second = display[0].partition(">")[2].removesuffix("</pre>").splitlines()
    assert first == "model &lt;Net&gt;"
    assert second.startswith("epoch 1/2 train  50% ━")
    assert second.endswith("2/4 eta 00:01 loss 1")
    assert second.count("━") == second.count("─")
    assert len(second) == 60
    bar.end()
    output.write("epoch 1")
    assert "━" not in display[0]
    assert "epoch 1" in display[0]


def test_notebook_output_is_opened_in_a_notebook_only():
    assert open_output() is None
