# SPDX-License-Identifier: Apache-2.0
"""The network that `export` writes: a float network, or a quantized one with its scales."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from taoq.errors import Fault, Notice, SpecError
from taoq.pipeline.artifacts import find_artifact
from taoq.pipeline.experiment import Experiment
from taoq.pipeline.models import build_empty, fitting_artifact, open_artifact
from taoq.quantization.backends import load_backend
from taoq.quantization.backends.base import Exportable
from taoq.quantization.formats import FORMATS
from taoq.quantization.formats.torch.biases import accept_biases
from taoq.quantization.types import Applied, Scales
from taoq.tasks.sections import ExportSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportSource:
    """A torch network to export.

    Attributes:
        reference: The network as it is evaluated, which the exported file must agree with.
        network: The float network to trace: `reference` itself, or one with its weights dequantized.
        layers: The quantized layers.
        scales: Scales of the quantized layers; empty for a float file.
    """

    reference: nn.Module
    network: nn.Module
    layers: Applied
    scales: Mapping[str, Scales]


def open_source(experiment: Experiment, section: ExportSpec) -> ExportSource:
    """Open the checkpoint or artifact of the section `export`.

    Raises:
        TaoqError: If the checkpoint is damaged, or belongs to another task or network.
        SpecError: If a field contradicts the checkpoint, or if the artifact cannot be exported.
    """
    directory = find_artifact(section.checkpoint)
    if section.is_quantized is not None and section.is_quantized != (directory is not None):
        what = f"is {str(section.is_quantized).lower()}, but {section.checkpoint} is"
        what += " a quantized artifact" if directory else " not an artifact"
        raise SpecError(Fault("export.is_quantized", what, "leave the field out: it is read from the artifact"))
    if directory is None:
        return float_source(experiment.build(section.checkpoint))
    artifact = fitting_artifact(experiment, directory)
    manifest = artifact.manifest
    if FORMATS[manifest.format].whole:
        what = f"{section.checkpoint} is an artifact of {manifest.backend}: its payload is an ONNX file"
        raise SpecError(Fault("export.checkpoint", what, f"take {artifact.payload} as it is"))
    reference = open_artifact(experiment, artifact).model
    empty = build_empty(experiment.restore(artifact.stored_spec)).eval()
    return quantized_source(reference, manifest.backend, empty, dequantize=section.dequantize)


def float_source(model: nn.Module) -> ExportSource:
    """Return a float network as a source."""
    return ExportSource(model.eval(), model, {}, {})


def quantized_source(reference: nn.Module, backend_name: str, empty: nn.Module, *, dequantize: bool) -> ExportSource:
    """Return a quantized network as a source.

    Args:
        reference: The quantized network.
        backend_name: Name of the backend that quantized it.
        empty: A float network of the same architecture; it is given the dequantized weights.
        dequantize: Whether to write plain float weights instead of Q/DQ nodes.

    Raises:
        SpecError: If ONNX has no operator for the backend's quantization.
    """
    backend = load_backend(backend_name)
    hint = "set export.dequantize: true for a float file with these weights, or quantize the float ONNX file"
    if not isinstance(backend, Exportable):
        raise SpecError(Fault("export.checkpoint", f"backend {backend_name} cannot be exported", hint))
    state, scales = backend.dequantized(reference)
    if not scales and not dequantize:
        what = f"{backend_name} quantizes weights in a way that ONNX has no operator for"
        raise SpecError(Fault("export.checkpoint", what, hint))
    accept_biases(empty, state)
    empty.load_state_dict(dict(state), assign=True)
    if dequantize:
        what = "the file has plain float32 weights, with the values of the quantized ones"
        log.warning(Notice("export.dequantize", what))
        scales = {}
    if not scales:
        return ExportSource(empty, empty, backend.applied(empty), {})
    return ExportSource(reference, empty, backend.applied(reference), scales)
