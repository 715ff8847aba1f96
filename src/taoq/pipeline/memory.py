# SPDX-License-Identifier: Apache-2.0
"""Memory of this process, in bytes, as Linux counts it."""

from __future__ import annotations

import re
from pathlib import Path


def resident() -> int:
    """What it holds now."""
    return _status("VmRSS")


def peak_resident() -> int:
    """The most that it ever held. Not `ru_maxrss`, which a process takes over from the one that started it."""
    return _status("VmHWM")


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s*(\d+) kB$", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024
