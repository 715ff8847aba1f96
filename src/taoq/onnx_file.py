# SPDX-License-Identifier: Apache-2.0
"""ONNX files: read with two-line errors, write whole, and what one look at a graph tells."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from taoq.errors import Fault, TaoqError
from taoq.files import weights_beside

SUFFIX = ".onnx"
LARGEST = 2**31 - 2**20
"""Bytes of the largest file without weights beside it: protobuf ends at 2 GB."""
_QDQ = ("QuantizeLinear", "DequantizeLinear")
_PROPERTY = "taoq"


@dataclass(frozen=True)
class GraphInput:
    """The image input of a graph.

    Attributes:
        name: Its name.
        shape: Its sizes; None where one is dynamic.
        dtype: numpy dtype.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: np.dtype[Any]


def read_onnx(path: Path) -> onnx.ModelProto:
    """Read a file with its weights, and check it.

    Raises:
        TaoqError: It is missing, damaged, no ONNX file, or its weights beside it are not there.
    """
    if not path.is_file():
        what = "is a folder, not an ONNX file" if path.is_dir() else "there is no such file"
        raise TaoqError(Fault(str(path), what, "export one first, or correct the path"))
    hint = "export it again, or copy it again: a part may be missing"
    try:
        model = onnx.load(str(path), load_external_data=False)
    except (DecodeError, OSError, ValueError):
        raise TaoqError(Fault(str(path), "is not an ONNX file, or was cut off", hint)) from None
    if not model.graph.node:
        raise TaoqError(Fault(str(path), "is not an ONNX file: it has no graph", hint))
    if not all(isinstance(name, str) for node in model.graph.node for name in (node.name, *node.input, *node.output)):
        raise TaoqError(Fault(str(path), "is no valid ONNX file: a name in it is no text", hint))
    try:
        onnx.load_external_data_for_model(model, str(path.parent))
        onnx.checker.check_model(model if byte_size(model) < LARGEST else str(path))
    except onnx.checker.ValidationError as error:
        what = f"is no valid ONNX file: {_first_line(error)}"
        if _external(model):
            what = f"its weights beside it cannot be read: {_first_line(error)}"
            hint = f"copy {', '.join(sorted(_external(model)))} beside it"
        raise TaoqError(Fault(str(path), what, hint)) from None
    except (OSError, ValueError) as error:
        hint = f"copy {', '.join(sorted(_external(model)))} beside it"
        raise TaoqError(Fault(str(path), f"its weights beside it cannot be read: {_first_line(error)}", hint)) from None
    return model


def write_onnx(model: onnx.ModelProto, path: Path, *, external: bool = False) -> None:
    """Write a file; weights go into one file beside it where the model is too large for one, or where asked.

    Args:
        model: The model, with its weights.
        path: The file. Nothing may be there.
        external: Whether the weights go beside it whatever its size.
    """
    if external or byte_size(model) >= LARGEST:
        # onnx moves the weights out of the model it is given
        beside = weights_beside(path).name
        onnx.save(model, str(path), save_as_external_data=True, location=beside, size_threshold=1024)
        onnx.load_external_data_for_model(model, str(path.parent))
        return
    with path.open("wb") as file:
        file.write(model.SerializeToString(deterministic=True))


def byte_size(model: onnx.ModelProto) -> int:
    """Bytes of a model with its weights; protobuf itself cannot count beyond 2 GB."""
    return sum(int(tensor.ByteSize()) for tensor in model.graph.initializer) + sum(
        int(node.ByteSize()) for node in model.graph.node
    )


def image_input(model: onnx.ModelProto, path: Path) -> GraphInput:
    """The one input of a graph; initializers that are inputs as well, as old exporters have them, do not count.

    Raises:
        TaoqError: There is not exactly one, or it is not [batch, 3, height, width].
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs) or "none"
        what = f"has {len(inputs)} inputs ({names}): taoq runs graphs with one image input"
        raise TaoqError(Fault(str(path), what, "export the network without its pre- and post-processing"))
    tensor = inputs[0].type.tensor_type
    if tensor.elem_type not in onnx.TensorProto.DataType.values() or not tensor.elem_type:
        what = f"its input '{inputs[0].name}' is no tensor of a known type"
        raise TaoqError(Fault(str(path), what, "export the network for batches of RGB images"))
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    if shape and shape[0] is not None and shape[0] < 1:
        what = f"its input '{inputs[0].name}' has a batch of {shape[0]}"
        raise TaoqError(Fault(str(path), what, "export it with a batch of 1 or more, or a dynamic one"))
    if len(shape) != 4 or shape[1] not in (3, None) or dtype.kind != "f":
        sizes = [size or "?" for size in shape]
        what = f"its input '{inputs[0].name}' is {dtype} {sizes}, not float [batch, 3, height, width]"
        raise TaoqError(Fault(str(path), what, "export the network for batches of RGB images"))
    return GraphInput(inputs[0].name, shape, dtype)


def check_image_size(found: GraphInput, images: Sequence[int], path: Path) -> None:
    """Refuse images that a graph does not take.

    Args:
        found: The graph's input.
        images: Shape of a batch of images of the spec.
        path: The file, for the message.

    Raises:
        TaoqError: The sizes differ.
    """
    if any(size not in (None, image) for size, image in zip(found.shape[2:], images[2:], strict=True)):
        height, width = (size or "any" for size in found.shape[2:])
        what = f"takes images of {height} x {width} (height x width), those of the spec are {images[2]} x {images[3]}"
        raise TaoqError(Fault(str(path), what, "set the input size in the dataset section to that of the file"))


def fixed_batches(images: Any, size: int | None) -> Iterator[tuple[Any, int]]:
    """Batches of the size that a graph has, and how many images of each count.

    Args:
        images: [N, ...].
        size: Of the graph's batch; None takes any.
    """
    size = size or len(images)
    for start in range(0, len(images), size):
        chunk = images[start : start + size]
        # the last one is filled up with its own images
        yield (chunk if len(chunk) == size else np.resize(chunk, (size, *chunk.shape[1:]))), len(chunk)


def is_quantized(model: onnx.ModelProto) -> bool:
    """Whether a graph has quantized tensors."""
    return any(node.op_type in _QDQ for node in model.graph.node)


def has_float8(model: onnx.ModelProto) -> bool:
    """Whether any tensor that is stored in a graph is an FP8 number."""
    return any(
        tensor.data_type in (onnx.TensorProto.FLOAT8E4M3FN, onnx.TensorProto.FLOAT8E5M2)
        for tensor in model.graph.initializer
    )


def read_properties(model: onnx.ModelProto, path: Path) -> Mapping[str, Any] | None:
    """What taoq's export wrote into a file about itself: task, source, spec, taoq. None in another exporter's file.

    Raises:
        TaoqError: It is damaged.
    """
    for entry in model.metadata_props:
        if entry.key == _PROPERTY:
            try:
                found = json.loads(entry.value)
                kinds = {"taoq": str, "task": str, "source": dict, "spec": dict}
                if all(isinstance(found[name], kind) for name, kind in kinds.items()):
                    return dict(found)
            except (ValueError, KeyError, TypeError, RecursionError):
                pass
            what = "what taoq wrote into it about itself is damaged"
            raise TaoqError(Fault(str(path), what, "export it again"))
    return None


def write_properties(model: onnx.ModelProto, properties: Mapping[str, Any]) -> None:
    """Keep what a reader of the file should know of it."""
    kept = [entry for entry in model.metadata_props if entry.key != _PROPERTY]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    model.metadata_props.add(key=_PROPERTY, value=json.dumps(properties, sort_keys=True))


def _external(model: onnx.ModelProto) -> set[str]:
    return {
        Path(entry.value).name
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
