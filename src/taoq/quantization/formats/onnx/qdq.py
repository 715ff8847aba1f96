# SPDX-License-Identifier: Apache-2.0
"""QuantizeLinear and DequantizeLinear nodes: placed in a graph as a plan says, and read back from any graph.

A quantized weight is stored as int8 or float8 numbers with a DequantizeLinear behind them. A quantized input passes a
QuantizeLinear and a DequantizeLinear that only the layers of the plan read: whatever else reads it stays float.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import ArrayLike, DTypeLike, NDArray
from onnx import numpy_helper

from taoq.errors import Fault, TaoqError, abbreviated
from taoq.quantization.dtypes import FP8_E4M3FN, FP8_E5M2, INT8, UINT8, DType, by_onnx
from taoq.quantization.formats.onnx.graph import DEQUANTIZE, QUANTIZE, Graph, attribute_of
from taoq.quantization.formats.onnx.layers import TYPES, list_layers
from taoq.quantization.types import Applied, AppliedLayer, LayerPlan, PerAxis, PerTensor, Scales, Scheme

Floats = NDArray[np.float32]

_NUMPY: Mapping[DType, DTypeLike] = {
    INT8: np.int8,
    FP8_E4M3FN: ml_dtypes.float8_e4m3fn,
    FP8_E5M2: ml_dtypes.float8_e5m2,
}
"""numpy type of the numbers that are stored here."""
_LEAST_RANGE = 1e-30  # below it, a scale underflows float32


def scale_of(largest: ArrayLike, dtype: DType) -> Floats:
    """Scales for tensors whose largest magnitudes are `largest`; 1 for a tensor of zeros."""
    magnitudes = np.asarray(largest, np.float32)
    scales = np.where(magnitudes < _LEAST_RANGE, np.float32(1), magnitudes / np.float32(dtype.largest))
    return scales.astype(np.float32)


def quantize_weight(
    weight: Floats, scheme: Scheme, scale: ArrayLike | None = None
) -> tuple[NDArray[np.generic], Floats]:
    """Stored numbers and scales of a weight: symmetric, the largest magnitude of each index maps to the format's.

    Args:
        weight: Its values.
        scheme: How it is quantized.
        scale: Scales to use; without it they come from the weight.

    Raises:
        ValueError: The scheme is none that ONNX stores with one zero point of 0.
    """
    if not scheme.symmetric or scheme.dtype not in _NUMPY:
        raise ValueError(f"no weights are stored as {scheme}")
    rest = tuple(axis for axis in range(weight.ndim) if axis != scheme.axis)
    if scale is None:
        scale = scale_of(np.abs(weight).max(axis=rest), scheme.dtype)
    scales = np.asarray(scale, np.float32)
    divided = weight / np.expand_dims(scales, rest) if scales.ndim else weight / scales
    if scheme.dtype.kind == "int":
        divided = np.rint(divided)
    largest = scheme.dtype.largest
    return np.clip(divided, -largest, largest).astype(_NUMPY[scheme.dtype]), scales


def insert(graph: Graph, layers: Iterable[LayerPlan], scales: Mapping[str, Scales]) -> None:
    """Quantize layers of a prepared graph in place.

    Args:
        graph: The graph.
        layers: The layers, with their schemes.
        scales: By layer, where known; activations need them, those of weights else come from the weight.
            Where SmoothQuant has factors, the input is multiplied by them first, and the weight divided.
    """
    for item in layers:
        node, known = graph.nodes[item.layer.name], scales.get(item.layer.name, Scales())
        if known.smoothing is not None:
            _smooth(graph, node, item.layer.channel_axis, known.smoothing)
        if item.weights:
            graph.set_input(node, 1, _store_weight(graph, node.input[1], item.weights, known.weights))
        if item.activations:
            assert known.activations is not None
            graph.set_input(node, 0, _quantize_tensor(graph, node.input[0], item.activations, known.activations))
    graph.close()
    graph.drop_unread_tensors()


def place_scales(graph: Graph, layers: Applied, scales: Mapping[str, Scales]) -> None:
    """Quantize the nodes that come from quantized torch layers, with the scales of those layers; in place.

    Args:
        graph: The graph of the float network with the values of the quantized weights.
        layers: The quantized layers of the torch network.
        scales: Their scales.

    Raises:
        TaoqError: A layer is not in the graph as one node.
    """
    nodes = [layer for layer in list_layers(graph, TYPES) if layer.alias in layers and not layer.obstacle]
    missing = sorted(set(layers) - {node.alias for node in nodes})
    if missing:
        what = f"{abbreviated(missing)}: not in the graph as one layer"
        raise TaoqError(Fault("export.checkpoint", what, "export with export.dequantize: true"))
    plans = []
    for node in nodes:
        layer = layers[node.alias]
        weights, activations = layer.weights, layer.activations
        if weights and node.type == "MatMul":
            weights = _transposed(weights)  # its weight is the transpose of nn.Linear's
        if activations and isinstance(activations.granularity, PerAxis):
            activations = replace(activations, granularity=PerAxis(node.input_axis))
        plans.append(LayerPlan(layer=node, weights=weights, activations=activations))
    insert(graph, plans, {node.name: scales[node.alias] for node in nodes})


def _transposed(scheme: Scheme) -> Scheme:
    """The scheme of a matrix for its transpose."""
    if not isinstance(scheme.granularity, PerAxis):
        return scheme
    return replace(scheme, granularity=PerAxis(1 - scheme.granularity.axis))


def _smooth(graph: Graph, node: onnx.NodeProto, channel_axis: int, factors: Floats) -> None:
    """Multiply the input channels of a linear layer, and divide its weight by the same."""
    given, smoothed, weight = node.input[0], f"{node.name}_smoothed", f"{node.input[1]}_smoothed"
    graph.store(f"{smoothed}_factors", factors)
    graph.add_node("Mul", [given, f"{smoothed}_factors"], smoothed)
    if weight not in graph.tensors:  # a layer that is called twice has one weight
        values = numpy_helper.to_array(graph.tensors[node.input[1]])
        graph.store(weight, values / np.expand_dims(factors, channel_axis))
    graph.set_input(node, 0, smoothed)
    graph.set_input(node, 1, weight)


def _store_weight(graph: Graph, name: str, scheme: Scheme, scale: ArrayLike | None) -> str:
    """Store a weight quantized. Returns the name of what dequantizes it; made once for all that ask."""
    stem = _stem(name, scheme)
    dequantized = f"{stem}_dequantized"
    if dequantized not in graph.makers:
        stored, scales = quantize_weight(numpy_helper.to_array(graph.tensors[name]), scheme, scale)
        graph.store(f"{stem}_quantized", stored)
        inputs = [f"{stem}_quantized", *_store_parameters(graph, stem, scales, scheme)]
        graph.add_node(DEQUANTIZE, inputs, dequantized, attributes=_axis_attribute(scheme))
    return dequantized


def _quantize_tensor(graph: Graph, name: str, scheme: Scheme, scale: ArrayLike) -> str:
    """Quantize and dequantize a tensor. Returns the name of the result; made once for all that ask."""
    stem = _stem(name, scheme)
    dequantized = f"{stem}_dequantized"
    if dequantized not in graph.makers:
        parameters = _store_parameters(graph, stem, np.asarray(scale, np.float32), scheme)
        axis = _axis_attribute(scheme)
        graph.add_node(QUANTIZE, [name, *parameters], f"{stem}_quantized", attributes=axis)
        graph.add_node(DEQUANTIZE, [f"{stem}_quantized", *parameters], dequantized, attributes=axis)
    return dequantized


def _store_parameters(graph: Graph, stem: str, scales: Floats, scheme: Scheme) -> list[str]:
    zeros = np.zeros(scales.shape, _NUMPY[scheme.dtype])
    return [graph.store(f"{stem}_scale", scales), graph.store(f"{stem}_zero_point", zeros)]


def _stem(name: str, scheme: Scheme) -> str:
    """Stem of the names that belong to a quantized tensor."""
    return f"{name}_{scheme.dtype}" + ("" if scheme.axis is None else f"_axis{scheme.axis}")


def _axis_attribute(scheme: Scheme) -> dict[str, int]:
    return {} if scheme.axis is None else {"axis": scheme.axis}


def read(graph: Graph) -> Applied:
    """What is quantized in a graph: schemes of weights and inputs of each layer that has any."""
    applied = {}
    for node in graph.proto.node:
        if node.op_type in TYPES:
            weights = _read_scheme(graph, node.input[1], stored=True)
            activations = _read_scheme(graph, node.input[0], stored=False)
            if weights or activations:
                input_range = _read_range(graph, node.input[0]) if activations else None
                applied[node.name] = AppliedLayer(weights, activations, input_range)
    return applied


def _read_scheme(graph: Graph, name: str, *, stored: bool) -> Scheme | None:
    """The scheme of a tensor that is stored quantized, or that is quantized while the graph runs; None if it is not."""
    node = graph.maker(name, through_casts=True)
    if node is None or node.op_type != DEQUANTIZE:
        return None
    source = graph.maker(node.input[0])
    if stored != (node.input[0] in graph.tensors) or (source is not None and source.op_type != QUANTIZE):
        return None
    dtype, symmetric = _read_dtype(graph, node)
    if not graph.tensors[node.input[1]].dims:
        return Scheme(dtype, PerTensor(), symmetric)
    axis = attribute_of(node, "axis", 1)
    if stored:
        axis %= len(graph.tensors[node.input[0]].dims)
    return Scheme(dtype, PerAxis(axis), symmetric)


def _read_dtype(graph: Graph, node: onnx.NodeProto) -> tuple[DType, bool]:
    """The format of what a DequantizeLinear reads, and whether its zero is stored as zero.

    Unsigned numbers with a zero point lie on the same grid as signed ones with another zero point: they count as int8.
    """
    typed = graph.tensors[node.input[2] if len(node.input) > 2 else node.input[0]]
    dtype = by_onnx(onnx.TensorProto.DataType.Name(typed.data_type))
    zeros = graph.values(node.input[2]) if len(node.input) > 2 else np.zeros(())
    if dtype == UINT8:
        return INT8, bool((zeros == 128).all())
    return dtype, bool((zeros == 0).all())


def _read_range(graph: Graph, name: str) -> tuple[float, float]:
    """Smallest and largest value that a quantized tensor represents."""
    node = graph.maker(name, through_casts=True)
    assert node is not None  # it has a scheme
    scale, zero = (graph.values(name) for name in node.input[1:3])
    stored = by_onnx(onnx.TensorProto.DataType.Name(graph.tensors[node.input[2]].data_type))
    least = 0.0 if stored.kind == "uint" else -stored.largest
    return float(((least - zero) * scale).min()), float(((stored.largest - zero) * scale).max())


def stored_weight(graph: Graph, layer: str) -> NDArray[np.float64] | None:
    """The values of a layer's weight, if it is stored quantized."""
    node = graph.maker(graph.nodes[layer].input[1], through_casts=True)
    if node is None or node.op_type != DEQUANTIZE or node.input[0] not in graph.tensors:
        return None
    stored, scale, *zeros = (graph.values(name) for name in node.input)
    zero = zeros[0] if zeros else np.zeros(())
    if scale.ndim:
        axis = attribute_of(node, "axis", 1) % stored.ndim
        shape = [-1 if index == axis else 1 for index in range(stored.ndim)]
        scale, zero = scale.reshape(shape), zero.reshape(shape) if zero.ndim else zero
    return (stored - zero) * scale
