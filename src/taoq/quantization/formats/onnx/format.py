# SPDX-License-Identifier: Apache-2.0
"""The ONNX model format."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from taoq.network import Inputs
from taoq.plain import JsonMapping
from taoq.quantization.formats.base import ModelFormat, Values
from taoq.quantization.formats.onnx import measures
from taoq.quantization.formats.onnx.file import byte_size, is_quantized, read_graph, read_output_names, read_properties
from taoq.quantization.formats.onnx.graph import Graph
from taoq.quantization.formats.onnx.layers import prepare
from taoq.quantization.types import LayerError

if TYPE_CHECKING:
    from torch import nn


class OnnxFormat:
    """Graphs in ONNX files."""

    name = "onnx"

    def read(self, path: str, build: Callable[[str | None], nn.Module]) -> Graph:
        """Read a graph from a file and check it."""
        return read_graph(Path(path))

    def output_names(self, path: str) -> Sequence[str]:
        """Return the names of the outputs in a file; empty if it cannot be read."""
        return read_output_names(Path(path))

    def is_quantized(self, model: Graph) -> bool:
        """Return whether the graph has quantized tensors."""
        return is_quantized(model)

    def properties(self, model: Graph, path: str) -> JsonMapping | None:
        """Return the metadata that taoq's export wrote into the file."""
        return read_properties(model, Path(path))

    def prepare(self, model: Graph, path: str) -> Graph:
        """Name every node, store constants as initializers and convert to opset 19 or later."""
        return prepare(model, path)

    def size(self, model: Graph) -> int:
        """Return the size of the graph with its weights, bytes."""
        return byte_size(model.model)

    def digest(self, model: Graph) -> str:
        """Return the SHA-256 of the serialized model."""
        return hashlib.sha256(model.model.SerializeToString(deterministic=True)).hexdigest()

    def unreached(self, model: Graph, inputs: Inputs, names: Sequence[str]) -> Mapping[str, str]:
        """Return no layers: an exporter folds constants, and a node is always run."""
        return {}

    def macs(self, model: Graph, inputs: Inputs) -> Mapping[str, int]:
        """Return the multiply-accumulates of each layer, for one sample."""
        return measures.macs(model, inputs)

    def layer_errors(
        self,
        reference: Graph,
        model: Graph,
        names: Sequence[str],
        batches: Iterable[Inputs],
        weight: Callable[[Graph, str], Values],
        *,
        device: str,
    ) -> Mapping[str, LayerError]:
        """Return the errors of quantized layers."""
        return measures.layer_errors(reference, model, names, batches)

    def bias_shifts(
        self, reference: Graph, model: Graph, names: Sequence[str], batches: Iterable[Inputs], *, device: str
    ) -> Mapping[str, NDArray[np.float64]]:
        """Return the shifts of the mean outputs of quantized layers."""
        return measures.bias_shifts(reference, model, names, batches)


FORMAT: ModelFormat[Graph] = OnnxFormat()
