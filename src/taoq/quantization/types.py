# SPDX-License-Identifier: Apache-2.0
"""Layers, numeric schemes and the plan: the types that the core and the backends share. Pure; imports no library."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from taoq.errors import Notice
from taoq.plain import JsonObject
from taoq.quantization.dtypes import DType

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer of a model as a backend sees it.

    Attributes:
        name: Qualified name in the model, without wrapper prefixes.
        type: Class name (torch) or op type (ONNX).
        weight_shape: Shape of the weight; empty for a layer without a weight matrix or kernel.
        channel_axis: Axis of the output channels in the weight.
        input_axis: Axis of the channels in the layer's input.
        alias: Alternative name that patterns also match, such as the name in the network's original code; may be empty.
        sensitive: Why quantizing the layer is known to cost accuracy; empty if it is not.
        obstacle: Why the backend cannot quantize the layer; empty if it can.
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
class PerTensor:
    """One scale for the whole tensor."""

    def __str__(self) -> str:
        return "per tensor"


@dataclass(frozen=True)
class PerAxis:
    """One scale for each index of an axis."""

    axis: int

    def __str__(self) -> str:
        return f"axis {self.axis}"


@dataclass(frozen=True)
class PerGroup:
    """One scale for each run of `size` values along an axis."""

    axis: int
    size: int

    def __str__(self) -> str:
        return f"groups of {self.size} along axis {self.axis}"


@dataclass(frozen=True)
class PerBlock:
    """One scale for each block of this shape."""

    shape: tuple[int, ...]

    def __str__(self) -> str:
        return "blocks of " + " x ".join(map(str, self.shape))


Granularity = PerTensor | PerAxis | PerGroup | PerBlock
"""How the values of a tensor are grouped into sets that share a scale."""


@dataclass(frozen=True)
class Scheme:
    """How a tensor is quantized.

    Attributes:
        dtype: Numeric format of the stored values.
        granularity: Which values share a scale.
        symmetric: Whether the zero point is 0; otherwise each scale has its own zero point.
        requested: Format that the rule names, if the backend realises it as another one. Ignored when schemes are
            compared.
    """

    dtype: DType
    granularity: Granularity
    symmetric: bool = True
    requested: DType | None = field(default=None, compare=False)

    def __str__(self) -> str:
        asymmetric = "" if self.symmetric else ", asymmetric"
        requested = f" (asked: {self.requested})" if self.requested else ""
        return f"{self.dtype} {self.granularity}{asymmetric}{requested}"

    @property
    def axis(self) -> int | None:
        """The axis with one scale per index; None for one scale per tensor.

        Raises:
            ValueError: If the granularity is neither per tensor nor per axis.
        """
        match self.granularity:
            case PerTensor():
                return None
            case PerAxis(axis):
                return axis
            case _:
                raise ValueError(f"{self} has neither one scale nor one scale per index of an axis")

    def to_json(self) -> JsonObject:
        """Return the scheme as it is stored in manifests and reports."""
        granularity: JsonObject
        match self.granularity:
            case PerTensor():
                granularity = {"axis": None}
            case PerAxis(axis):
                granularity = {"axis": axis}
            case PerGroup(axis, size):
                granularity = {"axis": axis, "group_size": size}
            case PerBlock(shape):
                granularity = {"axis": None, "block_shape": list(shape)}
        return {"dtype": self.dtype.name, **granularity, "asked": (self.requested or self.dtype).name}


@dataclass(frozen=True)
class Rule:
    """The entry of a spec that decides a layer.

    Attributes:
        section: The list that contains the entry.
        index: Position in the list.
        pattern: Pattern of the entry.
    """

    section: Literal["layers", "skip_names"]
    index: int
    pattern: str

    @property
    def field(self) -> str:
        """Path of the entry in the spec: `quantize.layers[0]`."""
        return f"quantize.{self.section}[{self.index}]"


class LayerFormat(NamedTuple):
    """The name of a layer and its schemes, without the rule that chose them."""

    layer: str
    weights: Scheme | None
    activations: Scheme | None

    def __str__(self) -> str:
        return f"{self.layer}: {self.weights} / {self.activations}"


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """The decision for one layer.

    Attributes:
        layer: The layer.
        weights: Scheme of the weights; None if they stay float.
        activations: Scheme of the layer's inputs; None if they stay float.
        rule: The spec entry that decided; None if no entry matches the layer.
        reason: Why the layer stays float; empty if it is quantized.
    """

    layer: Layer
    weights: Scheme | None = None
    activations: Scheme | None = None
    rule: Rule | None = None
    reason: str = ""

    @property
    def quantized(self) -> bool:
        """Whether weights or activations are quantized."""
        return self.weights is not None or self.activations is not None

    @property
    def format(self) -> LayerFormat:
        """Name and schemes of the layer."""
        return LayerFormat(self.layer.name, self.weights, self.activations)

    def to_json(self) -> JsonObject:
        """Return the layer's row of the plan in manifests and reports."""
        return {
            "layer": self.layer.name,
            "alias": self.layer.alias,
            "type": self.layer.type,
            "weights": self.weights.to_json() if self.weights else None,
            "activations": self.activations.to_json() if self.activations else None,
            "rule": self.rule.field if self.rule else "",
            "reason": self.reason,
        }


@dataclass(frozen=True, kw_only=True)
class QuantizationPlan:
    """The decisions for all layers of a model: the interface between the core and a backend.

    Attributes:
        backend: Name of the backend.
        mode: Value of `quantize.mode`.
        algorithm: Value of `quantize.algorithm`; empty if the backend needs no calibration.
        layers: All layers of the model, in model order.
        notices: Notices for the user about the plan.
    """

    backend: str
    mode: str
    algorithm: str
    layers: tuple[LayerPlan, ...]
    notices: tuple[Notice, ...] = ()

    @property
    def quantized(self) -> tuple[LayerPlan, ...]:
        """The layers that are quantized."""
        return tuple(item for item in self.layers if item.quantized)

    @property
    def quantizable(self) -> tuple[LayerPlan, ...]:
        """The layers that the backend can quantize."""
        return tuple(item for item in self.layers if not item.layer.obstacle)

    @property
    def listed(self) -> tuple[LayerPlan, ...]:
        """The layers that tables and manifests show: those with a weight matrix or kernel, and all quantized ones."""
        return tuple(item for item in self.layers if item.layer.weight_shape or item.quantized)

    @property
    def needs_calibration(self) -> bool:
        """Whether any activation needs a calibrated range."""
        return any(item.activations is not None for item in self.layers)

    def share(self, amounts: Mapping[str, int]) -> float | None:
        """Return the share of the quantized layers in the total of `amounts`, 0..1; None if the total is 0.

        Args:
            amounts: Multiply-accumulates or bytes, by layer name.
        """
        return share_of((item.layer.name for item in self.quantized), amounts)


def share_of(layers: Iterable[str], amounts: Mapping[str, int]) -> float | None:
    """Return the share of these layers in the total of `amounts`, 0..1; None if the total is 0."""
    total = sum(amounts.values())
    return sum(amounts.get(name, 0) for name in layers) / total if total else None


@dataclass(frozen=True)
class AppliedLayer:
    """The schemes of a quantized layer, read back from the model.

    Attributes:
        weights: Scheme of the weights; None if they are float.
        activations: Scheme of the layer's inputs; None if they are float.
        input_range: Smallest and largest representable input; None if inputs are float. With one scale per channel,
            the widest range.
    """

    weights: Scheme | None
    activations: Scheme | None
    input_range: tuple[float, float] | None = None


Applied = Mapping[str, AppliedLayer]
"""The quantized layers of a model, by layer name."""


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """Signal-to-quantization-noise ratios (SQNR) of a quantized layer, dB; None if not measured.

    Attributes:
        weights: SQNR of the weight.
        outputs: SQNR of the output, with the layer's input taken from the float model.
    """

    weights: float | None = None
    outputs: float | None = None


@dataclass(frozen=True, kw_only=True)
class Scales:
    """Scales of a quantized layer, float32: a scalar, or one per index of the scheme's axis; None if unknown.

    Attributes:
        weights: Scales of the weight.
        activations: Scales of the layer's input.
        smoothing: SmoothQuant factors, one per channel: the input is multiplied by them before it is quantized.
    """

    weights: ArrayLike | None = None
    activations: ArrayLike | None = None
    smoothing: NDArray[np.float32] | None = None
