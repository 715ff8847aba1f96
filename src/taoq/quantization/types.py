# SPDX-License-Identifier: Apache-2.0
"""Layers, numeric schemes and the plan: the values that the core and the backends share. Pure; imports no library."""

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
        name: Qualified name in the model, without any wrapper's prefix.
        type: Class name (torch) or op type (ONNX).
        weight_shape: Shape of its weight; empty for a layer without a matrix or kernel.
        channel_axis: Axis of the output channels in the weight.
        input_axis: Axis of the channels in the layer's input.
        alias: Another name that patterns match, such as its name in the network's original code; or empty.
        sensitive: Why it is known to lose accuracy when it is quantized; or empty.
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
"""Which values of a tensor share a scale."""


@dataclass(frozen=True)
class Scheme:
    """How a tensor is quantized.

    Attributes:
        dtype: The format of the stored numbers.
        granularity: Which values share a scale.
        symmetric: Whether zero is stored as zero; else each scale has a zero point.
        requested: The format that the rule names, where the backend realises another; not part of the comparison.
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
            ValueError: The scales have another granularity.
        """
        match self.granularity:
            case PerTensor():
                return None
            case PerAxis(axis):
                return axis
            case _:
                raise ValueError(f"{self} has neither one scale nor one scale per index of an axis")

    def to_json(self) -> JsonObject:
        """As plans in manifests and reports have it."""
        return {"dtype": self.dtype.name, "axis": self.axis, "asked": (self.requested or self.dtype).name}


@dataclass(frozen=True)
class Rule:
    """The entry of a spec that decides a layer.

    Attributes:
        section: The list it is in.
        index: Its position in the list.
        pattern: Its pattern.
    """

    section: Literal["layers", "skip_names"]
    index: int
    pattern: str

    @property
    def field(self) -> str:
        """`quantize.layers[0]`."""
        return f"quantize.{self.section}[{self.index}]"


class LayerFormat(NamedTuple):
    """A layer and its formats, whatever rule chose them."""

    layer: str
    weights: Scheme | None
    activations: Scheme | None

    def __str__(self) -> str:
        return f"{self.layer}: {self.weights} / {self.activations}"


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """What was decided for one layer.

    Attributes:
        layer: The layer.
        weights: Scheme of its weights; None stays float.
        activations: Scheme of its inputs; None stays float.
        rule: The entry of the spec that decided; None if no entry names the layer.
        reason: Why the layer stays float; empty if it does not.
    """

    layer: Layer
    weights: Scheme | None = None
    activations: Scheme | None = None
    rule: Rule | None = None
    reason: str = ""

    @property
    def quantized(self) -> bool:
        """Whether any of its tensors is quantized."""
        return self.weights is not None or self.activations is not None

    @property
    def format(self) -> LayerFormat:
        """Its name and its schemes."""
        return LayerFormat(self.layer.name, self.weights, self.activations)

    def to_json(self) -> JsonObject:
        """A row of the plan in manifests and reports."""
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
    """What was decided for a model. The core and a backend share nothing else.

    Attributes:
        backend: Name of the backend.
        mode: Value of `quantize.mode`.
        algorithm: Value of `quantize.algorithm`; empty if the backend calibrates nothing.
        layers: Every layer of the model, in its order.
        notices: What the user should know about the plan.
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
        """The layers that the backend could quantize."""
        return tuple(item for item in self.layers if not item.layer.obstacle)

    @property
    def listed(self) -> tuple[LayerPlan, ...]:
        """The layers that tables and manifests show: those with a weight matrix or kernel."""
        return tuple(item for item in self.layers if item.layer.weight_shape or item.quantized)

    @property
    def needs_calibration(self) -> bool:
        """Whether any activation has a static range to find."""
        return any(item.activations is not None for item in self.layers)

    def share(self, amounts: Mapping[str, int]) -> float | None:
        """The part of all amounts (multiply-accumulates, bytes) that is in quantized layers; None if all are 0."""
        return share_of((item.layer.name for item in self.quantized), amounts)


def share_of(layers: Iterable[str], amounts: Mapping[str, int]) -> float | None:
    """The part of all amounts that is in these layers, 0..1; None if all amounts are 0."""
    whole = sum(amounts.values())
    return sum(amounts.get(name, 0) for name in layers) / whole if whole else None


@dataclass(frozen=True)
class AppliedLayer:
    """What is really quantized in a layer, read back from a model.

    Attributes:
        weights: Scheme of its weights; None if they are float.
        activations: Scheme of its inputs; None if they are float.
        input_range: Smallest and largest input that it represents; None if inputs are float. With one scale per
            channel, the widest range.
    """

    weights: Scheme | None
    activations: Scheme | None
    input_range: tuple[float, float] | None = None


Applied = Mapping[str, AppliedLayer]
"""The quantized layers of a model, by name."""


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """Error of a quantized layer, as signal-to-quantization-noise ratios in dB; None where it was not measured.

    Attributes:
        weights: Of its weight.
        outputs: Of its output, given the input that the float model gives it.
    """

    weights: float | None = None
    outputs: float | None = None


@dataclass(frozen=True, kw_only=True)
class Scales:
    """Scales of a quantized layer, float32: one number, or one per index of the plan's axis; None if not known.

    Attributes:
        weights: Scales of its weight.
        activations: Scales of its input.
        smoothing: Factors that SmoothQuant multiplies its input by before it is quantized, one per channel.
    """

    weights: ArrayLike | None = None
    activations: ArrayLike | None = None
    smoothing: NDArray[np.float32] | None = None
