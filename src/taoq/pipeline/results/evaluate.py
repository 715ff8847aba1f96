# SPDX-License-Identifier: Apache-2.0
"""What `evaluate` returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from taoq.plain import JsonMapping, JsonObject
from taoq.views.pages import as_html


@dataclass(frozen=True, kw_only=True)
class EvaluateResult:
    """What `evaluate` gave.

    Attributes:
        checkpoint: What was evaluated, as the spec names it.
        num_images: Number of samples.
        device: Where it ran.
        seconds: Time that it took.
        metrics: The figures.
        details: What the metric shows besides, such as figures per class.
        directory: Folder of the results; None if none were written.
    """

    checkpoint: str
    num_images: int
    device: str
    seconds: float
    metrics: Mapping[str, float]
    details: JsonMapping = field(default_factory=dict)
    directory: Path | None = None

    def to_json(self) -> JsonObject:
        """The content of results.json."""
        return {
            "checkpoint": self.checkpoint,
            "num_images": self.num_images,
            "device": self.device,
            "seconds": round(self.seconds, 3),
            "metrics": dict(self.metrics),
            **self.details,
        }

    def _repr_html_(self) -> str:
        return as_html(f"{self.checkpoint}: {self.num_images} images on {self.device}", ["metric", "value"],
                       [[name, f"{value:.4f}"] for name, value in self.metrics.items()])  # fmt: skip
