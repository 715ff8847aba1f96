"""Small ONNX graphs, and the road from rules to a quantized graph without the command line."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from support.networks import Untouched, backend_of, calibrate, plan_of, quantize_corrected, seeded
from taoq.network import Inputs, OutputSpec
from taoq.quantization.formats.onnx import layers as onnx_layers
from taoq.quantization.formats.onnx.export import export_graph
from taoq.quantization.formats.onnx.file import read_graph
from taoq.quantization.formats.onnx.graph import Graph
from taoq.quantization.plan import verify
from taoq.quantization.ranges import RangeCache
from taoq.quantization.spec import LayerSpec, TensorSpec
from taoq.runtimes.onnxruntime import RUNTIME

__all__ = ["plan_of"]

MODELOPT, ORT = "modelopt.onnx", "onnxruntime"


class Branches(nn.Module):
    """A stem of three channels, two convolutions that read its output, one behind each, MatMul and Gemm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.left = nn.Conv2d(32, 32, 3, padding=1)
        self.right = nn.Conv2d(32, 32, 3, padding=1)
        self.tokens = nn.Linear(32, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, image: Tensor) -> Tensor:
        features = torch.relu(self.stem(image))
        joined = torch.relu(self.left(features)) + self.right(features)
        tokens = torch.relu(self.tokens(joined.flatten(2).transpose(1, 2)))
        return self.head(tokens.mean(1))


class Heavy(nn.Module):
    """Almost all of it is one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(192, 1024)

    def forward(self, image: Tensor) -> Tensor:
        return self.fc(image.flatten(1))


LAYERS = {
    "stem": "/stem/Conv",
    "left": "/left/Conv",
    "right": "/right/Conv",
    "tokens": "/tokens/MatMul",
    "head": "/head/Gemm",
}
"""Node names of Branches, by module."""


def exported(network: nn.Module, example: Tensor, *, dynamic: bool = True) -> Graph:
    """A network as a prepared graph; its input is `image`, its output `scores`."""
    graph = export_graph(network, {"image": example}, ["scores"], opset=19, dynamic=dynamic, fold=True)
    return onnx_layers.prepare(graph, "model.onnx")


@functools.cache
def _exported(build: type[nn.Module], *, size: int, batch: int | None) -> bytes:
    graph = exported(seeded(build), torch.zeros(batch or 2, 3, size, size), dynamic=batch is None)
    return bytes_of(graph)


def branches(batch: int | None = None) -> Graph:
    """Branches for images of 8 x 8, prepared, always the same; without a batch of its own it takes any."""
    return Graph(onnx.ModelProto.FromString(_exported(Branches, size=8, batch=batch)))


def heavy() -> Graph:
    """Heavy, prepared."""
    return Graph(onnx.ModelProto.FromString(_exported(Heavy, size=8, batch=None)))


def pictures(count: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def feed(*tensors: Tensor) -> list[Inputs]:
    return [{"image": tensor} for tensor in tensors]


def rule(pattern: str, weights: str = "int8", activations: str | None = "int8", axis: int | None = None) -> LayerSpec:
    """A rule; a dtype of None says nothing."""
    return LayerSpec(
        module_name=pattern,
        weights=TensorSpec(dtype=weights, quant_axis=axis),
        activations=TensorSpec(dtype=activations) if activations else None,
    )


def quantize(
    backend: str,
    graph: Graph,
    layers: Sequence[LayerSpec],
    batches: Iterable[Inputs] = Untouched(),
    options: Mapping[str, Any] | None = None,
    cache: RangeCache | None = None,
    **fields: Any,
) -> Graph:
    """Plan, quantize a copy, and verify that the library did what the plan says, as the pipeline does."""
    plan = plan_of(backend, graph.copy(), list(layers), options, **fields)
    ready = calibrate(backend, graph.copy(), plan, batches, options=options, cache=cache)
    assert not ready.left_out(plan)
    found = ready.quantize(plan)
    verify(plan, backend_of(backend).applied(found))
    return found


def corrected(backend: str, graph: Graph, layers: Sequence[LayerSpec], batches: Iterable[Inputs], **more: Any) -> Graph:
    """The same with corrected biases; the result is a valid graph."""
    found = quantize_corrected(backend, graph.copy, list(layers), batches, **more)
    onnx.checker.check_model(found.model, full_check=True)
    return found


def node(model: Graph, name: str) -> onnx.NodeProto:
    (found,) = (node for node in model.proto.node if node.name == name)
    return found


def tensors(model: Graph) -> dict[str, Any]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.proto.initializer}


def made_by(model: Graph) -> dict[str, onnx.NodeProto]:
    return {name: node for node in model.proto.node for name in node.output}


def dequantized_inputs(model: Graph) -> dict[str, list[int]]:
    """Which of the first two inputs of each layer come from a DequantizeLinear: an own reading, without `applied`."""
    makers = made_by(model)
    found = {}
    for item in model.proto.node:
        if item.op_type in onnx_layers.TYPES:
            sources = [makers.get(name) for name in item.input[:2]]
            indices = [index for index, source in enumerate(sources) if source and source.op_type == "DequantizeLinear"]
            if indices:
                found[item.name] = indices
    return found


def input_scale(model: Graph, name: str) -> float:
    """Scale of a layer's quantized input."""
    dequantize = made_by(model)[node(model, name).input[0]]
    return float(tensors(model)[dequantize.input[1]])


def weight_parts(model: Graph, name: str) -> tuple[Any, Any]:
    """Stored numbers and scales of a layer's quantized weight."""
    dequantize, values = made_by(model)[node(model, name).input[1]], tensors(model)
    return values[dequantize.input[0]], values[dequantize.input[1]]


def run(model: Graph, images: Tensor) -> Any:
    """The first output; at the level at which onnxruntime has kernels for float8."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = onnxruntime.InferenceSession(model.model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {model.proto.input[0].name: images.numpy()})[0]


def run_file(path: Path, images: Tensor) -> Any:
    """The first output of a file, as the runtime of taoq runs it."""
    runtime = RUNTIME.open(
        read_graph(path), path, {"image": images[:1]}, {"scores": OutputSpec(("N", 10))}, "cpu", "device", {}
    )
    return runtime.run({"image": images})["scores"].numpy()


def error(result: Any, reference: Any) -> float:
    """Relative error in the l2 norm."""
    return float(np.linalg.norm(result - reference) / np.linalg.norm(reference))


def bytes_of(model: Graph) -> bytes:
    return model.model.SerializeToString(deterministic=True)


def saved(backend: str, model: Graph, path: Path, options: Mapping[str, Any] | None = None) -> Path:
    backend_of(backend).save(model, path, options or {})
    return path
