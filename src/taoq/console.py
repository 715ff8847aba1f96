# SPDX-License-Identifier: Apache-2.0
"""Tables on stdout."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table


def show(table: Table) -> None:
    """Print a table; where stdout is a file or a pipe, wide enough to cut nothing."""
    width = None if sys.stdout.isatty() else 400
    Console(file=sys.stdout, width=width, highlight=False).print(table)


def size(number: int) -> str:
    """A number of bytes in MB (10^6 bytes) with three digits that count."""
    return f"{number / 1e6:.3g} MB"
