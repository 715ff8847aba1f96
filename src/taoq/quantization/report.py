# SPDX-License-Identifier: Apache-2.0
"""The plan as rows: for the table on screen, the manifest and the report."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from taoq.quantization.plan import LayerPlan, QuantizationPlan, TensorScheme


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


def _listed(plan: QuantizationPlan) -> list[LayerPlan]:
    return [item for item in plan.layers if item.layer.weight_shape or item.quantized]


def _words(scheme: TensorScheme | None) -> str:
    return str(scheme) if scheme else "float"


def _format(scheme: TensorScheme | None) -> dict[str, Any] | None:
    if scheme is None:
        return None
    return {"dtype": scheme.dtype, "axis": scheme.axis, "asked": scheme.asked or scheme.dtype}
