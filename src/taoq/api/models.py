# SPDX-License-Identifier: Apache-2.0
"""Models of a Python caller: opened, named, and put back as they were."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from torch import nn

from taoq.errors import Fault, SpecError, TaoqError
from taoq.pipeline.artifacts import find_artifact, read_artifact
from taoq.pipeline.experiment import Experiment
from taoq.pipeline.models import OpenedModel, fitting_artifact, open_artifact
from taoq.pipeline.supplied import Model, left_as_it_was, model_format_of, supply
from taoq.quantization.backends import load_backend
from taoq.quantization.formats import FORMATS, format_of, load_format
from taoq.tasks.sections import TaskSpec


def check_model(model: Model, spec: TaskSpec) -> None:
    """Refuse a model that is not of the format that the backend quantizes.

    Raises:
        SpecError: It is not.
    """
    backend = spec.quantize.backend
    wanted = FORMATS[load_backend(backend).capability.format]
    given = model_format_of(model)
    if given != wanted:
        hint = f"choose {given.backends}" + (", or make an ONNX file with taoq.export" if wanted.whole else "")
        what = f"the model is {'an ONNX file' if given.whole else 'a torch network'}, which {backend} does not quantize"
        raise SpecError(Fault("quantize.backend", what, hint))


def open_model(model: Model, **data: Any) -> tuple[Experiment, OpenedModel]:
    """A model with the data of a Python caller, not on a device yet."""
    directory = None if isinstance(model, nn.Module) else find_artifact(str(model))
    if directory is not None:
        manifest = read_artifact(directory).manifest
        if not FORMATS[manifest.format].whole:
            what = "is the artifact of a torch backend, which does not contain its network"
            raise SpecError(Fault(str(model), what, "give what taoq.load(folder, model) returns"))
        experiment = supply(directory / manifest.payload, TaskSpec(), **data)
        return experiment, open_artifact(experiment, fitting_artifact(experiment, directory))
    experiment = supply(model, TaskSpec(), **data)
    if isinstance(model, nn.Module):
        return experiment, OpenedModel(model, "torch", None, False)
    model_format = load_format(format_of(str(model)).name)
    graph = model_format.read(str(model), experiment.build)
    return experiment, OpenedModel(graph, model_format.name, Path(model), model_format.is_quantized(graph))


def kept(model: Model) -> contextlib.AbstractContextManager[None]:
    """Put a network back on its device and into its modes afterwards."""
    return left_as_it_was(model) if isinstance(model, nn.Module) else contextlib.nullcontext()


def artifact_folder(folder: str | Path) -> Path:
    """The folder of an artifact.

    Raises:
        TaoqError: It is none.
    """
    directory = find_artifact(str(folder))
    if directory is None:
        raise TaoqError(Fault(str(folder), "is no artifact", "name a folder that taoq wrote"))
    return directory


def name_of(model: Model) -> str:
    """Class of a network, path of a file."""
    return type(model).__name__ if isinstance(model, nn.Module) else str(model)
