# SPDX-License-Identifier: Apache-2.0
"""QuantizeLinear and DequantizeLinear nodes: insert them into a graph as planned, and read them from any graph.

A quantized weight is an int8 or float8 initializer followed by a DequantizeLinear node. A quantized input passes
through QuantizeLinear and DequantizeLinear nodes that only the planned layers read; other readers get the float tensor.
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
from taoq.quantization.ranges import LEAST_RANGE
from taoq.quantization.types import Applied, AppliedLayer, LayerPlan, PerAxis, PerTensor, Scales, Scheme

Floats = NDArray[np.float32]

_NUMPY: Mapping[DType, DTypeLike] = {
    INT8: np.int8,
    FP8_E4M3FN: ml_dtypes.float8_e4m3fn,
    FP8_E5M2: ml_dtypes.float8_e5m2,
}
"""numpy dtypes of the formats that can be stored."""


def scale_of(largest: ArrayLike, dtype: DType) -> Floats:
    """Return the symmetric scales for tensors with these largest magnitudes; 1 for a tensor of zeros."""
    magnitudes = np.asarray(largest, np.float32)
    scales = np.where(magnitudes < LEAST_RANGE, np.float32(1), magnitudes / np.float32(dtype.largest))
    return scales.astype(np.float32)


def quantize_weight(
    weight: Floats, scheme: Scheme, scale: ArrayLike | None = None
) -> tuple[NDArray[np.generic], Floats]:
    """Quantize a weight symmetrically and return the stored values and the scales.

    Args:
        weight: Values of the weight.
        scheme: How to quantize it.
        scale: Scales to use; by default the largest magnitude maps to the largest value of the format.

    Raises:
        ValueError: If the scheme is asymmetric, or its format cannot be stored.
    """
    if not scheme.symmetric or scheme.dtype not in _NUMPY:
        raise ValueError(f"no weights are stored as {scheme}")
    reduced = tuple(axis for axis in range(weight.ndim) if axis != scheme.axis)
    if scale is None:
        scale = scale_of(np.abs(weight).max(axis=reduced), scheme.dtype)
    scales = np.asarray(scale, np.float32)
    divided = weight / np.expand_dims(scales, reduced) if scales.ndim else weight / scales
    if scheme.dtype.kind == "int":
        divided = np.rint(divided)
    largest = scheme.dtype.largest
    return np.clip(divided, -largest, largest).astype(_NUMPY[scheme.dtype]), scales


def insert(graph: Graph, layers: Iterable[LayerPlan], scales: Mapping[str, Scales]) -> None:
    """Quantize layers of a prepared graph in place.

    Args:
        graph: The graph.
        layers: The layers, with their schemes.
        scales: Scales by layer name. Required for activations; scales of weights are computed from the weight if
            missing. SmoothQuant factors multiply the input and divide the weight before both are quantized.
    """
    for item in layers:
        node, layer_scales = graph.nodes[item.layer.name], scales.get(item.layer.name, Scales())
        if layer_scales.smoothing is not None:
            _smooth(graph, node, item.layer.channel_axis, layer_scales.smoothing)
        if item.weights:
            graph.set_input(node, 1, _store_weight(graph, node.input[1], item.weights, layer_scales.weights))
        if item.activations:
            assert layer_scales.activations is not None
            graph.set_input(node, 0, _quantize_tensor(graph, node.input[0], item.activations, layer_scales.activations))
    graph.close()
    graph.drop_unread_tensors()


def place_scales(graph: Graph, layers: Applied, scales: Mapping[str, Scales]) -> None:
    """Quantize the nodes that come from quantized torch layers, in place, with the scales of those layers.

    Args:
        graph: The exported float network, with dequantized weights.
        layers: The quantized layers of the torch network.
        scales: Scales by layer name.

    Raises:
        TaoqError: If a layer does not correspond to one node of the graph.
    """
    nodes = [layer for layer in list_layers(graph, TYPES, "") if layer.alias in layers and not layer.obstacle]
    missing = sorted(set(layers) - {node.alias for node in nodes})
    if missing:
        what = f"{abbreviated(missing)}: not in the graph as one layer"
        raise TaoqError(Fault("export.checkpoint", what, "export with export.dequantize: true"))
    plans = []
    for node in nodes:
        layer = layers[node.alias]
        weights, activations = layer.weights, layer.activations
        if weights and node.type == "MatMul":
            weights = _transposed(weights)  # The exporter transposes the weight of nn.Linear for MatMul.
        if activations and isinstance(activations.granularity, PerAxis):
            activations = replace(activations, granularity=PerAxis(node.input_axis))
        plans.append(LayerPlan(layer=node, weights=weights, activations=activations))
    insert(graph, plans, {node.name: scales[node.alias] for node in nodes})


def _transposed(scheme: Scheme) -> Scheme:
    """Return the scheme of a matrix for its transpose."""
    if not isinstance(scheme.granularity, PerAxis):
        return scheme
    return replace(scheme, granularity=PerAxis(1 - scheme.granularity.axis))


def _smooth(graph: Graph, node: onnx.NodeProto, channel_axis: int, factors: Floats) -> None:
    """Multiply the input channels of a linear layer by SmoothQuant factors, and divide its weight by them."""
    smoothed, weight = f"{node.name}_smoothed", f"{node.input[1]}_smoothed"
    graph.store(f"{smoothed}_factors", factors)
    graph.add_node("Mul", [node.input[0], f"{smoothed}_factors"], smoothed)
    if weight not in graph.tensors:  # The nodes of a layer that is called twice share its weight.
        values = numpy_helper.to_array(graph.tensors[node.input[1]])
        graph.store(weight, values / np.expand_dims(factors, channel_axis))
    graph.set_input(node, 0, smoothed)
    graph.set_input(node, 1, weight)


def _store_weight(graph: Graph, name: str, scheme: Scheme, scale: ArrayLike | None) -> str:
    """Store a weight quantized, once per scheme. Return the name of the dequantized tensor."""
    stem = _stem(name, scheme)
    dequantized = f"{stem}_dequantized"
    if dequantized not in graph.makers:
        stored, scales = quantize_weight(numpy_helper.to_array(graph.tensors[name]), scheme, scale)
        graph.store(f"{stem}_quantized", stored)
        inputs = [f"{stem}_quantized", *_store_parameters(graph, stem, scales, scheme)]
        graph.add_node(DEQUANTIZE, inputs, dequantized, attributes=_axis_attribute(scheme))
    return dequantized


def _quantize_tensor(graph: Graph, name: str, scheme: Scheme, scale: ArrayLike) -> str:
    """Quantize and dequantize a tensor, once per scheme. Return the name of the dequantized tensor."""
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
    """Return the common prefix of the names that belong to a quantized tensor."""
    return f"{name}_{scheme.dtype}" + ("" if scheme.axis is None else f"_axis{scheme.axis}")


def _axis_attribute(scheme: Scheme) -> dict[str, int]:
    return {} if scheme.axis is None else {"axis": scheme.axis}


def read(graph: Graph) -> Applied:
    """Return the quantized layers of a graph with the schemes of their weights and inputs."""
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
    """Return the scheme of a dequantized tensor; None if the tensor is not quantized.

    Args:
        graph: The graph.
        name: Name of the tensor.
        stored: Whether to look for a quantized initializer (a weight); otherwise for a tensor that is quantized at run
            time (an activation).
    """
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
    """Return the format that a DequantizeLinear node reads, and whether it is symmetric.

    uint8 is reported as int8: with a zero point shifted by 128, both represent the same values.
    """
    typed = graph.tensors[node.input[2] if len(node.input) > 2 else node.input[0]]
    dtype = by_onnx(onnx.TensorProto.DataType.Name(typed.data_type))
    zeros = graph.values(node.input[2]) if len(node.input) > 2 else np.zeros(())
    if dtype == UINT8:
        return INT8, bool((zeros == 128).all())
    return dtype, bool((zeros == 0).all())


def _read_range(graph: Graph, name: str) -> tuple[float, float]:
    """Return the smallest and the largest value that a quantized tensor can represent."""
    node = graph.maker(name, through_casts=True)
    assert node is not None  # The caller has read a scheme for it.
    scale, zero = (graph.values(name) for name in node.input[1:3])
    stored = by_onnx(onnx.TensorProto.DataType.Name(graph.tensors[node.input[2]].data_type))
    least = 0.0 if stored.kind == "uint" else -stored.largest
    return float(((least - zero) * scale).min()), float(((stored.largest - zero) * scale).max())


def stored_weight(graph: Graph, layer: str) -> NDArray[np.float64] | None:
    """Return the dequantized weight of a layer; None if the weight is not stored quantized."""
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
