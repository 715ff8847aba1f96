# SPDX-License-Identifier: Apache-2.0
"""What quantization does to each layer of an ONNX graph and its bias, and how much each layer computes."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, numpy_helper
from onnx.helper import make_node, make_tensor_value_info

from taoq.errors import Fault, TaoqError
from taoq.onnx_file import GraphInput, image_input, write_onnx
from taoq.quantization.backends import onnx_biases, qdq
from taoq.quantization.backends.base import Inputs, LayerError, check_shifts, library_output
from taoq.quantization.backends.onnx_calibration import feeds, lean_sessions
from taoq.quantization.backends.onnx_layers import TYPES, channel_axis
from taoq.quantization.sqnr import sqnr

_SIGNAL, _NOISE, _SHAPE, _COPY = "taoq_signal/", "taoq_noise/", "taoq_shape/", "taoq_copy/"
_SHIFT, _SIZE = "taoq_shift/", "taoq_size/"

_Compare = Callable[[onnx.GraphProto, str, str, str], None]
"""Puts a comparison into a graph: of a layer's name, its float output and its quantized one."""


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
        copy = _with_copies(reference, model, names, _sum_squares)
        sums, _ = _totals(copy, itertools.chain([first], stream))
        outputs = {name: sqnr(float(sums[_SIGNAL + name]), float(sums[_NOISE + name])) for name in names}
    return {name: LayerError(weights=weights[name], outputs=outputs.get(name)) for name in names}


def bias_shifts(
    reference: onnx.ModelProto,
    model: onnx.ModelProto,
    names: Sequence[str],
    batches: Iterable[Inputs],
    *,
    device: str,  # noqa: ARG001 (so small a job is done on the CPU)
) -> dict[str, Any]:
    """What quantization shifts the mean output of layers by, for each channel: float minus quantized, float64.

    Each layer gets the input that the float graph gives it (Nagel et al., "Data-Free Quantization Through Weight
    Equalization and Bias Correction", 2019: the empirical correction).

    Args:
        reference: The float graph, prepared.
        model: The quantized graph.
        names: Its quantized layers.
        batches: Inputs; gone through once.
        device: Not used.

    Raises:
        TaoqError: There are no inputs, a mean is not finite, or the graph computes in float16.
    """
    if _is_half(model):
        what = "layers of a float16 graph cannot be compared with those of the float graph"
        hint = "take high_precision_dtype: fp16 out of quantize.backend_kwargs"
        raise TaoqError(Fault("quantize.bias_correction", what, hint))
    sums, images = _totals(_with_copies(reference, model, names, _sum_channels), batches)
    shifts = {name: sums[_SHIFT + name] / (sums[_SIZE + name] / len(sums[_SHIFT + name])) for name in names}
    check_shifts(images, [name for name, shift in shifts.items() if not np.isfinite(shift).all()])
    return shifts


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
        # of what was looked at: the input of a transposed convolution, whose weight has its channels first
        channels = weight[0 if node.op_type == "ConvTranspose" else channel_axis(node, len(weight))]
        counts[node.name] = int(np.prod(weight)) * elements // channels
    return counts


def _is_half(model: onnx.ModelProto) -> bool:
    """Whether a graph computes in float16: its tensors are not those of the float graph."""
    scales = {tensor.name: tensor for tensor in model.graph.initializer}
    return any(
        node.op_type == "DequantizeLinear" and scales[node.input[1]].data_type == TensorProto.FLOAT16
        for node in model.graph.node
        if node.input and node.input[-1] in scales
    )


def _with_copies(
    reference: onnx.ModelProto, model: onnx.ModelProto, names: Sequence[str], compare: _Compare
) -> onnx.ModelProto:
    """The float graph with a copy of each quantized layer, and what `compare` makes of both as its outputs."""
    copy = onnx.ModelProto()
    copy.CopyFrom(reference)
    del copy.graph.output[:]
    known = {name for node in reference.graph.node for name in node.output}
    made_by = {name: node for node in model.graph.node for name in node.output}
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    known |= {value.name for value in reference.graph.input}
    # a bias may have other values there, or be dequantized
    known |= {
        tensor.name
        for tensor in reference.graph.initializer
        if tensor.name not in made_by and tensor == stored.get(tensor.name, tensor)
    }
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
    biases = onnx_biases.changes(reference, model, names)
    for name in names:
        found = _COPY + quantized[name].output[0]
        _bring_node(quantized[name])
        if name in biases:  # corrected, behind the layer
            bias, corrected = f"{_COPY}{name}/bias", f"{_COPY}{name}/corrected"
            copy.graph.initializer.append(numpy_helper.from_array(biases[name], bias))
            copy.graph.node.append(make_node("Add", [found, bias], [corrected], corrected))
            found = corrected
        compare(copy.graph, name, floats[name].output[0], found)
    return copy


def _sum_squares(graph: onnx.GraphProto, name: str, output: str, found: str) -> None:
    """Sums of the squares of a float output and of the difference."""
    difference = f"{_NOISE}{name}/difference"
    graph.node.extend(
        [
            make_node("Sub", [found, output], [difference], difference),
            make_node("ReduceSumSquare", [output], [_SIGNAL + name], _SIGNAL + name, keepdims=0),
            make_node("ReduceSumSquare", [difference], [_NOISE + name], _NOISE + name, keepdims=0),
        ]
    )
    graph.output.extend(make_tensor_value_info(prefix + name, TensorProto.FLOAT, ()) for prefix in (_SIGNAL, _NOISE))


def _sum_channels(graph: onnx.GraphProto, name: str, output: str, found: str) -> None:
    """Sum of the difference for each channel, and how many elements it has."""
    node = next(node for node in graph.node if node.name == name)
    weight = next(tensor for tensor in graph.initializer if tensor.name == node.input[1])
    shift = _SHIFT + name
    # to [positions, channels], or for a convolution [images, channels, positions]
    is_convolution = "Conv" in node.op_type
    shape = [0, 0, -1] if is_convolution else [-1, weight.dims[channel_axis(node, len(weight.dims))]]
    constants = {"shape": shape, "axes": [0, 2] if is_convolution else [0]}
    graph.initializer.extend(
        numpy_helper.from_array(np.array(values, np.int64), f"{shift}/{key}") for key, values in constants.items()
    )
    graph.node.extend(
        [
            make_node("Sub", [output, found], [f"{shift}/difference"], f"{shift}/difference"),
            make_node("Cast", [f"{shift}/difference"], [f"{shift}/double"], f"{shift}/double", to=TensorProto.DOUBLE),
            make_node("Reshape", [f"{shift}/double", f"{shift}/shape"], [f"{shift}/flat"], f"{shift}/flat"),
            make_node("ReduceSum", [f"{shift}/flat", f"{shift}/axes"], [shift], shift, keepdims=0),
            make_node("Size", [f"{shift}/difference"], [_SIZE + name], _SIZE + name),
        ]
    )
    graph.output.append(make_tensor_value_info(shift, TensorProto.DOUBLE, None))
    graph.output.append(make_tensor_value_info(_SIZE + name, TensorProto.INT64, ()))


def _totals(model: onnx.ModelProto, batches: Iterable[Inputs]) -> tuple[dict[str, Any], int]:
    """Sums of the outputs of a graph over all batches, by name, and the number of images."""
    sums: dict[str, Any] = {}
    graph_input, images = image_input(model, Path("quantize.model_path")), 0
    for found, fed in _run(model, graph_input, batches):
        images += fed
        for key, value in found.items():
            sums[key] = sums.get(key, 0.0) + np.asarray(value, np.float64)
    return sums, images


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
