# SPDX-License-Identifier: Apache-2.0
"""Read and write ONNX files, and the metadata that taoq's export stores in them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from taoq.errors import Fault, TaoqError, first_line
from taoq.files import weights_beside
from taoq.plain import JsonMapping
from taoq.quantization.formats.onnx.graph import DEQUANTIZE, QUANTIZE, Graph

LARGEST = 2**31 - 2**20
"""Largest size of a file without external weights, bytes. The limit of protobuf is 2 GB."""
_PROPERTY = "taoq"


def read_graph(path: Path) -> Graph:
    """Read a file with its weights and check it.

    Raises:
        TaoqError: If the file is missing, damaged or not an ONNX file, or if its external weights are missing.
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
        raise TaoqError(Fault(str(path), "is not a valid ONNX file: a name in it is not text", hint))
    external = _external_files(model)
    copy_hint = f"copy {', '.join(sorted(external))} beside it"
    try:
        onnx.load_external_data_for_model(model, str(path.parent))
        onnx.checker.check_model(model if byte_size(model) < LARGEST else str(path))
    except onnx.checker.ValidationError as error:
        if _external_files(model):
            what = f"its weights beside it cannot be read: {first_line(error)}"
            raise TaoqError(Fault(str(path), what, copy_hint)) from None
        raise TaoqError(Fault(str(path), f"is not a valid ONNX file: {first_line(error)}", hint)) from None
    except (OSError, ValueError) as error:
        what = f"its weights beside it cannot be read: {first_line(error)}"
        raise TaoqError(Fault(str(path), what, copy_hint)) from None
    return Graph(model)


def read_output_names(path: Path) -> list[str]:
    """Return the names of the outputs in a file, without reading weights beside it; empty if it cannot be read."""
    try:
        return [value.name for value in onnx.load(str(path), load_external_data=False).graph.output]
    except (DecodeError, OSError, ValueError):
        return []


def write_graph(graph: Graph, path: Path, *, external: bool = False) -> None:
    """Write a graph to a file. A model above 2 GB gets its weights in a second file beside it.

    Args:
        graph: The graph, with its weights.
        path: The file; must not exist.
        external: Whether to write the weights to a second file regardless of the size.
    """
    model = graph.model
    if external or byte_size(model) >= LARGEST:
        # `onnx.save` removes the weights from the model; load them back.
        onnx.save(model, str(path), save_as_external_data=True, location=weights_beside(path).name, size_threshold=1024)
        onnx.load_external_data_for_model(model, str(path.parent))
        return
    with path.open("wb") as file:
        file.write(model.SerializeToString(deterministic=True))


def byte_size(model: onnx.ModelProto) -> int:
    """Return the size of a model with its weights, bytes. `ModelProto.ByteSize` fails above 2 GB."""
    return sum(int(tensor.ByteSize()) for tensor in model.graph.initializer) + sum(
        int(node.ByteSize()) for node in model.graph.node
    )


def is_quantized(graph: Graph) -> bool:
    """Return whether a graph has quantized tensors."""
    return any(node.op_type in (QUANTIZE, DEQUANTIZE) for node in graph.proto.node)


def has_float8(graph: Graph) -> bool:
    """Return whether any initializer of a graph is FP8."""
    kinds = (onnx.TensorProto.FLOAT8E4M3FN, onnx.TensorProto.FLOAT8E5M2)
    return any(tensor.data_type in kinds for tensor in graph.proto.initializer)


def read_properties(graph: Graph, path: Path) -> JsonMapping | None:
    """Return the metadata of taoq's export: task, source, spec, taoq; None for a file of another exporter.

    Raises:
        TaoqError: If the metadata is damaged.
    """
    for entry in graph.model.metadata_props:
        if entry.key == _PROPERTY:
            try:
                properties = json.loads(entry.value)
                types = {"taoq": str, "task": str, "source": dict, "spec": dict}
                if all(isinstance(properties[name], type_) for name, type_ in types.items()):
                    return dict(properties)
            except (ValueError, KeyError, TypeError, RecursionError):
                pass
            raise TaoqError(Fault(str(path), "the metadata that taoq wrote into it is damaged", "export it again"))
    return None


def write_properties(graph: Graph, properties: Mapping[str, object]) -> None:
    """Store metadata in a graph, for `read_properties`."""
    model = graph.model
    kept = [entry for entry in model.metadata_props if entry.key != _PROPERTY]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    model.metadata_props.add(key=_PROPERTY, value=json.dumps(properties, sort_keys=True))


def _external_files(model: onnx.ModelProto) -> set[str]:
    return {
        Path(entry.value).name
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
