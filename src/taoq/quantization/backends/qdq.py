# SPDX-License-Identifier: Apache-2.0
"""QuantizeLinear and DequantizeLinear nodes: put into a graph as a plan says, and read back from any graph.

A quantized weight is stored as int8 or float8 numbers with a DequantizeLinear behind them. A quantized input passes a
QuantizeLinear and a DequantizeLinear that only the layers of the plan read: whatever else reads it stays float.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import numpy_helper

from taoq.quantization.backends.base import Applied, Scales
from taoq.quantization.backends.onnx_layers import TYPES, names_read
from taoq.quantization.plan import LayerPlan, TensorScheme

LARGEST = {"int8": 127.0, "fp8_e4m3fn": 448.0}
"""The value that a scale maps the largest magnitude to."""
_NUMPY: dict[str, Any] = {"int8": np.int8, "fp8_e4m3fn": ml_dtypes.float8_e4m3fn}
_DTYPES = {
    onnx.TensorProto.INT8: "int8",
    onnx.TensorProto.UINT8: "int8",  # eight bits of integer; onnxruntime's activations are unsigned
    onnx.TensorProto.FLOAT8E4M3FN: "fp8_e4m3fn",
    onnx.TensorProto.FLOAT8E5M2: "fp8_e5m2",
}
_LEAST_RANGE = 1e-30  # below it, a scale underflows float32


def scale_of(largest: Any, dtype: str) -> Any:
    """The scale of a tensor whose largest magnitude is `largest`; 1 where that is zero."""
    largest = np.asarray(largest, np.float32)
    return np.where(largest < _LEAST_RANGE, np.float32(1), largest / np.float32(LARGEST[dtype])).astype(np.float32)


def insert(model: onnx.ModelProto, layers: Iterable[LayerPlan], scales: Mapping[str, Scales]) -> None:
    """Quantize layers of a prepared graph in place.

    Args:
        model: The graph.
        layers: The layers, with their formats.
        scales: By layer, where known; activations need them, those of weights else come from the weight.
            Where SmoothQuant has factors, the input is multiplied by them first, and the weight divided.
    """
    graph = _Graph(model)
    for item in layers:
        node, known = graph.nodes[item.layer.name], scales.get(item.layer.name, Scales())
        if known.smoothing is not None:
            graph.smooth(node, item.layer.channel_axis, known.smoothing)
        if item.weights:
            node.input[1] = graph.weight(node.input[1], item.weights, known.weights)
        if item.activations:
            node.input[0] = graph.activation(node.input[0], item.activations, known.activations)
    graph.close()


def read(model: onnx.ModelProto) -> Applied:
    """What is quantized in a graph: formats of weights and inputs of each layer that has any."""
    made_by = {name: node for node in model.graph.node for name in node.output}
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}

    def scheme(name: str, *, stored: bool) -> TensorScheme | None:
        node = _maker(made_by, name)
        if node is None or node.op_type != "DequantizeLinear":
            return None
        source = made_by.get(node.input[0])
        if stored != (node.input[0] in tensors) or (source is not None and source.op_type != "QuantizeLinear"):
            return None
        typed = tensors[node.input[2] if len(node.input) > 2 else node.input[0]]
        rank = len(tensors[node.input[1]].dims)
        axis = _axis(node)
        if stored:
            axis %= len(tensors[node.input[0]].dims)
        return TensorScheme(_DTYPES.get(typed.data_type, "unknown"), axis if rank else None)

    found: dict[str, tuple[TensorScheme | None, TensorScheme | None]] = {}
    for node in model.graph.node:
        if node.op_type in TYPES:
            weights, activations = scheme(node.input[1], stored=True), scheme(node.input[0], stored=False)
            if weights or activations:
                found[node.name] = (weights, activations)
    return found


def ranges(model: onnx.ModelProto) -> dict[str, tuple[float, float]]:
    """Smallest and largest input that the quantized layers of a graph represent, by name."""
    made_by = {name: node for node in model.graph.node for name in node.output}
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    found = {}
    layers = {node.name: node for node in model.graph.node}
    for name in (name for name, (_, activations) in read(model).items() if activations):
        node = _maker(made_by, layers[name].input[0])
        assert node is not None  # `read` found it
        scale, zero = (numpy_helper.to_array(tensors[name]).astype(np.float64) for name in node.input[1:3])
        kind = tensors[node.input[2]].data_type
        largest = LARGEST[_DTYPES[kind]]
        least, most = (0.0, 255.0) if kind == onnx.TensorProto.UINT8 else (-largest, largest)
        found[name] = (float(((least - zero) * scale).min()), float(((most - zero) * scale).max()))
    return found


def stored_weight(model: onnx.ModelProto, name: str) -> Any:
    """The values of a weight that is stored quantized, by the name a layer reads; None where there is none."""
    node = _maker({output: node for node in model.graph.node for output in node.output}, name)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    if node is None or node.op_type != "DequantizeLinear" or node.input[0] not in tensors:
        return None
    stored, scale, *zero = (numpy_helper.to_array(tensors[key]).astype(np.float64) for key in node.input)
    if scale.ndim:
        axis = _axis(node) % stored.ndim
        shape = [-1 if index == axis else 1 for index in range(stored.ndim)]
        scale, zero = scale.reshape(shape), [value.reshape(shape) for value in zero]
    return (stored - (zero[0] if zero else 0.0)) * scale


def _maker(made_by: Mapping[str, onnx.NodeProto], name: str) -> onnx.NodeProto | None:
    """What makes a tensor, in front of casts; None for an input or an initializer."""
    node = made_by.get(name)
    while node is not None and node.op_type == "Cast":
        node = made_by.get(node.input[0])
    return node


def _axis(node: onnx.NodeProto) -> int:
    """The axis of the scales of a QuantizeLinear or DequantizeLinear, 1 where it does not say (ONNX)."""
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == "axis"), 1)


def quantize_weight(weight: Any, scheme: TensorScheme, scale: Any = None) -> tuple[Any, Any]:
    """Stored numbers and scales of a weight: symmetric, the largest magnitude of each index maps to the format's.

    Args:
        weight: float32.
        scheme: Format and axis.
        scale: Use these scales instead.
    """
    rest = tuple(axis for axis in range(weight.ndim) if axis != scheme.axis)
    if scale is None:
        scale = scale_of(np.abs(weight).max(axis=rest), scheme.dtype)
    scale = np.asarray(scale, np.float32)
    divided = weight / np.expand_dims(scale, rest) if scale.ndim else weight / scale
    largest = LARGEST[scheme.dtype]
    if scheme.dtype == "int8":
        divided = np.rint(divided)
    return np.clip(divided, -largest, largest).astype(_NUMPY[scheme.dtype]), scale


class _Graph:
    """A graph while nodes are put in: what is asked for twice is made once."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._graph = model.graph
        self.nodes = {node.name: node for node in self._graph.node}
        self._tensors = {tensor.name: tensor for tensor in self._graph.initializer}
        self._made: set[str] = set()  # dequantized tensors
        self._new: dict[str, list[onnx.NodeProto]] = {}  # by the tensor that they read; "" reads stored ones

    def smooth(self, node: onnx.NodeProto, channel_axis: int, factors: Any) -> None:
        """Multiply the input channels of a linear layer, and divide its weight by the same."""
        given, smoothed, weight = node.input[0], f"{node.name}_smoothed", f"{node.input[1]}_smoothed"
        self._store(f"{smoothed}_factors", factors)
        self._add(given, "Mul", [given, f"{smoothed}_factors"], smoothed, {})
        if weight not in self._tensors:  # a layer that is called twice has one weight
            values = numpy_helper.to_array(self._tensors[node.input[1]])
            self._store(weight, values / np.expand_dims(factors, channel_axis))
            self._tensors[weight] = self._graph.initializer[-1]
        node.input[:2] = [smoothed, weight]

    def weight(self, name: str, scheme: TensorScheme, scale: Any) -> str:
        """Name of a weight, quantized."""
        stem, attributes = _stem(name, scheme)
        dequantized = f"{stem}_dequantized"
        if dequantized not in self._made:
            stored, scale = quantize_weight(numpy_helper.to_array(self._tensors[name]), scheme, scale)
            self._store(f"{stem}_quantized", stored)
            inputs = [f"{stem}_quantized", *self._parameters(stem, scale, scheme.dtype)]
            self._add("", "DequantizeLinear", inputs, dequantized, attributes)
            self._made.add(dequantized)
        return dequantized

    def activation(self, name: str, scheme: TensorScheme, scale: Any) -> str:
        """Name of a tensor, quantized and dequantized."""
        stem, attributes = _stem(name, scheme)
        dequantized = f"{stem}_dequantized"
        if dequantized not in self._made:
            parameters = self._parameters(stem, np.float32(scale), scheme.dtype)
            self._add(name, "QuantizeLinear", [name, *parameters], f"{stem}_quantized", attributes)
            self._add(name, "DequantizeLinear", [f"{stem}_quantized", *parameters], dequantized, attributes)
            self._made.add(dequantized)
        return dequantized

    def close(self) -> None:
        """Put the new nodes behind what they read, and take out the float weights that nothing reads any more."""
        given = [value.name for value in self._graph.input]
        nodes = [*self._new.pop("", [])]
        for name in given:
            nodes += self._behind(name)
        for node in self._graph.node:
            nodes.append(node)
            for name in node.output:
                nodes += self._behind(name)
        del self._graph.node[:]
        self._graph.node.extend(nodes)
        read = names_read(self._graph) | {value.name for value in self._graph.output}
        kept = [tensor for tensor in self._graph.initializer if tensor.name in read]
        del self._graph.initializer[:]
        self._graph.initializer.extend(kept)

    def _behind(self, name: str) -> list[onnx.NodeProto]:
        """The new nodes that read a tensor, and those that read what they make."""
        return [
            one
            for node in self._new.pop(name, [])
            for one in (node, *(one for made in node.output for one in self._behind(made)))
        ]

    def _parameters(self, stem: str, scale: Any, dtype: str) -> list[str]:
        self._store(f"{stem}_scale", scale)
        self._store(f"{stem}_zero_point", np.zeros(np.shape(scale), _NUMPY[dtype]))
        return [f"{stem}_scale", f"{stem}_zero_point"]

    def _store(self, name: str, values: Any) -> None:
        self._graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))

    def _add(self, behind: str, op_type: str, inputs: list[str], output: str, attributes: Mapping[str, Any]) -> None:
        node = onnx.helper.make_node(op_type, inputs, [output], f"{output}/{op_type}", **attributes)
        self._new.setdefault(behind, []).append(node)


def _stem(name: str, scheme: TensorScheme) -> tuple[str, dict[str, int]]:
    """Stem of the new names of a tensor, and the attributes of its nodes."""
    if scheme.axis is None:
        return f"{name}_{scheme.dtype}", {}
    return f"{name}_{scheme.dtype}_axis{scheme.axis}", {"axis": scheme.axis}
