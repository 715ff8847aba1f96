# SPDX-License-Identifier: Apache-2.0
"""The inputs of a graph: what they take, and batches fed to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from taoq.errors import Fault, TaoqError
from taoq.network import Inputs, format_shape
from taoq.quantization.formats.onnx.graph import Graph

Arrays = dict[str, NDArray[Any]]
"""What onnxruntime is fed: arrays by the name of the graph's input."""


@dataclass(frozen=True)
class GraphInput:
    """An input of a graph.

    Attributes:
        name: Its name.
        shape: A size for each axis; None for any size.
        dtype: numpy dtype.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: np.dtype[np.generic]

    def __str__(self) -> str:
        return f"{self.dtype} {format_shape(['N', *self.shape[1:]] if self.shape else [])}"


def graph_inputs(graph: Graph, where: str) -> tuple[GraphInput, ...]:
    """The inputs of a graph, in order; stored tensors that old exporters list among them are left out.

    Args:
        graph: The graph.
        where: Its file, for messages.

    Raises:
        TaoqError: There is none, one is no tensor of a known type, or their batches differ.
    """
    found = []
    for value in graph.proto.input:
        if value.name in graph.tensors:
            continue
        tensor = value.type.tensor_type
        if tensor.elem_type not in onnx.TensorProto.DataType.values() or not tensor.elem_type:
            what = f"its input '{value.name}' is no tensor of a known type"
            raise TaoqError(Fault(where, what, "export the network with tensors as inputs"))
        shape = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim)
        if shape and shape[0] is not None and shape[0] < 1:
            what = f"its input '{value.name}' has a batch of {shape[0]}"
            raise TaoqError(Fault(where, what, "export it with a batch of 1 or more, or a dynamic one"))
        found.append(GraphInput(value.name, shape, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)))
    if not found:
        raise TaoqError(Fault(where, "has no inputs", "export the network with its inputs"))
    if len({entry.shape[0] for entry in found if entry.shape}) > 1:
        batches = ", ".join(f"'{entry.name}' {entry.dtype} {format_shape(entry.shape)}" for entry in found)
        raise TaoqError(Fault(where, f"its inputs have different batches: {batches}", "export it with one batch size"))
    return tuple(found)


def fixed_batch(inputs: Sequence[GraphInput]) -> int | None:
    """The number of samples that a graph always takes; None for any number."""
    return inputs[0].shape[0] if inputs[0].shape else None


def check_inputs(inputs: Sequence[GraphInput], example: Inputs, where: str) -> None:
    """Check that a graph takes batches like an example.

    Args:
        inputs: The graph's inputs.
        example: Tensors as the data has them.
        where: The graph's file, for the message.

    Raises:
        TaoqError: The number of inputs, a shape or a kind of number differs.
    """
    if len(inputs) != len(example):
        names = ", ".join(entry.name for entry in inputs)
        what = f"has {len(inputs)} input(s) ({names}), the data has {len(example)} ({', '.join(example)})"
        raise TaoqError(Fault(where, what, "export the network without its pre- and post-processing"))
    for entry, tensor in zip(inputs, _in_order(inputs, example), strict=True):
        same_rank = len(entry.shape) == tensor.ndim
        sizes = zip(entry.shape[1:], tensor.shape[1:], strict=False)
        same_kind = (entry.dtype.kind == "f") == tensor.is_floating_point()
        if not same_rank or not same_kind or any(size not in (None, given) for size, given in sizes):
            dtype = str(tensor.dtype).removeprefix("torch.")
            given = format_shape(["N", *tensor.shape[1:]])
            what = f"its input '{entry.name}' is {entry}, the data is {dtype} {given}"
            hint = "export the network for inputs like the data"
            if same_rank and same_kind:
                hint = f"set the input size of the data to that of the file, or {hint}"
            raise TaoqError(Fault(where, what, hint))


def zeros(inputs: Sequence[GraphInput]) -> Inputs | None:
    """One sample of zeros for each input; None if a size besides that of the batch is unknown."""
    if any(size is None for entry in inputs for size in entry.shape[1:]):
        return None
    return {entry.name: torch.from_numpy(np.zeros((1, *entry.shape[1:]), entry.dtype)) for entry in inputs}


def arrays_of(inputs: Inputs, wanted: Sequence[GraphInput]) -> Arrays:
    """A batch as arrays of the types that a graph takes; by name if the names agree, else in order."""
    ordered = zip(wanted, _in_order(wanted, inputs), strict=True)
    return {entry.name: tensor.numpy().astype(entry.dtype, copy=False) for entry, tensor in ordered}


def pieces(arrays: Arrays, size: int) -> Iterator[Arrays]:
    """A batch cut into batches of at most `size` samples."""
    for start in range(0, samples(arrays), size):
        yield {name: array[start : start + size] for name, array in arrays.items()}


def filled(arrays: Arrays, size: int) -> Iterator[tuple[Arrays, int]]:
    """A batch cut into batches of exactly `size` samples, and how many samples of each count.

    The last one is filled up with its own samples.
    """
    for piece in pieces(arrays, size):
        count = samples(piece)
        if count < size:
            piece = {name: np.resize(array, (size, *array.shape[1:])) for name, array in piece.items()}
        yield piece, count


def samples(arrays: Arrays) -> int:
    """Number of samples in a batch."""
    return len(next(iter(arrays.values())))


def _in_order(wanted: Sequence[GraphInput], inputs: Inputs) -> list[Tensor]:
    names = [entry.name for entry in wanted]
    return [inputs[name] for name in names] if set(names) == set(inputs) else list(inputs.values())
