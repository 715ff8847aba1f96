# SPDX-License-Identifier: Apache-2.0
"""The layers of an ONNX graph, what keeps one from being quantized, and their weights."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from taoq.errors import Fault, TaoqError
from taoq.onnx_file import read_onnx, write_onnx
from taoq.quantization.plan import Layer

TYPES = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Op types that multiply their first input with a weight, their second."""
OPSET = 19
"""The first with FP8 and per-channel scales for all that is placed here (ONNX, QuantizeLinear-19)."""


def prepare(model: onnx.ModelProto, path: str) -> onnx.ModelProto:
    """A graph that can be quantized: every node named, constants as initializers, opset 19 at least.

    Raises:
        TaoqError: The opset is too old to be converted.
    """
    version = opset(model)
    if version < OPSET:
        try:
            model = onnx.version_converter.convert_version(model, OPSET)
        except (RuntimeError, IndexError, onnx.version_converter.ConvertError) as error:
            what = f"its opset {version} cannot be converted to {OPSET}: {str(error).strip().splitlines()[0]}"
            raise TaoqError(Fault(path, what, f"export it again with opset_version: {OPSET}")) from None
    _keep_constants(model.graph)
    _name_nodes(model.graph)
    return model


def opset(model: onnx.ModelProto) -> int:
    """Version of the standard operators."""
    return max(int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def list_layers(model: onnx.ModelProto, types: Sequence[str]) -> list[Layer]:
    """All nodes, in the order of the graph.

    Args:
        model: A graph that was prepared.
        types: Op types that may be quantized.
    """
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    return [_layer(node, weights, types) for node in model.graph.node]


def save(model: onnx.ModelProto, path: Path, options: Mapping[str, Any]) -> None:
    """Write a quantized graph; weights go beside it where asked, or above 2 GB."""
    write_onnx(model, path, external=options.get("use_external_data_format", False))


def load(path: Path, build_model: Callable[[], onnx.ModelProto]) -> onnx.ModelProto:  # noqa: ARG001 (the file is whole)
    """Read it back."""
    return read_onnx(path)


def _layer(node: onnx.NodeProto, weights: dict[str, onnx.TensorProto], types: Sequence[str]) -> Layer:
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
        obstacle = "quantize.backend_kwargs leaves its type out"
    else:
        obstacle = ""
    return Layer(
        name=node.name,
        type=node.op_type,
        weight_shape=shape,
        channel_axis=channel_axis(node, len(shape)),
        input_axis=1 if "Conv" in node.op_type else -1,
        alias=module_path(node),
        obstacle=obstacle,
    )


def module_path(node: onnx.NodeProto) -> str:
    """`layer1.0.conv1` of `/layer1/0/conv1/Conv`: the torch module, as torch's exporter names nodes; else empty."""
    match = re.fullmatch(rf"/(.+)/{node.op_type}(_\d+)?", node.name)
    return match[1].replace("/", ".") if match else ""


def check_weights(model: onnx.ModelProto) -> None:
    """Refuse weights and biases with NaN or infinite values: they would spoil every scale behind them.

    Raises:
        TaoqError: Names every such layer.
    """
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    faults = [
        Fault(node.name, f"its {what} is not finite", "look for NaN or infinite values in the checkpoint")
        for node in model.graph.node
        if node.op_type in TYPES
        for what, name in zip(("weight", "bias"), node.input[1:3], strict=False)
        if name in weights and not np.isfinite(numpy_helper.to_array(weights[name])).all()
    ]
    if faults:
        raise TaoqError(*faults)


def channel_axis(node: onnx.NodeProto, rank: int) -> int:
    """Axis of the output channels in a weight (ONNX operator specifications)."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm":
        transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        return 0 if transposed else 1
    return 1 if node.op_type == "ConvTranspose" else max(rank - 1, 0)


def names_read(graph: onnx.GraphProto) -> set[str]:
    """Names of the tensors that nodes read, those in branches and loops as well."""
    return {name for node in graph.node for name in node.input} | names_read_inside(graph)


def names_read_inside(graph: onnx.GraphProto) -> set[str]:
    """Names that branches and loops of a graph read, its own or theirs."""
    return {
        name
        for node in graph.node
        for attribute in node.attribute
        for inner in ([attribute.g] if attribute.HasField("g") else attribute.graphs)
        for name in names_read(inner) | {value.name for value in inner.output}
    }


def own_weights(model: onnx.ModelProto, layers: Sequence[str]) -> None:
    """Give layers weights and biases of their own where others read the same ones; in place."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    readers = Counter(name for node in model.graph.node for name in node.input)
    readers.update(names_read_inside(model.graph))
    planned = set(layers)
    for node in model.graph.node:
        if node.name in planned:
            for index, name in enumerate(node.input):
                if name in tensors and readers[name] > 1:
                    readers[name] -= 1
                    copy = model.graph.initializer.add()
                    copy.CopyFrom(tensors[name])
                    copy.name = node.input[index] = f"{node.name}_input_{index}_own"


def _keep_constants(graph: onnx.GraphProto) -> None:
    """Make initializers of Constant nodes, and take Identity nodes of initializers out: a weight may be either."""
    outputs = {value.name for value in graph.output} | names_read_inside(graph)
    known = {tensor.name for tensor in graph.initializer}
    same: dict[str, str] = {}
    kept = []
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = same.get(name, name)
        if node.op_type == "Constant" and node.attribute[0].name == "value" and node.output[0] not in outputs:
            tensor = graph.initializer.add()
            tensor.CopyFrom(node.attribute[0].t)
            tensor.name = node.output[0]
            known.add(tensor.name)
        elif node.op_type == "Identity" and node.input[0] in known and node.output[0] not in outputs:
            same[node.output[0]] = node.input[0]
        else:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)
    inputs = [value for value in graph.input if value.name not in known]  # old exporters list weights as inputs
    del graph.input[:]
    graph.input.extend(inputs)


def _name_nodes(graph: onnx.GraphProto) -> None:
    """Give every node a name of its own: a file need not, and plans and ModelOpt go by names."""
    used = Counter(node.name for node in graph.node if node.name)
    numbers: Counter[str] = Counter()
    for node in graph.node:
        if node.name and used[node.name] == 1:
            continue
        stem = node.name or node.op_type
        name = stem
        while name in used or not name:
            numbers[stem] += 1
            name = f"{stem}_{numbers[stem]}"
        node.name = name
        used[name] += 1
