# SPDX-License-Identifier: Apache-2.0
"""The capabilities of backends as data, and the check of a spec against them. The support page is made from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from taoq.errors import Fault, Notice, SpecError
from taoq.quantization.dtypes import DTYPES, NATIVE, DType
from taoq.quantization.spec import LayerSpec, QuantizeSpec, TensorSpec
from taoq.quantization.types import LayerPlan

_ALWAYS_ACCEPTED = ("minmax", "max", "entropy")
"""Algorithms that a backend without calibration accepts and ignores, because TAO's specs set them for torchao too."""


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """A calibration algorithm: a value of `quantize.algorithm`.

    Attributes:
        name: Value of `quantize.algorithm`.
        activations: Activation formats that it can calibrate.
        weights: Weight formats that it can be combined with; empty for all formats of the backend.
        per_tensor: Whether it supports only one range per tensor.
        smooths: Whether it applies SmoothQuant to linear layers, and `max` to all other layers.
    """

    name: str
    activations: tuple[DType, ...]
    weights: tuple[DType, ...] = ()
    per_tensor: bool = False
    smooths: bool = False

    def smooths_layer(self, item: LayerPlan) -> bool:
        """Return whether the algorithm smooths this layer: a linear layer whose input is quantized."""
        return self.smooths and item.activations is not None and len(item.layer.weight_shape) == 2


@dataclass(frozen=True, kw_only=True)
class TensorCapability:
    """How a backend can quantize weights or activations.

    Attributes:
        dtypes: Supported formats.
        axes: Which axis may have one scale per index: none, only the channel axis, or any.
        symmetric: Whether the zero point is 0.
    """

    dtypes: tuple[DType, ...]
    axes: Literal["none", "channels", "any"] = "any"
    symmetric: bool = True


@dataclass(frozen=True, kw_only=True)
class Capability:
    """The capabilities of a backend.

    Attributes:
        name: Value of `quantize.backend`.
        format: Name of the model format that it quantizes.
        payload: File name of the quantized model; the same as TAO's for backends that TAO has.
        libraries: Distributions whose versions are recorded in the manifest.
        modes: Supported values of `quantize.mode`.
        algorithms: Supported calibration algorithms; empty if the backend needs no calibration.
        weights: How weights can be quantized.
        activations: How activations can be quantized; None if they stay float.
        activations_alone: Whether a layer's activations can be quantized while its weights stay float.
        layer_types: Layer types that it quantizes, for messages.
        devices: Supported values of `quantize.device`, without an index.
        realised: Formats that it accepts but realises as another format.
        caches_ranges: Whether it can store calibration ranges in a file.
        options: Supported keys of `quantize.backend_kwargs`, each with a description.
        target: What the artifact is good for.
    """

    name: str
    format: str
    payload: str
    libraries: tuple[str, ...]
    modes: tuple[str, ...]
    algorithms: tuple[Algorithm, ...] = ()
    weights: TensorCapability
    activations: TensorCapability | None = None
    activations_alone: bool = True
    layer_types: tuple[str, ...]
    devices: tuple[str, ...]
    realised: Mapping[DType, DType] = field(default_factory=dict)
    caches_ranges: bool = False
    options: Mapping[str, str] = field(default_factory=dict)
    target: str

    def algorithm(self, name: str) -> Algorithm | None:
        """Return the algorithm of this name; None if the backend does not have it."""
        return next((algorithm for algorithm in self.algorithms if algorithm.name == name), None)


def check(section: QuantizeSpec, capability: Capability) -> tuple[Notice, ...]:
    """Check a `quantize` section against a backend's capabilities. Needs no model.

    Returns:
        Notices for the user.

    Raises:
        SpecError: If the section has faults; lists all of them.
    """
    faults = list(_check_section(section, capability))
    for index, rule in enumerate(section.layers):
        faults += _check_rule(rule, f"quantize.layers[{index}]", section, capability)
    if faults:
        raise SpecError(*faults)
    return tuple(_notices(section, capability))


def _check_section(section: QuantizeSpec, capability: Capability) -> Iterator[Fault]:
    backend = capability.name
    if section.mode not in capability.modes:
        hint = f"write mode: {capability.modes[0]}, or choose a backend that has {section.mode}"
        yield Fault("quantize.mode", f"backend {backend} has no mode {section.mode}", hint)
    if section.device.partition(":")[0] not in capability.devices:
        hint = "choose one of " + ", ".join(capability.devices)
        yield Fault("quantize.device", f"backend {backend} does not run on {section.device}", hint)
    if not section.layers:
        hint = "write at least one rule: {module_name: Linear, weights: {dtype: int8}}"
        yield Fault("quantize.layers", "empty: nothing would be quantized", hint)
    if section.calibration.cache and not capability.caches_ranges:
        hint = "leave it out: this backend calibrates in every run"
        yield Fault("quantize.calibration.cache", f"backend {backend} keeps no ranges", hint)
    names = [algorithm.name for algorithm in capability.algorithms]
    if section.algorithm not in (names or _ALWAYS_ACCEPTED):
        hint = "write " + " or ".join(f"algorithm: {name}" for name in names or ("minmax",))
        hint += f", or choose a backend that has {section.algorithm}"
        yield Fault("quantize.algorithm", f"backend {backend} has no algorithm {section.algorithm}", hint)


def _notices(section: QuantizeSpec, capability: Capability) -> Iterator[Notice]:
    deprecated = [name for name in ("default_layer_dtype", "default_activation_dtype") if getattr(section, name)]
    for name in deprecated:
        yield Notice(f"quantize.{name}", "deprecated, no effect; the dtype comes from each rule")
    if not capability.algorithms and section.algorithm != "minmax":
        yield Notice("quantize.algorithm", f"{section.algorithm} has no effect, {capability.name} calibrates nothing")
    for index, rule in enumerate(section.layers):
        if rule.activations and rule.activations.dtype != NATIVE and not capability.activations:
            where, dtype = f"quantize.layers[{index}].activations", rule.activations.dtype
            yield Notice(where, f"{dtype} has no effect, {capability.name} quantizes weights only")
        for part, tensor in tensors_of(rule):
            for requested, realised in capability.realised.items():
                if tensor.dtype == requested.name:
                    what = f"{capability.name} has no static {requested} and realises it as {realised}"
                    yield Notice(f"quantize.layers[{index}].{part}.dtype", what)


def tensors_of(rule: LayerSpec) -> list[tuple[str, TensorSpec]]:
    """Return the parts that a rule sets, `weights` and `activations`, with their specs."""
    parts = (("weights", rule.weights), ("activations", rule.activations))
    return [(part, tensor) for part, tensor in parts if tensor is not None]


def _check_rule(rule: LayerSpec, where: str, section: QuantizeSpec, capability: Capability) -> Iterator[Fault]:
    backend, name = capability.name, rule.module_name
    if not tensors_of(rule):
        hint = "write weights: {dtype: int8}, or weights: {dtype: native} to keep the layers float"
        yield Fault(where, f"rule '{name}' says nothing of weights or activations", hint)
        return
    if not capability.activations and rule.weights is None:
        hint = "write weights: {dtype: int8}, or choose a backend that quantizes activations"
        yield Fault(where, f"rule '{name}' has activations only, {backend} quantizes weights only", hint)
        return
    quantizes_activations = rule.activations is not None and rule.activations.dtype != NATIVE
    if quantizes_activations and not capability.activations_alone and _is_native(rule.weights):
        what = f"rule '{name}' has activations only, {backend} quantizes them with the weights"
        yield Fault(where, what, f"write weights: {{dtype: {capability.weights.dtypes[0]}}} as well")
    for part, tensor in tensors_of(rule):
        supported = capability.weights if part == "weights" else capability.activations
        if supported is None:
            continue  # Not a fault: `_notices` reports that this part has no effect.
        faults = list(_check_tensor(part, tensor, where, capability, supported))
        yield from faults
        algorithm = capability.algorithm(section.algorithm)
        if algorithm and quantizes_activations and not _is_native(tensor) and not faults:
            yield from _check_algorithm(algorithm, part, tensor, where, capability)


def _check_tensor(
    part: str, tensor: TensorSpec, where: str, capability: Capability, supported: TensorCapability
) -> Iterator[Fault]:
    names = [dtype.name for dtype in supported.dtypes]
    accepted = [*names, *(dtype.name for dtype in capability.realised), NATIVE]
    if tensor.dtype not in accepted:
        hint = "choose one of " + ", ".join((*names, NATIVE))
        yield Fault(f"{where}.{part}.dtype", f"backend {capability.name} has no {tensor.dtype} {part}", hint)
    if supported.axes == "none" and not _is_native(tensor) and tensor.quant_axis is not None:
        what = f"{capability.name} has one scale for all of a layer's input"
        yield Fault(f"{where}.{part}.quant_axis", what, "leave it out")


def _check_algorithm(
    algorithm: Algorithm, part: str, tensor: TensorSpec, where: str, capability: Capability
) -> Iterator[Fault]:
    dtypes = algorithm.weights if part == "weights" else algorithm.activations
    dtype = DTYPES[tensor.dtype]
    if dtypes and capability.realised.get(dtype, dtype) not in dtypes:
        what = f"{algorithm.name} cannot calibrate {tensor.dtype} {part} ({where})"
        yield Fault("quantize.algorithm", what, f"write algorithm: max, or {part}: {{dtype: {dtypes[0]}}}")
    if part == "activations" and algorithm.per_tensor and tensor.quant_axis is not None:
        what = f"{algorithm.name} finds one range for a tensor, not one per index"
        yield Fault(f"{where}.{part}.quant_axis", what, "write algorithm: max, or leave the axis out")


def _is_native(tensor: TensorSpec | None) -> bool:
    return tensor is None or tensor.dtype == NATIVE
