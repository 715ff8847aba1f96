# SPDX-License-Identifier: Apache-2.0
"""taoq.load."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from taoq.api.config import device_of
from taoq.api.models import artifact_folder
from taoq.errors import Fault, SpecError, TaoqError, abbreviated
from taoq.pipeline.artifacts import Artifact, read_artifact
from taoq.pipeline.experiment import bind
from taoq.pipeline.models import fitting_artifact, open_artifact, start
from taoq.pipeline.supplied import supply
from taoq.quantization.formats import FORMATS
from taoq.runtimes.base import Runtime
from taoq.tasks import load_task
from taoq.tasks.sections import TaskSpec


def load(folder: str | Path, model: nn.Module | None = None, *, device: str | None = None) -> nn.Module | Runtime:
    """Open an artifact, after checking that it is whole.

    Args:
        folder: The folder of the artifact, or its payload.
        model: The float network that it was made from, for an artifact of a torch backend that `taoq.quantize` made;
            its weights do not matter. Artifacts of a task build their network themselves.
        device: Where an ONNX graph runs; None is the GPU if there is one.

    Returns:
        Of a torch backend the network, in eval mode on the CPU; of an ONNX backend a runtime, whose `run` takes and
        gives tensors by name.

    Raises:
        SpecError: The network is missing.
        TaoqError: The artifact is damaged, or does not fit the network.
    """
    directory = artifact_folder(folder)
    artifact = read_artifact(directory)
    manifest = artifact.manifest
    info = FORMATS[manifest.format]
    if manifest.task:
        task = load_task(manifest.task)
        experiment = bind(task, artifact.stored_spec.load(task.spec))
    elif info.whole:
        experiment = supply(directory / manifest.payload, TaskSpec())
    elif model is None:
        what = "was made from a network of your own, which it does not contain"
        raise SpecError(Fault(str(folder), what, "give that network: taoq.load(folder, model)"))
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
    """Refuse a network without the layers of an artifact.

    Raises:
        TaoqError: It lacks one.
    """
    own = {name for name, _ in model.named_modules()}
    missing = [row["layer"] for row in artifact.manifest.plan if row["layer"] not in own]
    if missing:
        what = f"does not fit this {type(model).__name__}, which has no layer {abbreviated(missing)}"
        raise TaoqError(Fault(str(artifact.payload), what, "give the network that was quantized"))


def _check_shapes(model: nn.Module, loaded: nn.Module, artifact: Artifact) -> None:
    """Refuse a network whose layers have other shapes: a library may take the stored weights all the same.

    Raises:
        TaoqError: One has.
    """
    for row in artifact.manifest.plan:
        name = row["layer"]
        own, stored = (list(network.get_parameter(f"{name}.weight").shape) for network in (model, loaded))
        if own != stored:
            what = f"does not fit this {type(model).__name__}: its layer {name} has the shape {own}, not {stored}"
            raise TaoqError(Fault(str(artifact.payload), what, "give the network that was quantized"))
