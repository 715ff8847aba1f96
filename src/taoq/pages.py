# SPDX-License-Identifier: Apache-2.0
"""Reports as single HTML files: no script, nothing from a network, light and dark."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined


def page(kind: Literal["quantize", "analyze", "compare"], data: Mapping[str, Any]) -> str:
    """The report of an action.

    Args:
        kind: The action.
        data: What its JSON file says.
    """
    environment = Environment(
        loader=PackageLoader("taoq"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "mb": lambda number: f"{number / 1e6:.3g} MB",
        "db": lambda number: "" if number is None else f"{number:.1f}",
        "points": lambda number: "" if number is None else f"{100 * number:.2f}",
        "change": lambda number: f"{100 * number:+.2f}",
    }
    return environment.get_template(f"{kind}.html").render(data=data)
