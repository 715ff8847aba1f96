"""Small ONNX graphs of the contract tests, and the road from rules to a quantized graph without the command line."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from networks import Untouched, backend_of, seeded
from onnx import numpy_helper
from torch import Tensor, nn

from taoq.onnx_export import export_graph
from taoq.quantization.backends import onnx_layers
from taoq.quantization.backends.base import Inputs, verify
from taoq.quantization.plan import QuantizationPlan, check, resolve
from taoq.quantization.ranges import RangeCache
from taoq.quantization.spec import LayerSpec, QuantizeSpec, TensorSpec

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


@functools.cache
def _exported(build: type[nn.Module], *, size: int, batch: int | None) -> bytes:
    example = {"image": torch.zeros(batch or 2, 3, size, size)}
    model = export_graph(seeded(build), example, ["scores"], opset=19, dynamic=batch is None, fold=True)
    return onnx_layers.prepare(model, "model.onnx").SerializeToString(deterministic=True)


def branches(batch: int | None = None) -> onnx.ModelProto:
    """Branches for images of 8 x 8, prepared, always the same; without a batch of its own it takes any."""
    return onnx.ModelProto.FromString(_exported(Branches, size=8, batch=batch))


def heavy() -> onnx.ModelProto:
    """Heavy, prepared."""
    return onnx.ModelProto.FromString(_exported(Heavy, size=8, batch=None))


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


def section_of(backend: str, layers: Sequence[LayerSpec], **fields: Any) -> QuantizeSpec:
    return QuantizeSpec(backend=backend, mode="static_ptq", layers=list(layers), device="cpu", **fields)


def plan_of(
    backend: str,
    model: onnx.ModelProto,
    layers: Sequence[LayerSpec],
    options: Mapping[str, Any] | None = None,
    **fields: Any,
) -> QuantizationPlan:
    library, section = backend_of(backend), section_of(backend, layers, **fields)
    return resolve(section, library.layers(model, options or {}), library.support, check(section, library.support))


def quantize(
    backend: str,
    model: onnx.ModelProto,
    layers: Sequence[LayerSpec],
    batches: Iterable[Inputs] = Untouched(),
    options: Mapping[str, Any] | None = None,
    cache: RangeCache | None = None,
    **fields: Any,
) -> onnx.ModelProto:
    """Plan, quantize a copy, and verify that the library did what the plan says, as the action does."""
    plan = plan_of(backend, model, layers, options, **fields)
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    found, left_out = (
        backend_of(backend).calibrate(copy, plan, batches, options or {}, device="cpu", cache=cache).quantize(plan)
    )
    assert not left_out
    verify(plan, backend_of(backend).applied(found))
    return found


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    (found,) = (node for node in model.graph.node if node.name == name)
    return found


def tensors(model: onnx.ModelProto) -> dict[str, Any]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def made_by(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in model.graph.node for name in node.output}


def dequantized_inputs(model: onnx.ModelProto) -> dict[str, list[int]]:
    """Which of the first two inputs of each layer come from a DequantizeLinear: an own reading, without `applied`."""
    makers = made_by(model)
    found = {}
    for item in model.graph.node:
        if item.op_type in onnx_layers.TYPES:
            sources = [makers.get(name) for name in item.input[:2]]
            indices = [index for index, source in enumerate(sources) if source and source.op_type == "DequantizeLinear"]
            if indices:
                found[item.name] = indices
    return found


def input_scale(model: onnx.ModelProto, name: str) -> float:
    """Scale of a layer's quantized input."""
    dequantize = made_by(model)[node(model, name).input[0]]
    return float(tensors(model)[dequantize.input[1]])


def weight_parts(model: onnx.ModelProto, name: str) -> tuple[Any, Any]:
    """Stored numbers and scales of a layer's quantized weight."""
    dequantize, values = made_by(model)[node(model, name).input[1]], tensors(model)
    return values[dequantize.input[0]], values[dequantize.input[1]]


def run(model: onnx.ModelProto, images: Tensor) -> Any:
    """The first output; at the level at which onnxruntime has kernels for float8."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {model.graph.input[0].name: images.numpy()})[0]


def error(result: Any, reference: Any) -> float:
    """Relative error in the l2 norm."""
    return float(np.linalg.norm(result - reference) / np.linalg.norm(reference))


def bytes_of(model: onnx.ModelProto) -> bytes:
    return model.SerializeToString(deterministic=True)


def saved(backend: str, model: onnx.ModelProto, path: Path, options: Mapping[str, Any] | None = None) -> Path:
    backend_of(backend).save(model, path, options or {})
    return path
