# SPDX-License-Identifier: Apache-2.0
"""Resident memory of this process in bytes, as Linux counts it."""

from __future__ import annotations

import re
from pathlib import Path


def resident() -> int:
    """Return the resident memory of this process."""
    return _status("VmRSS")


def peak_resident() -> int:
    """Return the peak of the resident memory. `ru_maxrss` would not do: a child process inherits its parent's."""
    return _status("VmHWM")


def _status(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    match = re.search(rf"^{field}:\s*(\d+) kB$", status, re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024
