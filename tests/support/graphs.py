"""Small ONNX graphs, and quantizing them from rules without the command line."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
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
VARIANTS = ((MODELOPT, "int8"), (MODELOPT, "fp8_e4m3fn"), (ORT, "int8"))
every_onnx_variant = pytest.mark.parametrize(
    ("backend", "dtype"), VARIANTS, ids=[" ".join(variant) for variant in VARIANTS]
)
every_onnx_backend = pytest.mark.parametrize("backend", [MODELOPT, ORT])


class Branches(nn.Module):
    """A convolution of three channels, two convolutions that read its output, a MatMul and a Gemm."""

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
    """A single linear layer, whose weight is almost the whole file."""

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
"""Node names of Branches by module."""


def exported(network: nn.Module, example: Tensor, *, dynamic: bool = True) -> Graph:
    """Export a network as a prepared graph with the input `image` and the output `scores`."""
    graph = export_graph(network, {"image": example}, ["scores"], opset=19, dynamic=dynamic, fold=True)
    return onnx_layers.prepare(graph, "model.onnx")


@functools.cache
def _exported(build: type[nn.Module], *, size: int, batch: int | None) -> bytes:
    graph = exported(seeded(build), torch.zeros(batch or 2, 3, size, size), dynamic=batch is None)
    return bytes_of(graph)


def branches(batch: int | None = None) -> Graph:
    """Branches for images of 8 x 8, prepared, always the same; of a fixed batch size, or of any."""
    return Graph(onnx.ModelProto.FromString(_exported(Branches, size=8, batch=batch)))


def heavy() -> Graph:
    """Heavy, prepared."""
    return Graph(onnx.ModelProto.FromString(_exported(Heavy, size=8, batch=None)))


def pictures(count: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def feed(*tensors: Tensor) -> list[Inputs]:
    return [{"image": tensor} for tensor in tensors]


def rule(pattern: str, weights: str = "int8", activations: str | None = "int8", axis: int | None = None) -> LayerSpec:
    """A rule; without activations if their dtype is None."""
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
    calibrated = calibrate(backend, graph.copy(), plan, batches, options=options, cache=cache)
    assert not calibrated.left_out(plan)
    quantized = calibrated.quantize(plan)
    verify(plan, backend_of(backend).applied(quantized))
    return quantized


def corrected(backend: str, graph: Graph, layers: Sequence[LayerSpec], batches: Iterable[Inputs], **more: Any) -> Graph:
    """Quantize a copy with corrected biases, and check that the result is a valid graph."""
    quantized = quantize_corrected(backend, graph.copy, list(layers), batches, **more)
    onnx.checker.check_model(quantized.model, full_check=True)
    return quantized


def node(model: Graph, name: str) -> onnx.NodeProto:
    """The node of a name."""
    (match,) = (node for node in model.proto.node if node.name == name)
    return match


def tied(index: int) -> Graph:
    """Branches whose left and right share their weight (1) or their bias (2), as exporters store equal tensors once."""
    model = branches()
    node(model, "/right/Conv").input[index] = node(model, "/left/Conv").input[index]
    return Graph(model.model)


def tensors(model: Graph) -> dict[str, Any]:
    """Stored tensors by name."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.proto.initializer}


def made_by(model: Graph) -> dict[str, onnx.NodeProto]:
    """The node that computes each tensor, by the name of the tensor."""
    return {name: node for node in model.proto.node for name in node.output}


def dequantized_inputs(model: Graph) -> dict[str, list[int]]:
    """Which of the first two inputs of each layer come from a DequantizeLinear; read without taoq's `applied`."""
    makers = made_by(model)
    dequantized = {}
    for layer in model.proto.node:
        if layer.op_type in onnx_layers.TYPES:
            sources = [makers.get(name) for name in layer.input[:2]]
            indices = [index for index, source in enumerate(sources) if source and source.op_type == "DequantizeLinear"]
            if indices:
                dequantized[layer.name] = indices
    return dequantized


def input_scale(model: Graph, name: str) -> float:
    """Scale of a layer's quantized input."""
    dequantize = made_by(model)[node(model, name).input[0]]
    return float(tensors(model)[dequantize.input[1]])


def input_scales(model: Graph) -> dict[str, float]:
    """Scales of all the quantized inputs of layers."""
    return {name: input_scale(model, name) for name, indices in dequantized_inputs(model).items() if 0 in indices}


def weight_of(model: Graph, name: str) -> Any:
    """The weight of a layer that is not quantized."""
    return tensors(model)[node(model, name).input[1]]


def weight_parts(model: Graph, name: str) -> tuple[Any, Any]:
    """Stored values and scales of a layer's quantized weight."""
    dequantize, values = made_by(model)[node(model, name).input[1]], tensors(model)
    return values[dequantize.input[0]], values[dequantize.input[1]]


def run(model: Graph, images: Tensor) -> Any:
    """The first output; computed at the optimization level at which onnxruntime has float8 kernels."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = onnxruntime.InferenceSession(model.model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {model.proto.input[0].name: images.numpy()})[0]


def run_file(path: Path, images: Tensor) -> Any:
    """The output of a file of Branches, as taoq's runtime computes it."""
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
