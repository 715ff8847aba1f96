# SPDX-License-Identifier: Apache-2.0
"""Open whatever a `checkpoint` field names: an artifact, or a float checkpoint."""

from __future__ import annotations

import functools
import logging
import pickle
from pathlib import Path
from typing import Any

from omegaconf.errors import OmegaConfBaseException
from torch import nn

from taoq.artifact import MANIFEST, Manifest, find_artifact, read_manifest, versions
from taoq.checkpoint import WithoutInitialisation
from taoq.errors import Fault, SpecError, TaoqError
from taoq.quantization.backends import BACKENDS, load_backend
from taoq.runtime import Runtime, TorchRuntime, torch_device
from taoq.spec import spec_from_dict
from taoq.tasks.base import Task, image_shape
from taoq.tasks.sections import RunSpec

log = logging.getLogger(__name__)


def open_runtime(task: Task[Any], spec: Any, section: RunSpec, where: str) -> Runtime:
    """The model of `evaluate` or `inference`, on its device.

    Args:
        task: The task.
        spec: Its spec.
        section: The section of the action.
        where: Name of that section.
    """
    directory = find_artifact(section.checkpoint) if section.checkpoint else None
    if section.is_quantized is False and directory is not None:
        what = f"is false, but {section.checkpoint} is a quantized artifact"
        raise SpecError(Fault(f"{where}.is_quantized", what, "leave the field out: the artifact knows"))
    manifest = read_artifact(task, spec, directory) if directory else None
    if (manifest and manifest.format == "onnx") or (not manifest and section.checkpoint.endswith(".onnx")):
        return _open_onnx(task, spec, section, where, manifest)
    if section.is_quantized and directory is None:
        what = f"{section.checkpoint} is not an artifact: there is no manifest.json beside it that names it"
        if not section.checkpoint:
            what = f"is true, but {where}.checkpoint is not given"
        raise SpecError(
            Fault(
                f"{where}.is_quantized",
                what,
                f"quantize first, or give the folder of an artifact as {where}.checkpoint",
            )
        )
    folder = Path(section.checkpoint or "-")
    if directory is None and folder.is_dir() and not (folder / "config.json").is_file():  # of Hugging Face
        what = "is a folder without a manifest.json: no artifact, or not all of it"
        raise TaoqError(Fault(section.checkpoint, what, "quantize again, or give a checkpoint file"))
    if section.device == "trt":
        raise SpecError(Fault(f"{where}.device", "trt does not run torch models", "write cuda, cuda:N or cpu"))
    device = torch_device(_device(section, where), f"{where}.device")
    if directory is None or manifest is None:
        return TorchRuntime(task.build_model(spec, section.checkpoint), task.outputs(spec), device)
    return TorchRuntime(open_artifact(task, directory, manifest), task.outputs(spec), device)


def _open_onnx(task: Task[Any], spec: Any, section: RunSpec, where: str, manifest: Manifest | None) -> Runtime:
    """An ONNX file, float or quantized, of an artifact or of anyone."""
    from taoq.onnx_file import is_quantized, read_onnx

    path = Path(section.checkpoint)
    if manifest and path.is_dir():
        path = path / manifest.payload
    model = read_onnx(path)
    if not manifest:
        check_provenance(task, spec, model, path)
    quantized = is_quantized(model)
    if section.is_quantized is not None and section.is_quantized != quantized:
        what = f"is {str(section.is_quantized).lower()}, but {path} is {'' if quantized else 'not '}quantized"
        raise SpecError(Fault(f"{where}.is_quantized", what, "leave the field out: the file knows"))
    return open_onnx(task, spec, path, _device(section, where), where=f"{where}.device", model=model)


def open_onnx(
    task: Task[Any], spec: Any, path: Path, device: str = "cpu", *, where: str = "device", model: Any = None
) -> Runtime:
    """An ONNX file for the images and outputs of a spec; the arguments are those of OnnxRuntime."""
    from taoq.onnx_runtime import OnnxRuntime

    return OnnxRuntime(path, task.outputs(spec), image_shape(task, spec), device, where=where, model=model)


def check_provenance(task: Task[Any], spec: Any, model: Any, path: Path) -> None:
    """Refuse a file that taoq exported for another task, or for a model that differs from the spec's.

    Args:
        task: The task.
        spec: The user's spec.
        model: The ONNX model.
        path: Its file.

    Raises:
        TaoqError: It was.
    """
    from taoq.onnx_file import read_properties

    properties = read_properties(model, path)
    if properties is None:
        return  # another exporter's
    if properties["task"] != task.name:
        what = f"was exported by {properties['task']}"
        raise TaoqError(Fault(str(path), what, f"run it with: taoq {properties['task']} ..."))
    task.check_same_model(spec, _stored_spec(task, properties["spec"], str(path), properties["taoq"]))


def _stored_spec(task: Task[Any], data: Any, where: str, version: str) -> Any:
    try:
        return spec_from_dict(data, task.spec)
    except OmegaConfBaseException as error:
        what = f"its spec does not fit this taoq: {str(error).splitlines()[0]}"
        raise TaoqError(Fault(where, what, f"read it with taoq {version}")) from None


def read_artifact(task: Task[Any], spec: Any, directory: Path) -> Manifest:
    """The manifest of an artifact that fits a spec.

    Raises:
        TaoqError: It is damaged, or of another task, model or taoq.
    """
    manifest = read_manifest(directory)
    if manifest.task != task.name:
        raise TaoqError(
            Fault(str(directory), f"is an artifact of {manifest.task}", f"run it with: taoq {manifest.task} ...")
        )
    stored = _stored_spec(task, manifest.spec, str(directory / MANIFEST), manifest.taoq)
    task.check_same_model(spec, stored)
    if manifest.backend not in BACKENDS:
        what = f"this taoq has no backend {manifest.backend}"
        raise TaoqError(Fault(str(directory / MANIFEST), what, f"read it with taoq {manifest.taoq}"))
    quantized = sum(1 for row in manifest.plan if row["weights"] or row["activations"])
    log.info("%s: quantized by %s, %d layers", directory, manifest.backend, quantized)
    if manifest.accuracy and not manifest.accuracy["met"]:
        what = "%s: does not meet its accuracy budget: %s fell by %.4f, %g was accepted"
        accuracy = manifest.accuracy
        log.warning(what, directory, accuracy["metric"], accuracy["drop"], accuracy["max_drop"])
    return manifest


def open_artifact(task: Task[Any], directory: Path, manifest: Manifest) -> nn.Module:
    """Rebuild a quantized torch model from its manifest alone; the spec supplies only the data."""
    backend = load_backend(manifest.backend)
    stored = spec_from_dict(manifest.spec, task.spec)
    here = versions((*backend.libraries, *task.libraries))
    changed = [
        f"{name} {then}, here {here.get(name)}" for name, then in manifest.versions.items() if here.get(name) != then
    ]
    if changed:
        log.info("%s: written with %s", directory, "; ".join(changed))
    try:
        model: nn.Module = backend.load(directory / manifest.payload, functools.partial(build_empty, task, stored))
    except pickle.UnpicklingError:
        what = "holds objects besides tensors, which taoq does not load: they could run code"
        raise TaoqError(Fault(str(directory / manifest.payload), what, "quantize again")) from None
    except (RuntimeError, KeyError, AttributeError) as error:
        if not changed:
            raise  # the libraries are those that wrote it: a bug
        what = f"does not load with these libraries: {str(error).splitlines()[0]}"
        hint = f"install the versions it was written with ({'; '.join(changed)}), or quantize again"
        raise TaoqError(Fault(str(directory / manifest.payload), what, hint)) from error
    return model


def build_empty(task: Task[Any], spec: Any) -> nn.Module:
    """A network for a payload, which holds every weight of it."""
    with WithoutInitialisation():
        return task.build_model(spec, None)


def _device(section: RunSpec, where: str) -> str:
    """The one device of a section: `gpu_ids` says which GPU `cuda` is."""
    if section.num_gpus > 1 or len(section.gpu_ids) > 1:
        what = f"num_gpus is {section.num_gpus}, gpu_ids is {section.gpu_ids}: taoq runs on one device"
        raise SpecError(Fault(f"{where}.num_gpus", what, "write num_gpus: 1 and one entry in gpu_ids"))
    if section.device == "cuda" and section.gpu_ids and section.gpu_ids[0] > 0:
        return f"cuda:{section.gpu_ids[0]}"
    return section.device
