# SPDX-License-Identifier: Apache-2.0
"""Open models: the float model that a backend quantizes, or the model that a `checkpoint` field names."""

from __future__ import annotations

import logging
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from taoq.checkpoint import WithoutInitialisation
from taoq.errors import Fault, Notice, SpecError, TaoqError, first_line
from taoq.pipeline.artifacts import MANIFEST, Artifact, file_of, find_artifact, read_artifact, versions
from taoq.pipeline.experiment import Experiment, restored
from taoq.plain import JsonMapping, Options
from taoq.plugins import BACKENDS
from taoq.quantization.backends import load_backend
from taoq.quantization.backends.base import Backend, M
from taoq.quantization.formats import FORMATS, format_of, load_format
from taoq.quantization.formats.base import ModelFormat
from taoq.runtimes import check_options, load_runtime
from taoq.runtimes.base import Runtime
from taoq.spec.load import StoredSpec
from taoq.tasks.sections import RunSpec

log = logging.getLogger(__name__)

_LEAVE_OUT = "leave the field out: it is read from the artifact"


@dataclass(frozen=True)
class OpenedModel:
    """A model that is not on a device yet.

    Attributes:
        model: The model, of the type of its format.
        format: Name of the format.
        path: File of the model; None for a float torch model and for a model in memory.
        quantized: Whether the model is quantized.
        artifact: Artifact that the model comes from; None for other files.
    """

    model: Any
    format: str
    path: Path | None
    quantized: bool
    artifact: Artifact | None = None


def experiment_for(experiment: Experiment, checkpoint: str) -> Experiment:
    """Return the experiment for the inputs and outputs of a file: that with post-processing if the file has it.

    Args:
        experiment: The experiment.
        checkpoint: The file, or the folder of an artifact.
    """
    if experiment.postprocess is None or not checkpoint:
        return experiment
    path = str(file_of(checkpoint))
    names = set(load_format(format_of(path).name).output_names(path))
    if set(experiment.outputs) <= names or not names:
        return experiment
    processed = experiment.postprocess().experiment
    return processed if set(processed.outputs) <= names else experiment


def open_float(experiment: Experiment, backend: Backend[M]) -> M:
    """Open the float model of a spec, in the form that its backend quantizes.

    Raises:
        TaoqError: If the model is damaged, already quantized, or takes inputs that differ from the data's.
    """
    section = experiment.spec.quantize
    model_format: ModelFormat[M] = load_format(backend.capability.format)
    model = model_format.read(section.model_path, experiment.build)
    if model_format.is_quantized(model):
        what = f"{section.model_path} is quantized already: it has QuantizeLinear or DequantizeLinear nodes"
        raise SpecError(Fault("quantize.model_path", what, "give the float file it was made from"))
    if FORMATS[model_format.name].whole:
        path = Path(section.model_path)
        check_provenance(experiment, model_format.properties(model, section.model_path), path)
        # A model that the runtime cannot run cannot be calibrated either.
        opened = OpenedModel(model, model_format.name, path, False)
        start(experiment, opened, "cpu", "quantize.device").run(experiment.example())
    return model_format.prepare(model, section.model_path)


def reopen_float(experiment: Experiment, backend: Backend[M]) -> M:
    """Read the float model again, without the checks: calibration consumed the first copy."""
    path = experiment.spec.quantize.model_path
    model_format: ModelFormat[M] = load_format(backend.capability.format)
    return model_format.prepare(model_format.read(path, experiment.build), path)


def start(
    experiment: Experiment,
    opened: OpenedModel,
    device: str,
    where: str,
    runtime: str = "auto",
    options: Options | None = None,
    section: str = "runtime",
) -> Runtime:
    """Open a runtime for a model.

    Args:
        experiment: The experiment, for its inputs and outputs.
        opened: The model.
        device: Value of the `device` field: cpu, cuda, cuda:N or trt.
        where: Field that names the device, for messages.
        runtime: Value of the `runtime` field.
        options: Value of the `runtime_kwargs` field.
        section: Section of these fields, for messages.
    """
    kind = load_runtime(opened.format, runtime, f"{section}.runtime")
    check_options(kind, options or {}, f"{section}.runtime_kwargs")
    return kind.open(opened.model, opened.path, experiment.example(), experiment.outputs, device, where, options or {})


def device_for(format_name: str, requested: str, where: str) -> str:
    """Resolve a `device` field to the device that models of a format run on."""
    return load_runtime(format_name).device(requested, where)


def open_runtime(experiment: Experiment, section: RunSpec, where: str) -> Runtime:
    """Open the model of a section and its runtime.

    Args:
        experiment: The experiment.
        section: A section with a `checkpoint`, such as `evaluate`.
        where: Name of the section.

    Raises:
        TaoqError: If the checkpoint is damaged, belongs to another task or network, or does not run.
        SpecError: If a field contradicts the checkpoint.
    """
    device = _device(section, where)
    opened = open_checkpoint(experiment, section.checkpoint, where, is_quantized=section.is_quantized)
    return start(experiment, opened, device, f"{where}.device", section.runtime, section.runtime_kwargs, where)


def open_checkpoint(
    experiment: Experiment, checkpoint: str, where: str, *, is_quantized: bool | None = None
) -> OpenedModel:
    """Open the model of a `checkpoint` field: an artifact, a float checkpoint, or a file of another format.

    Args:
        experiment: The experiment.
        checkpoint: Path of the model; empty for a network that the task builds without a checkpoint.
        where: Section of the field, for messages.
        is_quantized: Value of the `is_quantized` field; None if it is not set.

    Raises:
        TaoqError: If the checkpoint is damaged, or belongs to another task or network.
        SpecError: If `is_quantized` contradicts the checkpoint.
    """
    directory = find_artifact(checkpoint)
    if directory is not None:
        if is_quantized is False:
            what = f"is false, but {checkpoint} is a quantized artifact"
            raise SpecError(Fault(f"{where}.is_quantized", what, _LEAVE_OUT))
        return open_artifact(experiment, fitting_artifact(experiment, directory))
    info = format_of(checkpoint)
    if not info.whole:
        _check_plain_checkpoint(checkpoint, where, is_quantized=is_quantized)
        return OpenedModel(experiment.build(checkpoint), info.name, None, False)
    model_format, path = load_format(info.name), Path(checkpoint)
    model = model_format.read(checkpoint, experiment.build)
    check_provenance(experiment, model_format.properties(model, checkpoint), path)
    quantized = model_format.is_quantized(model)
    if is_quantized is not None and is_quantized != quantized:
        what = f"is {str(is_quantized).lower()}, but {path} is {'' if quantized else 'not '}quantized"
        raise SpecError(Fault(f"{where}.is_quantized", what, "leave the field out: the file knows"))
    return OpenedModel(model, info.name, path, quantized)


def _check_plain_checkpoint(checkpoint: str, where: str, *, is_quantized: bool | None) -> None:
    """Refuse a torch checkpoint that a spec calls quantized, and a folder that is not an artifact."""
    if is_quantized:
        what = f"{checkpoint} is not an artifact: there is no manifest.json beside it that names it"
        if not checkpoint:
            what = f"is true, but {where}.checkpoint is not given"
        hint = f"quantize first, or give the folder of an artifact as {where}.checkpoint"
        raise SpecError(Fault(f"{where}.is_quantized", what, hint))
    folder = Path(checkpoint or "-")
    if folder.is_dir() and not (folder / "config.json").is_file():  # Hugging Face models have one.
        what = "is a folder without a manifest.json: it is not an artifact, or not a complete one"
        raise TaoqError(Fault(checkpoint, what, "quantize again, or give a checkpoint file"))


def fitting_artifact(experiment: Experiment, directory: Path) -> Artifact:
    """Read an artifact and check that it was made for the task and the network of an experiment.

    Raises:
        TaoqError: If the artifact is damaged, or was made for another task or network or with an unknown backend.
    """
    artifact = read_artifact(directory)
    manifest = artifact.manifest
    if manifest.task != experiment.task:
        what, hint = f"is an artifact of {manifest.task}", f"run it with: taoq {manifest.task} ..."
        if not manifest.task:
            what, hint = "was made through the Python API", "open it with taoq.load(folder, model)"
        raise TaoqError(Fault(str(directory), what, hint))
    restored(experiment, artifact.stored_spec)
    if manifest.backend not in BACKENDS.rows():
        what = f"this taoq has no backend {manifest.backend}"
        raise TaoqError(Fault(str(directory / MANIFEST), what, f"read it with taoq {manifest.taoq}"))
    what = f"quantized by {manifest.backend}, {manifest.layers_quantized} layers"
    log.info(Notice(str(directory), what))
    if manifest.accuracy and not manifest.accuracy["met"]:
        accuracy = manifest.accuracy
        what = (
            f"does not meet its accuracy budget: {accuracy['metric']} fell by {accuracy['drop']:.4f},"
            f" {accuracy['max_drop']:g} was accepted"
        )
        log.warning(Notice(str(directory), what))
    return artifact


def open_artifact(experiment: Experiment, artifact: Artifact) -> OpenedModel:
    """Rebuild a quantized model from its manifest alone; the experiment's own spec supplies only the data.

    Raises:
        TaoqError: If the payload contains pickled objects other than tensors, or does not load with the installed
            libraries.
    """
    manifest = artifact.manifest
    backend = load_backend(manifest.backend)
    stored = experiment.restore(artifact.stored_spec)
    installed = versions((*backend.capability.libraries, *experiment.libraries)) | experiment.plugins
    changed = [
        f"{name} {version}, here {installed.get(name)}"
        for name, version in manifest.versions.items()
        if installed.get(name) != version
    ]
    if changed:
        log.info(Notice(str(artifact.directory), f"written with {'; '.join(changed)}"))
    try:
        model = backend.load(artifact.payload, lambda: build_empty(stored))
    except pickle.UnpicklingError:
        what = "holds objects besides tensors, which taoq does not load: they could run code"
        raise TaoqError(Fault(str(artifact.payload), what, "quantize again")) from None
    except (RuntimeError, KeyError, AttributeError) as error:
        if not experiment.task:
            what = f"does not fit this network: {str(error).splitlines()[-1].strip()}"
            raise TaoqError(Fault(str(artifact.payload), what, "give the network that was quantized")) from error
        if not changed:
            raise  # The libraries are the ones that wrote the payload, so this is a bug.
        what = f"does not load with these libraries: {first_line(error)}"
        hint = f"install the versions it was written with ({'; '.join(changed)}), or quantize again"
        raise TaoqError(Fault(str(artifact.payload), what, hint)) from error
    return OpenedModel(model, backend.capability.format, artifact.payload, True, artifact)


def build_empty(experiment: Experiment) -> nn.Module:
    """Build a network without initializing its weights, for a payload that has all of them."""
    with WithoutInitialisation():
        return experiment.build(None)


def check_provenance(experiment: Experiment, properties: JsonMapping | None, path: Path) -> None:
    """Check that a file which taoq exported belongs to the task and the network of an experiment.

    Args:
        experiment: The experiment.
        properties: Metadata that `taoq export` wrote into the file; None for any other file.
        path: The file.

    Raises:
        TaoqError: If the file was exported for another task or network.
    """
    if properties is None:
        return
    if properties["task"] != experiment.task:
        what = f"was exported by {properties['task'] or 'the Python API'}"
        hint = f"run it with: taoq {properties['task']} ..." if properties["task"] else "use the Python API"
        raise TaoqError(Fault(str(path), what, hint))
    restored(experiment, StoredSpec(properties["spec"], str(path), properties["taoq"]))


def _device(section: RunSpec, where: str) -> str:
    """Return the device of a section, where `gpu_ids` selects the GPU that `cuda` stands for."""
    if section.num_gpus > 1 or len(section.gpu_ids) > 1:
        what = f"num_gpus is {section.num_gpus}, gpu_ids is {section.gpu_ids}: taoq runs on one device"
        raise SpecError(Fault(f"{where}.num_gpus", what, "write num_gpus: 1 and one entry in gpu_ids"))
    if section.device == "cuda" and section.gpu_ids and section.gpu_ids[0] > 0:
        return f"cuda:{section.gpu_ids[0]}"
    return section.device
