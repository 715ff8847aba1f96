# SPDX-License-Identifier: Apache-2.0
"""The inputs of a graph: their shapes and types, and conversion of batches to them."""

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
"""A batch for onnxruntime: arrays by name of the graph input."""


@dataclass(frozen=True)
class GraphInput:
    """An input of a graph.

    Attributes:
        name: Name of the input.
        shape: Size of each axis; None for any size.
        dtype: numpy dtype of the input.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: np.dtype[np.generic]

    def __str__(self) -> str:
        return f"{self.dtype} {format_shape(['N', *self.shape[1:]] if self.shape else [])}"


def graph_inputs(graph: Graph, where: str) -> tuple[GraphInput, ...]:
    """Return the inputs of a graph, in order, without the initializers that old exporters list as inputs.

    Args:
        graph: The graph.
        where: File of the graph, for messages.

    Raises:
        TaoqError: If the graph has no inputs, an input is not a tensor of a known type, or the batch sizes differ.
    """
    inputs = []
    for value in graph.proto.input:
        if value.name in graph.tensors:
            continue
        tensor = value.type.tensor_type
        if tensor.elem_type not in onnx.TensorProto.DataType.values() or not tensor.elem_type:
            what = f"its input '{value.name}' is not a tensor of a known type"
            raise TaoqError(Fault(where, what, "export the network with tensors as inputs"))
        shape = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim)
        if shape and shape[0] is not None and shape[0] < 1:
            what = f"its input '{value.name}' has a batch of {shape[0]}"
            raise TaoqError(Fault(where, what, "export it with a batch of 1 or more, or a dynamic one"))
        inputs.append(GraphInput(value.name, shape, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)))
    if not inputs:
        raise TaoqError(Fault(where, "has no inputs", "export the network with its inputs"))
    if len({entry.shape[0] for entry in inputs if entry.shape}) > 1:
        batches = ", ".join(f"'{entry.name}' {entry.dtype} {format_shape(entry.shape)}" for entry in inputs)
        raise TaoqError(Fault(where, f"its inputs have different batches: {batches}", "export it with one batch size"))
    return tuple(inputs)


def fixed_batch(inputs: Sequence[GraphInput]) -> int | None:
    """Return the batch size that a graph requires; None for any size."""
    return inputs[0].shape[0] if inputs[0].shape else None


def check_inputs(inputs: Sequence[GraphInput], example: Inputs, where: str) -> None:
    """Check that a graph takes batches like an example.

    Args:
        inputs: The graph's inputs.
        example: An example batch of the data.
        where: File of the graph, for messages.

    Raises:
        TaoqError: If the number of inputs, a rank, a size or the kind of dtype (float or integer) differs.
    """
    if len(inputs) != len(example):
        names = ", ".join(entry.name for entry in inputs)
        what = f"has {len(inputs)} input(s) ({names}), the data has {len(example)} ({', '.join(example)})"
        raise TaoqError(Fault(where, what, "export the network without its pre- and post-processing"))
    for entry, tensor in zip(inputs, _in_order(inputs, example), strict=True):
        same_rank = len(entry.shape) == tensor.ndim
        sizes = zip(entry.shape[1:], tensor.shape[1:], strict=False)
        same_kind = (entry.dtype.kind == "f") == tensor.is_floating_point()
        if not same_rank or not same_kind or any(size not in (None, data_size) for size, data_size in sizes):
            dtype = str(tensor.dtype).removeprefix("torch.")
            data_shape = format_shape(["N", *tensor.shape[1:]])
            what = f"its input '{entry.name}' is {entry}, the data is {dtype} {data_shape}"
            hint = "export the network for inputs like the data"
            if same_rank and same_kind:
                hint = f"set the input size of the data to that of the file, or {hint}"
            raise TaoqError(Fault(where, what, hint))


def zeros(inputs: Sequence[GraphInput], open_size: int | None = None) -> Inputs | None:
    """Return one sample of zeros for each input.

    Args:
        inputs: The inputs.
        open_size: Size of axes that may have any size; None to return None if there are any besides the batch.
    """
    if open_size is None and any(size is None for entry in inputs for size in entry.shape[1:]):
        return None
    samples = {}
    for entry in inputs:
        shape = [1, *((open_size or 1) if size is None else size for size in entry.shape[1:])]
        samples[entry.name] = torch.from_numpy(np.zeros(shape, entry.dtype))
    return samples


def arrays_of(batch: Inputs, inputs: Sequence[GraphInput]) -> Arrays:
    """Convert a batch to arrays of a graph's input types; matched by name if the names agree, otherwise by order."""
    pairs = zip(inputs, _in_order(inputs, batch), strict=True)
    return {entry.name: tensor.numpy().astype(entry.dtype, copy=False) for entry, tensor in pairs}


def pieces(arrays: Arrays, size: int) -> Iterator[Arrays]:
    """Split a batch into batches of at most `size` samples."""
    for start in range(0, samples(arrays), size):
        yield {name: array[start : start + size] for name, array in arrays.items()}


def filled(arrays: Arrays, size: int) -> Iterator[tuple[Arrays, int]]:
    """Split a batch into batches of exactly `size` samples. The last one is padded by repeating its samples.

    Yields:
        A batch and the number of its samples that are not padding.
    """
    for piece in pieces(arrays, size):
        count = samples(piece)
        if count < size:
            piece = {name: np.resize(array, (size, *array.shape[1:])) for name, array in piece.items()}
        yield piece, count


def samples(arrays: Arrays) -> int:
    """Return the number of samples in a batch."""
    return len(next(iter(arrays.values())))


def _in_order(inputs: Sequence[GraphInput], batch: Inputs) -> list[Tensor]:
    names = [entry.name for entry in inputs]
    return [batch[name] for name in names] if set(names) == set(batch) else list(batch.values())
