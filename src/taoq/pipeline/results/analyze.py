# SPDX-License-Identifier: Apache-2.0
"""What `analyze` returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from taoq.plain import JsonObject
from taoq.views.pages import as_html, page


@dataclass(frozen=True, kw_only=True)
class RankedUnit:
    """A layer or group in the ranking; metrics are None where they were not measured.

    Attributes:
        name: The layer, or the pattern of the group.
        layers: Names of its layers.
        dtype: Its format.
        macs: Multiply-accumulates of its layers.
        bytes: Size of their weights as float32.
        sqnr: SQNR of the network's outputs with only it quantized, dB.
        sqnr_all_but: SQNR with all except it quantized, dB.
        metric: The figure with only it quantized.
        metric_all_but: The figure with all except it quantized.
    """

    name: str
    layers: tuple[str, ...]
    dtype: str
    macs: int
    bytes: int
    sqnr: float | None
    sqnr_all_but: float | None = None
    metric: float | None = None
    metric_all_but: float | None = None

    def to_json(self) -> JsonObject:
        """A row of the report."""
        return {**vars(self), "layers": list(self.layers)}


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """The network without its worst units.

    Attributes:
        left_out: Number of units that stay float.
        layers: Number of quantized layers.
        macs_share: The part of the multiply-accumulates that is quantized, 0..1.
        bytes_share: The part of the weights that is quantized, 0..1.
        metric: The figure.
    """

    left_out: int
    layers: int
    macs_share: float
    bytes_share: float
    metric: float


@dataclass(frozen=True, kw_only=True)
class AnalyzeResult:
    """Which layers hurt.

    Attributes:
        task: Name of the task.
        backend: Name of the backend.
        model: The float checkpoint.
        metric: The figure that counts.
        num_samples: Number of samples that outputs were compared on.
        num_images: Number of samples that the figure was measured on.
        float_figure: The figure of the float model.
        all_quantized: SQNR, figure and loss with everything quantized.
        macs: Multiply-accumulates of the network.
        units: The ranking, worst first.
        curve: The figure without the worst 0, 1, 2, 4, ... units.
        advice: What the curve says.
        skip_names: Patterns of the layers to leave float.
        seconds: Time that it took.
        command: The command line.
        versions: Versions of the libraries.
        directory: Folder of the results; None if none were written.
    """

    task: str
    backend: str
    model: str
    metric: str
    num_samples: int
    num_images: int
    float_figure: float
    all_quantized: Mapping[str, float | None]
    macs: int
    units: tuple[RankedUnit, ...]
    curve: tuple[CurvePoint, ...]
    advice: str
    skip_names: tuple[str, ...]
    seconds: float = 0.0
    command: str = ""
    versions: Mapping[str, str]
    directory: Path | None = None

    def to_json(self) -> JsonObject:
        """The content of analysis.json besides its key and its measurements."""
        return {
            "task": self.task,
            "backend": self.backend,
            "model": self.model,
            "metric": self.metric,
            "num_samples": self.num_samples,
            "num_images": self.num_images,
            "float": self.float_figure,
            "all": dict(self.all_quantized),
            "layers": sum(len(unit.layers) for unit in self.units),
            "macs": self.macs,
            "units": [unit.to_json() for unit in self.units],
            "curve": [vars(point) for point in self.curve],
            "advice": self.advice,
            "skip_names": list(self.skip_names),
            "seconds": round(self.seconds, 3),
            "command": self.command,
            "versions": dict(self.versions),
        }

    def html(self) -> str:
        """The report as one HTML file."""
        return page("analyze", self.to_json())

    def _repr_html_(self) -> str:
        rows = [
            [unit.name, unit.dtype, "" if unit.sqnr is None else f"{unit.sqnr:.1f}",
             "" if unit.metric is None else f"{unit.metric:.4f}"]
            for unit in self.units[:20]
        ]  # fmt: skip
        return as_html(self.advice, ["layer or group", "format", "SQNR dB", self.metric], rows)
