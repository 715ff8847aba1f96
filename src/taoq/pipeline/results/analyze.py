# SPDX-License-Identifier: Apache-2.0
"""The result of `analyze`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from taoq.plain import JsonObject
from taoq.views.pages import as_html, page


@dataclass(frozen=True, kw_only=True)
class RankedUnit:
    """A layer or group of layers in the ranking.

    Attributes:
        name: Name of the layer, or pattern of the group.
        layers: Names of its layers.
        dtype: Its numeric format.
        macs: Multiply-accumulates of its layers, for one sample.
        bytes: Size of its weights as float32, in bytes.
        sqnr: SQNR of the network's outputs with only this unit quantized, in dB; None if it is not finite.
        sqnr_all_but: SQNR with all except this unit quantized, in dB; None if not measured.
        metric: Metric with only this unit quantized; None if not measured.
        metric_all_but: Metric with all except this unit quantized; None if not measured.
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
        """Return a row of the report."""
        return {**vars(self), "layers": list(self.layers)}


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """The network with its worst units left float and all others quantized.

    Attributes:
        left_out: Number of units that are left float.
        layers: Number of quantized layers.
        macs_share: Fraction of the multiply-accumulates that is quantized, 0..1.
        bytes_share: Fraction of the weights that is quantized, 0..1.
        metric: Value of the metric.
    """

    left_out: int
    layers: int
    macs_share: float
    bytes_share: float
    metric: float


@dataclass(frozen=True, kw_only=True)
class AnalyzeResult:
    """Result of `taoq.analyze`: the layers ranked by what quantizing them costs.

    Attributes:
        task: Name of the task; empty for a network passed from Python.
        backend: Name of the backend.
        model: Path of the float checkpoint; empty for a network passed from Python.
        metric: Name of the metric that is compared.
        num_samples: Number of samples that the SQNR was measured on.
        num_images: Number of samples that the metric was measured on.
        float_figure: Metric of the float model.
        all_quantized: `sqnr` (dB), `metric` and its `drop` with all layers quantized.
        macs: Multiply-accumulates of the network, for one sample.
        units: Layers or groups of layers, worst first.
        curve: Metric with the worst 0, 1, 2, 4, ... units left float.
        advice: Conclusion from the curve, in one line.
        skip_names: Patterns of the layers to leave float, for `quantize.skip_names`.
        seconds: Duration of the analysis.
        command: Command line; empty for a call from Python.
        versions: Versions of Python and of the libraries.
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
        """Return the content of analysis.json, except for its key and its measurements."""
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
        """Return the report as a self-contained HTML page."""
        return page("analyze", self.to_json())

    def _repr_html_(self) -> str:
        rows = [
            [unit.name, unit.dtype, "" if unit.sqnr is None else f"{unit.sqnr:.1f}",
             "" if unit.metric is None else f"{unit.metric:.4f}"]
            for unit in self.units[:20]
        ]  # fmt: skip
        return as_html(self.advice, ["layer or group", "format", "SQNR dB", self.metric], rows)
