"""Errors, ranges and multiply-accumulates of layers, against values computed by hand. Real libraries."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from support import graphs, networks
from support.graphs import LAYERS, branches, every_onnx_variant, pictures
from support.networks import backend_of, every_torch_variant, images, layer_errors, tiny_net
from taoq.quantization.sqnr import EXACT, sqnr

DECIBELS = {"int8": (30, 60), "fp8_e4m3fn": (25, 40), "fp8_e5m2": (20, 35)}
"""Bounds of the errors of weights and outputs."""


def test_sqnr_in_decibels() -> None:
    assert sqnr(100.0, 1.0) == 20.0
    assert (sqnr(1.0, 0.0), sqnr(0.0, 0.0), sqnr(float("nan"), 1.0)) == (EXACT, None, None)


@every_torch_variant
def test_errors_of_torch_layers(backend: str, dtype: str) -> None:
    model = networks.quantized_tiny_net(backend, dtype)
    names = list(backend_of(backend).applied(model))
    errors = layer_errors(backend, tiny_net(), model, names, networks.feed(images(5), images(6)))
    low, high = DECIBELS[dtype]
    assert all(low < errors[name].weights < high and low < errors[name].outputs < high for name in names)
    reference, calls = tiny_net(), []
    reference.fc1.register_forward_hook(lambda _, inputs, output: calls.append((inputs[0], output)))
    networks.run(reference, torch.cat([images(5), images(6)]))
    ((inputs, output),) = calls
    with torch.inference_mode():
        noise = float((model.fc1(inputs) - output).double().square().sum())
    assert errors["fc1"].outputs == pytest.approx(sqnr(float(output.double().square().sum()), noise), abs=0.01)
    without_images = layer_errors(backend, tiny_net(), model, names, [])
    assert {name: error.outputs for name, error in without_images.items()} == dict.fromkeys(names)


@every_torch_variant
def test_ranges_of_torch_layers(backend: str, dtype: str) -> None:
    ranges = networks.ranges(backend, networks.quantized_tiny_net(backend, dtype))
    if backend == "torchao":
        assert ranges == {}
    else:
        largest = float(torch.cat([images(1), images(2)]).abs().max())
        assert ranges["stem"] == pytest.approx((-largest, largest), rel=1e-3)


@every_onnx_variant
def test_errors_of_onnx_layers(backend: str, dtype: str) -> None:
    layers = [layer for layer in LAYERS if not (dtype != "int8" and layer == "stem")]
    model = graphs.quantize(
        backend,
        branches(),
        [graphs.rule(layer, dtype, dtype) for layer in layers],
        graphs.feed(pictures()),
    )
    names = [LAYERS[layer] for layer in layers]
    batches = graphs.feed(pictures(seed=1))
    errors = layer_errors(backend, branches(), model, names, batches)
    low, high = DECIBELS[dtype]
    assert list(errors) == names
    assert all(low < error.weights < high and low < error.outputs < high for error in errors.values())
    # the first layer gets the same input in both graphs: its error is that of the network cut off behind it
    left = LAYERS["left"]
    left_alone = graphs.quantize(backend, branches(), [graphs.rule("left", dtype, dtype)], graphs.feed(pictures()))
    alone = layer_errors(backend, branches(), left_alone, [left], batches)
    assert alone[left].outputs == pytest.approx(errors[left].outputs, abs=0.2)
    ranges = networks.ranges(backend, model)
    assert set(ranges) == set(names)
    smallest, largest = ranges[left]
    assert largest > 0
    assert smallest == (0 if backend == "onnxruntime" else -largest)


def test_weights_alone_have_no_range() -> None:
    model = graphs.quantize("onnxruntime", branches(), [graphs.rule("left", "int8", None)])
    assert networks.ranges("onnxruntime", model) == {}
    errors = layer_errors("onnxruntime", branches(), model, ["/left/Conv"], [])
    assert errors["/left/Conv"].outputs is None
    assert errors["/left/Conv"].weights > 30


class Shapes(nn.Module):
    """A strided, a grouped and a transposed convolution, and a linear layer on tokens that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.strided = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.spread = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.tokens = nn.Linear(6, 6)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        features = self.spread(self.grouped(self.strided(image))).flatten(2).transpose(1, 2)
        return self.tokens(self.tokens(features))


def test_multiply_accumulates_of_a_network() -> None:
    model, image = Shapes(), torch.zeros(1, 3, 16, 16)
    by_hand = {
        "strided": 8 * 8 * 8 * 3 * 9,
        "grouped": 8 * 8 * 8 * 2 * 9,
        "spread": 8 * 8 * 8 * 6 * 4,
        "tokens": 2 * 16 * 16 * 6 * 6,
    }
    for backend in networks.BACKENDS:
        assert networks.format_of(backend).macs(model, {"image": image}) == by_hand


def test_multiply_accumulates_of_a_graph() -> None:
    pixels = pictures(1).shape[-1] ** 2
    assert networks.format_of("onnxruntime").macs(branches(), {"image": pictures(1)}) == {
        "/stem/Conv": pixels * 32 * 3 * 9,
        "/left/Conv": pixels * 32 * 32 * 9,
        "/right/Conv": pixels * 32 * 32 * 9,
        "/tokens/MatMul": pixels * 32 * 64,
        "/head/Gemm": 64 * 10,
    }
