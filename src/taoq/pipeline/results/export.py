# SPDX-License-Identifier: Apache-2.0
"""The result of `export`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from taoq.network import OutputSpec
from taoq.pipeline.proof import Proof
from taoq.plain import JsonMapping, JsonObject
from taoq.views.pages import as_html, megabytes


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """Result of `taoq.export`.

    Attributes:
        onnx_file: Path of the file.
        checkpoint: Path of the exported checkpoint or artifact; empty for a network passed from Python.
        opset_version: Version of the ONNX operator set.
        nodes: Number of nodes of the graph.
        quantized_layers: Number of quantized layers.
        size: Size of the file in bytes, external weights included.
        inputs: Shape of each input.
        preprocessing: What becomes of a file before it is an input; empty if the task does not say it.
        proof: Comparison of the file's outputs with those of the torch network.
        versions: Versions of Python and of the libraries.
        command: Command line; empty for a call from Python.
    """

    onnx_file: Path
    checkpoint: str
    opset_version: int
    nodes: int
    quantized_layers: int
    size: int
    inputs: Mapping[str, OutputSpec]
    preprocessing: JsonMapping
    proof: Proof
    versions: Mapping[str, str]
    command: str = ""

    def to_json(self) -> JsonObject:
        """Return the content of `<name>_export.json`."""
        return {
            "onnx_file": str(self.onnx_file),
            "checkpoint": self.checkpoint,
            "opset_version": self.opset_version,
            "nodes": self.nodes,
            "quantized_layers": self.quantized_layers,
            "size": self.size,
            "preprocessing": dict(self.preprocessing),
            "proof": self.proof.to_json(),
            "versions": dict(self.versions),
            "command": self.command,
        }

    def _repr_html_(self) -> str:
        rows = [
            [name, f"{difference.largest_difference:.2g}", f"{difference.largest_value:.3g}"]
            for name, difference in self.proof.outputs.items()
        ]
        title = f"{self.onnx_file}: {megabytes(self.size)}, opset {self.opset_version}, {self.nodes} nodes"
        return as_html(title, ["output", "largest difference to torch", "largest value"], rows)
