# SPDX-License-Identifier: Apache-2.0
"""The result of `evaluate`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from taoq.plain import JsonMapping, JsonObject
from taoq.views.pages import as_html


@dataclass(frozen=True, kw_only=True)
class EvaluateResult:
    """Result of `taoq.evaluate`.

    Attributes:
        checkpoint: Path of the model; the class name of a network passed from Python.
        num_images: Number of evaluated samples.
        device: Device that the model ran on.
        seconds: Duration of the evaluation, without loading the model.
        metrics: Values of the metric by name.
        details: Further results of the metric, such as values per class.
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
        """Return the content of results.json."""
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
