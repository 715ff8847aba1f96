"""Damaged files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

Damage = Callable[[], object]
"""Damages a file of the current folder."""

GIT_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 1453316\n"
"""What lies in the place of a file that git-lfs did not fetch."""


def cut(path: Path | str, size: int) -> None:
    """Keep the first `size` bytes of a file; a negative size drops as many at the end."""
    Path(path).write_bytes(Path(path).read_bytes()[:size])
