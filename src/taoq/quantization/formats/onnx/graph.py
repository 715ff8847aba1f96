# SPDX-License-Identifier: Apache-2.0
"""The one view of an ONNX graph: its nodes and tensors by name, and the edits that quantization makes."""

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
    """A model and its graph, indexed by name. Edit it through its methods: they keep the index right."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self._added: list[onnx.NodeProto] = []

    @property
    def proto(self) -> onnx.GraphProto:
        """The graph itself."""
        return self.model.graph

    @functools.cached_property
    def nodes(self) -> dict[str, onnx.NodeProto]:
        """Nodes by name; in a prepared graph each node has a name of its own."""
        return {node.name: node for node in self.proto.node}

    @functools.cached_property
    def makers(self) -> dict[str, onnx.NodeProto]:
        """The node that computes a tensor, by the tensor's name."""
        return {name: node for node in self.proto.node for name in node.output}

    @functools.cached_property
    def readers(self) -> dict[str, list[onnx.NodeProto]]:
        """The nodes that read a tensor, once for each of their inputs that is the tensor."""
        readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.proto.node:
            for name in node.input:
                readers.setdefault(name, []).append(node)
        return readers

    @functools.cached_property
    def tensors(self) -> dict[str, onnx.TensorProto]:
        """Stored tensors (initializers) by name."""
        return {tensor.name: tensor for tensor in self.proto.initializer}

    @functools.cached_property
    def read_outside(self) -> set[str]:
        """Tensors that something else than a node of the graph reads: outputs, and what branches and loops read."""
        return {value.name for value in self.proto.output} | names_read_inside(self.proto)

    @property
    def output_shapes(self) -> dict[str, list[int | None]]:
        """Shapes of the outputs as the file declares them; None for an unknown size."""
        return {
            value.name: [dim.dim_value or None for dim in value.type.tensor_type.shape.dim]
            for value in self.proto.output
        }

    def values(self, name: str) -> NDArray[np.float64]:
        """Values of a stored tensor."""
        return numpy_helper.to_array(self.tensors[name]).astype(np.float64)

    def scalar(self, name: str) -> float:
        """The one value of a stored tensor."""
        return float(self.values(name))

    def maker(self, name: str, *, through_casts: bool = False) -> onnx.NodeProto | None:
        """The node that computes a tensor; None for an input or a stored tensor."""
        node = self.makers.get(name)
        while through_casts and node is not None and node.op_type == "Cast":
            node = self.makers.get(node.input[0])
        return node

    def dequantizer(self, name: str) -> onnx.NodeProto | None:
        """The DequantizeLinear node that computes a tensor; None if another node does, or none."""
        node = self.maker(name)
        return node if node is not None and node.op_type == DEQUANTIZE else None

    def has_one_reader(self, name: str) -> bool:
        """Whether exactly one input of one node reads a tensor, and nothing else does."""
        return len(self.readers.get(name, [])) == 1 and name not in self.read_outside

    def unused_name(self, stem: str) -> str:
        """`stem`, or `stem_1`, ..., if a node or a tensor has that name."""
        name, number = stem, 0
        while name in self.makers or name in self.tensors or name in self.nodes:
            number += 1
            name = f"{stem}_{number}"
        return name

    def copy(self) -> Graph:
        """A copy that can be edited."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        return Graph(model)

    def store(self, name: str, values: ArrayLike) -> str:
        """Store a tensor, or replace the stored tensor of this name. Returns the name."""
        tensor = self.tensors.get(name)
        if tensor is None:
            tensor = self.tensors[name] = self.proto.initializer.add()
        tensor.CopyFrom(numpy_helper.from_array(np.asarray(values), name))
        return name

    def store_copy(self, tensor: onnx.TensorProto, name: str) -> str:
        """Store a copy of a tensor under another name. Returns the name."""
        copy = self.tensors[name] = self.proto.initializer.add()
        copy.CopyFrom(tensor)
        copy.name = name
        return name

    def set_input(self, node: onnx.NodeProto, index: int, name: str) -> None:
        """Let a node read another tensor; `index` may be one behind its last input."""
        if index == len(node.input):
            node.input.append(name)
        else:
            self._forget_reader(node.input[index], node)
            node.input[index] = name
        self.readers.setdefault(name, []).append(node)

    def drop_inputs(self, node: onnx.NodeProto, start: int) -> None:
        """Take the inputs from `start` on away from a node."""
        for name in node.input[start:]:
            self._forget_reader(name, node)
        del node.input[start:]

    def rename_output(self, node: onnx.NodeProto, name: str) -> None:
        """Let a node's first output have another name; whatever read the old name reads nothing until it is made."""
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
        """Add a node with one output. `close` puts it behind what it reads.

        Args:
            op_type: Its operator.
            inputs: Names of the tensors that it reads.
            output: Name of the tensor that it computes.
            name: Its name; without it `<output>/<op_type>`.
            attributes: Attributes of the operator.
        """
        node = make_node(op_type, list(inputs), [output], name or f"{output}/{op_type}")
        node.attribute.extend(make_attribute(key, value) for key, value in (attributes or {}).items())
        self._added.append(node)
        self.nodes[node.name] = self.makers[output] = node
        for read in node.input:
            self.readers.setdefault(read, []).append(node)

    def close(self) -> None:
        """Put added nodes right behind the node that computes what they read; those of stored tensors go first."""
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
        """Take out stored tensors that nothing reads."""
        read = names_read(self.proto) | {value.name for value in self.proto.output}
        kept = [tensor for tensor in self.proto.initializer if tensor.name in read]
        del self.proto.initializer[:]
        self.proto.initializer.extend(kept)
        self._forget()

    def _forget_reader(self, name: str, node: onnx.NodeProto) -> None:
        readers = self.readers[name]
        del readers[next(index for index, reader in enumerate(readers) if reader is node)]

    def _forget(self) -> None:
        """Index again when it is needed: `extend` copied nodes or tensors."""
        for name in ("nodes", "makers", "readers", "tensors", "read_outside"):
            self.__dict__.pop(name, None)


def _behind(name: str, waiting: dict[str, list[onnx.NodeProto]]) -> list[onnx.NodeProto]:
    """The added nodes that read a tensor, each followed by those that read what it computes."""
    return [
        ready
        for node in waiting.pop(name, [])
        for ready in (node, *(ready for made in node.output for ready in _behind(made, waiting)))
    ]


def names_read(graph: onnx.GraphProto) -> set[str]:
    """Names of the tensors that nodes read, including those in branches and loops."""
    return {name for node in graph.node for name in node.input} | names_read_inside(graph)


def names_read_inside(graph: onnx.GraphProto) -> set[str]:
    """Names that the branches and loops of a graph read, their own or the graph's."""
    return {
        name
        for node in graph.node
        for attribute in node.attribute
        for inner in ([attribute.g] if attribute.HasField("g") else attribute.graphs)
        for name in names_read(inner) | {value.name for value in inner.output}
    }


def attribute_of(node: onnx.NodeProto, name: str, default: int) -> int:
    """An integer attribute of a node."""
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == name), default)


def opset(model: onnx.ModelProto) -> int:
    """Version of the standard operators."""
    return max(int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
