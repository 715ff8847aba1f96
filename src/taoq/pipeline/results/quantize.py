# SPDX-License-Identifier: Apache-2.0
"""What `quantize` returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from taoq.errors import Fault, Notice
from taoq.pipeline.artifacts import Manifest
from taoq.pipeline.intervals import Difference
from taoq.pipeline.search import SearchResult
from taoq.plain import JsonObject
from taoq.quantization.spec import QuantizeSpec
from taoq.quantization.types import LayerError, LayerPlan, QuantizationPlan
from taoq.views.pages import as_html, megabytes, page


@dataclass(frozen=True, kw_only=True)
class LayerResult:
    """What was done to a layer, and what it cost.

    Attributes:
        plan: What was decided.
        macs: Multiply-accumulates for one sample; None for a layer that has none.
        error: Its error; None if it is float.
        input_range: Smallest and largest input that it represents; None if its inputs are float.
    """

    plan: LayerPlan
    macs: int | None
    error: LayerError | None
    input_range: tuple[float, float] | None

    @property
    def name(self) -> str:
        """Name of the layer."""
        return self.plan.layer.name

    @property
    def weight_sqnr(self) -> float | None:
        """Signal-to-quantization-noise ratio of its weight, dB."""
        return self.error.weights if self.error else None

    @property
    def output_sqnr(self) -> float | None:
        """Signal-to-quantization-noise ratio of its output, dB."""
        return self.error.outputs if self.error else None

    def to_json(self) -> JsonObject:
        """A row of the report."""
        return {
            **self.plan.to_json(),
            "macs": self.macs,
            "weights_sqnr": self.weight_sqnr,
            "outputs_sqnr": self.output_sqnr,
            "range": list(self.input_range) if self.input_range else None,
        }


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Figures of the float and of the quantized model on the same samples.

    Attributes:
        num_images: Number of samples.
        seconds: Time for both.
        float_figures: Figures of the float model.
        quantized_figures: Figures of the quantized model.
        difference: The difference of the figure that counts.
    """

    num_images: int
    seconds: float
    float_figures: Mapping[str, float]
    quantized_figures: Mapping[str, float]
    difference: Difference

    def to_json(self) -> JsonObject:
        """As the report has it."""
        return {
            "num_images": self.num_images,
            "seconds": round(self.seconds, 3),
            "float": dict(self.float_figures),
            "quantized": dict(self.quantized_figures),
            "differences": [self.difference.to_json()],
        }


@dataclass(frozen=True, kw_only=True)
class AccuracyCheck:
    """The loss of a quantized model against its budget.

    Attributes:
        metric: The figure that counts.
        float_figure: Its value for the float model.
        quantized_figure: Its value for the quantized model.
        max_drop: The budget.
        met: Whether the loss is within the budget.
    """

    metric: str
    float_figure: float
    quantized_figure: float
    max_drop: float
    met: bool

    @property
    def drop(self) -> float:
        """What is lost."""
        return self.float_figure - self.quantized_figure

    def fault(self, hint: str) -> Fault:
        """The loss as a fault."""
        what = (
            f"{self.metric} falls from {self.float_figure:.4f} to {self.quantized_figure:.4f}, by {self.drop:.4f};"
            f" {self.max_drop:g} is accepted"
        )
        return Fault("quantize.accuracy.max_drop", what, hint)

    def to_json(self) -> JsonObject:
        """As the manifest and the report have it."""
        return {
            "metric": self.metric,
            "float": self.float_figure,
            "quantized": self.quantized_figure,
            "drop": self.drop,
            "max_drop": self.max_drop,
            "met": self.met,
        }


@dataclass(frozen=True, kw_only=True)
class QuantizeResult:
    """What `quantize` did, and what it cost.

    Attributes:
        manifest: The manifest of the artifact.
        plan: What was decided for each layer.
        layers: The layers with a weight matrix or kernel: what was done to each, and its error.
        macs_quantized: The part of the multiply-accumulates that is in quantized layers; None if there are none.
        seconds: Time for calibration and quantization.
        device: Where it ran.
        created: When, as ISO 8601.
        command: The command line.
        section: The `quantize` section.
        target: What the artifact is for.
        notices: What the user should know.
        evaluation: Figures of both models; None if they were not measured.
        accuracy: The loss against the budget; None if there is no budget.
        search: How the plan was found; None if no search was asked for.
        model: The quantized model, in the backend's format, on the CPU.
        directory: Folder of the artifact; None if it was not kept.
    """

    manifest: Manifest
    plan: QuantizationPlan
    layers: tuple[LayerResult, ...]
    macs_quantized: float | None
    seconds: float
    device: str
    created: str
    command: str
    section: QuantizeSpec
    target: str
    notices: tuple[Notice, ...]
    evaluation: Evaluation | None
    accuracy: AccuracyCheck | None
    search: SearchResult | None
    model: Any = field(repr=False)
    directory: Path | None

    @property
    def payload(self) -> Path | None:
        """Path of the quantized model; None if it was not kept."""
        return self.directory / self.manifest.payload if self.directory else None

    def to_json(self) -> JsonObject:
        """The content of quantization_report.json."""
        manifest, section = self.manifest, self.section
        return {
            "task": manifest.task,
            "backend": manifest.backend,
            "payload": manifest.payload,
            "sha256": manifest.sha256,
            "size": manifest.size,
            "float_size": manifest.float_size,
            "source": dict(manifest.source),
            "calibration": dict(manifest.calibration),
            "versions": dict(manifest.versions),
            "mode": self.plan.mode,
            "algorithm": self.plan.algorithm,
            "target": self.target,
            "layers_quantized": len(self.plan.quantized),
            "layers_quantizable": len(self.plan.quantizable),
            "macs_quantized": self.macs_quantized,
            "seconds": round(self.seconds, 3),
            "device": self.device,
            "created": self.created,
            "warnings": [str(notice) for notice in self.notices],
            "command": self.command,
            "rules": [
                {
                    "field": f"quantize.layers[{index}]",
                    "pattern": rule.module_name,
                    "weights": rule.weights.dtype if rule.weights else None,
                    "activations": rule.activations.dtype if rule.activations else None,
                }
                for index, rule in enumerate(section.layers)
            ],
            "skip_names": list(section.skip_names),
            "layers": [layer.to_json() for layer in self.layers],
            "evaluation": self.evaluation.to_json() if self.evaluation else None,
            "accuracy": self.accuracy.to_json() if self.accuracy else None,
            "search": self.search.to_json() if self.search else None,
        }

    def html(self) -> str:
        """The report as one HTML file."""
        return page("quantize", self.to_json())

    def _repr_html_(self) -> str:
        manifest = self.manifest
        rows = [
            ["layers quantized", f"{len(self.plan.quantized)} of {len(self.plan.quantizable)}"],
            ["size", f"{megabytes(manifest.float_size)} as float32, {megabytes(manifest.size)} now"],
        ]
        if self.evaluation:
            difference = self.evaluation.difference
            rows.append([difference.figure, f"{difference.value:+.4f} ({difference.interval or 'no interval'})"])
        worst = [layer for layer in self.layers if layer.output_sqnr is not None]
        for layer in sorted(worst, key=lambda layer: layer.output_sqnr or 0.0)[:5]:
            rows.append([layer.name, f"{layer.output_sqnr:.1f} dB"])
        return as_html(f"quantized by {manifest.backend}", ["what", "value"], rows)
