"""Exported networks and artifacts of the examples: what they hold, what they compute, what they say of themselves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from support.graphs import tensors
from taoq.pipeline.artifacts import Artifact, read_artifact
from taoq.pipeline.experiment import Experiment, bind
from taoq.pipeline.models import open_artifact
from taoq.quantization.formats.onnx.file import read_graph, read_properties
from taoq.quantization.formats.onnx.graph import Graph
from taoq.spec.load import spec_from_dict
from taoq.tasks import load_task


def files_of(folder: Path) -> dict[str, bytes]:
    """Contents of the files of a folder, besides the log and the status."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("log.txt", "status.json")}


def random_images(count: int, size: int) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(count))


def run_onnxruntime(source: Path | Graph, images: Tensor) -> dict[str, Any]:
    """The outputs by name, computed by onnxruntime itself."""
    content = str(source) if isinstance(source, Path) else source.model.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {session.get_inputs()[0].name: images.numpy()}), strict=True))


def shape_of(value: onnx.ValueInfoProto) -> list[Any]:
    """Size of each axis of an input or output; the name of an axis of any size."""
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def module_of(node_name: str) -> str:
    """The torch module that a node comes from."""
    return node_name.removeprefix("/").rpartition("/")[0].replace("/", ".")


def layer_weights(graph: Graph) -> dict[str, Any]:
    """Weight of each Conv, Gemm and MatMul that has one, by name of the node."""
    values = tensors(graph)
    return {
        node.name: values[node.input[1]]
        for node in graph.proto.node
        if node.op_type in ("Conv", "Gemm", "MatMul") and node.input[1] in values
    }


def properties_of(file: Path) -> Mapping[str, Any]:
    """What the export wrote into a file about itself."""
    properties = read_properties(read_graph(file), file)
    assert properties is not None
    return properties


def experiment_of(file: Path) -> Experiment:
    """The experiment that a file was exported from, by what it says of itself."""
    properties = properties_of(file)
    task = load_task(properties["task"])
    return bind(task, spec_from_dict(properties["spec"], task.spec))


def exported_network(file: Path, checkpoint: Path) -> tuple[Experiment, nn.Module]:
    """The experiment that a file was exported from, and its torch network with the weights of a checkpoint."""
    experiment = experiment_of(file)
    return experiment, experiment.build(str(checkpoint)).eval()


def quantized_network(folder: Path) -> tuple[Artifact, nn.Module]:
    """An artifact of a torch backend, and its network."""
    artifact = read_artifact(folder)
    task = load_task(artifact.manifest.task)
    experiment = bind(task, spec_from_dict(artifact.manifest.spec, task.spec))
    return artifact, open_artifact(experiment, artifact).model
