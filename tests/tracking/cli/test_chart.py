from __future__ import annotations

import math

from tracking.cli.chart import HEIGHT, draw_chart


def test_chart_of_a_line_is_a_diagonal():
    points = [(1, 0.0), (HEIGHT, 8.0)]
    lines = draw_chart("loss", {"train": points}, 12, has_colours=False)
    assert lines[0] == "loss   * train" or lines[:2] == ["loss", "* train"]
    rows = [line.partition("|")[2] for line in lines if "|" in line]
    assert [row.find("*") for row in rows] == sorted(
        [row.find("*") for row in rows], reverse=True
    )
    assert rows[0].rstrip().endswith("*")
    assert rows[-1].startswith("*")


def test_chart_leaves_out_what_is_no_number_and_survives_any_range():
    points = [(1, math.nan), (2, 1e308), (3, -1e308), (4, math.inf)]
    lines = draw_chart("loss", {"valid": points}, 80, has_colours=True)
    assert len([line for line in lines if "|" in line]) == HEIGHT
    assert "1e+308" in lines[1]
    assert draw_chart("loss", {"valid": points[:2]}, 80, has_colours=True) == []
    flat = draw_chart("loss", {"valid": [(1, 2.0), (2, 2.0)]}, 40, has_colours=False)
    assert any(line.count("*") > 10 for line in flat)
