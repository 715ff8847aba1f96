# SPDX-License-Identifier: Apache-2.0
"""Render results as HTML: self-contained report pages, and tables for notebooks.

A page has no script, loads nothing from the network, and follows the browser's light or dark mode. This module takes
plain data and imports no result class, because the result classes import it to render themselves.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Literal

from jinja2 import Environment, PackageLoader, StrictUndefined

from taoq.plain import JsonMapping


def page(kind: Literal["quantize", "analyze", "compare"], data: JsonMapping) -> str:
    """Render the report of an action.

    Args:
        kind: Name of the action.
        data: Content of the action's JSON report.
    """
    environment = Environment(
        loader=PackageLoader("taoq.views"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "mb": megabytes,
        "db": lambda number: "" if number is None else f"{number:.1f}",
        "points": lambda number: "" if number is None else f"{100 * number:.2f}",
        "change": lambda number: "" if number is None else f"{100 * number:+.2f}",
    }
    return environment.get_template(f"{kind}.html").render(data=data)


def as_html(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Render an HTML table with a caption, for a notebook."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><caption>{html.escape(title)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def megabytes(number: int) -> str:
    """Format a number of bytes in MB (10^6 bytes), with three significant digits."""
    return f"{number / 1e6:.3g} MB"
