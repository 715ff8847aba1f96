# SPDX-License-Identifier: Apache-2.0
"""The plan: which layer gets which numeric format, by which rule. Pure; imports no library.

The rules, in order:
1. A pattern (`fnmatch`, case-sensitive) is matched against the layer's name, its alias, then its type.
2. The last rule that matches a layer decides the whole layer; what it does not mention stays float.
3. `skip_names` comes after all rules and wins. Layers that no rule names stay float.
4. A rule that matches nothing quantizable is an error; a skip name that matches nothing is a warning.
5. What the backend cannot honour is refused. The one exception is `Support.realised`, with a warning.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from taoq.errors import Fault, SpecError, TaoqError, did_you_mean, some
from taoq.quantization.spec import NATIVE, LayerSpec, QuantizeSpec, TensorSpec


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer of a model as a backend sees it.

    Attributes:
        name: Qualified name in the model, without any wrapper's prefix.
        type: Class name (torch) or op type (ONNX).
        weight_shape: Shape of its weight; empty for a layer without a matrix or kernel.
        channel_axis: Axis of the output channels in the weight.
        input_axis: Axis of the channels in the layer's input.
        alias: Another name that patterns match, such as that of the network's original code; empty if there is none.
        sensitive: What makes it known to lose accuracy when it is quantized; empty if nothing is known.
        obstacle: Why the backend cannot quantize it; empty if it can.
    """

    name: str
    type: str
    weight_shape: tuple[int, ...] = ()
    channel_axis: int = 0
    input_axis: int = 1
    alias: str = ""
    sensitive: str = ""
    obstacle: str = ""


@dataclass(frozen=True)
class TensorScheme:
    """A numeric format of one tensor.

    Attributes:
        dtype: int8, fp8_e4m3fn or fp8_e5m2.
        axis: Axis with one scale per index; None is one scale for the tensor.
        asked: The dtype of the rule, where the backend realises another one.
    """

    dtype: str
    axis: int | None
    asked: str = ""

    def __str__(self) -> str:
        scales = "per tensor" if self.axis is None else f"axis {self.axis}"
        return f"{self.dtype} {scales}" + (f" (asked: {self.asked})" if self.asked else "")


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """What was decided for one layer.

    Attributes:
        layer: The layer.
        weights: Format of its weights; None stays float.
        activations: Format of its inputs; None stays float.
        rule: The field that decided (`quantize.layers[0]`, `quantize.skip_names[1]`), or empty.
        reason: Why the layer stays float; empty if it does not.
    """

    layer: Layer
    weights: TensorScheme | None = None
    activations: TensorScheme | None = None
    rule: str = ""
    reason: str = ""

    @property
    def quantized(self) -> bool:
        """Whether any of its tensors is quantized."""
        return self.weights is not None or self.activations is not None


@dataclass(frozen=True, kw_only=True)
class QuantizationPlan:
    """What was decided for a model: the only thing that the core and a backend share."""

    backend: str
    mode: str
    algorithm: str
    layers: tuple[LayerPlan, ...]
    warnings: tuple[str, ...] = ()

    @property
    def quantized(self) -> tuple[LayerPlan, ...]:
        """The layers that are quantized."""
        return tuple(layer for layer in self.layers if layer.quantized)

    @property
    def quantizable(self) -> tuple[LayerPlan, ...]:
        """The layers that the backend could quantize."""
        return tuple(layer for layer in self.layers if not layer.layer.obstacle)

    @property
    def needs_calibration(self) -> bool:
        """Whether any activation has a static range to find."""
        return any(layer.activations is not None for layer in self.layers)


@dataclass(frozen=True, kw_only=True)
class Support:
    """What a backend can do, as data: checked before any work, and printed in the support matrix.

    Attributes:
        modes: Values of `quantize.mode`.
        algorithms: Values of `quantize.algorithm`; empty if nothing is calibrated.
        weights: Dtypes of weights.
        activations: Dtypes of activations.
        entropy_activations: Dtypes of activations that `algorithm: entropy` can calibrate.
        smoothquant: Dtypes of weights and activations that `algorithm: smoothquant` can take.
        layer_types: Types that it quantizes, for messages.
        devices: Kinds of `quantize.device`.
        realised: Dtypes that it accepts and realises as another one.
        weight_axes: Whether the scales of a weight may go along another axis than its output channels.
        activation_axes: Whether activations may have a scale per channel.
        activations_alone: Whether a layer's activations can be quantized and its weights not.
        caches_ranges: Whether it can keep calibration ranges in a file.
        target: What its artifact is for.
    """

    modes: tuple[str, ...]
    algorithms: tuple[str, ...]
    weights: tuple[str, ...]
    activations: tuple[str, ...]
    entropy_activations: tuple[str, ...] = ()
    smoothquant: tuple[str, ...] = ()
    layer_types: tuple[str, ...]
    devices: tuple[str, ...]
    realised: Mapping[str, str] = field(default_factory=dict)
    weight_axes: bool = True
    activation_axes: bool = True
    activations_alone: bool = True
    caches_ranges: bool = False
    target: str


def check(spec: QuantizeSpec, support: Support) -> tuple[str, ...]:
    """Check everything of the section that needs no model. Returns warnings.

    Raises:
        SpecError: With every fault.
    """
    backend = spec.backend
    faults: list[Fault] = []
    warnings: list[str] = []
    if spec.mode not in support.modes:
        hint = f"write mode: {support.modes[0]}, or choose a backend that has {spec.mode}"
        faults.append(Fault("quantize.mode", f"backend {backend} has no mode {spec.mode}", hint))
    device = spec.device.partition(":")[0]
    if device not in support.devices:
        hint = "choose one of " + ", ".join(support.devices)
        faults.append(Fault("quantize.device", f"backend {backend} does not run on {spec.device}", hint))
    if not spec.layers:
        hint = "write at least one rule: {module_name: Linear, weights: {dtype: int8}}"
        faults.append(Fault("quantize.layers", "empty: nothing would be quantized", hint))
    if spec.calibration.cache and not support.caches_ranges:
        hint = "leave it out: this backend calibrates in every run"
        faults.append(Fault("quantize.calibration.cache", f"backend {backend} keeps no ranges", hint))
    if spec.bias_correction and spec.backend_kwargs.get("high_precision_dtype") == "fp16":
        what = "layers of a float16 graph cannot be compared with those of the float graph"
        hint = "take high_precision_dtype: fp16 out of quantize.backend_kwargs"
        faults.append(Fault("quantize.bias_correction", what, hint))
    # minmax and entropy are TAO's words, which its specs give to torchao as well
    if spec.algorithm not in support.algorithms and (support.algorithms or spec.algorithm == "smoothquant"):
        hint = "write " + " or ".join(f"algorithm: {name}" for name in support.algorithms or ("minmax",))
        hint += f", or choose a backend that has {spec.algorithm}"
        faults.append(Fault("quantize.algorithm", f"backend {backend} has no algorithm {spec.algorithm}", hint))
    for index, rule in enumerate(spec.layers):
        faults += _check_rule(rule, f"quantize.layers[{index}]", spec, support)
    if faults:
        raise SpecError(*faults)
    deprecated = [name for name in ("default_layer_dtype", "default_activation_dtype") if getattr(spec, name)]
    if deprecated:
        names = ", ".join(f"quantize.{name}" for name in deprecated)
        warnings.append(f"{names}: deprecated, no effect; the dtype comes from each rule")
    if not support.algorithms and spec.algorithm != "minmax":
        warnings.append(f"quantize.algorithm: {spec.algorithm} has no effect, {backend} calibrates nothing")
    for index, rule in enumerate(spec.layers):
        if rule.activations and rule.activations.dtype != NATIVE and not support.activations:
            where = f"quantize.layers[{index}].activations"
            warnings.append(f"{where}: {rule.activations.dtype} has no effect, {backend} quantizes weights only")
        for part, tensor in _tensors(rule):
            if tensor.dtype in support.realised:
                real = support.realised[tensor.dtype]
                where = f"quantize.layers[{index}].{part}.dtype"
                warnings.append(f"{where}: {backend} has no static {tensor.dtype} and realises it as {real}")
    return tuple(warnings)


def resolve(
    spec: QuantizeSpec, layers: Sequence[Layer], support: Support, warnings: tuple[str, ...] = ()
) -> QuantizationPlan:
    """Decide every layer of a model by the rules of this module.

    Args:
        spec: A section that passed `check`.
        layers: All layers of the model, quantizable or not.
        support: What the backend can do.
        warnings: What `check` returned; kept with the plan.

    Raises:
        SpecError: A rule matches nothing quantizable, an axis is outside of a weight, or nothing is left.
    """
    faults: list[Fault] = []
    plans = {layer.name: LayerPlan(layer=layer, reason=layer.obstacle or "no rule names it") for layer in layers}
    for index, rule in enumerate(spec.layers):
        where = f"quantize.layers[{index}]"
        matched = [layer for layer in layers if matches(rule.module_name, layer)]
        able = [layer for layer in matched if not layer.obstacle]
        if not able:
            faults.append(
                _matches_nothing(f"{where}.module_name", rule.module_name, matched, layers, spec.backend, support)
            )
        for layer in able:
            plans[layer.name] = _apply(rule, where, layer, support, faults)
    unmatched: list[str] = []
    for index, pattern in enumerate(spec.skip_names):
        where = f"quantize.skip_names[{index}]"
        matched = [layer for layer in layers if matches(pattern, layer)]
        for layer in matched:
            if not layer.obstacle:
                plans[layer.name] = LayerPlan(layer=layer, rule=where, reason="skipped")
        if not matched:
            near = _near(pattern, layers, "")
            unmatched.append(f"{where}: '{pattern}' matches no layer" + (f"; {near}" if near else ""))
    plan = QuantizationPlan(
        backend=spec.backend,
        mode=spec.mode,
        algorithm=spec.algorithm if support.algorithms else "",
        layers=tuple(plans.values()),
        warnings=(*warnings, *unmatched, *_sensitive(plans.values(), spec), *_not_smoothed(plans.values(), spec)),
    )
    if not faults and not plan.quantized:
        hint = "take a pattern out of quantize.skip_names, or give a rule another dtype than native"
        faults.append(Fault("quantize.layers", "no layer is left to quantize", hint))
    elif not faults and spec.algorithm == "smoothquant" and not any(is_smoothed(item) for item in plan.quantized):
        what = "smoothquant has no layer to smooth: no linear layer has quantized activations"
        faults.append(Fault("quantize.algorithm", what, "write algorithm: max, or name linear layers"))
    if faults:
        raise SpecError(*faults)
    return plan


def leave_out(plan: QuantizationPlan, reasons: Mapping[str, str], *, strict: bool) -> QuantizationPlan:
    """The plan without layers that a library would not quantize.

    Args:
        plan: What was decided.
        reasons: Why a layer stays float after all, by name.
        strict: Whether that is an error.

    Raises:
        TaoqError: It is, or nothing else was quantized.
    """
    by_rule: dict[tuple[str, str], list[str]] = {}
    for item in plan.layers:
        if item.layer.name in reasons:
            by_rule.setdefault((item.rule, reasons[item.layer.name]), []).append(item.layer.name)
    if strict and by_rule:
        hint = "put them into quantize.skip_names, or set quantize.strict: false to leave them float"
        raise TaoqError(
            *(Fault(rule, f"{some(names)} cannot be quantized: {why}", hint) for (rule, why), names in by_rule.items())
        )
    layers = tuple(
        replace(item, weights=None, activations=None, reason=reasons[item.layer.name])
        if item.layer.name in reasons
        else item
        for item in plan.layers
    )
    warnings = (
        f"{rule}: {len(names)} layer(s) stay float ({some(names)}): {why}" for (rule, why), names in by_rule.items()
    )
    left = replace(plan, layers=layers, warnings=(*plan.warnings, *warnings))
    if not left.quantized:
        hint = "name other layers, or choose another dtype"
        raise TaoqError(Fault("quantize.layers", f"{plan.backend} quantizes none of the layers", hint))
    return left


def described(items: Iterable[LayerPlan]) -> str:
    """Layers and their formats in one line: equal for equal choices."""
    return "; ".join(f"{item.layer.name}: {item.weights} / {item.activations}" for item in items) or "nothing"


def matches(pattern: str, layer: Layer) -> bool:
    """Whether a pattern names a layer: its qualified name, with or without a leading slash, its alias, or its type."""
    if fnmatchcase(layer.name.removeprefix("/"), pattern.removeprefix("/")):
        return True
    return any(fnmatchcase(name, pattern) for name in (layer.name, layer.alias, layer.type) if name)


def is_smoothed(item: LayerPlan) -> bool:
    """Whether `algorithm: smoothquant` smooths a layer: the input of a linear layer, where it is quantized."""
    return item.activations is not None and len(item.layer.weight_shape) == 2


def _check_rule(rule: LayerSpec, where: str, spec: QuantizeSpec, support: Support) -> list[Fault]:
    faults: list[Fault] = []
    if not _tensors(rule):
        hint = "write weights: {dtype: int8}, or weights: {dtype: native} to keep the layers float"
        return [Fault(where, f"rule '{rule.module_name}' says nothing of weights or activations", hint)]
    if not support.activations and rule.weights is None:
        hint = "write weights: {dtype: int8}, or choose a backend that quantizes activations"
        return [
            Fault(
                where,
                f"rule '{rule.module_name}' has activations only, {spec.backend} quantizes weights only",
                hint,
            )
        ]
    activations = rule.activations if rule.activations and rule.activations.dtype != NATIVE else None
    if activations and not support.activations_alone and (rule.weights is None or rule.weights.dtype == NATIVE):
        what = f"rule '{rule.module_name}' has activations only, {spec.backend} quantizes them with the weights"
        faults.append(Fault(where, what, f"write weights: {{dtype: {support.weights[0]}}} as well"))
    if activations and support.activations and not support.activation_axes and activations.quant_axis is not None:
        what = f"{spec.backend} has one scale for all of a layer's input"
        faults.append(Fault(f"{where}.activations.quant_axis", what, "leave it out"))
    for part, tensor in _tensors(rule):
        dtypes = support.weights if part == "weights" else support.activations
        if not dtypes:
            continue  # check() says that this part has no effect
        if tensor.dtype not in (*dtypes, *support.realised, NATIVE):
            hint = "choose one of " + ", ".join((*dtypes, NATIVE))
            faults.append(Fault(f"{where}.{part}.dtype", f"backend {spec.backend} has no {tensor.dtype} {part}", hint))
        if spec.algorithm == "smoothquant" and support.smoothquant and activations and tensor.dtype != NATIVE:
            faults += _check_smoothquant(part, tensor, where, support)
        if part == "activations" and spec.algorithm == "entropy" and tensor.dtype != NATIVE:
            if tensor.dtype not in support.entropy_activations:
                hint = "write algorithm: max, or activations: {dtype: int8}"
                faults.append(
                    Fault(
                        "quantize.algorithm",
                        f"entropy cannot calibrate {tensor.dtype} activations ({where})",
                        hint,
                    )
                )
            if tensor.quant_axis is not None:
                hint = "write algorithm: max, or leave the axis out"
                faults.append(
                    Fault(
                        f"{where}.{part}.quant_axis",
                        "entropy finds one range for a tensor, not one per index",
                        hint,
                    )
                )
    return faults


def _check_smoothquant(part: str, tensor: TensorSpec, where: str, support: Support) -> Iterator[Fault]:
    if tensor.dtype not in support.smoothquant:
        what = f"smoothquant cannot take {tensor.dtype} {part} ({where})"
        yield Fault("quantize.algorithm", what, f"write algorithm: max, or {part}: {{dtype: {support.smoothquant[0]}}}")
    if part == "activations" and tensor.quant_axis is not None:
        what = "smoothquant has one scale for a tensor, not one per index"
        yield Fault(f"{where}.{part}.quant_axis", what, "write algorithm: max, or leave the axis out")


def _apply(rule: LayerSpec, where: str, layer: Layer, support: Support, faults: list[Fault]) -> LayerPlan:
    """The plan of one layer under the rule that decides it."""
    weights = _scheme(rule.weights, layer.channel_axis, support)
    activations = _scheme(rule.activations, None, support) if support.activations else None
    if weights is not None and weights.axis is not None:
        rank = len(layer.weight_shape)
        if not -rank <= weights.axis < rank:
            what = f"axis {weights.axis} is outside of the weight of '{layer.name}', shape {list(layer.weight_shape)}"
            faults.append(
                Fault(f"{where}.weights.quant_axis", what, f"the output channels are axis {layer.channel_axis}")
            )
        weights = replace(weights, axis=weights.axis % rank)
    if weights is not None and not support.weight_axes and weights.axis != layer.channel_axis:
        what = f"axis {weights.axis} is not that of the output channels of '{layer.name}' ({layer.type})"
        faults.append(Fault(f"{where}.weights.quant_axis", what, "leave it out: this backend has one scale a channel"))
    if activations is not None and activations.axis not in (None, layer.input_axis):
        # a library would take such an axis and find one range for the whole tensor
        what = f"axis {activations.axis} is not the channel axis of the input of '{layer.name}' ({layer.type})"
        hint = f"write {layer.input_axis} for one scale per channel, or leave it out for one scale per tensor"
        faults.append(Fault(f"{where}.activations.quant_axis", what, hint))
    reason = "" if weights or activations else "native"
    return LayerPlan(layer=layer, weights=weights, activations=activations, rule=where, reason=reason)


def _scheme(tensor: TensorSpec | None, axis: int | None, support: Support) -> TensorScheme | None:
    if tensor is None or tensor.dtype == NATIVE:
        return None
    realised = support.realised.get(tensor.dtype, tensor.dtype)
    asked = tensor.dtype if realised != tensor.dtype else ""
    return TensorScheme(realised, axis if tensor.quant_axis is None else tensor.quant_axis, asked)


def _tensors(rule: LayerSpec) -> list[tuple[str, TensorSpec]]:
    parts = (("weights", rule.weights), ("activations", rule.activations))
    return [(part, tensor) for part, tensor in parts if tensor is not None]


def _matches_nothing(
    where: str,
    pattern: str,
    matched: Sequence[Layer],
    layers: Sequence[Layer],
    backend: str,
    support: Support,
) -> Fault:
    """Why a rule decides nothing: the pattern names no layer, or only layers the backend cannot quantize."""
    types = ", ".join(support.layer_types)
    if not matched:
        otherwise = f"the quantizable types of this model are {_listed(_types(layers))}"
        return Fault(where, f"pattern '{pattern}' matches no layer", _near(pattern, layers, otherwise))
    obstacle = matched[0].obstacle
    what = f"pattern '{pattern}' matches {len(matched)} layer(s), none of which {backend} can quantize: {obstacle}"
    return Fault(where, what, f"{backend} quantizes {types}")


def _near(pattern: str, layers: Iterable[Layer], otherwise: str) -> str:
    able = [layer for layer in layers if not layer.obstacle]
    if any(name.startswith(f"{pattern}.") for layer in able for name in (layer.name, layer.alias)):
        return f"did you mean '{pattern}.*'?"
    aliases = [layer.alias for layer in able if layer.alias]
    return did_you_mean(pattern, [*_types(able), *(layer.name for layer in able), *aliases], otherwise)


def _sensitive(plans: Iterable[LayerPlan], spec: QuantizeSpec) -> Iterator[str]:
    """A warning for each rule and each kind of sensitive layer whose activations it quantizes."""
    found: dict[tuple[str, str], list[str]] = {}
    for plan in plans:
        if plan.activations and plan.layer.sensitive:
            found.setdefault((plan.rule, plan.layer.sensitive), []).append(plan.layer.alias or plan.layer.name)
    patterns = {f"quantize.layers[{index}]": rule.module_name for index, rule in enumerate(spec.layers)}
    for (rule, kind), names in found.items():
        yield (
            f"{rule}: '{patterns[rule]}' quantizes {len(names)} layer(s) known to lose accuracy:"
            f" {kind} ({some(names)}); quantize.skip_names keeps them float"
        )


def _not_smoothed(plans: Iterable[LayerPlan], spec: QuantizeSpec) -> Iterator[str]:
    """A warning where SmoothQuant leaves quantized layers as they are."""
    names = [plan.layer.alias or plan.layer.name for plan in plans if plan.quantized and not is_smoothed(plan)]
    if spec.algorithm == "smoothquant" and names:
        yield (
            "quantize.algorithm: smoothquant smooths linear layers with quantized inputs;"
            f" {len(names)} other layer(s) get ranges as with max ({some(names)})"
        )


def _types(layers: Iterable[Layer]) -> list[str]:
    return sorted({layer.type for layer in layers if not layer.obstacle})


def _listed(words: Sequence[str]) -> str:
    return ", ".join(words) or "none"
