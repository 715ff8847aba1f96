# SPDX-License-Identifier: Apache-2.0
"""Bias correction in ONNX graphs: add to the biases of layers, and read the correction back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from taoq.quantization.formats.onnx.graph import DEQUANTIZE, QUANTIZE, Graph
from taoq.quantization.formats.onnx.layers import CONVOLUTIONS

Shift = NDArray[np.float64]
"""Value to add to a layer's output, one per output channel."""


def add_shifts(graph: Graph, shifts: Mapping[str, Shift], *, integers: bool = False) -> Graph:
    """Add to the outputs of layers, in place: to the existing bias or to a new one.

    Args:
        graph: The graph.
        shifts: Values to add, by layer name.
        integers: Whether a new bias is stored as int32 if input and weight are quantized.
    """
    for name, shift in shifts.items():
        node = graph.nodes[name]
        if not (node.op_type != "MatMul" and _add_to_bias(graph, node, shift, integers=integers)):
            _add_behind(graph, node, shift)
    if shifts:
        graph.close()
    return graph


def changes_behind(reference: Graph, graph: Graph, layers: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    """Return how much more the Add nodes after layers add than in the float graph, by layer name.

    Args:
        reference: The float graph.
        graph: The quantized graph.
        layers: Names of the layers.

    Returns:
        The differences, one value per output channel. Layers without a difference are left out.
    """
    changes = {}
    for name in layers:
        added = _added_behind(graph, graph.nodes[name])
        if added is not None:
            node, index = added
            before = reference.nodes.get(node.name)
            constant = 0.0 if before is None else reference.values(before.input[index])
            change = graph.values(node.input[index]) - constant
            if np.any(change):
                changes[name] = np.asarray(change, np.float32)
    return changes


def _added_behind(graph: Graph, node: onnx.NodeProto) -> tuple[onnx.NodeProto, int] | None:
    """Find the Add node that adds a constant to a layer's output and is the only reader of the output.

    Quantize and dequantize nodes in between are skipped: onnxruntime's quantizer inserts them.

    Returns:
        The node and the index of its constant input; None if there is no such node.
    """
    name = node.output[0]
    while graph.has_one_reader(name):
        (reader,) = graph.readers[name]
        if reader.op_type == "Add":
            index = 1 if reader.input[0] == name else 0
            constant = graph.tensors.get(reader.input[index])
            return (reader, index) if constant is not None and constant.data_type == TensorProto.FLOAT else None
        if reader.op_type not in (QUANTIZE, DEQUANTIZE):
            return None
        name = reader.output[0]
    return None


def _add_to_bias(graph: Graph, node: onnx.NodeProto, shift: Shift, *, integers: bool) -> bool:
    """Add to the bias input of a layer, or create the bias. Return False if the bias is computed by another node."""
    beta = next((attribute for attribute in node.attribute if attribute.name == "beta"), None)
    if node.op_type == "Gemm" and beta is not None:
        if beta.f == 0:  # The existing bias has no effect: replace it.
            beta.f = 1.0
            graph.drop_inputs(node, 2)
        shift = shift / beta.f
    name = node.input[2] if len(node.input) > 2 else ""
    maker = graph.dequantizer(name)
    if not name:
        _give_bias(graph, node, shift, integers=integers)
    elif name in graph.tensors:
        _replace(graph, node, 2, graph.values(name) + shift, np.float32)
    elif maker is not None and maker.input[0] in graph.tensors and graph.has_one_reader(name):
        stored, scale = graph.values(maker.input[0]), graph.values(maker.input[1])
        # The scale of the bias is input scale times weight scale, so rounding the shift to it loses nothing relevant.
        _replace(graph, maker, 0, np.rint(stored + shift / scale), np.int32)
    else:
        return False
    return True


def _add_behind(graph: Graph, node: onnx.NodeProto, shift: Shift) -> None:
    """Add to the constant of the Add node after a layer, or insert such a node."""
    if node.op_type in CONVOLUTIONS:
        shift = shift.reshape(-1, *[1] * (_weight_rank(graph, node) - 2))
    added = _added_behind(graph, node)
    if added is not None:
        adder, index = added
        _replace(graph, adder, index, graph.values(adder.input[index]) + shift, np.float32)
        return
    output = node.output[0]
    uncorrected = graph.unused_name(f"{output}_uncorrected")
    graph.rename_output(node, uncorrected)  # The new Add takes over the name, so every reader gets the sum.
    constant = _store_new(graph, node, shift, np.float32)
    graph.add_node("Add", [uncorrected, constant], output, graph.unused_name(f"{node.name}/bias_correction"))


def _give_bias(graph: Graph, node: onnx.NodeProto, shift: Shift, *, integers: bool) -> None:
    """Create the bias of a layer that has none."""
    graph.drop_inputs(node, 2)
    makers = [graph.dequantizer(name) for name in node.input[:2]]
    if not integers or makers[0] is None or makers[1] is None:
        graph.set_input(node, 2, _store_new(graph, node, shift, np.float32))
        return
    product = graph.values(makers[0].input[1]) * graph.values(makers[1].input[1])
    scale = np.asarray(product, np.float32)
    stored = _store_new(graph, node, np.rint(shift / scale.astype(np.float64)), np.int32)
    inputs = [
        stored,
        _store_new(graph, node, scale, np.float32),
        _store_new(graph, node, np.zeros(scale.shape), np.int32),
    ]
    output = f"{stored}_dequantized"
    graph.add_node(DEQUANTIZE, inputs, output, attributes={"axis": 0} if scale.ndim else {})
    graph.set_input(node, 2, output)


def _weight_rank(graph: Graph, node: onnx.NodeProto) -> int:
    maker = graph.maker(node.input[1])
    return len(graph.tensors[maker.input[0] if maker is not None else node.input[1]].dims)


def _replace(
    graph: Graph, node: onnx.NodeProto, index: int, values: Shift, dtype: type[np.float32] | type[np.int32]
) -> None:
    """Replace an initializer that a node reads. If it has other readers, give the node an initializer of its own."""
    name = node.input[index]
    if graph.has_one_reader(name):
        graph.store(name, _as_stored(values, dtype))
    else:
        graph.set_input(node, index, _store_new(graph, node, values, dtype))


def _store_new(
    graph: Graph, node: onnx.NodeProto, values: NDArray[np.floating], dtype: type[np.float32] | type[np.int32]
) -> str:
    return graph.store(graph.unused_name(f"{node.name}_bias"), _as_stored(values, dtype))


def _as_stored(values: NDArray[np.floating], dtype: type[np.float32] | type[np.int32]) -> NDArray[np.generic]:
    if dtype is np.int32:
        limits = np.iinfo(np.int32)
        values = np.clip(values, limits.min, limits.max)
    stored: NDArray[np.generic] = np.asarray(values).astype(dtype)
    return stored
