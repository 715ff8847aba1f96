# SPDX-License-Identifier: Apache-2.0
"""Open models: the float model of a backend, an artifact, or whatever a `checkpoint` field names."""

from __future__ import annotations

import logging
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from taoq.checkpoint import WithoutInitialisation
from taoq.errors import Fault, Notice, SpecError, TaoqError, first_line
from taoq.pipeline.artifacts import MANIFEST, Artifact, find_artifact, read_artifact, versions
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

_LEAVE_OUT = "leave the field out: the artifact knows"


@dataclass(frozen=True)
class OpenedModel:
    """A model that is not on a device yet.

    Attributes:
        model: The model in its format.
        format: Name of the format.
        path: Its file; None if it has none.
        quantized: Whether it is quantized.
        artifact: The artifact that it comes from; None for other files.
    """

    model: Any
    format: str
    path: Path | None
    quantized: bool
    artifact: Artifact | None = None


def open_float(experiment: Experiment, backend: Backend[M]) -> M:
    """The float model of a spec, in the form that its backend quantizes.

    Raises:
        TaoqError: It is damaged, or quantized already, or takes other inputs than the data.
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
        # what the runtime cannot run, no library can calibrate
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
    """Make a model ready to run.

    Args:
        experiment: The experiment, for its inputs and outputs.
        opened: The model.
        device: As in a spec.
        where: The field that names the device, for messages.
        runtime: Value of the field `runtime`.
        options: Value of the field `runtime_kwargs`.
        section: The section of these fields, for messages.
    """
    kind = load_runtime(opened.format, runtime, f"{section}.runtime")
    check_options(kind, options or {}, f"{section}.runtime_kwargs")
    return kind.open(opened.model, opened.path, experiment.example(), experiment.outputs, device, where, options or {})


def device_for(format_name: str, requested: str, where: str) -> str:
    """The device of this machine that models of a format run on."""
    return load_runtime(format_name).device(requested, where)


def open_runtime(experiment: Experiment, section: RunSpec, where: str) -> Runtime:
    """The model of a section that runs one, ready to run.

    Args:
        experiment: The experiment.
        section: The section.
        where: Name of the section.

    Raises:
        TaoqError: The checkpoint is damaged, or of another task or network, or does not run.
        SpecError: A field contradicts what the checkpoint is.
    """
    opened = open_checkpoint(experiment, section.checkpoint, where, is_quantized=section.is_quantized)
    device = _device(section, where)
    return start(experiment, opened, device, f"{where}.device", section.runtime, section.runtime_kwargs, where)


def open_checkpoint(
    experiment: Experiment, checkpoint: str, where: str, *, is_quantized: bool | None = None
) -> OpenedModel:
    """Open whatever a `checkpoint` field names: an artifact, a float checkpoint, or a file of another format.

    Args:
        experiment: The experiment.
        checkpoint: The path; empty for a network that its task builds without one.
        where: The section, for messages.
        is_quantized: What a spec says about it; None says nothing.
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
    """Refuse a torch checkpoint that a spec calls quantized, and a folder that is no artifact."""
    if is_quantized:
        what = f"{checkpoint} is not an artifact: there is no manifest.json beside it that names it"
        if not checkpoint:
            what = f"is true, but {where}.checkpoint is not given"
        hint = f"quantize first, or give the folder of an artifact as {where}.checkpoint"
        raise SpecError(Fault(f"{where}.is_quantized", what, hint))
    folder = Path(checkpoint or "-")
    if folder.is_dir() and not (folder / "config.json").is_file():  # of Hugging Face
        what = "is a folder without a manifest.json: no artifact, or not all of it"
        raise TaoqError(Fault(checkpoint, what, "quantize again, or give a checkpoint file"))


def fitting_artifact(experiment: Experiment, directory: Path) -> Artifact:
    """Read an artifact that fits an experiment.

    Raises:
        TaoqError: It is damaged, or of another task, network or taoq.
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
        TaoqError: Its payload holds code, or does not load with the libraries of this machine.
    """
    manifest = artifact.manifest
    backend = load_backend(manifest.backend)
    stored = experiment.restore(artifact.stored_spec)
    here = versions((*backend.capability.libraries, *experiment.libraries)) | experiment.plugins
    changed = [
        f"{name} {then}, here {here.get(name)}" for name, then in manifest.versions.items() if here.get(name) != then
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
            raise  # the libraries are those that wrote it: a bug
        what = f"does not load with these libraries: {first_line(error)}"
        hint = f"install the versions it was written with ({'; '.join(changed)}), or quantize again"
        raise TaoqError(Fault(str(artifact.payload), what, hint)) from error
    return OpenedModel(model, backend.capability.format, artifact.payload, True, artifact)


def build_empty(experiment: Experiment) -> nn.Module:
    """A network for a payload that holds every weight of it."""
    with WithoutInitialisation():
        return experiment.build(None)


def check_provenance(experiment: Experiment, properties: JsonMapping | None, path: Path) -> None:
    """Refuse a file that taoq exported for another task, or for a network that differs from the spec's.

    Args:
        experiment: The experiment.
        properties: What taoq's export wrote into the file; None for any other file.
        path: The file.

    Raises:
        TaoqError: It was exported for another task or network.
    """
    if properties is None:
        return
    if properties["task"] != experiment.task:
        what = f"was exported by {properties['task'] or 'the Python API'}"
        hint = f"run it with: taoq {properties['task']} ..." if properties["task"] else "use the Python API"
        raise TaoqError(Fault(str(path), what, hint))
    restored(experiment, StoredSpec(properties["spec"], str(path), properties["taoq"]))


def _device(section: RunSpec, where: str) -> str:
    """The one device of a section: `gpu_ids` says which GPU `cuda` is."""
    if section.num_gpus > 1 or len(section.gpu_ids) > 1:
        what = f"num_gpus is {section.num_gpus}, gpu_ids is {section.gpu_ids}: taoq runs on one device"
        raise SpecError(Fault(f"{where}.num_gpus", what, "write num_gpus: 1 and one entry in gpu_ids"))
    if section.device == "cuda" and section.gpu_ids and section.gpu_ids[0] > 0:
        return f"cuda:{section.gpu_ids[0]}"
    return section.device
