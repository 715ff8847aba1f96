"""Fixtures of the tests of both tasks."""

from __future__ import annotations

from pathlib import Path

import pytest

from taoq.tasks.pixels import Pixels, read_pixels


@pytest.fixture
def opened_images(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Paths of the images that have been read, in the order of reading."""
    opened: list[Path] = []

    def read_and_record(path: Path) -> Pixels:
        opened.append(path)
        return read_pixels(path)

    monkeypatch.setattr("taoq.tasks.images.read_pixels", read_and_record)
    return opened
