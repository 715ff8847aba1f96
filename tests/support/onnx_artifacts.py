"""ONNX files through quantize: rules of the tests, and what an artifact of a file holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from taoq.pipeline.artifacts import read_artifact
from taoq.quantization.formats.onnx import qdq
from taoq.quantization.formats.onnx.file import read_graph

INT8 = "weights: {dtype: int8}, activations: {dtype: int8}"
CONV_AND_GEMM = f"quantize.layers=[{{module_name: Conv, {INT8}}}, {{module_name: Gemm, {INT8}}}]"
FEW_IMAGES = "quantize.calibration.num_samples=16"
MODELOPT, ONNXRUNTIME = "quantize.backend=modelopt.onnx", "quantize.backend=onnxruntime"
FILES_OF_ARTIFACT = [
    "experiment.yaml",
    "log.txt",
    "manifest.json",
    "quantization_report.html",
    "quantization_report.json",
    "quantized_model.onnx",
    "status.json",
]
"""What the folder of an artifact has."""
Metrics = Callable[[str, Path], dict[str, float]]
"""Metrics of a checkpoint by `evaluate`: (network, checkpoint)."""


def file_names(folder: Path) -> list[str]:
    """Paths of all files below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def quantized_layers(folder: Path) -> list[str]:
    """Quantized layers of an artifact, from its manifest; they must be those of its graph."""
    artifact = read_artifact(folder)
    names = [row["layer"] for row in artifact.manifest.plan if row["weights"] or row["activations"]]
    assert sorted(names) == sorted(qdq.read(read_graph(artifact.payload)))
    return names
