# SPDX-License-Identifier: Apache-2.0
"""Resolve the rules of a spec into a plan: one decision per layer. Pure; imports no library.

1. A pattern (`fnmatch`, case-sensitive) is matched against the layer's name, its alias and its type.
2. The last matching rule decides the whole layer; a tensor that the rule does not mention stays float.
3. `skip_names` is applied after all rules and wins. Layers that no rule matches stay float.
4. A rule that matches no quantizable layer is an error; a `skip_names` entry that matches no layer is a notice.
5. What the backend cannot honour is refused. The only exception is `Capability.realised`, which gives a notice.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from taoq.errors import Fault, Notice, SpecError, TaoqError, abbreviated, did_you_mean
from taoq.quantization.capability import Algorithm, Capability, TensorCapability
from taoq.quantization.dtypes import DTYPES, NATIVE, DType
from taoq.quantization.spec import LayerSpec, QuantizeSpec, TensorSpec
from taoq.quantization.types import (
    Applied,
    AppliedLayer,
    Granularity,
    Layer,
    LayerPlan,
    PerAxis,
    PerTensor,
    QuantizationPlan,
    Rule,
    Scheme,
)


def resolve(
    section: QuantizeSpec, layers: Sequence[Layer], capability: Capability, notices: tuple[Notice, ...] = ()
) -> QuantizationPlan:
    """Resolve the rules of a section for the layers of a model. See the module docstring for the semantics.

    Args:
        section: A section that passed `capability.check`.
        layers: All layers of the model, quantizable or not.
        capability: Capabilities of the backend.
        notices: Notices of `capability.check`, to be kept in the plan.

    Raises:
        SpecError: If a rule matches no quantizable layer, an axis does not exist or is not supported, or the plan
            quantizes nothing.
    """
    faults: list[Fault] = []
    plans = {layer.name: LayerPlan(layer=layer, reason=layer.obstacle or "no rule names it") for layer in layers}
    for index, entry in enumerate(section.layers):
        rule = Rule("layers", index, entry.module_name)
        matched = [layer for layer in layers if matches(rule.pattern, layer)]
        quantizable = [layer for layer in matched if not layer.obstacle]
        if not quantizable:
            faults.append(_matches_nothing(rule, matched, layers, capability))
        for layer in quantizable:
            plans[layer.name] = _plan_layer(entry, rule, layer, capability)
    skipped, unmatched = _skip(section.skip_names, layers)
    plans |= skipped
    decided = tuple(plans.values())
    faults += _check_axes(decided, capability)
    algorithm = capability.algorithm(section.algorithm)
    if not faults:
        faults += _check_result(decided, algorithm)
    if faults:
        raise SpecError(*faults)
    return QuantizationPlan(
        backend=capability.name,
        mode=section.mode,
        algorithm=section.algorithm if algorithm else "",
        layers=decided,
        notices=(*notices, *unmatched, *_sensitive(decided), *_not_smoothed(decided, algorithm)),
    )


def matches(pattern: str, layer: Layer) -> bool:
    """Return whether a pattern matches a layer's name (with or without a leading slash), alias or type."""
    if fnmatchcase(layer.name.removeprefix("/"), pattern.removeprefix("/")):
        return True
    return any(fnmatchcase(name, pattern) for name in (layer.name, layer.alias, layer.type) if name)


def exact_patterns(names: Iterable[str]) -> list[str]:
    """Return patterns that match exactly these names."""
    return [glob.escape(name) for name in names]


def common_patterns(names: Sequence[str], all_names: Iterable[str]) -> list[str]:
    """Return few patterns that match these names and no others: `blocks.*.attn.qkv` for that layer of each block.

    Args:
        names: Names of layers.
        all_names: Names of all layers.
    """
    others = set(all_names) - set(names)
    patterns: dict[str, list[str]] = {}
    for name in names:
        patterns.setdefault(re.sub(r"\d+", "*", glob.escape(name)), []).append(name)
    result: list[str] = []
    for pattern, matched in patterns.items():
        unique = len(matched) > 1 and not any(fnmatchcase(other, pattern) for other in others)
        result += [pattern] if unique else exact_patterns(matched)
    return result


def leave_out(plan: QuantizationPlan, reasons: Mapping[str, str], *, strict: bool) -> QuantizationPlan:
    """Return the plan without the layers that the library cannot quantize: they stay float, with a notice.

    Args:
        plan: The plan.
        reasons: Why the library leaves a layer float, by layer name.
        strict: Whether such a layer is an error.

    Raises:
        TaoqError: If `strict` is set and a layer stays float, or no quantized layer remains.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for item in plan.layers:
        if item.layer.name in reasons:
            field = item.rule.field if item.rule else "quantize.layers"
            groups.setdefault((field, reasons[item.layer.name]), []).append(item.layer.name)
    if strict and groups:
        hint = "put them into quantize.skip_names, or set quantize.strict: false to leave them float"
        raise TaoqError(
            *(
                Fault(field, f"{abbreviated(names)} cannot be quantized: {reason}", hint)
                for (field, reason), names in groups.items()
            )
        )
    remaining = replace(
        plan,
        layers=tuple(
            replace(item, weights=None, activations=None, reason=reasons[item.layer.name])
            if item.layer.name in reasons
            else item
            for item in plan.layers
        ),
        notices=(
            *plan.notices,
            *(
                Notice(field, f"{len(names)} layer(s) stay float ({abbreviated(names)}): {reason}")
                for (field, reason), names in groups.items()
            ),
        ),
    )
    if not remaining.quantized:
        hint = "name other layers, or choose another dtype"
        raise TaoqError(Fault("quantize.layers", f"{plan.backend} quantizes none of the layers", hint))
    return remaining


def verify(plan: QuantizationPlan, applied: Applied) -> None:
    """Check that the quantized model has exactly the schemes of the plan.

    Raises:
        TaoqError: If they differ; lists every difference.
    """
    faults: list[Fault] = []
    planned = {item.layer.name: item for item in plan.quantized}
    for name in sorted({*planned, *applied}):
        item, actual = planned.get(name), applied.get(name, AppliedLayer(None, None))
        for part, expected, scheme in (
            ("weights", item.weights if item else None, actual.weights),
            ("activations", item.activations if item else None, actual.activations),
        ):
            if not _agrees(expected, scheme):
                what = f"{part} are {scheme or 'float'} after quantization, the plan says {expected or 'float'}"
                faults.append(Fault(name, what, f"put it into quantize.skip_names; this is a limit of {plan.backend}"))
    if faults:
        raise TaoqError(*faults)


def _agrees(planned: Scheme | None, actual: Scheme | None) -> bool:
    if planned is None or actual is None:
        return planned is actual
    same = (planned.dtype, planned.granularity) == (actual.dtype, actual.granularity)
    return same and actual.symmetric >= planned.symmetric  # An asymmetric range may still give a zero point of 0.


def _plan_layer(entry: LayerSpec, rule: Rule, layer: Layer, capability: Capability) -> LayerPlan:
    """Return the plan of one layer under the rule that decides it."""
    default_axis = None if capability.weights.axes == "none" else layer.channel_axis
    weights = _scheme(entry.weights, default_axis, capability, capability.weights)
    if weights and isinstance(weights.granularity, PerAxis) and layer.weight_shape:
        axis, rank = weights.granularity.axis, len(layer.weight_shape)
        if -rank <= axis < rank:
            weights = replace(weights, granularity=PerAxis(axis % rank))
    activations = None
    if capability.activations:
        activations = _scheme(entry.activations, None, capability, capability.activations)
    reason = "" if weights or activations else "native"
    return LayerPlan(layer=layer, weights=weights, activations=activations, rule=rule, reason=reason)


def _scheme(
    tensor: TensorSpec | None, default_axis: int | None, capability: Capability, supported: TensorCapability
) -> Scheme | None:
    """Return the scheme of a tensor. `default_axis` is used if the rule names no axis; None is per tensor."""
    if tensor is None or tensor.dtype == NATIVE:
        return None
    requested: DType = DTYPES[tensor.dtype]
    dtype = capability.realised.get(requested, requested)
    axis = default_axis if tensor.quant_axis is None else tensor.quant_axis
    granularity: Granularity = PerTensor() if axis is None else PerAxis(axis)
    return Scheme(dtype, granularity, supported.symmetric, requested if requested != dtype else None)


def _skip(patterns: Sequence[str], layers: Sequence[Layer]) -> tuple[Mapping[str, LayerPlan], tuple[Notice, ...]]:
    """Return the plans of the layers that `skip_names` keeps float, and a notice for each pattern without a match."""
    skipped: dict[str, LayerPlan] = {}
    notices: list[Notice] = []
    for index, pattern in enumerate(patterns):
        rule = Rule("skip_names", index, pattern)
        matched = [layer for layer in layers if matches(pattern, layer)]
        for layer in matched:
            if not layer.obstacle:
                skipped[layer.name] = LayerPlan(layer=layer, rule=rule, reason="skipped")
        if not matched:
            hint = _did_you_mean(pattern, layers, "")
            notices.append(Notice(rule.field, f"'{pattern}' matches no layer" + (f"; {hint}" if hint else "")))
    return skipped, tuple(notices)


def _check_axes(plans: Iterable[LayerPlan], capability: Capability) -> Iterator[Fault]:
    """Yield a fault for each axis that the tensor does not have, or for which the backend supports no scales."""
    for item in plans:
        layer, field = item.layer, item.rule.field if item.rule else ""
        if item.weights and isinstance(item.weights.granularity, PerAxis):
            axis, rank = item.weights.granularity.axis, len(layer.weight_shape)
            if not 0 <= axis < rank:
                what = f"axis {axis} is outside of the weight of '{layer.name}', shape {list(layer.weight_shape)}"
                hint = f"the output channels are axis {layer.channel_axis}"
                yield Fault(f"{field}.weights.quant_axis", what, hint)
            elif capability.weights.axes == "channels" and axis != layer.channel_axis:
                what = f"axis {axis} is not that of the output channels of '{layer.name}' ({layer.type})"
                yield Fault(f"{field}.weights.quant_axis", what, "leave it out: this backend has one scale a channel")
        if item.activations and isinstance(item.activations.granularity, PerAxis):
            axis = item.activations.granularity.axis
            if axis != layer.input_axis:
                # A library would accept such an axis, and compute one range for the whole tensor.
                what = f"axis {axis} is not the channel axis of the input of '{layer.name}' ({layer.type})"
                hint = f"write {layer.input_axis} for one scale per channel, or leave it out for one scale per tensor"
                yield Fault(f"{field}.activations.quant_axis", what, hint)


def _check_result(plans: Sequence[LayerPlan], algorithm: Algorithm | None) -> Iterator[Fault]:
    """Yield a fault if no layer is quantized, or if a smoothing algorithm has no layer to smooth."""
    quantized = [item for item in plans if item.quantized]
    if not quantized:
        hint = "take a pattern out of quantize.skip_names, or give a rule another dtype than native"
        yield Fault("quantize.layers", "no layer is left to quantize", hint)
    elif algorithm and algorithm.smooths and not any(map(algorithm.smooths_layer, quantized)):
        what = f"{algorithm.name} has no layer to smooth: no linear layer has quantized activations"
        yield Fault("quantize.algorithm", what, "write algorithm: max, or name linear layers")


def _matches_nothing(rule: Rule, matched: Sequence[Layer], layers: Sequence[Layer], capability: Capability) -> Fault:
    """Return the fault of a rule that matches no layer, or only layers that the backend cannot quantize."""
    where, backend = f"{rule.field}.module_name", capability.name
    if not matched:
        otherwise = f"the quantizable types of this model are {', '.join(_types(layers)) or 'none'}"
        hint = _did_you_mean(rule.pattern, layers, otherwise)
        return Fault(where, f"pattern '{rule.pattern}' matches no layer", hint)
    count, obstacle = len(matched), matched[0].obstacle
    what = f"pattern '{rule.pattern}' matches {count} layer(s), none of which {backend} can quantize: {obstacle}"
    return Fault(where, what, f"{backend} quantizes {', '.join(capability.layer_types)}")


def _did_you_mean(pattern: str, layers: Iterable[Layer], otherwise: str) -> str:
    quantizable = [layer for layer in layers if not layer.obstacle]
    if any(name.startswith(f"{pattern}.") for layer in quantizable for name in (layer.name, layer.alias)):
        return f"did you mean '{pattern}.*'?"
    aliases = [layer.alias for layer in quantizable if layer.alias]
    names = [layer.name for layer in quantizable]
    return did_you_mean(pattern, [*_types(quantizable), *names, *aliases], otherwise)


def _types(layers: Iterable[Layer]) -> list[str]:
    return sorted({layer.type for layer in layers if not layer.obstacle})


def _sensitive(plans: Iterable[LayerPlan]) -> Iterator[Notice]:
    """Yield a notice for each rule and each kind of sensitive layer whose activations the rule quantizes."""
    groups: dict[tuple[Rule, str], list[str]] = {}
    for item in plans:
        if item.rule and item.activations and item.layer.sensitive:
            name = item.layer.alias or item.layer.name
            groups.setdefault((item.rule, item.layer.sensitive), []).append(name)
    for (rule, kind), names in groups.items():
        what = (
            f"'{rule.pattern}' quantizes {len(names)} layer(s) known to lose accuracy:"
            f" {kind} ({abbreviated(names)}); quantize.skip_names keeps them float"
        )
        yield Notice(rule.field, what)


def _not_smoothed(plans: Iterable[LayerPlan], algorithm: Algorithm | None) -> Iterator[Notice]:
    """Yield a notice if a smoothing algorithm does not smooth all quantized layers."""
    if algorithm is None or not algorithm.smooths:
        return
    unsmoothed = [item.layer for item in plans if item.quantized and not algorithm.smooths_layer(item)]
    names = [layer.alias or layer.name for layer in unsmoothed]
    if names:
        what = (
            f"{algorithm.name} smooths linear layers with quantized inputs;"
            f" {len(names)} other layer(s) get ranges as with max ({abbreviated(names)})"
        )
        yield Notice("quantize.algorithm", what)
