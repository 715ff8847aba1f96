# SPDX-License-Identifier: Apache-2.0
"""An indexed view of an ONNX graph: nodes and tensors by name, and the edits that quantization makes."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import numpy as np
import onnx
from numpy.typing import ArrayLike, NDArray
from onnx import numpy_helper
from onnx.helper import make_attribute, make_node

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"


class Graph:
    """An ONNX model with an index of its graph. Edit it through its methods: they keep the index up to date."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self._added: list[onnx.NodeProto] = []

    @property
    def proto(self) -> onnx.GraphProto:
        """The graph of the model."""
        return self.model.graph

    @functools.cached_property
    def nodes(self) -> dict[str, onnx.NodeProto]:
        """Nodes by name. Names are unique in a prepared graph (`layers.prepare`)."""
        return {node.name: node for node in self.proto.node}

    @functools.cached_property
    def makers(self) -> dict[str, onnx.NodeProto]:
        """The node that computes each tensor, by tensor name."""
        return {name: node for node in self.proto.node for name in node.output}

    @functools.cached_property
    def readers(self) -> dict[str, list[onnx.NodeProto]]:
        """The nodes that read each tensor, by tensor name; a node that reads a tensor twice is listed twice."""
        readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.proto.node:
            for name in node.input:
                readers.setdefault(name, []).append(node)
        return readers

    @functools.cached_property
    def tensors(self) -> dict[str, onnx.TensorProto]:
        """Initializers by name."""
        return {tensor.name: tensor for tensor in self.proto.initializer}

    @functools.cached_property
    def read_outside(self) -> set[str]:
        """Names of tensors that are graph outputs, or that subgraphs (branches and loops) read."""
        return {value.name for value in self.proto.output} | names_read_inside(self.proto)

    @property
    def output_shapes(self) -> dict[str, list[int | None]]:
        """Declared shapes of the outputs, by name; None for an unknown size."""
        return {
            value.name: [dim.dim_value or None for dim in value.type.tensor_type.shape.dim]
            for value in self.proto.output
        }

    def values(self, name: str) -> NDArray[np.float64]:
        """Return the values of an initializer as float64."""
        return numpy_helper.to_array(self.tensors[name]).astype(np.float64)

    def scalar(self, name: str) -> float:
        """Return the value of an initializer with one element."""
        return float(self.values(name))

    def maker(self, name: str, *, through_casts: bool = False) -> onnx.NodeProto | None:
        """Return the node that computes a tensor, or None for a graph input or an initializer.

        Args:
            name: Name of the tensor.
            through_casts: Whether to skip Cast nodes and return the node before them.
        """
        node = self.makers.get(name)
        while through_casts and node is not None and node.op_type == "Cast":
            node = self.makers.get(node.input[0])
        return node

    def dequantizer(self, name: str) -> onnx.NodeProto | None:
        """Return the DequantizeLinear node that computes a tensor, or None if no such node does."""
        node = self.maker(name)
        return node if node is not None and node.op_type == DEQUANTIZE else None

    def has_one_reader(self, name: str) -> bool:
        """Return whether a tensor is read exactly once, by an input of one node."""
        return len(self.readers.get(name, [])) == 1 and name not in self.read_outside

    def unused_name(self, stem: str) -> str:
        """Return `stem`, or the first of `stem_1`, `stem_2`, ... that no node and no tensor has."""
        name, number = stem, 0
        while name in self.makers or name in self.tensors or name in self.nodes:
            number += 1
            name = f"{stem}_{number}"
        return name

    def copy(self) -> Graph:
        """Return a deep copy."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        return Graph(model)

    def store(self, name: str, values: ArrayLike) -> str:
        """Add an initializer, or replace the one of this name. Return the name."""
        tensor = self.tensors.get(name)
        if tensor is None:
            tensor = self.tensors[name] = self.proto.initializer.add()
        tensor.CopyFrom(numpy_helper.from_array(np.asarray(values), name))
        return name

    def store_copy(self, tensor: onnx.TensorProto, name: str) -> str:
        """Add a copy of a tensor as an initializer with another name. Return the name."""
        copy = self.tensors[name] = self.proto.initializer.add()
        copy.CopyFrom(tensor)
        copy.name = name
        return name

    def set_input(self, node: onnx.NodeProto, index: int, name: str) -> None:
        """Replace an input of a node, or append one if `index` is the number of inputs."""
        if index == len(node.input):
            node.input.append(name)
        else:
            self._forget_reader(node.input[index], node)
            node.input[index] = name
        self.readers.setdefault(name, []).append(node)

    def drop_inputs(self, node: onnx.NodeProto, start: int) -> None:
        """Remove the inputs of a node from index `start` on."""
        for name in node.input[start:]:
            self._forget_reader(name, node)
        del node.input[start:]

    def rename_output(self, node: onnx.NodeProto, name: str) -> None:
        """Rename the first output of a node. Readers keep the old name, which the caller must define again."""
        del self.makers[node.output[0]]
        node.output[0] = name
        self.makers[name] = node

    def add_node(
        self,
        op_type: str,
        inputs: Iterable[str],
        output: str,
        name: str = "",
        attributes: Mapping[str, int] | None = None,
    ) -> None:
        """Add a node with one output. It becomes part of the graph when `close` is called.

        Args:
            op_type: Operator.
            inputs: Names of the tensors that it reads.
            output: Name of the tensor that it computes.
            name: Name of the node; default: `<output>/<op_type>`.
            attributes: Integer attributes of the operator.
        """
        node = make_node(op_type, list(inputs), [output], name or f"{output}/{op_type}")
        node.attribute.extend(make_attribute(key, value) for key, value in (attributes or {}).items())
        self._added.append(node)
        self.nodes[node.name] = self.makers[output] = node
        for read in node.input:
            self.readers.setdefault(read, []).append(node)

    def close(self) -> None:
        """Insert the added nodes: each right after the node that computes its first input that is not an initializer.

        Nodes that read only initializers go first.
        """
        if not self._added:
            return
        waiting: dict[str, list[onnx.NodeProto]] = {}
        for node in self._added:
            source = next((name for name in node.input if name and name not in self.tensors), "")
            waiting.setdefault(source, []).append(node)
        self._added = []
        first = ("", *(value.name for value in self.proto.input))
        ordered = [ready for name in first for ready in _behind(name, waiting)]
        for node in self.proto.node:
            ordered += [node, *(ready for name in node.output for ready in _behind(name, waiting))]
        del self.proto.node[:]
        self.proto.node.extend(ordered)
        self._forget()

    def drop_unread_tensors(self) -> None:
        """Remove initializers that nothing reads."""
        read = names_read(self.proto) | {value.name for value in self.proto.output}
        kept = [tensor for tensor in self.proto.initializer if tensor.name in read]
        del self.proto.initializer[:]
        self.proto.initializer.extend(kept)
        self._forget()

    def _forget_reader(self, name: str, node: onnx.NodeProto) -> None:
        readers = self.readers[name]
        del readers[next(index for index, reader in enumerate(readers) if reader is node)]

    def _forget(self) -> None:
        """Drop the index. It refers to the old protos, since `extend` copies nodes and tensors."""
        for name in ("nodes", "makers", "readers", "tensors", "read_outside"):
            self.__dict__.pop(name, None)


def _behind(name: str, waiting: dict[str, list[onnx.NodeProto]]) -> list[onnx.NodeProto]:
    """Pop the nodes that wait for a tensor, each followed by the nodes that wait for its outputs."""
    return [
        ready
        for node in waiting.pop(name, [])
        for ready in (node, *(ready for made in node.output for ready in _behind(made, waiting)))
    ]


def names_read(graph: onnx.GraphProto) -> set[str]:
    """Return the names of the tensors that nodes read, including the nodes of subgraphs."""
    return {name for node in graph.node for name in node.input} | names_read_inside(graph)


def names_read_inside(graph: onnx.GraphProto) -> set[str]:
    """Return the names of the tensors that the subgraphs (branches and loops) of a graph read, inner and outer ones."""
    return {
        name
        for node in graph.node
        for attribute in node.attribute
        for inner in ([attribute.g] if attribute.HasField("g") else attribute.graphs)
        for name in names_read(inner) | {value.name for value in inner.output}
    }


def attribute_of(node: onnx.NodeProto, name: str, default: int) -> int:
    """Return an integer attribute of a node."""
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == name), default)


def opset(model: onnx.ModelProto) -> int:
    """Return the version of the standard operators."""
    return max(int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
