# SPDX-License-Identifier: Apache-2.0
"""taoq.export."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from taoq.api.config import check_options, device_of, spec_of
from taoq.api.load import load
from taoq.api.models import artifact_folder
from taoq.pipeline.artifacts import read_artifact
from taoq.pipeline.export import check_target, refuse_replacement, write_export
from taoq.pipeline.export_source import float_source, quantized_source
from taoq.pipeline.results.export import ExportResult
from taoq.pipeline.results.quantize import QuantizeResult
from taoq.pipeline.supplied import Loader, supply
from taoq.quantization.formats import load_format
from taoq.runtimes.base import torch_device


def export(
    model: nn.Module,
    onnx_file: str | Path,
    data: Loader,
    *,
    artifact: str | Path | QuantizeResult | None = None,
    device: str | torch.device = "cpu",
    **options: object,
) -> ExportResult:
    """Export a network as an ONNX file, and verify on data that both compute the same outputs.

    Args:
        model: Float network.
        onnx_file: File to write. `<name>_export.json` beside it records the comparison.
        data: Iterable of batches to compare the outputs on; see `calibration` of `taoq.quantize`.
        artifact: Quantized version of `model` to export: the result of `taoq.quantize`, or the folder of its artifact.
            With backend modelopt.pytorch, the file gets QuantizeLinear and DequantizeLinear nodes. None exports
            `model` itself.
        device: Device that the network is traced on: `cpu` or `cuda`.
        options: Fields of the `export` section of a spec: opset_version, batch_size, check_images, tolerance,
            dequantize, overwrite, verbose.

    Returns:
        The file with its size and shapes, and the largest difference of each output, in `proof`.

    Raises:
        SpecError: If an option is invalid, or if ONNX has no operator for the artifact's quantization.
        TaoqError: If the network cannot be exported, or if the outputs differ; the file is then not written.

    Example:
        >>> import taoq
        >>> result = taoq.export(network, "float.onnx", images)
        >>> result = taoq.export(network, "int8.onnx", images, artifact="results/int8")
    """
    names = ("opset_version", "batch_size", "check_images", "tolerance", "dequantize", "overwrite", "verbose")
    check_options(options, "export", names)
    target = Path(onnx_file)
    spec = spec_of(export=options)
    check_target(spec.export, target)
    experiment = supply(model, spec, calibration=data, data_name="data")
    float_model = experiment.build(None)
    origin = {"path": "", "sha256": load_format("torch").digest(float_model)}
    refuse_replacement(spec.export, target, origin["sha256"])
    if artifact is None:
        source = float_source(float_model)
    else:
        if isinstance(artifact, QuantizeResult):
            quantized, backend = artifact.model, artifact.manifest.backend
        else:
            quantized, backend = load(artifact, model), read_artifact(artifact_folder(artifact)).manifest.backend
        source = quantized_source(quantized, backend, float_model, dequantize=spec.export.dequantize)
    return write_export(experiment, source, origin, target, torch_device(device_of(device), "device"))
