# SPDX-License-Identifier: Apache-2.0
"""The plan as rows: for the table on screen, the manifest and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from taoq.quantization.backends.base import LayerError
from taoq.quantization.plan import LayerPlan, QuantizationPlan, TensorScheme
from taoq.quantization.spec import QuantizeSpec


def rows(plan: QuantizationPlan) -> list[dict[str, Any]]:
    """One row per layer with a weight: name, alias, type, formats, the rule that decided, why it stays float."""
    return [
        {
            "layer": item.layer.name,
            "alias": item.layer.alias,
            "type": item.layer.type,
            "weights": _format(item.weights),
            "activations": _format(item.activations),
            "rule": item.rule,
            "reason": item.reason,
        }
        for item in _listed(plan)
    ]


def patterns(section: QuantizeSpec) -> dict[str, str]:
    """The pattern of each rule and each skip name, by field."""
    rules = {f"quantize.layers[{index}]": rule.module_name for index, rule in enumerate(section.layers)}
    return rules | {f"quantize.skip_names[{index}]": pattern for index, pattern in enumerate(section.skip_names)}


def asked(section: QuantizeSpec) -> list[dict[str, Any]]:
    """The rules as they were written."""
    return [
        {
            "field": f"quantize.layers[{index}]",
            "pattern": rule.module_name,
            "weights": rule.weights.dtype if rule.weights else None,
            "activations": rule.activations.dtype if rule.activations else None,
        }
        for index, rule in enumerate(section.layers)
    ]


def measured_rows(
    plan: QuantizationPlan,
    errors: Mapping[str, LayerError],
    ranges: Mapping[str, tuple[float, float]],
    macs: Mapping[str, int],
) -> list[dict[str, Any]]:
    """The rows of a plan with what was measured of each layer; None where nothing was.

    Args:
        plan: The plan.
        errors: Of the quantized layers.
        ranges: Of their inputs.
        macs: Multiply-accumulates of all layers.
    """
    found = []
    for row in rows(plan):
        name, error = row["layer"], errors.get(row["layer"])
        range_ = ranges.get(name)
        found.append(
            {
                **row,
                "macs": macs.get(name),
                "weights_sqnr": error.weights if error else None,
                "outputs_sqnr": error.outputs if error else None,
                "range": list(range_) if range_ else None,
            }
        )
    return found


def quantized_share(plan: QuantizationPlan, amounts: Mapping[str, int]) -> float | None:
    """The part of all amounts, multiply-accumulates or bytes, that is in the quantized layers; None if all are 0."""
    whole = sum(amounts.values())
    return sum(amounts.get(item.layer.name, 0) for item in plan.quantized) / whole if whole else None


def table(plan: QuantizationPlan, spec_rules: dict[str, str]) -> Table:
    """The plan for the screen.

    Args:
        plan: The plan.
        spec_rules: The pattern of each rule, by field.
    """
    result = Table(title=f"{plan.backend}, {plan.mode}" + (f", {plan.algorithm}" if plan.needs_calibration else ""))
    aliases = any(item.layer.alias for item in _listed(plan))
    for column in ("layer", *(["original name"] if aliases else []), "type", "weights", "activations", "decided by"):
        result.add_column(column, overflow="fold")
    for item, row in zip(_listed(plan), rows(plan), strict=True):
        style = "" if item.quantized else "dim"
        decided = f"{item.rule} '{spec_rules[item.rule]}'" if item.rule else ""
        why = " ".join(
            part for part in (decided, f"({item.reason})" if item.reason and item.rule else item.reason) if part
        )
        if item.quantized and item.layer.sensitive:
            why = f"{why} (sensitive: {item.layer.sensitive})"
        names = (row["layer"], row["alias"]) if aliases else (row["layer"],)
        result.add_row(*names, row["type"], _words(item.weights), _words(item.activations), why, style=style)
    hidden = len(plan.layers) - len(_listed(plan))
    result.caption = (
        f"{len(plan.quantized)} of {len(plan.quantizable)} quantizable layers are quantized;"
        f" {hidden} layers without a weight matrix are not listed"
    )
    return result


def error_table(layers: Sequence[Mapping[str, Any]], most: int = 10) -> Table:
    """The quantized layers with the largest errors, worst first.

    Args:
        layers: Rows of `measured_rows`.
        most: How many are shown.
    """
    measured = [row for row in layers if row["weights_sqnr"] is not None or row["outputs_sqnr"] is not None]
    by = "outputs_sqnr" if any(row["outputs_sqnr"] is not None for row in measured) else "weights_sqnr"
    known = sorted((row for row in measured if row[by] is not None), key=lambda row: float(row[by]))
    result = Table(title=f"largest errors of {len(known)} quantized layers, SQNR in dB: less is worse")
    result.add_column("layer", overflow="fold")
    for column in ("weights", "outputs", "input range"):
        result.add_column(column, justify="right")
    for row in known[:most]:
        decibels = [f"{row[key]:.1f}" if row[key] is not None else "-" for key in ("weights_sqnr", "outputs_sqnr")]
        range_ = f"{row['range'][0]:.4g} .. {row['range'][1]:.4g}" if row["range"] else "float"
        result.add_row(row["layer"], *decibels, range_)
    return result


def figures_table(evaluation: Mapping[str, Any]) -> Table:
    """What quantization changed in the figures of the task.

    Args:
        evaluation: The figures of both models, and their differences.
    """
    result = Table(title=f"on {evaluation['num_images']} images, differences with their 95 % interval")
    result.add_column("metric")
    for column in ("float", "quantized", "difference", "interval"):
        result.add_column(column, justify="right")
    intervals = {one["figure"]: one for one in evaluation["differences"]}
    for name, before in evaluation["float"].items():
        after = evaluation["quantized"].get(name)
        if after is None:
            continue
        one = intervals.get(name)
        interval = f"{one['low']:+.4f} .. {one['high']:+.4f}" if one else ""
        result.add_row(name, f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}", interval)
    return result


def _listed(plan: QuantizationPlan) -> list[LayerPlan]:
    return [item for item in plan.layers if item.layer.weight_shape or item.quantized]


def _words(scheme: TensorScheme | None) -> str:
    return str(scheme) if scheme else "float"


def _format(scheme: TensorScheme | None) -> dict[str, Any] | None:
    if scheme is None:
        return None
    return {"dtype": scheme.dtype, "axis": scheme.axis, "asked": scheme.asked or scheme.dtype}
