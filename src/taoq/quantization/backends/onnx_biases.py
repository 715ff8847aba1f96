# SPDX-License-Identifier: Apache-2.0
"""Biases of the layers of an ONNX graph: what is added to an output, and how more is added to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnx.helper import make_attribute, make_node

from taoq.quantization.backends.onnx_layers import names_read_inside

_QDQ = ("QuantizeLinear", "DequantizeLinear")


def changes(reference: onnx.ModelProto, model: onnx.ModelProto, layers: Sequence[str]) -> dict[str, Any]:
    """What Add nodes behind layers of a graph add more than those of the float graph, by layer.

    Args:
        reference: The float graph.
        model: The quantized graph.
        layers: Names of the layers.
    """
    floats, quantized = _Graph(reference), _Graph(model)
    found = {}
    for name in layers:
        added = quantized.added_behind(quantized.nodes[name])
        if added is not None:
            before = floats.nodes.get(added[0].name)
            constant = 0.0 if before is None else floats.values(before.input[added[1]])
            change = quantized.values(added[0].input[added[1]]) - constant
            if np.any(change):
                found[name] = np.asarray(change, np.float32)
    return found


def add(model: onnx.ModelProto, shifts: Mapping[str, Any], *, integers: bool = False) -> onnx.ModelProto:
    """Add to the outputs of layers, in place: to the bias that they have, else to one that they get.

    Args:
        model: The graph.
        shifts: One number per output channel, by layer.
        integers: Whether a new bias is stored as int32 where input and weight are quantized.
    """
    if not shifts:
        return model  # most graphs that are tried
    graph = _Graph(model)
    for name, shift in shifts.items():
        node = graph.nodes[name]
        if not (node.op_type != "MatMul" and graph.add_to_bias(node, shift, integers=integers)):
            graph.add_behind(node, shift)
    graph.close()
    return model


class _Graph:
    """A graph by names."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._graph = model.graph
        self.nodes = {node.name: node for node in self._graph.node}
        self._made_by = {name: node for node in self._graph.node for name in node.output}
        self._tensors = {tensor.name: tensor for tensor in self._graph.initializer}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self._graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self._kept = {value.name for value in self._graph.output} | names_read_inside(self._graph)
        self._new: dict[str, onnx.NodeProto] = {}  # by the node that it is put behind
        self._first: list[onnx.NodeProto] = []

    def values(self, name: str) -> Any:
        """Values of an initializer."""
        return numpy_helper.to_array(self._tensors[name]).astype(np.float64)

    def added_behind(self, node: onnx.NodeProto) -> tuple[onnx.NodeProto, int] | None:
        """The Add of a constant that alone reads the output of a layer, and which of its inputs the constant is.

        The output may be quantized in between, as onnxruntime's quantizer does.
        """
        name = node.output[0]
        while self._has_one_reader(name):
            (reader,) = self._readers[name]
            if reader.op_type == "Add":
                index = 1 if reader.input[0] == name else 0
                constant = self._tensors.get(reader.input[index])
                return (reader, index) if constant is not None and constant.data_type == TensorProto.FLOAT else None
            if reader.op_type not in _QDQ:
                return None
            name = reader.output[0]
        return None

    def add_to_bias(self, node: onnx.NodeProto, shift: Any, *, integers: bool) -> bool:
        """Add to the bias input of a layer, which may be missing; False where it is computed."""
        beta = next((item for item in node.attribute if item.name == "beta"), None)
        if node.op_type == "Gemm" and beta is not None:
            if beta.f == 0:  # what is there is not added
                beta.f = 1.0
                del node.input[2:]
            shift = shift / beta.f
        name = node.input[2] if len(node.input) > 2 else ""
        maker = self._made_by.get(name)
        if not name:
            self._give_bias(node, shift, integers=integers)
        elif name in self._tensors:
            node.input[2] = self._store(name, self.values(name) + shift, np.float32, node)
        elif (
            maker is not None
            and maker.op_type == "DequantizeLinear"
            and maker.input[0] in self._tensors
            and self._has_one_reader(name)
        ):
            stored, scale = self.values(maker.input[0]), self.values(maker.input[1])
            # a scale is that of input times weight: far finer than what is added
            maker.input[0] = self._store(maker.input[0], np.rint(stored + shift / scale), np.int32, maker)
        else:
            return False
        return True

    def add_behind(self, node: onnx.NodeProto, shift: Any) -> None:
        """Add to the constant that is added to the output of a layer, or put such an Add behind it."""
        if "Conv" in node.op_type:
            shift = shift.reshape(-1, *[1] * (self._weight_rank(node) - 2))
        added = self.added_behind(node)
        if added is not None:
            adder, index = added
            name = adder.input[index]
            adder.input[index] = self._store(name, self.values(name) + shift, np.float32, adder)
            return
        output = node.output[0]
        stem = self._unused(f"{output}_uncorrected", {*self._made_by, *self._tensors})
        node.output[0] = stem  # the Add takes its name: so all that read it read the sum
        constant = self._store("", shift, np.float32, node)
        name = self._unused(f"{node.name}/bias_correction", set(self.nodes))
        self.nodes[name] = self._new[node.name] = make_node("Add", [stem, constant], [output], name)

    def close(self) -> None:
        """Put the new nodes into their places."""
        nodes = [*self._first]
        for node in self._graph.node:
            nodes.append(node)
            if node.name in self._new:
                nodes.append(self._new[node.name])
        del self._graph.node[:]
        self._graph.node.extend(nodes)

    def _give_bias(self, node: onnx.NodeProto, shift: Any, *, integers: bool) -> None:
        del node.input[2:]
        scales = [self._scale(name) for name in node.input[:2]]
        if not integers or scales[0] is None or scales[1] is None:
            node.input.append(self._store("", shift, np.float32, node))
            return
        scale = np.asarray(scales[0] * scales[1], np.float32)
        zeros = np.zeros(scale.shape)
        stored = self._store("", np.rint(shift / scale.astype(np.float64)), np.int32, node)
        inputs = [stored, self._store("", scale, np.float32, node), self._store("", zeros, np.int32, node)]
        output = f"{stored}_dequantized"
        dequantize = make_node("DequantizeLinear", inputs, [output], f"{output}/DequantizeLinear")
        if scale.ndim:
            dequantize.attribute.append(make_attribute("axis", 0))
        self._first.append(dequantize)
        node.input.append(output)

    def _scale(self, name: str) -> Any:
        """The scale of a tensor that is dequantized; None where it is not."""
        maker = self._made_by.get(name)
        return self.values(maker.input[1]) if maker is not None and maker.op_type == "DequantizeLinear" else None

    def _weight_rank(self, node: onnx.NodeProto) -> int:
        maker = self._made_by.get(node.input[1])
        return len(self._tensors[maker.input[0] if maker is not None else node.input[1]].dims)

    def _has_one_reader(self, name: str) -> bool:
        return len(self._readers.get(name, [])) == 1 and name not in self._kept

    def _store(self, name: str, values: Any, dtype: Any, node: onnx.NodeProto) -> str:
        """Name of an initializer with these values: a new one where there is none, or others read it."""
        limits = np.iinfo(dtype) if dtype is np.int32 else None
        array = np.asarray(np.clip(values, limits.min, limits.max) if limits else values).astype(dtype)
        alone = bool(name) and self._has_one_reader(name)
        name = name if alone else self._unused(f"{node.name}_bias", {*self._made_by, *self._tensors})
        tensor = self._tensors[name] if alone else self._graph.initializer.add()
        tensor.CopyFrom(numpy_helper.from_array(array, name))
        self._tensors[name] = tensor
        return name

    @staticmethod
    def _unused(stem: str, used: set[str]) -> str:
        name, number = stem, 0
        while name in used:
            number += 1
            name = f"{stem}_{number}"
        return name
