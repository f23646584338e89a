"""Printed tables."""

from __future__ import annotations

import pytest

from tracking.cli import render


@pytest.mark.parametrize("columns", [("run", "\u00fcber", "last one"), ("run",)])
def test_long_table_is_printed_as_rich_prints_it(columns, capsys):
    words = ["", "a", "\u65e5\u672c\u8a9e", "x" * 30, "tab\tand\nline", "\x1b[31mred"]
    rows = [
        [words[(row * 7 + place) % len(words)] for place in range(len(columns))]
        for row in range(render.LONG_TABLE + 1)
    ]
    long, short = (render.make_table(columns, some) for some in (rows, rows[:6]))
    console = render.make_console()
    console.print(long)
    expected = capsys.readouterr().out
    render.print_table(long)
    assert capsys.readouterr().out == expected
    assert "\x1b" not in expected
    render.print_table(short)
    assert capsys.readouterr().out.splitlines()[3] == expected.splitlines()[3]
