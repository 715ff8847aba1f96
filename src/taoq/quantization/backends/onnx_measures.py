# SPDX-License-Identifier: Apache-2.0
"""What quantization does to each layer of an ONNX graph, and how much each layer computes."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, numpy_helper
from onnx.helper import make_node, make_tensor_value_info

from taoq.onnx_file import GraphInput, image_input, write_onnx
from taoq.quantization.backends import qdq
from taoq.quantization.backends.base import Inputs, LayerError, library_output
from taoq.quantization.backends.onnx_calibration import feeds, lean_sessions
from taoq.quantization.backends.onnx_layers import TYPES
from taoq.quantization.sqnr import sqnr

_SIGNAL, _NOISE, _SHAPE, _COPY = "taoq_signal/", "taoq_noise/", "taoq_shape/", "taoq_copy/"


def layer_errors(
    reference: onnx.ModelProto,
    model: onnx.ModelProto,
    names: Sequence[str],
    batches: Iterable[Inputs],
    *,
    device: str,  # noqa: ARG001 (so small a job is done on the CPU)
) -> dict[str, LayerError]:
    """Errors of the layers of a graph: each gets the input that the float graph gives it, so it answers for its own.

    A copy of each quantized layer is put beside the float one, and both are compared inside of the graph: what comes
    out are two numbers a layer.

    Args:
        reference: The float graph, prepared.
        model: The quantized graph.
        names: Its quantized layers.
        batches: Inputs; none measures the weights alone.
        device: Not used.
    """
    floats = {node.name: node for node in reference.graph.node}
    quantized = {node.name: node for node in model.graph.node}
    plain = {tensor.name: tensor for tensor in reference.graph.initializer}
    weights: dict[str, float | None] = {}
    for name in names:
        weight = numpy_helper.to_array(plain[floats[name].input[1]]).astype(np.float64)
        found = qdq.stored_weight(model, quantized[name].input[1])
        weights[name] = None if found is None else sqnr(float((weight**2).sum()), float(((found - weight) ** 2).sum()))
    outputs: dict[str, float | None] = {}
    stream = iter(batches)
    first = next(stream, None)
    if first is not None and not _is_half(model):
        outputs = _output_errors(_with_copies(reference, model, names), itertools.chain([first], stream), names)
    return {name: LayerError(weights=weights[name], outputs=outputs.get(name)) for name in names}


def macs(model: onnx.ModelProto, inputs: Inputs) -> dict[str, int]:
    """Multiply-accumulates of each layer with a weight, for one sample.

    Args:
        model: The float graph, prepared.
        inputs: One sample.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type in TYPES and node.input[1] in tensors]
    shaped = onnx.ModelProto()
    shaped.CopyFrom(model)
    del shaped.graph.output[:]
    for node in nodes:
        read = node.input[0] if node.op_type == "ConvTranspose" else node.output[0]
        shaped.graph.node.append(make_node("Shape", [read], [_SHAPE + node.name], _SHAPE + node.name))
        shaped.graph.output.append(make_tensor_value_info(_SHAPE + node.name, TensorProto.INT64, None))
    graph_input = image_input(model, Path("quantize.model_path"))
    ((found, fed),) = _run(shaped, graph_input, [inputs])
    counts = {}
    for node in nodes:
        weight = tuple(tensors[node.input[1]].dims)
        elements = int(np.prod(found[_SHAPE + node.name])) // fed
        channels = weight[0] if "Conv" in node.op_type else weight[_output_axis(node, weight)]
        counts[node.name] = int(np.prod(weight)) * elements // channels
    return counts


def _output_axis(node: onnx.NodeProto, weight: tuple[int, ...]) -> int:
    transposed = node.op_type == "Gemm" and any(item.name == "transB" and item.i for item in node.attribute)
    return 0 if transposed else len(weight) - 1


def _is_half(model: onnx.ModelProto) -> bool:
    """Whether a graph computes in float16: its tensors are not those of the float graph."""
    scales = {tensor.name: tensor for tensor in model.graph.initializer}
    return any(
        node.op_type == "DequantizeLinear" and scales[node.input[1]].data_type == TensorProto.FLOAT16
        for node in model.graph.node
        if node.input and node.input[-1] in scales
    )


def _with_copies(reference: onnx.ModelProto, model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """The float graph with a copy of each quantized layer, and sums of squares as its outputs."""
    copy = onnx.ModelProto()
    copy.CopyFrom(reference)
    del copy.graph.output[:]
    known = {name for node in reference.graph.node for name in node.output}
    known |= {value.name for value in reference.graph.input} | {tensor.name for tensor in reference.graph.initializer}
    made_by = {name: node for node in model.graph.node for name in node.output}
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    done: set[str] = set()

    def bring(tensor: str) -> str:
        """Name of a tensor of the quantized graph in the copy; what makes it is copied, up to what is there."""
        if tensor in known or not tensor:
            return tensor
        name = _COPY + tensor
        if name not in done:
            done.add(name)
            if tensor in stored:
                copied = copy.graph.initializer.add()
                copied.CopyFrom(stored[tensor])
                copied.name = name
            else:
                _bring_node(made_by[tensor])
        return name

    def _bring_node(node: onnx.NodeProto) -> None:
        inputs = [bring(name) for name in node.input]
        copied = copy.graph.node.add()
        copied.CopyFrom(node)
        copied.name = _COPY + node.name
        copied.input[:] = inputs
        copied.output[:] = [_COPY + name for name in node.output]

    floats = {node.name: node for node in reference.graph.node}
    quantized = {node.name: node for node in model.graph.node}
    for name in names:
        output, found = floats[name].output[0], _COPY + quantized[name].output[0]
        _bring_node(quantized[name])
        difference = f"{_NOISE}{name}/difference"
        copy.graph.node.extend(
            [
                make_node("Sub", [found, output], [difference], difference),
                make_node("ReduceSumSquare", [output], [_SIGNAL + name], _SIGNAL + name, keepdims=0),
                make_node("ReduceSumSquare", [difference], [_NOISE + name], _NOISE + name, keepdims=0),
            ]
        )
        copy.graph.output.extend(
            make_tensor_value_info(prefix + name, TensorProto.FLOAT, ()) for prefix in (_SIGNAL, _NOISE)
        )
    return copy


def _output_errors(model: onnx.ModelProto, batches: Iterable[Inputs], names: Sequence[str]) -> dict[str, float | None]:
    sums: dict[str, float] = {}
    graph_input = image_input(model, Path("quantize.model_path"))
    for found, _ in _run(model, graph_input, batches):
        for key, value in found.items():
            sums[key] = sums.get(key, 0.0) + float(value)
    return {name: sqnr(sums[_SIGNAL + name], sums[_NOISE + name]) for name in names}


def _run(
    model: onnx.ModelProto, graph_input: GraphInput, batches: Iterable[Inputs]
) -> Iterator[tuple[dict[str, Any], int]]:
    """Outputs of a graph by name, as it is written, and how many images it got."""
    with tempfile.TemporaryDirectory() as folder, library_output(), lean_sessions():
        path = Path(folder, "model.onnx")
        write_onnx(model, path)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = [value.name for value in model.graph.output]
        for fed in feeds(graph_input, batches, graph_input.shape[0], entropy=False):
            yield dict(zip(names, session.run(names, fed), strict=True)), len(fed[graph_input.name])
