# SPDX-License-Identifier: Apache-2.0
"""The layers of an ONNX graph, their weights, and the obstacles to quantizing them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import numpy_helper

from taoq.errors import Fault, TaoqError, first_line
from taoq.quantization.formats.onnx.graph import Graph, attribute_of, names_read_inside, opset
from taoq.quantization.types import Layer

TYPES = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Op types that multiply their first input by a weight, which is their second input."""
CONVOLUTIONS = ("Conv", "ConvTranspose")
OPSET = 19
"""The first opset whose QuantizeLinear and DequantizeLinear support FP8 (ONNX operators, QuantizeLinear-19)."""


def prepare(graph: Graph, path: str) -> Graph:
    """Prepare a graph for quantization: unique node names, constants as initializers, opset 19 or later.

    Args:
        graph: The graph; may be modified.
        path: File of the graph, for messages.

    Raises:
        TaoqError: If the opset cannot be converted.
    """
    model = graph.model
    version = opset(model)
    if version < OPSET:
        try:
            model = onnx.version_converter.convert_version(model, OPSET)
        except (RuntimeError, IndexError, onnx.version_converter.ConvertError) as error:
            what = f"its opset {version} cannot be converted to {OPSET}: {first_line(error)}"
            raise TaoqError(Fault(path, what, f"export it again with opset_version: {OPSET}")) from None
    _store_constants(model.graph)
    _name_nodes(model.graph)
    return Graph(model)


def list_layers(graph: Graph, types: Sequence[str], other_type: str) -> list[Layer]:
    """List all nodes of a graph as layers, in graph order.

    Args:
        graph: A prepared graph.
        types: Op types that may be quantized.
        other_type: Why a layer of another type cannot be quantized.
    """
    return [_layer(node, graph.tensors, types, other_type) for node in graph.proto.node]


def _layer(
    node: onnx.NodeProto, weights: Mapping[str, onnx.TensorProto], types: Sequence[str], other_type: str
) -> Layer:
    multiplies = node.op_type in TYPES
    weight = weights.get(node.input[1]) if multiplies and len(node.input) > 1 else None
    shape = tuple(weight.dims) if weight is not None else ()
    if not multiplies:
        obstacle = "it has no weight matrix or kernel"
    elif weight is None:
        obstacle = "its second input is computed, it has no weight"
    elif len(shape) < 2:
        obstacle = "its weight is a vector"
    elif weight.data_type != onnx.TensorProto.FLOAT:
        obstacle = f"its weight is {onnx.TensorProto.DataType.Name(weight.data_type)}, not FLOAT"
    elif node.input[0] in weights:
        obstacle = "its input is a constant"
    elif node.op_type not in types:
        obstacle = other_type
    else:
        obstacle = ""
    return Layer(
        name=node.name,
        type=node.op_type,
        weight_shape=shape,
        channel_axis=channel_axis(node, len(shape)),
        input_axis=1 if node.op_type in CONVOLUTIONS else -1,
        alias=module_path(node),
        obstacle=obstacle,
    )


def module_path(node: onnx.NodeProto) -> str:
    """Return the torch module that a node comes from: `layer1.0.conv1` for `/layer1/0/conv1/Conv`; empty if unknown."""
    match = re.fullmatch(rf"/(.+)/{node.op_type}(_\d+)?", node.name)
    return match[1].replace("/", ".") if match else ""


def check_weights(graph: Graph) -> None:
    """Refuse weights and biases with NaN or infinite values: they make every scale computed from them useless.

    Raises:
        TaoqError: If there are such values; lists every layer.
    """
    faults = [
        Fault(node.name, f"its {part} is not finite", "look for NaN or infinite values in the checkpoint")
        for node in graph.proto.node
        if node.op_type in TYPES
        for part, name in zip(("weight", "bias"), node.input[1:3], strict=False)
        if name in graph.tensors and not np.isfinite(numpy_helper.to_array(graph.tensors[name])).all()
    ]
    if faults:
        raise TaoqError(*faults)


def channel_axis(node: onnx.NodeProto, rank: int) -> int:
    """Return the axis of the output channels in a weight (ONNX operator specifications).

    Args:
        node: The layer.
        rank: Number of axes of its weight.
    """
    match node.op_type:
        case "Conv":
            return 0
        case "ConvTranspose":
            return 1
        case "Gemm":
            return 0 if attribute_of(node, "transB", 0) else 1
        case _:  # MatMul, or a node without a weight.
            return max(rank - 1, 0)


def own_weights(graph: Graph, layers: Sequence[str]) -> None:
    """Copy the weights and biases that layers share with other readers, in place, so that each layer has its own."""
    readers = Counter(name for node in graph.proto.node for name in node.input)
    readers.update(names_read_inside(graph.proto))
    planned = set(layers)
    for node in graph.proto.node:
        if node.name in planned:
            for index, name in enumerate(node.input):
                if name in graph.tensors and readers[name] > 1:
                    readers[name] -= 1
                    copy = graph.store_copy(graph.tensors[name], f"{node.name}_input_{index}_own")
                    graph.set_input(node, index, copy)


def _store_constants(graph: onnx.GraphProto) -> None:
    """Replace Constant nodes by initializers, and remove Identity nodes of initializers: weights may be behind both."""
    outputs = {value.name for value in graph.output} | names_read_inside(graph)
    stored = {tensor.name for tensor in graph.initializer}
    sources: dict[str, str] = {}  # By output of a removed Identity node.
    kept = []
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = sources.get(name, name)
        if node.op_type == "Constant" and node.attribute[0].name == "value" and node.output[0] not in outputs:
            tensor = graph.initializer.add()
            tensor.CopyFrom(node.attribute[0].t)
            tensor.name = node.output[0]
            stored.add(tensor.name)
        elif node.op_type == "Identity" and node.input[0] in stored and node.output[0] not in outputs:
            sources[node.output[0]] = node.input[0]
        else:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)
    inputs = [value for value in graph.input if value.name not in stored]  # Old exporters list weights as inputs.
    del graph.input[:]
    graph.input.extend(inputs)


def _name_nodes(graph: onnx.GraphProto) -> None:
    """Give every node a unique name. ONNX does not require one, but plans and ModelOpt identify nodes by name."""
    used = Counter(node.name for node in graph.node if node.name)
    numbers: Counter[str] = Counter()
    for node in graph.node:
        if node.name and used[node.name] == 1:
            continue
        stem = name = node.name or node.op_type
        # The bare type would be a pattern for all nodes of the type.
        while name in used or name == node.op_type:
            numbers[stem] += 1
            name = f"{stem}_{numbers[stem]}"
        node.name = name
        used[name] += 1
