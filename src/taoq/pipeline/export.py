# SPDX-License-Identifier: Apache-2.0
"""export: write a torch checkpoint or artifact as an ONNX file, and verify its outputs on real images."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path

import onnx
import yaml

import taoq
from taoq.errors import Fault, Notice, SpecError, TaoqError
from taoq.files import sha256, total_size
from taoq.network import OutputSpec
from taoq.pipeline.artifacts import find_artifact, versions
from taoq.pipeline.experiment import BoundPostProcess, Experiment
from taoq.pipeline.export_source import ExportSource, open_source
from taoq.pipeline.export_trace import append_postprocess, trace
from taoq.pipeline.models import OpenedModel, start
from taoq.pipeline.proof import Proof, prove, prove_postprocess
from taoq.pipeline.results.export import ExportResult
from taoq.pipeline.staging import Stage, staged
from taoq.plain import JsonObject
from taoq.quantization.formats import FORMATS, format_of
from taoq.quantization.formats.onnx.export import OPSETS
from taoq.quantization.formats.onnx.file import read_graph, read_properties, write_graph, write_properties
from taoq.quantization.formats.onnx.graph import Graph, opset
from taoq.runtimes.base import torch_device
from taoq.spec.load import spec_to_dict
from taoq.tasks.base import DeepStream
from taoq.tasks.sections import ExportSpec

log = logging.getLogger(__name__)

_ONNX = FORMATS["onnx"]
_LIBRARIES = ("torch", "onnx", "onnxruntime-gpu")


def target_of(section: ExportSpec, directory: Path) -> Path:
    """Return the path of the file to write."""
    return Path(section.onnx_file) if section.onnx_file else directory / f"model{_ONNX.suffixes[0]}"


def sized(experiment: Experiment) -> Experiment:
    """Return the experiment for the input size of the section `export`; by default that of the data.

    Raises:
        SpecError: If the network does not take inputs of this size.
    """
    section = experiment.spec.export
    if section.input_channel != 3:
        what = f"the input has {section.input_channel} channels, every network here has 3"
        raise SpecError(Fault("export.input_channel", what, "leave it out"))
    if section.input_height is None and section.input_width is None:
        return experiment
    images = [tensor for tensor in experiment.example().values() if tensor.ndim == 4]
    if experiment.with_size is None or not images:
        what = f"{experiment.task or 'this network'} has one input size"
        raise SpecError(Fault("export.input_height", what, "leave input_height and input_width out"))
    own_height, own_width = images[0].shape[2:]
    height, width = section.input_height or own_height, section.input_width or own_width
    return experiment if (height, width) == (own_height, own_width) else experiment.with_size(height, width)


def check_export(section: ExportSpec, target: Path) -> None:
    """Check an `export` section before anything is opened.

    Raises:
        SpecError: If a field is invalid.
        TaoqError: If the checkpoint does not exist.
    """
    checkpoint = section.checkpoint
    if not checkpoint:
        raise SpecError(Fault("export.checkpoint", "missing", "name a checkpoint or an artifact"))
    if not Path(checkpoint).exists():
        raise TaoqError(Fault("export.checkpoint", f"there is no {checkpoint}", "name a checkpoint or an artifact"))
    if format_of(checkpoint) == _ONNX:
        what = f"{checkpoint} is an ONNX file already"
        raise SpecError(Fault("export.checkpoint", what, "name the checkpoint it was made from"))
    check_target(section, target)


def check_target(section: ExportSpec, target: Path) -> None:
    """Check the fields of an `export` section that do not depend on the checkpoint.

    Raises:
        SpecError: If a field is invalid, or if the file must not be written.
    """
    suffix = _ONNX.suffixes[0]
    if target.suffix != suffix:
        hint = f"write {target.with_suffix(suffix)}"
        raise SpecError(Fault("export.onnx_file", f"{target} does not end in {suffix}", hint))
    first, last = OPSETS
    if not first <= section.opset_version <= last:
        what = f"torch's exporter writes opset {first} to {last}, not {section.opset_version}"
        raise SpecError(Fault("export.opset_version", what, "write 17, which every network here takes"))
    if section.postprocess and section.serialize_nvdsinfer:
        what = "DeepStream's parser reads the outputs of the network, without post-processing"
        raise SpecError(Fault("export.postprocess", what, "leave it out, or serialize_nvdsinfer"))
    if section.batch_size == 0:
        raise SpecError(Fault("export.batch_size", "0 images are no batch", "write -1 for any number of images"))
    if find_artifact(str(target)):
        what = f"{target} is the payload of an artifact"
        raise SpecError(Fault("export.onnx_file", what, "name another file"))


def export(experiment: Experiment, target: Path, *, command: str = "") -> ExportResult:
    """Export the checkpoint of the section `export`, after `check_export`.

    Args:
        experiment: The experiment, for the input size of the file; see `sized`.
        target: File to write.
        command: Command line, for the report.

    Raises:
        TaoqError: If the network cannot be exported, or if the outputs differ; the file is then not written.
    """
    section = experiment.spec.export
    origin = {"path": section.checkpoint, "sha256": sha256(Path(section.checkpoint))}
    refuse_replacement(section, target, origin["sha256"])
    if find_artifact(section.checkpoint) is None:
        experiment = experiment.of_checkpoint(section.checkpoint)
    device = "cpu" if section.on_cpu else torch_device(f"cuda:{section.gpu_id}", "export.gpu_id")
    return write_export(experiment, open_source(experiment, section), origin, target, device, command=command)


def write_export(
    experiment: Experiment,
    source: ExportSource,
    origin: Mapping[str, str],
    target: Path,
    device: str,
    *,
    command: str = "",
) -> ExportResult:
    """Trace a network, write its file, and verify the file's outputs.

    Args:
        experiment: The experiment.
        source: The network.
        origin: Path and SHA-256 of the exported checkpoint; stored in the file.
        target: File to write.
        device: Device that the network is traced on.
        command: Command line, for the report.

    Raises:
        SpecError: If the section asks for post-processing or a configuration for DeepStream, and the task has none.
        TaoqError: If the network cannot be exported, or if the outputs differ; the file is then not written.
    """
    section = experiment.spec.export
    deepstream, postprocess = _deepstream(experiment), _postprocess(experiment)
    network = trace(experiment, source, postprocess, device)
    graph = append_postprocess(network, experiment, source, postprocess) if postprocess else network
    write_properties(graph, _properties(experiment, origin))
    with staged(target.parent, target.name) as stage:
        file = stage.path / target.name
        write_graph(graph, file)
        onnx.checker.check_model(str(file), full_check=True)
        size = total_size(file)
        proof = _prove(experiment, source, postprocess, network, file)
        if deepstream:
            _write_deepstream(deepstream, experiment, target, stage)
        result = ExportResult(
            onnx_file=target,
            checkpoint=section.checkpoint,
            opset_version=opset(graph.model),
            nodes=len(graph.proto.node),
            quantized_layers=len(source.layers),
            size=size,
            inputs={
                name: OutputSpec((section.batch_size if section.batch_size > 0 else "any", *tensor.shape[1:]))
                for name, tensor in (postprocess.experiment if postprocess else experiment).example().items()
            },
            preprocessing=experiment.preprocessing(),
            proof=proof,
            versions=versions((*_LIBRARIES, *experiment.libraries)) | experiment.plugins,
            command=command,
        )
        stage.write_json(f"{target.stem}_export.json", result.to_json())
        stage.commit()
    return result


def _properties(experiment: Experiment, origin: Mapping[str, str]) -> JsonObject:
    """Return what the file stores about itself."""
    return {
        "taoq": taoq.__version__,
        "task": experiment.task,
        "source": dict(origin),
        "spec": spec_to_dict(experiment.spec),
        "preprocessing": experiment.preprocessing(),
    }


def refuse_replacement(section: ExportSpec, target: Path, source_sha256: str) -> None:
    """Refuse to overwrite a file that was not exported from the same checkpoint, unless `export.overwrite` is set.

    Raises:
        TaoqError: If the file was not exported from this checkpoint.
    """
    if section.overwrite or not target.exists():
        return
    try:
        source = (read_properties(read_graph(target), target) or {}).get("source", {})
    except TaoqError:
        source = {}  # not an ONNX file, or not exported by taoq
    if source.get("sha256") != source_sha256:
        what = f"{target} is there already, made from {source.get('path', 'something else')}"
        raise TaoqError(Fault("export.onnx_file", what, "name another file, or set export.overwrite: true"))
    log.info(Notice("export.onnx_file", f"{target} was made from the same checkpoint and will be replaced"))


def _prove(
    experiment: Experiment, source: ExportSource, postprocess: BoundPostProcess | None, network: Graph, file: Path
) -> Proof:
    """Compare a file with the torch network; one with post-processing in two steps, first without it.

    Raises:
        TaoqError: If the outputs differ.
    """
    quantized = bool(source.scales)
    graph = read_graph(file)
    if postprocess is None:
        runtime = start(experiment, OpenedModel(graph, _ONNX.name, file, quantized), "cpu", "export.on_cpu")
        return prove(experiment, source.reference, runtime, quantized=quantized)
    runtime = start(experiment, OpenedModel(network, _ONNX.name, None, quantized), "cpu", "export.on_cpu")
    proof = prove(experiment, source.reference, runtime, quantized=quantized)
    whole = start(postprocess.experiment, OpenedModel(graph, _ONNX.name, file, quantized), "cpu", "export.on_cpu")
    return dataclasses.replace(proof, outputs={**proof.outputs, **prove_postprocess(postprocess, runtime, whole)})


def _postprocess(experiment: Experiment) -> BoundPostProcess | None:
    """Return the post-processing of the task if the section asks for it.

    Raises:
        SpecError: If the task has none.
    """
    if not experiment.spec.export.postprocess:
        return None
    if experiment.postprocess is None:
        what = f"{experiment.task or 'this network'} has no post-processing: the metric takes the network's outputs"
        raise SpecError(Fault("export.postprocess", what, "leave it out"))
    return experiment.postprocess()


def _deepstream(experiment: Experiment) -> DeepStream | None:
    """Return the task's configuration for DeepStream if the section asks for one.

    Raises:
        SpecError: If the task has none.
    """
    if not experiment.spec.export.serialize_nvdsinfer:
        return None
    if experiment.deepstream is None:
        what = f"{experiment.task or 'this network'} has no configuration for DeepStream"
        raise SpecError(Fault("export.serialize_nvdsinfer", what, "leave it out"))
    return experiment.deepstream()


def _write_deepstream(deepstream: DeepStream, experiment: Experiment, target: Path, stage: Stage) -> None:
    """Write nvdsinfer_config.yaml and labels.txt for the Gst-nvinfer plugin of DeepStream."""
    (images,) = experiment.example().values()
    properties = {
        "gpu-id": 0,
        "model-color-format": 0,  # RGB
        "onnx-file": target.name,
        "labelfile-path": "labels.txt",
        "infer-dims": ";".join(map(str, images.shape[1:])),
        "batch-size": max(experiment.spec.export.batch_size, 1),
        "network-mode": 2,  # FP16 for the layers without Q/DQ nodes
        **deepstream.properties,
    }
    stage.write_text("nvdsinfer_config.yaml", yaml.safe_dump({"property": properties}, sort_keys=False))
    stage.write_text("labels.txt", deepstream.labels)
