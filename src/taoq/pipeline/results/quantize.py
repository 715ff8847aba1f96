# SPDX-License-Identifier: Apache-2.0
"""The result of `quantize`."""

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
    """How a layer was quantized, and its error.

    Attributes:
        plan: The layer and the schemes of its weights and inputs.
        macs: Multiply-accumulates for one sample; None for a layer that has none.
        error: Quantization error; None for a float layer.
        input_range: Smallest and largest input that its format represents; None if its inputs are float.
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
        """Signal-to-quantization-noise ratio of the weight in dB; None if not measured."""
        return self.error.weights if self.error else None

    @property
    def output_sqnr(self) -> float | None:
        """Signal-to-quantization-noise ratio of the output in dB; None if not measured.

        The layer gets the input that it has in the float model, so errors of other layers do not add to it.
        """
        return self.error.outputs if self.error else None

    def to_json(self) -> JsonObject:
        """Return a row of the report."""
        return {
            **self.plan.to_json(),
            "macs": self.macs,
            "weights_sqnr": self.weight_sqnr,
            "outputs_sqnr": self.output_sqnr,
            "range": list(self.input_range) if self.input_range else None,
        }


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Metrics of the float and of the quantized model on the same samples.

    Attributes:
        num_images: Number of evaluated samples.
        seconds: Duration of the evaluation of both models.
        float_figures: Values of the float model by name.
        quantized_figures: Values of the quantized model by name.
        difference: Difference of the primary metric, with its confidence interval.
    """

    num_images: int
    seconds: float
    float_figures: Mapping[str, float]
    quantized_figures: Mapping[str, float]
    difference: Difference

    def to_json(self) -> JsonObject:
        """Return the evaluation as it appears in the report."""
        return {
            "num_images": self.num_images,
            "seconds": round(self.seconds, 3),
            "float": dict(self.float_figures),
            "quantized": dict(self.quantized_figures),
            "differences": [self.difference.to_json()],
        }


@dataclass(frozen=True, kw_only=True)
class AccuracyCheck:
    """Loss of a quantized model, checked against the accuracy budget.

    Attributes:
        metric: Name of the metric.
        float_figure: Value of the float model.
        quantized_figure: Value of the quantized model.
        max_drop: Largest accepted loss.
        met: Whether the loss is accepted.
    """

    metric: str
    float_figure: float
    quantized_figure: float
    max_drop: float
    met: bool

    @property
    def drop(self) -> float:
        """Loss of the metric: float value minus quantized value."""
        return self.float_figure - self.quantized_figure

    def fault(self, hint: str) -> Fault:
        """Return a fault that reports the loss."""
        what = (
            f"{self.metric} falls from {self.float_figure:.4f} to {self.quantized_figure:.4f}, by {self.drop:.4f};"
            f" {self.max_drop:g} is accepted"
        )
        return Fault("quantize.accuracy.max_drop", what, hint)

    def to_json(self) -> JsonObject:
        """Return the check as it appears in the manifest and in the report."""
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
    """Result of `taoq.quantize`.

    Attributes:
        manifest: Manifest of the artifact.
        plan: Scheme of each layer, and the rule that decided it.
        layers: Schemes and error of each layer with a weight matrix or kernel, in model order.
        macs_quantized: Fraction of the multiply-accumulates that is in quantized layers, 0..1; None if the network has
            no multiply-accumulates.
        seconds: Duration of calibration and quantization.
        device: Device that calibration ran on.
        created: Time of creation, ISO 8601 in UTC.
        command: Command line; empty for a call from Python.
        section: The `quantize` section.
        target: Purpose of the backend, in one line.
        notices: Warnings about the plan and the accuracy budget.
        evaluation: Metrics of both models; None if they were not evaluated.
        accuracy: Check of the accuracy budget; None if there is no budget.
        search: Search that found the plan; None if there was none.
        model: Quantized model on the CPU: an `nn.Module` for a torch backend, a graph for an ONNX backend.
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
        """Path of the quantized model in the artifact; None if it was not kept."""
        return self.directory / self.manifest.payload if self.directory else None

    def to_json(self) -> JsonObject:
        """Return the content of quantization_report.json."""
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
        """Return the report as a self-contained HTML page."""
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
        measured = [layer for layer in self.layers if layer.output_sqnr is not None]
        for layer in sorted(measured, key=lambda layer: layer.output_sqnr or 0.0)[:5]:
            rows.append([layer.name, f"{layer.output_sqnr:.1f} dB"])
        return as_html(f"quantized by {manifest.backend}", ["what", "value"], rows)
