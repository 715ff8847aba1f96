# SPDX-License-Identifier: Apache-2.0
"""Results as HTML: reports as single files (no script, nothing from a network, light and dark), tables for notebooks.

Takes plain data and imports nothing of taoq: results render themselves with it.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Literal

from jinja2 import Environment, PackageLoader, StrictUndefined

from taoq.plain import JsonMapping


def page(kind: Literal["quantize", "analyze", "compare"], data: JsonMapping) -> str:
    """The report of an action.

    Args:
        kind: The action.
        data: The content of its JSON file.
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
    """A table for a notebook."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><caption>{html.escape(title)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def megabytes(number: int) -> str:
    """A number of bytes in MB (10^6 bytes) with three significant digits."""
    return f"{number / 1e6:.3g} MB"
