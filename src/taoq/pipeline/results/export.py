# SPDX-License-Identifier: Apache-2.0
"""What `export` returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from taoq.network import OutputSpec
from taoq.pipeline.proof import Proof
from taoq.plain import JsonObject
from taoq.views.pages import as_html, megabytes


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """An exported file.

    Attributes:
        onnx_file: The file.
        checkpoint: What it was made from.
        opset_version: Version of the standard operators.
        nodes: Number of nodes.
        quantized_layers: Number of quantized layers.
        size: Size of the file with its weights, bytes.
        inputs: Shapes of its inputs.
        proof: The comparison with the torch network.
        versions: Versions of the libraries.
        command: The command line.
    """

    onnx_file: Path
    checkpoint: str
    opset_version: int
    nodes: int
    quantized_layers: int
    size: int
    inputs: Mapping[str, OutputSpec]
    proof: Proof
    versions: Mapping[str, str]
    command: str = ""

    def to_json(self) -> JsonObject:
        """The content of `<name>_export.json`."""
        return {
            "onnx_file": str(self.onnx_file),
            "checkpoint": self.checkpoint,
            "opset_version": self.opset_version,
            "nodes": self.nodes,
            "quantized_layers": self.quantized_layers,
            "size": self.size,
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
