# SPDX-License-Identifier: Apache-2.0
"""The result of `inference`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from taoq.plain import JsonObject


@dataclass(frozen=True, kw_only=True)
class InferenceResult:
    """Result of the action `inference`.

    Attributes:
        num_images: Number of images.
        device: Device that the model ran on.
        files: Files and folders that were written.
    """

    num_images: int
    device: str
    files: tuple[Path, ...]

    def to_json(self) -> JsonObject:
        """Return the result as plain data."""
        return {"num_images": self.num_images, "device": self.device, "files": list(map(str, self.files))}
