"""SmoothQuant with modelopt.pytorch: factors, parts of a plan, files, exported graphs. Real libraries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from support import graphs, networks
from support.networks import (
    backend_of,
    bare,
    faults_of,
    feed,
    fresh_bare,
    fresh_tokens,
    images,
    layer_errors,
    notices,
    scheme,
    schemes,
    tokens,
)
from taoq.errors import Fault, SpecError, TaoqError
from taoq.quantization.capability import check
from taoq.quantization.formats.onnx.export import export_graph
from taoq.quantization.formats.onnx.graph import Graph
from taoq.quantization.formats.onnx.qdq import place_scales
from taoq.quantization.spec import LayerSpec, TensorSpec

NAME = "modelopt.pytorch"
HALF = {"alpha": 0.5}
SMOOTHED = ["left", "right", "out"]


def batches() -> list[Any]:
    return feed(images(1), images(2))


def quantized(
    *layers: LayerSpec, algorithm: str = "smoothquant", options: dict[str, Any] | None = None, model: Any = None
) -> Any:
    rules = list(layers) or networks.rules(NAME, "int8", "*")
    options = (HALF if algorithm == "smoothquant" else {}) if options is None else options
    return networks.quantize(NAME, model or tokens(), rules, batches(), options, algorithm=algorithm)


def quantized_corrected(build: Callable[[], nn.Module], algorithm: str = "smoothquant") -> nn.Module:
    options = HALF if algorithm == "smoothquant" else {}
    rules = networks.rules(NAME, "int8", "*")
    return networks.quantize_corrected(NAME, build, rules, batches(), options=options, algorithm=algorithm)


def inputs_of(name: str) -> Tensor:
    """Inputs of a layer in the float network."""
    reference, layer_inputs = tokens(), []
    reference.get_submodule(name).register_forward_pre_hook(lambda _, inputs: layer_inputs.append(inputs[0]))
    networks.run(reference, torch.cat([images(1), images(2)]))
    return layer_inputs[0]


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_factors_weights_and_ranges_are_those_of_the_paper(alpha: float) -> None:
    library, model = backend_of(NAME), quantized(options={"alpha": alpha})
    state, scales = library.dequantized(model)
    ranges = networks.ranges(NAME, model)
    assert scales["stem"].smoothing is None
    for name in SMOOTHED:
        input_maxima = inputs_of(name).flatten(0, -2).abs().amax(0)
        weight = tokens().get_parameter(f"{name}.weight")
        factors = (weight.abs().amax(0) ** (1 - alpha) / input_maxima**alpha).clamp(1e-4, 1e4).detach()
        torch.testing.assert_close(torch.tensor(scales[name].smoothing), factors, rtol=1e-5, atol=0)
        smoothed = (weight / factors).detach()
        steps = smoothed.abs().amax(1) / 127
        torch.testing.assert_close(torch.tensor(scales[name].weights), steps, rtol=1e-5, atol=0)
        stored = (model.get_submodule(name).weight.data.int() * steps[:, None]).float()
        assert float((stored - smoothed).abs().div(steps[:, None]).max()) < 0.501
        torch.testing.assert_close(state[f"{name}.weight"], stored * factors, rtol=1e-5, atol=1e-9)
        assert scales[name].activations == pytest.approx(float((input_maxima * factors).max()) / 127, rel=1e-5)
        high = float(((input_maxima * factors).max() / factors).max())
        assert ranges[name] == (pytest.approx(-high, rel=1e-4), pytest.approx(high, rel=1e-4))


def test_a_channel_of_large_values_costs_less() -> None:
    library, noise = backend_of(NAME), {}
    for algorithm in ("max", "smoothquant"):
        model = quantized(algorithm=algorithm)
        errors = layer_errors(NAME, tokens(), model, list(library.applied(model)), batches())
        noise[algorithm] = {name: error.outputs for name, error in errors.items()}
        assert all(20 < error.weights < 60 for error in errors.values())  # compared without the factors
    assert noise["smoothquant"]["stem"] == pytest.approx(noise["max"]["stem"], abs=0.01)
    assert all(noise["smoothquant"][name] > noise["max"][name] + 3 for name in SMOOTHED)


def test_parts_of_a_plan() -> None:
    library = backend_of(NAME)
    plan = networks.plan_of(NAME, tokens(), networks.rules(NAME, "int8", "*"), algorithm="smoothquant")
    calibrated = networks.calibrate(NAME, tokens(), plan, batches(), options=HALF)
    for names in ([], ["left"], ["left", "right", "out"], ["right", "stem"], ["out"], []):
        model = calibrated.with_only([layer_plan for layer_plan in plan.quantized if layer_plan.layer.name in names])
        output = networks.run(model, images())
        assert set(library.applied(model)) == set(names)
        if names:
            alone = quantized(*[networks.rule(name, "int8") for name in names])
            torch.testing.assert_close(output, networks.run(alone, images()), rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(output, networks.run(tokens(), images()))
    tried = layer_errors(NAME, tokens(), calibrated.with_only(plan.quantized), ["left"], batches())
    expected = layer_errors(NAME, tokens(), quantized(), ["left"], batches())
    assert tried["left"].weights == pytest.approx(expected["left"].weights, abs=1e-3)


def test_activations_alone_are_smoothed_and_weights_alone_are_not() -> None:
    library = backend_of(NAME)
    model = quantized(
        LayerSpec(module_name="Linear", activations=TensorSpec(dtype="int8")),
        networks.rule("out", "int8", activations=False),
    )
    state, scales = library.dequantized(model)
    assert schemes(NAME, model) == {
        "left": (None, scheme("int8")),
        "right": (None, scheme("int8")),
        "out": (scheme("int8", 0), None),
    }
    assert scales["left"].smoothing is not None
    assert scales["out"].smoothing is None
    torch.testing.assert_close(state["left.weight"], tokens().left.weight.detach(), rtol=1e-6, atol=1e-9)
    result = graphs.run(exported(model), images())
    assert graphs.error(result, networks.run(model, images()).numpy()) < 0.01


def test_a_reloaded_model_is_the_same_in_a_new_process(tmp_path: Path) -> None:
    """With bias correction too, which adds a bias to layers that have none in a fresh network."""
    torchao_rules = networks.rules("torchao", "int8", "*")
    models = [
        (NAME, fresh_tokens, quantized_corrected(tokens)),
        (NAME, fresh_bare, quantized_corrected(bare, algorithm="max")),
        (
            "torchao",
            fresh_bare,
            networks.quantize_corrected("torchao", bare, torchao_rules, correct_on=batches()),
        ),
    ]
    for output, (_, _, model) in zip(networks.outputs_in_a_new_process(models, tmp_path), models, strict=True):
        assert torch.equal(output, networks.run(model, images()))


def test_a_reloaded_model_has_the_same_layers_and_tensors(tmp_path: Path) -> None:
    model = quantized_corrected(tokens)
    loaded = networks.saved_and_loaded(NAME, model, fresh_tokens, tmp_path / "payload.pth")
    assert backend_of(NAME).applied(loaded) == backend_of(NAME).applied(model)
    assert networks.parts(loaded).keys() == networks.parts(model).keys()
    assert "left.bias" in loaded.state_dict()


def exported(model: nn.Module, build: Callable[[], nn.Module] = fresh_tokens) -> Graph:
    """The graph that export makes of a quantized model."""
    library = backend_of(NAME)
    state, scales = library.dequantized(model)
    network = build()
    network.load_state_dict(dict(state), assign=True)
    graph = export_graph(network, {"image": images()}, ["scores"], opset=19, dynamic=True, fold=False)
    place_scales(graph, library.applied(model), scales)
    onnx.checker.check_model(graph.model, full_check=True)
    return graph


def test_dequantized_weights_fit_the_float_network() -> None:
    state, _ = backend_of(NAME).dequantized(quantized())
    network = fresh_tokens()
    network.load_state_dict(dict(state))
    assert 0 < networks.error(networks.run(network, images()), networks.run(tokens(), images())) < 0.03


def test_an_exported_graph_multiplies_the_inputs_of_smoothed_layers() -> None:
    library, model = backend_of(NAME), quantized()
    graph = exported(model)
    result = graphs.run(graph, images())
    assert graphs.error(result, networks.run(model, images()).numpy()) < 1e-3
    makers = graphs.made_by(graph)
    _, scales = library.dequantized(model)
    unsmoothed_inputs = []
    layers = {"left": "/left/MatMul", "right": "/right/MatMul", "out": "/out/Gemm", "stem": "/stem/Conv"}
    for name, layer in layers.items():
        quantize = makers[makers[graphs.node(graph, layer).input[0]].input[0]]
        maker = makers.get(quantize.input[0])
        if name == "stem":
            assert maker is None  # the image
            continue
        assert maker.op_type == "Mul"
        np.testing.assert_array_equal(graphs.tensors(graph)[maker.input[1]], scales[name].smoothing)
        unsmoothed_inputs.append(maker.input[0])
        stored, _ = graphs.weight_parts(graph, layer)
        expected = model.get_submodule(name).weight.data.numpy()
        np.testing.assert_array_equal(stored, expected.T if layer.endswith("MatMul") else expected)
    left, right, _ = unsmoothed_inputs
    assert left == right  # each multiplies the same tensor with factors of its own
    # nothing else is multiplied, and no float weight is left
    assert sum(node.op_type == "Mul" for node in graph.proto.node) == 3
    assert not any(value.dtype == np.float32 and value.ndim >= 2 for value in graphs.tensors(graph).values())


def test_a_layer_that_is_called_twice_has_one_weight_in_the_graph() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, image: Tensor) -> Tensor:
            return self.fc(self.fc(image.mean((2, 3))))

    model = quantized(networks.rule("fc", "int8"), model=networks.seeded(Twice).eval())
    graph = exported(model, lambda: Twice().eval())
    assert sum(value.dtype == np.int8 and value.ndim == 2 for value in graphs.tensors(graph).values()) == 1
    result = graphs.run(graph, images())
    assert graphs.error(result, networks.run(model, images()).numpy()) < 1e-5


class Unsmoothable(nn.Module):
    """A linear layer with a single input channel, or with a channel whose input and weights are zero."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, 4)
        if channels > 1:
            with torch.no_grad():
                self.fc.weight[:, 1:] = 0

    def forward(self, image: Tensor) -> Tensor:
        features = image.mean((2, 3))[:, : self.fc.in_features]
        return self.fc(features if self.fc.in_features == 1 else features * torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize(
    ("channels", "reason"), [(1, "fc has only one channel to smooth"), (2, "pre_quant_scale should be positive")]
)
def test_a_network_that_modelopt_cannot_smooth_is_an_error(channels: int, reason: str) -> None:
    model = Unsmoothable(channels).eval()
    with pytest.raises(TaoqError) as error:
        quantized(networks.rule("fc", "int8"), model=model)
    assert str(error.value) == (
        f"quantize.algorithm: ModelOpt's SmoothQuant does not take this network: {reason}\nhint: write algorithm: max"
    )


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"alpha": 1.5}, Fault("", "input should be less than or equal to 1", "see ModelOpt's SmoothQuantCalibConfig")),
        ({"alpha": None}, Fault("", "'None' is not a number from 0 to 1", "write for example 0.5")),
        (
            {"alpa": 0.5},
            Fault("", "ModelOpt's SmoothQuantCalibConfig has no argument 'alpa'", "did you mean 'alpha'?"),
        ),
    ],
    ids=["value", "none", "unknown"],
)
def test_options_are_checked(options: dict[str, Any], fault: Fault) -> None:
    (key,) = options
    expected = Fault(f"quantize.backend_kwargs.{key}", fault.what, fault.hint)
    assert faults_of(NAME, options, "smoothquant") == [expected]
    assert faults_of(NAME, HALF, "smoothquant") == []
    assert faults_of(NAME, HALF, "max") != []


def test_a_notice_names_the_layers_that_are_not_smoothed() -> None:
    plan = networks.plan_of(NAME, tokens(), networks.rules(NAME, "int8", "*"), algorithm="smoothquant")
    assert notices(plan) == [
        "quantize.algorithm: smoothquant smooths linear layers with quantized inputs;"
        " 1 other layer(s) get ranges as with max (stem)",
    ]
    with pytest.raises(SpecError) as error:
        networks.plan_of(NAME, tokens(), networks.rules(NAME, "int8", "Conv2d"), algorithm="smoothquant")
    assert str(error.value) == (
        "quantize.algorithm: smoothquant has no layer to smooth: no linear layer has quantized activations\n"
        "hint: write algorithm: max, or name linear layers"
    )


@pytest.mark.parametrize(
    ("backend", "instead"),
    [
        ("torchao", "algorithm: minmax"),
        ("modelopt.onnx", "algorithm: minmax or algorithm: max or algorithm: entropy"),
        ("onnxruntime", "algorithm: minmax or algorithm: max or algorithm: entropy"),
    ],
    ids=["torchao", "modelopt.onnx", "onnxruntime"],
)
def test_backends_without_smoothquant_refuse_it(backend: str, instead: str) -> None:
    section = networks.section_of(backend, [networks.rule("*", "int8")], algorithm="smoothquant")
    with pytest.raises(SpecError) as error:
        check(section, backend_of(backend).capability)
    assert str(error.value) == (
        f"quantize.algorithm: backend {backend} has no algorithm smoothquant\n"
        f"hint: write {instead}, or choose a backend that has smoothquant"
    )
