# SPDX-License-Identifier: Apache-2.0
"""Render results as tables for the terminal."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from taoq.pipeline.proof import Proof
from taoq.pipeline.results.analyze import AnalyzeResult
from taoq.pipeline.results.benchmark import COMPILED, BenchmarkResult
from taoq.pipeline.results.compare import ComparedModel, CompareResult
from taoq.pipeline.results.evaluate import EvaluateResult
from taoq.pipeline.results.quantize import Evaluation, LayerResult
from taoq.pipeline.search import SearchResult
from taoq.pipeline.timing import SPEEDUP
from taoq.quantization.types import QuantizationPlan, Scheme
from taoq.views.pages import megabytes

_WORST_LAYERS, _WORST_UNITS, _DIFFERING_LAYERS = 10, 20, 20
"""Maximum number of rows in the terminal; the HTML reports show all rows."""


def to_screen(item: Table | str) -> None:
    """Print a line or a table to stdout."""
    if isinstance(item, str):
        print(item)
        return
    width = None if sys.stdout.isatty() else 400  # wide enough that no cell is folded in a file or a pipe
    Console(file=sys.stdout, width=width, highlight=False).print(item)


def plan_table(plan: QuantizationPlan) -> Table:
    """Tabulate the scheme of each layer, and the rule that decided it."""
    table = Table(title=f"{plan.backend}, {plan.mode}" + (f", {plan.algorithm}" if plan.needs_calibration else ""))
    has_aliases = any(item.layer.alias for item in plan.listed)
    names = ["layer", *(["original name"] if has_aliases else [])]
    for column in (*names, "type", "weights", "activations", "decided by"):
        table.add_column(column, overflow="fold")
    for item in plan.listed:
        rule = f"{item.rule.field} '{item.rule.pattern}'" if item.rule else ""
        reason = f"({item.reason})" if item.reason and item.rule else item.reason
        sensitive = f"(sensitive: {item.layer.sensitive})" if item.quantized and item.layer.sensitive else ""
        decided_by = " ".join(part for part in (rule, reason, sensitive) if part)
        cells = [item.layer.name, *([item.layer.alias] if has_aliases else [])]
        schemes = (_scheme(item.weights), _scheme(item.activations))
        table.add_row(*cells, item.layer.type, *schemes, decided_by, style="" if item.quantized else "dim")
    hidden = len(plan.layers) - len(plan.listed)
    table.caption = (
        f"{len(plan.quantized)} of {len(plan.quantizable)} quantizable layers are quantized;"
        f" {hidden} layers without a weight matrix are not listed"
    )
    return table


def error_table(layers: Sequence[LayerResult]) -> Table:
    """Tabulate the quantized layers with the largest errors, worst first."""
    has_outputs = any(layer.output_sqnr is not None for layer in layers)

    def error(layer: LayerResult) -> float | None:
        return layer.output_sqnr if has_outputs else layer.weight_sqnr

    measured = sorted((layer for layer in layers if error(layer) is not None), key=lambda layer: error(layer) or 0.0)
    table = Table(title=f"largest errors of {len(measured)} quantized layers, SQNR in dB: lower is worse")
    table.add_column("layer", overflow="fold")
    for column in ("weights", "outputs", "input range"):
        table.add_column(column, justify="right")
    for layer in measured[:_WORST_LAYERS]:
        decibels = [f"{value:.1f}" if value is not None else "-" for value in (layer.weight_sqnr, layer.output_sqnr)]
        limits = f"{layer.input_range[0]:.4g} .. {layer.input_range[1]:.4g}" if layer.input_range else "float"
        table.add_row(layer.name, *decibels, limits)
    return table


def evaluation_table(evaluation: Evaluation) -> Table:
    """Tabulate the metrics of the float and of the quantized model."""
    table = Table(title=f"on {evaluation.num_images} images, differences with their 95 % interval")
    table.add_column("metric")
    for column in ("float", "quantized", "difference", "interval"):
        table.add_column(column, justify="right")
    for name, before in evaluation.float_figures.items():
        after = evaluation.quantized_figures.get(name)
        if after is not None:
            interval = evaluation.difference.interval if name == evaluation.difference.figure else ""
            table.add_row(name, f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}", interval)
    return table


def search_table(search: SearchResult) -> Table:
    """Tabulate the plans that a search evaluated."""
    table = Table(title=f"{len(search.evaluations)} plans were evaluated; {search.max_drop:g} less is accepted")
    table.add_column("tried", overflow="fold")
    for column in ("layers", search.maximize, "drop", "within"):
        table.add_column(column, justify="right")
    for plan in search.evaluations:
        share = f"{100 * plan.share:.1f} %"
        table.add_row(plan.what, str(plan.layers), share, f"{plan.drop:+.4f}", "yes" if plan.within else "no")
    return table


def metrics_table(result: EvaluateResult) -> Table:
    """Tabulate the metrics of an evaluation."""
    table = Table()
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in result.metrics.items():
        table.add_row(name, f"{value:.4f}")
    return table


def proof_table(proof: Proof) -> Table:
    """Tabulate the differences between an exported file and the torch network."""
    table = Table(title=f"outputs of torch and ONNX on {proof.images} images")
    table.add_column("output")
    for column in ("largest difference", "largest value", "accepted"):
        table.add_column(column, justify="right")
    for name, output in proof.outputs.items():
        numbers = (f"{output.largest_difference:.2g}", f"{output.largest_value:.3g}", f"{output.accepted:.2g}")
        table.add_row(name, *numbers)
    return table


def ranking_table(result: AnalyzeResult) -> Table:
    """Tabulate the layers or groups that cost most when quantized, worst first."""
    title = f"worst of {len(result.units)} layers or groups: outputs on {result.num_samples} images,"
    table = Table(title=f"{title} {result.metric} on {result.num_images}")
    table.add_column("layer or group", overflow="fold")
    table.add_column("format")
    all_but = "all except this"
    for column in ("SQNR dB", all_but, result.metric, all_but, "multiply-accumulates"):
        table.add_column(column, justify="right")
    for unit in result.units[:_WORST_UNITS]:
        share = f"{100 * unit.macs / result.macs:.1f} %" if result.macs else ""
        decibels = [f"{value:.1f}" if value is not None else "" for value in (unit.sqnr, unit.sqnr_all_but)]
        figures = [f"{value:.4f}" if value is not None else "" for value in (unit.metric, unit.metric_all_but)]
        table.add_row(unit.name, unit.dtype, *decibels, *figures, share)
    return table


def benchmark_table(result: BenchmarkResult) -> Table:
    """Tabulate the latencies of a benchmark."""
    table = Table(title=f"on {result.device}, {result.threads} threads, {result.runs} runs in turns")
    table.add_column("model")
    for column in ("batch", "p50 ms", "p90 ms", "p99 ms", "images/s", "speed-up"):
        table.add_column(column, justify="right")
    for row in result.rows:
        latencies = [f"{value:.2f}" for value in (row.p50_ms, row.p90_ms, row.p99_ms)]
        table.add_row(row.model, str(row.batch), *latencies, f"{row.images_per_second:.1f}", f"{row.speedup:.2f}")
    compiled = any(row.model.endswith(COMPILED) for row in result.rows)
    table.caption = SPEEDUP + ("; compiled against compiled" if compiled else "")
    return table


def compare_table(result: CompareResult) -> Table:
    """Tabulate artifacts and their float models."""
    title = f"{result.num_images} images; {result.runs} runs in turns on {result.device}"
    table = Table(title=title, caption=SPEEDUP)
    table.add_column("model", overflow="fold")
    table.add_column("backend")
    for column in ("layers", "size", result.metric, "difference", "95 % interval"):
        table.add_column(column, justify="right")
    for batch in result.batch_sizes:
        table.add_column(f"ms at batch {batch}", justify="right")
        table.add_column("speed-up", justify="right")
    for model in result.models:
        table.add_row(*_compared_cells(model, result.metric))
    return table


def _compared_cells(model: ComparedModel, metric: str) -> list[str]:
    artifact = model.artifact
    return [
        model.model,
        model.backend,
        str(artifact.layers) if artifact else "",
        megabytes(model.size),
        f"{model.figures[metric]:.4f}",
        f"{artifact.difference.value:+.4f}" if artifact else "",
        artifact.difference.interval if artifact else "",
        *(cell for speed in model.speeds for cell in (f"{speed.p50_ms:.2f}", f"{speed.speedup:.2f}")),
    ]


def differences_table(result: CompareResult) -> Table:
    """Tabulate the settings and layers in which artifacts differ."""
    settings: Mapping[str, Mapping[str, object]] = result.settings
    layers: Mapping[str, Mapping[str, object]] = result.layers
    names = [model.model for model in result.models if model.artifact]
    table = Table(title=f"{len(settings)} setting(s) and {len(layers)} layer(s) differ")
    table.add_column("setting or layer", overflow="fold")
    for name in names:
        table.add_column(name, overflow="fold")
    for label, values in (*settings.items(), *itertools.islice(layers.items(), _DIFFERING_LAYERS)):
        table.add_row(label, *("-" if values[name] is None else str(values[name]) for name in names))
    if len(layers) > _DIFFERING_LAYERS:
        table.caption = f"{len(layers) - _DIFFERING_LAYERS} more layers are in compare.html"
    return table


def _scheme(scheme: Scheme | None) -> str:
    return str(scheme) if scheme else "float"
