# SPDX-License-Identifier: Apache-2.0
"""Check, open and name the models that are passed to the public API."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from taoq.api.config import calibration_samples, with_evaluation
from taoq.errors import Fault, SpecError, TaoqError
from taoq.pipeline.artifacts import find_artifact, read_artifact
from taoq.pipeline.experiment import Experiment
from taoq.pipeline.models import OpenedModel, fitting_artifact, open_artifact
from taoq.pipeline.supplied import Loader, Model, model_format_of, supply
from taoq.plain import JsonMapping
from taoq.quantization.backends import load_backend
from taoq.quantization.formats import FORMATS, format_of, load_format
from taoq.tasks.metrics import AnyMetric
from taoq.tasks.sections import TaskSpec

NO_NETWORK = "was made from a network of your own, which it does not contain"


def check_model(model: Model, spec: TaskSpec) -> None:
    """Raise SpecError if the backend of a spec does not quantize models of this format."""
    backend = spec.quantize.backend
    backend_format = FORMATS[load_backend(backend).capability.format]
    model_format = model_format_of(model)
    if model_format != backend_format:
        hint = f"choose {model_format.backends}"
        if backend_format.whole:
            hint += ", or make an ONNX file with taoq.export"
        kind = "an ONNX file" if model_format.whole else "a torch network"
        what = f"the model is {kind}, which {backend} does not quantize"
        raise SpecError(Fault("quantize.backend", what, hint))


def supply_float(
    model: Model,
    spec: TaskSpec,
    config: JsonMapping,
    *,
    calibration: Loader | None,
    evaluation: Loader | None,
    metric: AnyMetric | None,
) -> Experiment:
    """Return the experiment of a float model that a config quantizes; see `supply`."""
    return supply(
        model,
        with_evaluation(spec, evaluation),
        calibration=calibration,
        evaluation=evaluation,
        metric=metric,
        num_samples=calibration_samples(config),
    )


def open_model(model: Model, **data: Any) -> tuple[Experiment, OpenedModel]:
    """Open a model that is not on a device yet, and bind it to the data.

    Args:
        model: A network, the path of an ONNX file, or the folder of an artifact of an ONNX backend.
        data: Loaders and metric; see `supply`.
    """
    directory = find_artifact(str(model)) if isinstance(model, str | Path) else None
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


def artifact_folder(folder: str | Path) -> Path:
    """Return the folder of an artifact, given that folder or the payload in it.

    Raises:
        TaoqError: If the path is not an artifact.
    """
    directory = find_artifact(str(folder))
    if directory is None:
        raise TaoqError(Fault(str(folder), "is not an artifact", "name a folder that taoq wrote"))
    return directory


def name_of(model: Model) -> str:
    """Return the class name of a network, or the path of a file."""
    return type(model).__name__ if isinstance(model, nn.Module) else str(model)
