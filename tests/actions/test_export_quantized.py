"""`export` of artifacts of torch backends: Q/DQ graphs with their very numbers, and float files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from support.commands import Taoq, Words, read_json, rules
from support.examples import CHECKPOINTS
from support.exported import (
    files_of,
    layer_weights,
    module_of,
    properties_of,
    quantized_network,
    random_images,
    run_onnxruntime,
)
from support.graphs import made_by, tensors
from taoq.files import sha256
from taoq.quantization.backends import load_backend
from taoq.quantization.formats.onnx.file import read_graph
from taoq.quantization.formats.onnx.graph import Graph

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """The folder that `quantize` writes."""
    return tmp_path / "results" / "quantize"


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    """The file that `export` writes."""
    return tmp_path / "results" / "export" / "model.onnx"


def stored_numbers(graph: Graph) -> dict[str, tuple[Any, Any, Any]]:
    """Numbers and scale of the weight, and scale of the input, of each quantized layer, by its module."""
    makers, values = made_by(graph), tensors(graph)
    stored = {}
    for node in graph.proto.node:
        weight, images = (makers.get(name) for name in node.input[1::-1]) if len(node.input) > 1 else (None, None)
        if node.op_type in ("Conv", "Gemm", "MatMul") and weight is not None and weight.op_type == "DequantizeLinear":
            assert images is not None
            assert images.op_type == "DequantizeLinear"
            assert makers[images.input[0]].op_type == "QuantizeLinear"
            numbers, scale = values[weight.input[0]], values[weight.input[1]]
            if node.op_type == "MatMul":
                numbers = numbers.T
            stored[module_of(node.name)] = (numbers, scale, values[images.input[1]])
    return stored


def rules_for(dtype: str, *patterns: str) -> str:
    """An override that quantizes weights and activations of the layers of several patterns."""
    tensors = f"weights: {{dtype: {dtype}}}, activations: {{dtype: {dtype}}}"
    return f"quantize.layers=[{', '.join(f'{{module_name: {pattern!r}, {tensors}}}' for pattern in patterns)}]"


ARTIFACTS = {
    "resnet_18 int8": ("resnet_18", "int8", "int8", ("Conv2d", "Linear"), 22),
    "resnet_18 fp8": ("resnet_18", "fp8_e4m3fn", "float8_e4m3fn", ("Conv2d", "Linear"), 22),
    "vit_tiny int8": ("vit_tiny", "int8", "int8", ("blocks.[0]*", "head"), 5),
    "detector int8": ("detector", "int8", "int8", ("Conv2d",), 46),
}
"""Network, format, numpy's name of the format, patterns of the quantized layers, number of the quantized layers."""


@pytest.mark.parametrize("case", ARTIFACTS)
def test_an_artifact_of_modelopt_becomes_a_graph_with_its_very_numbers(
    taoq: Taoq,
    network_words: Words,
    export_network: Words,
    metrics: Callable[[str, Path], dict[str, float]],
    artifact: Path,
    model_file: Path,
    case: str,
) -> None:
    network, dtype, numpy_name, patterns, count = ARTIFACTS[case]
    options = [rules_for(dtype, *patterns), "quantize.calibration.num_samples=8"]
    assert taoq(*network_words("quantize", network, *options))[0] == 0
    code, out, err = taoq(*export_network(network, f"export.checkpoint={artifact}"))
    assert (code, err) == (
        0,
        f"{artifact}: quantized by modelopt.pytorch, {count} layers\n"
        "export.opset_version: a quantized graph needs 19; 17 is not enough\n",
    )
    assert f" nodes, {count} layers quantized, input [any, 3, " in out
    report = read_json(model_file.with_name("model_export.json"))
    assert (report["opset_version"], report["quantized_layers"], report["proof"]["tolerance"]) == (19, count, 0.1)

    onnx.checker.check_model(str(model_file), full_check=True)
    stored = stored_numbers(read_graph(model_file))
    quantized, net = quantized_network(artifact)
    state, _ = load_backend(quantized.manifest.backend).dequantized(net)
    assert set(stored) == {row["layer"] for row in quantized.manifest.plan if row["weights"]}
    assert len(stored) == count
    largest = 127 if dtype == "int8" else 448
    for module, (numbers, scale, input_scale) in stored.items():
        layer = net.get_submodule(module)
        assert numbers.dtype.name == numpy_name
        assert np.array_equal(scale, layer.weight_quantizer.amax.flatten().numpy() / np.float32(largest))
        assert input_scale == layer.input_quantizer.amax.numpy() / np.float32(largest)
        stored_by_torch = layer.weight.as_subclass(torch.Tensor)
        in_the_file = torch.from_numpy(numbers.astype(np.float32))
        assert torch.equal(in_the_file, stored_by_torch.float())
        weight = state[f"{module}.weight"]
        rebuilt = in_the_file * torch.tensor(scale).reshape(-1, *[1] * (weight.ndim - 1))
        torch.testing.assert_close(rebuilt, weight, rtol=1e-6, atol=0)

    figure = "val_mAP" if network == "detector" else "val_acc_1"
    in_torch, in_onnx = (metrics(network, checkpoint)[figure] for checkpoint in (artifact, model_file))
    assert in_torch > 0.8
    assert abs(in_torch - in_onnx) < 0.005


def test_an_artifact_of_torchao_has_only_a_float_graph(
    taoq: Taoq, network_words: Words, export_network: Words, artifact: Path, model_file: Path
) -> None:
    options = ["quantize.backend=torchao", "quantize.mode=weight_only_ptq", rules("int8", "Linear", activations=False)]
    assert taoq(*network_words("quantize", "vit_tiny", *options))[0] == 0
    code, _, err = taoq(*export_network("vit_tiny", f"export.checkpoint={artifact}"))
    assert (code, err) == (
        2,
        f"{artifact}: quantized by torchao, 25 layers\n"
        f"override export.checkpoint={artifact}: export.checkpoint: torchao quantizes weights in a way that ONNX has no"
        " operator for\n"
        "hint: set export.dequantize: true for a float file with these weights, or quantize the float ONNX file\n",
    )
    assert not files_of(model_file.parent)

    code, _, err = taoq(*export_network("vit_tiny", f"export.checkpoint={artifact}", "export.dequantize=true"))
    assert (code, err) == (
        0,
        f"{artifact}: quantized by torchao, 25 layers\n"
        "warning: override export.dequantize=true: export.dequantize: the file has plain float32 weights, with the"
        " values of the quantized ones\n",
    )
    graph = read_graph(model_file)
    assert not {node.op_type for node in graph.proto.node} & {"QuantizeLinear", "DequantizeLinear"}
    assert graph.model.opset_import[0].version == 17
    _, net = quantized_network(artifact)
    for name, weight in layer_weights(graph).items():
        module = net.get_submodule(module_of(name))
        value = module.weight.dequantize() if isinstance(module, nn.Linear) else module.weight
        assert np.array_equal(weight.T if "/MatMul" in name else weight, value.numpy())
    images = random_images(4, 32)
    with torch.inference_mode():
        np.testing.assert_allclose(run_onnxruntime(graph, images)["output"], net(images).numpy(), atol=1e-4)
    assert properties_of(model_file)["source"] == {"path": str(artifact), "sha256": sha256(artifact)}


def test_a_dequantized_artifact_of_modelopt_is_a_float_file(
    taoq: Taoq,
    network_words: Words,
    export_network: Words,
    artifact: Path,
    model_file: Path,
) -> None:
    assert taoq(*network_words("quantize", "resnet_18", "quantize.calibration.num_samples=4"))[0] == 0
    assert taoq(*export_network("resnet_18", f"export.checkpoint={artifact}", "export.dequantize=true"))[0] == 0
    graph = read_graph(model_file)
    assert not {node.op_type for node in graph.proto.node} & {
        "QuantizeLinear", "DequantizeLinear", "BatchNormalization",
    }  # fmt: skip
    quantized, net = quantized_network(artifact)
    state, _ = load_backend(quantized.manifest.backend).dequantized(net)
    exported = layer_weights(graph)["/fc/Gemm"]
    assert np.array_equal(exported, state["fc.weight"].numpy())
    assert not np.array_equal(exported, load_file(CHECKPOINTS["resnet_18"])["fc.weight"])
    report = read_json(model_file.with_name("model_export.json"))
    assert (report["quantized_layers"], report["proof"]["tolerance"]) == (0, 1e-3)
