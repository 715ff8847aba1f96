"""Fixtures of the tests of both tasks."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from taoq.tasks.images import read_image


@pytest.fixture
def opened_images(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Paths of the images that have been read, in the order of reading."""
    opened: list[Path] = []

    def read_and_record(path: Path) -> Image.Image:
        opened.append(path)
        return read_image(path)

    monkeypatch.setattr("taoq.tasks.images.read_image", read_and_record)
    return opened
