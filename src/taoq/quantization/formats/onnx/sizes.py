# SPDX-License-Identifier: Apache-2.0
"""Replace computed sizes in an exported graph by constants: all sizes are known, except that of the batch.

torch's exporter writes `x.reshape(len(x), -1, 64)` as Shape, Gather, Unsqueeze and Concat nodes in front of a Reshape.
Here all sizes are computed for two batches. Those that are the same for both are constants, and a Reshape or an Expand
can do without the size of the batch: -1, 0 or 1 stands for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon
from numpy.typing import NDArray

_BATCHES = (1, 62)
"""Batches for which sizes are computed: what is the same for both does not depend on the batch."""
_LARGEST_CONSTANT = 8192
"""Size of the largest value that is stored instead of being computed, bytes; larger ones would enlarge the file."""

_Value = NDArray[Any]


@dataclass(frozen=True)
class _Known:
    """What is known of a graph before it runs, for one batch size.

    Attributes:
        values: Values of tensors that depend only on sizes, and of initializers, by name.
        shapes: Shapes of tensors, by name; 0 for an unknown size.
    """

    values: dict[str, _Value]
    shapes: dict[str, list[int]]


def store_sizes(model: onnx.ModelProto, *, dynamic: bool) -> onnx.ModelProto:
    """Return a model with constants instead of computed sizes, without the nodes that computed them.

    Args:
        model: The model, whose inputs have known sizes, except for the batch if it is dynamic. It is modified.
        dynamic: Whether the batch may have any size.
    """
    known = [_known(model, batch) for batch in (_BATCHES if dynamic else (None,))]
    stored = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            constant = None if name in stored else _constant(node, index, known)
            if constant is not None:
                node.input[index] = f"{node.name}/input_{index}"
                model.graph.initializer.append(onnx.numpy_helper.from_array(constant, node.input[index]))
    surgeon = onnx_graphsurgeon.import_onnx(model).cleanup().toposort()
    result: onnx.ModelProto = onnx_graphsurgeon.export_onnx(surgeon)
    return result


def _known(model: onnx.ModelProto, batch: int | None) -> _Known:
    """Compute what is known for a batch size; None for the size that the inputs have."""
    known, before = _Known({}, {}), -1
    sized = _without_weights(model)
    for value in sized.graph.input[: len(model.graph.input)]:
        if batch is not None:
            value.type.tensor_type.shape.dim[0].dim_value = batch
    while len(known.values) > before:  # A shape that becomes known may make further shapes known.
        before = len(known.values)
        sized = onnx.shape_inference.infer_shapes(sized, data_prop=True)
        for value in (*sized.graph.input, *sized.graph.value_info, *sized.graph.output):
            known.shapes[value.name] = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        surgeon = onnx_graphsurgeon.import_onnx(sized).fold_constants(size_threshold=_LARGEST_CONSTANT)
        for tensor in surgeon.tensors().values():
            if isinstance(tensor, onnx_graphsurgeon.Constant):
                known.values[tensor.name] = tensor.values
        sized = onnx_graphsurgeon.export_onnx(surgeon.cleanup().toposort())
    return known


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy that has inputs instead of large initializers, after its own inputs."""
    copy = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    copy.graph.name = model.graph.name
    copy.graph.node.extend(model.graph.node)
    copy.graph.input.extend(model.graph.input)
    copy.graph.output.extend(model.graph.output)
    for value in copy.graph.output:
        value.type.tensor_type.ClearField("shape")  # Inference keeps a declared shape, which has names for sizes.
    for tensor in model.graph.initializer:
        if tensor.ByteSize() > _LARGEST_CONSTANT:
            copy.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            copy.graph.initializer.append(tensor)
    return copy


def _constant(node: onnx.NodeProto, index: int, known: Sequence[_Known]) -> _Value | None:
    """Return a constant that can replace an input of a node for every batch; None if there is none.

    Args:
        node: The node.
        index: Number of the input.
        known: What is known for each batch.
    """
    name = node.input[index]
    values = [entry.values[name] for entry in known if name in entry.values]
    if len(values) == len(known) and all(np.array_equal(value, values[0]) for value in values):
        return values[0]
    if index != 1 or node.op_type not in ("Reshape", "Expand"):
        return None
    before, after = ([entry.shapes.get(name, ()) for entry in known] for name in (node.input[0], node.output[0]))
    if not all(shape and all(shape) for shape in (*before, *after)):
        return None
    # A size of the data is kept by 0 in a Reshape, and by 1 in an Expand, which aligns the shapes at their ends.
    is_expand = node.op_type == "Expand"
    keep, offset = (1, len(after[0]) - len(before[0])) if is_expand else (0, 0)
    shape: list[int] = []
    for axis, sizes in enumerate(zip(*after, strict=True)):
        own = axis - offset
        kept = 0 <= own < len(before[0]) and sizes == tuple(entry[own] for entry in before)
        shape.append(sizes[0] if len(set(sizes)) == 1 else keep if kept else -1)
    # Only a Reshape can infer a size, and only one.
    return None if shape.count(-1) > (0 if is_expand else 1) else np.array(shape)
