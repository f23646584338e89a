"""Short HTML of results, which a notebook shows."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def as_html(text: object, rows: Mapping[str, Mapping[str, str]] | None = None) -> str:
    """Return a text, and a table below it.

    Parameters
    ----------
    text
        Its lines stay as they are.
    rows
        Cells of each row of the table, by name of the row and column.
    """
    found = f'<pre style="font-family: monospace">{html.escape(str(text))}</pre>'
    if not rows:
        return found
    columns = dict.fromkeys(column for cells in rows.values() for column in cells)
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(
        f"<tr><th>{html.escape(name)}</th>"
        + "".join(f"<td>{html.escape(cells.get(c, ''))}</td>" for c in columns)
        + "</tr>"
        for name, cells in rows.items()
    )
    return f"{found}<table><tr><th></th>{head}</tr>{body}</table>"


def as_picture(figure: Figure) -> str:
    """Return a picture of a figure in HTML."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}">'
