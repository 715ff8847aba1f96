# SPDX-License-Identifier: Apache-2.0
"""Per-layer measurements of ONNX graphs: quantization error, shift of the mean output, multiply-accumulates.

Layers are compared within one graph: a copy of each quantized layer is added to the float graph and gets the same input
as the float layer, so its error does not depend on other layers. The graph reduces outputs to a few sums per layer and
runs on the CPU.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto
from onnx.helper import make_node, make_tensor_value_info

from taoq.errors import Fault, TaoqError
from taoq.network import Inputs
from taoq.quantization.formats.checks import check_shifts
from taoq.quantization.formats.onnx.biases import changes_behind
from taoq.quantization.formats.onnx.calibration import feeds, lean_options
from taoq.quantization.formats.onnx.file import write_graph
from taoq.quantization.formats.onnx.graph import DEQUANTIZE, Graph
from taoq.quantization.formats.onnx.inputs import Arrays, graph_inputs, samples
from taoq.quantization.formats.onnx.layers import CONVOLUTIONS, TYPES, channel_axis
from taoq.quantization.formats.onnx.qdq import stored_weight
from taoq.quantization.library import library_output
from taoq.quantization.sqnr import sqnr
from taoq.quantization.types import LayerError

_SIGNAL, _NOISE, _SHAPE, _COPY = "taoq_signal/", "taoq_noise/", "taoq_shape/", "taoq_copy/"
_SHIFT, _SIZE = "taoq_shift/", "taoq_size/"
_WHERE = "quantize.model_path"

_Compare = Callable[[Graph, str, str, str], None]
"""Adds a comparison to a graph, given a layer's name, its float output and its quantized output."""


def layer_errors(
    reference: Graph, graph: Graph, names: Sequence[str], batches: Iterable[Inputs]
) -> dict[str, LayerError]:
    """Return the errors of quantized layers, with each layer's input taken from the float graph.

    Args:
        reference: The float graph, prepared.
        graph: The quantized graph.
        names: Names of its quantized layers.
        batches: Inputs; if empty, only weights are compared.
    """
    weights: dict[str, float | None] = {}
    for name in names:
        weight = reference.values(reference.nodes[name].input[1])
        stored = stored_weight(graph, name)
        weights[name] = None if stored is None else sqnr(_energy(weight), _energy(stored - weight))
    outputs: dict[str, float | None] = {}
    stream = iter(batches)
    first = next(stream, None)
    if first is not None and not computes_in_half(graph):
        comparison = _with_copies(reference, graph, names, _sum_squares)
        sums, _ = _totals(comparison, itertools.chain([first], stream))
        outputs = {name: sqnr(float(sums[_SIGNAL + name]), float(sums[_NOISE + name])) for name in names}
    return {name: LayerError(weights=weights[name], outputs=outputs.get(name)) for name in names}


def bias_shifts(
    reference: Graph, graph: Graph, names: Sequence[str], batches: Iterable[Inputs]
) -> dict[str, NDArray[np.float64]]:
    """Return the shift of each layer's mean output: float minus quantized, one value per output channel.

    Each layer's input is taken from the float graph: the empirical bias correction of Nagel et al., "Data-Free
    Quantization Through Weight Equalization and Bias Correction", 2019.

    Args:
        reference: The float graph, prepared.
        graph: The quantized graph.
        names: Names of its quantized layers.
        batches: Inputs; iterated over once.

    Raises:
        TaoqError: If there are no inputs, a mean is not finite, or the graph computes in float16.
    """
    if computes_in_half(graph):
        raise TaoqError(half_precision_fault())
    sums, count = _totals(_with_copies(reference, graph, names, _sum_channels), batches)
    shifts = {name: sums[_SHIFT + name] / (sums[_SIZE + name] / len(sums[_SHIFT + name])) for name in names}
    check_shifts(count, [name for name, shift in shifts.items() if not np.isfinite(shift).all()])
    return shifts


def half_precision_fault() -> Fault:
    """Return the fault of bias correction in a float16 graph."""
    what = "layers of a float16 graph cannot be compared with those of the float graph"
    hint = "take high_precision_dtype: fp16 out of quantize.backend_kwargs"
    return Fault("quantize.bias_correction", what, hint)


def macs(graph: Graph, inputs: Inputs) -> dict[str, int]:
    """Return the multiply-accumulates of each layer with a weight, for one sample.

    Args:
        graph: The float graph, prepared.
        inputs: One sample.
    """
    nodes = [node for node in graph.proto.node if node.op_type in TYPES and node.input[1] in graph.tensors]
    shaped = graph.copy()
    del shaped.proto.output[:]
    for node in nodes:
        tensor = node.input[0] if node.op_type == "ConvTranspose" else node.output[0]
        shaped.proto.node.append(make_node("Shape", [tensor], [_SHAPE + node.name], _SHAPE + node.name))
        shaped.proto.output.append(make_tensor_value_info(_SHAPE + node.name, TensorProto.INT64, None))
    ((shapes, count),) = _run(Graph(shaped.model), [inputs])
    counts = {}
    for node in nodes:
        weight = tuple(graph.tensors[node.input[1]].dims)
        elements = int(np.prod(shapes[_SHAPE + node.name])) // count
        # Every weight element is used once per position of the output, or of the input in a transposed convolution,
        # whose weight has the input channels on axis 0.
        channels = weight[0 if node.op_type == "ConvTranspose" else channel_axis(node, len(weight))]
        counts[node.name] = int(np.prod(weight)) * elements // channels
    return counts


def computes_in_half(graph: Graph) -> bool:
    """Return whether a graph computes in float16. Its tensors cannot be compared with those of a float32 graph."""
    return any(
        node.op_type == DEQUANTIZE and graph.tensors[node.input[1]].data_type == TensorProto.FLOAT16
        for node in graph.proto.node
        if node.input and node.input[-1] in graph.tensors
    )


def _with_copies(reference: Graph, graph: Graph, names: Sequence[str], compare: _Compare) -> Graph:
    """Return the float graph with a copy of each quantized layer; its only outputs are those that `compare` adds."""
    result = reference.copy()
    del result.proto.output[:]
    copier = _Copier(reference, graph, result)
    changes = changes_behind(reference, graph, names)
    for name in names:
        quantized = copier.copy_node(graph.nodes[name])
        if name in changes:  # The bias was corrected in an Add node after the layer.
            corrected = f"{_COPY}{name}/corrected"
            bias = result.store(f"{_COPY}{name}/bias", changes[name])
            result.proto.node.append(make_node("Add", [quantized, bias], [corrected], corrected))
            quantized = corrected
        compare(result, name, reference.nodes[name].output[0], quantized)
    return result


class _Copier:
    """Copies nodes of a quantized graph, with the tensors and nodes that they read, into a copy of the float graph."""

    def __init__(self, reference: Graph, graph: Graph, target: Graph) -> None:
        self._graph, self._target = graph, target
        self._copied: set[str] = set()
        # Tensors that are the same in both graphs. A bias may differ in the quantized graph, or be dequantized there.
        self._shared = {*reference.makers, *(value.name for value in reference.proto.input)}
        self._shared |= {
            name
            for name, tensor in reference.tensors.items()
            if name not in graph.makers and tensor == graph.tensors.get(name, tensor)
        }

    def copy_node(self, node: onnx.NodeProto) -> str:
        """Copy a node and the nodes that compute its inputs, up to shared tensors. Return its first output's name."""
        inputs = [self._copy_tensor(name) for name in node.input]
        copy = self._target.proto.node.add()
        copy.CopyFrom(node)
        copy.name = _COPY + node.name
        copy.input[:] = inputs
        copy.output[:] = [_COPY + name for name in node.output]
        return str(copy.output[0])

    def _copy_tensor(self, name: str) -> str:
        if name in self._shared or not name:
            return name
        copied = _COPY + name
        if copied not in self._copied:
            self._copied.add(copied)
            if name in self._graph.tensors:
                self._target.store_copy(self._graph.tensors[name], copied)
            else:
                self.copy_node(self._graph.makers[name])
        return copied


def _sum_squares(graph: Graph, name: str, output: str, quantized: str) -> None:
    """Add the sums of squares of the float output and of the difference to the graph's outputs."""
    difference = f"{_NOISE}{name}/difference"
    graph.proto.node.extend(
        [
            make_node("Sub", [quantized, output], [difference], difference),
            make_node("ReduceSumSquare", [output], [_SIGNAL + name], _SIGNAL + name, keepdims=0),
            make_node("ReduceSumSquare", [difference], [_NOISE + name], _NOISE + name, keepdims=0),
        ]
    )
    sums = (_SIGNAL + name, _NOISE + name)
    graph.proto.output.extend(make_tensor_value_info(total, TensorProto.FLOAT, ()) for total in sums)


def _sum_channels(graph: Graph, name: str, output: str, quantized: str) -> None:
    """Add the sum of the difference per channel, and the number of its elements, to the graph's outputs."""
    node = graph.nodes[name]
    dims = graph.tensors[node.input[1]].dims
    shift = _SHIFT + name
    # Reshape to [positions, channels], or for a convolution to [samples, channels, positions].
    is_convolution = node.op_type in CONVOLUTIONS
    shape = [0, 0, -1] if is_convolution else [-1, dims[channel_axis(node, len(dims))]]
    graph.store(f"{shift}/shape", np.array(shape, np.int64))
    graph.store(f"{shift}/axes", np.array([0, 2] if is_convolution else [0], np.int64))
    graph.proto.node.extend(
        [
            make_node("Sub", [output, quantized], [f"{shift}/difference"], f"{shift}/difference"),
            make_node("Cast", [f"{shift}/difference"], [f"{shift}/double"], f"{shift}/double", to=TensorProto.DOUBLE),
            make_node("Reshape", [f"{shift}/double", f"{shift}/shape"], [f"{shift}/flat"], f"{shift}/flat"),
            make_node("ReduceSum", [f"{shift}/flat", f"{shift}/axes"], [shift], shift, keepdims=0),
            make_node("Size", [f"{shift}/difference"], [_SIZE + name], _SIZE + name),
        ]
    )
    graph.proto.output.append(make_tensor_value_info(shift, TensorProto.DOUBLE, None))
    graph.proto.output.append(make_tensor_value_info(_SIZE + name, TensorProto.INT64, ()))


def _totals(graph: Graph, batches: Iterable[Inputs]) -> tuple[dict[str, NDArray[np.float64]], int]:
    """Return the sums of a graph's outputs over all batches, by output name, and the number of samples."""
    sums: dict[str, NDArray[np.float64]] = {}
    count = 0
    for outputs, batch_size in _run(graph, batches):
        count += batch_size
        for name, value in outputs.items():
            sums[name] = sums.get(name, np.float64(0.0)) + np.asarray(value, np.float64)
    return sums, count


def _run(graph: Graph, batches: Iterable[Inputs]) -> Iterator[tuple[Arrays, int]]:
    """Run a graph without optimizations. Yield its outputs by name and the number of samples of each batch."""
    inputs = graph_inputs(graph, _WHERE)
    with tempfile.TemporaryDirectory() as folder, library_output():
        path = Path(folder, "model.onnx")
        write_graph(graph, path)
        options = lean_options()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = [value.name for value in graph.proto.output]
        for arrays in feeds(inputs, batches):
            yield dict(zip(names, session.run(names, arrays), strict=True)), samples(arrays)


def _energy(values: NDArray[np.float64]) -> float:
    return float((values**2).sum())
