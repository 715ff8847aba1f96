# SPDX-License-Identifier: Apache-2.0
"""taoq.load."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from taoq.api.config import device_of
from taoq.api.models import NO_NETWORK, artifact_folder
from taoq.errors import Fault, SpecError, TaoqError, abbreviated
from taoq.pipeline.artifacts import Artifact, read_artifact
from taoq.pipeline.experiment import bind
from taoq.pipeline.models import experiment_for, fitting_artifact, open_artifact, start
from taoq.pipeline.supplied import supply
from taoq.quantization.formats import FORMATS
from taoq.runtimes.base import Runtime
from taoq.tasks import load_task
from taoq.tasks.sections import TaskSpec


def load(
    folder: str | Path, model: nn.Module | None = None, *, device: str | torch.device | None = None
) -> nn.Module | Runtime:
    """Load the quantized model of an artifact, after verifying the artifact's checksum.

    Args:
        folder: Folder of the artifact, or its payload file.
        model: Float network that was quantized, required for artifacts that `taoq.quantize` made with a torch backend.
            Only its architecture is used, so its weights may be untrained. Artifacts of the command line build their
            network themselves.
        device: Device for an artifact of an ONNX backend. None selects the GPU if there is one.

    Returns:
        For a torch backend, the quantized network, in eval mode on the CPU. For an ONNX backend, a runtime: its `run`
        method maps a dictionary of input tensors to a dictionary of output tensors.

    Raises:
        SpecError: If `model` is required and missing.
        TaoqError: If the artifact is damaged, or was made from another network.

    Example:
        >>> import taoq
        >>> quantized = taoq.load("results/int8", network)
        >>> outputs = quantized(images[0])
    """
    directory = artifact_folder(folder)
    artifact = read_artifact(directory)
    manifest = artifact.manifest
    info = FORMATS[manifest.format]
    if manifest.task:
        task = load_task(manifest.task)
        experiment = experiment_for(bind(task, artifact.stored_spec.load(task.spec)), str(directory))
    elif info.whole:
        experiment = supply(directory / manifest.payload, TaskSpec(), open_size=1)
    elif model is None:
        raise SpecError(Fault(str(folder), NO_NETWORK, "give that network: taoq.load(folder, model)"))
    else:
        _check_layers(model, artifact)
        experiment = supply(model, TaskSpec())
    opened = open_artifact(experiment, fitting_artifact(experiment, directory))
    if info.whole:
        return start(experiment, opened, device_of(device), "device")
    network: nn.Module = opened.model
    if model is not None and not manifest.task:
        _check_shapes(model, network, artifact)
    return network


def _check_layers(model: nn.Module, artifact: Artifact) -> None:
    """Raise TaoqError if the network lacks a layer of the artifact."""
    names = {name for name, _ in model.named_modules()}
    missing = [row["layer"] for row in artifact.manifest.plan if row["layer"] not in names]
    if missing:
        what = f"does not fit this {type(model).__name__}, which has no layer {abbreviated(missing)}"
        raise TaoqError(Fault(str(artifact.payload), what, "give the network that was quantized"))


def _check_shapes(model: nn.Module, loaded: nn.Module, artifact: Artifact) -> None:
    """Raise TaoqError if a layer has another shape than in the artifact.

    This must be checked here: a library may load weights of any shape without an error.
    """
    for row in artifact.manifest.plan:
        if not (row["weights"] or row["activations"]):  # Layers that stay float may have no weight of this name.
            continue
        name = row["layer"]
        shape, stored = (list(network.get_parameter(f"{name}.weight").shape) for network in (model, loaded))
        if shape != stored:
            what = f"does not fit this {type(model).__name__}: its layer {name} has the shape {shape}, not {stored}"
            raise TaoqError(Fault(str(artifact.payload), what, "give the network that was quantized"))
