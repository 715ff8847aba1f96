"""Bias correction, against mean shifts computed by hand. Real libraries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn

from support import graphs, networks
from support.graphs import LAYERS, branches, corrected, every_onnx_backend, exported, pictures
from support.networks import (
    backend_of,
    bare,
    bias_shifts,
    every_torch_variant,
    fresh_bare,
    images,
    layer_errors,
    normal,
)
from taoq.errors import TaoqError
from taoq.quantization.formats.onnx.graph import Graph
from taoq.quantization.spec import LayerSpec

ONNX_VARIANTS = [
    ("modelopt.onnx", "int8", "int8"),
    ("modelopt.onnx", "fp8_e4m3fn", "fp8_e4m3fn"),
    ("modelopt.onnx", "int8", None),
    ("onnxruntime", "int8", "int8"),
]
every_onnx_variant = pytest.mark.parametrize(
    ("backend", "weights", "activations"),
    ONNX_VARIANTS,
    ids=[" ".join(map(str, variant)) for variant in ONNX_VARIANTS],
)


def batches() -> list[Any]:
    """Of different sizes, so that a mean of the batches' means would be wrong."""
    return networks.feed(images(1), images(2)[:5])


def quantized(backend: str, dtype: str) -> nn.Module:
    return networks.quantize(backend, bare(), networks.rules(backend, dtype, "*"), batches())


def quantized_and_corrected(backend: str, dtype: str) -> nn.Module:
    return networks.quantize_corrected(backend, bare, networks.rules(backend, dtype, "*"), batches())


def shifts_by_hand(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Mean of float minus quantized output of each channel, over all images at once."""
    reference, shifts = bare(), {name: [] for name in names}

    def hook(name: str) -> Callable[..., None]:
        def append_shift(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            difference = output - model.get_submodule(name)(*inputs)
            axes = (0, 2, 3) if output.ndim == 4 else (0, 1)
            shifts[name].append(difference.double().mean(axes))

        return append_shift

    for name in names:
        reference.get_submodule(name).register_forward_hook(hook(name))
    networks.run(reference, torch.cat([inputs["image"] for inputs in batches()]))
    return {name: torch.stack(of_each_call).mean(0) for name, of_each_call in shifts.items()}


@every_torch_variant
def test_the_correction_is_the_mean_shift(backend: str, dtype: str) -> None:
    plain, model = quantized(backend, dtype), quantized_and_corrected(backend, dtype)
    names = list(backend_of(backend).applied(plain))
    expected = shifts_by_hand(plain, names)
    assert all(shift.abs().max() > 1e-5 for shift in expected.values())
    for name, shift in expected.items():
        before = getattr(plain.get_submodule(name).bias, "data", torch.zeros(()))
        correction = model.get_submodule(name).bias - before
        # a value between two steps may be rounded either way: taoq runs the batches one by one
        torch.testing.assert_close(correction.double(), shift, rtol=1e-2, atol=4e-6)
    assert all(shift.abs().max() < 4e-6 for shift in shifts_by_hand(model, names).values())
    assert backend_of(backend).applied(model) == backend_of(backend).applied(plain)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@every_torch_variant
def test_a_reloaded_model_has_the_new_biases(backend: str, dtype: str, tmp_path: Path) -> None:
    """test_smoothquant.py reloads one in a new process too."""
    model = quantized_and_corrected(backend, dtype)
    loaded = networks.saved_and_loaded(backend, model, fresh_bare, tmp_path / "payload.pth")
    assert torch.equal(networks.run(loaded, images()), networks.run(model, images()))
    assert ("stem.bias" in loaded.state_dict()) == (backend == "modelopt.pytorch")
    assert "fc.bias" in loaded.state_dict()
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("key", ["norm.offset", "fc.extra", "other.bias"])
def test_only_biases_of_layers_are_loaded_in_addition(key: str, tmp_path: Path) -> None:
    library, model = backend_of("torchao"), quantized_and_corrected("torchao", "int8")
    torch.save({**model.state_dict(), key: torch.zeros(6)}, tmp_path / "payload.pth")
    with pytest.raises(RuntimeError, match=rf'Unexpected key\(s\) in state_dict: "{key}"'):
        library.load(tmp_path / "payload.pth", fresh_bare)


class Wrapped(nn.Module):
    """A network with a `bias` of its own, outside of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.bias = None

    def forward(self, image: Tensor) -> Tensor:
        return self.fc(image)


def test_a_bias_outside_of_layers_is_refused_on_loading(tmp_path: Path) -> None:
    library = backend_of("torchao")
    model = networks.quantize("torchao", Wrapped().eval(), networks.rules("torchao", "int8", "fc"))
    torch.save({**model.state_dict(), "bias": torch.zeros(4)}, tmp_path / "payload.pth")
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "bias"'):
        library.load(tmp_path / "payload.pth", lambda: Wrapped().eval())


def test_weights_alone_are_corrected_too() -> None:
    rules = [networks.rule("fc", "int8", activations=False)]
    weight = backend_of("modelopt.pytorch").weight(networks.quantize("modelopt.pytorch", bare(), rules), "fc")
    model = networks.quantize_corrected("modelopt.pytorch", bare, rules, correct_on=batches())
    assert model.stem.bias is None
    reference, layer_inputs = bare(), []
    reference.fc.register_forward_pre_hook(lambda _, inputs: layer_inputs.append(inputs[0]))
    networks.run(reference, torch.cat([inputs["image"] for inputs in batches()]))
    expected = (reference.fc.weight.double() - weight) @ layer_inputs[0].double().mean((0, 1))
    torch.testing.assert_close(model.fc.bias.double(), expected, rtol=1e-3, atol=1e-7)


def test_a_layer_that_no_image_reaches_keeps_its_bias() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)

        def forward(self, image: Tensor) -> Tensor:
            return self.used(image)

    def build() -> nn.Module:
        return networks.seeded(Unused).eval()

    rules, feed = networks.rules("torchao", "int8", "*"), networks.feed(normal(8, 4))
    model = networks.quantize_corrected("torchao", build, rules, correct_on=feed)
    assert model.unused.bias is None
    assert not torch.equal(model.used.bias, build().used.bias)


@pytest.mark.parametrize(
    ("backend", "feed", "message"),
    [
        ("torchao", [], "quantize.calibration: there are no images\nhint: give calibration images"),
        (
            "torchao",
            networks.feed(images() * torch.nan),
            "quantize.bias_correction: the mean output of fc, twice is not a finite number\n"
            "hint: look for NaN or infinite values in the calibration images or in the checkpoint",
        ),
        ("onnxruntime", [], "quantize.calibration: there are no images\nhint: give calibration images"),
        (
            "onnxruntime",
            graphs.feed(pictures() * torch.nan),
            "quantize.calibration: the calibration images have values that are not finite\n"
            "hint: look at the normalisation of the dataset section",
        ),
        (
            "onnxruntime",
            graphs.feed(pictures().sign() * 3e38),
            "quantize.bias_correction: the mean output of /left/Conv is not a finite number\n"
            "hint: look for NaN or infinite values in the calibration images or in the checkpoint",
        ),
    ],
    ids=["torch-none", "torch-nan", "onnx-none", "onnx-nan", "onnx-infinite"],
)
def test_no_mean_is_an_error(backend: str, feed: list[Any], message: str) -> None:
    if backend == "torchao":
        build, rules = bare, networks.rules(backend, "int8", "*")
    else:
        build, rules = branches, [graphs.rule("left", "int8", None)]
    with pytest.raises(TaoqError) as error:
        networks.quantize_corrected(backend, build, rules, correct_on=feed)
    assert str(error.value) == message


def graph_feed() -> list[Any]:
    return graphs.feed(pictures(8, 1), pictures(3, 2))


def graph_rules(weights: str, activations: str | None) -> list[LayerSpec]:
    layers = [layer for layer in LAYERS if weights == "int8" or layer != "stem"]  # FP8 leaves three channels out
    return [graphs.rule(layer, weights, activations) for layer in layers]


def remaining_shifts(backend: str, reference: Graph, graph: Graph, feed: list[Any]) -> dict[str, Any]:
    """Shifts that a second correction would add."""
    return bias_shifts(backend, reference, graph, backend_of(backend).applied(graph), feed)


def tensor_values(graph: Graph, name: str) -> Any:
    """Values of a tensor of a graph, for all images."""
    model = graph.copy().model
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    images = np.concatenate([inputs["image"].numpy() for inputs in graph_feed()])
    return session.run(None, {"image": images})[0]


def test_the_correction_of_a_graph_is_the_mean_shift() -> None:
    reference = branches()
    plain = graphs.quantize("modelopt.onnx", reference, graph_rules("int8", "int8"), graph_feed())
    model = corrected("modelopt.onnx", reference, graph_rules("int8", "int8"), graph_feed())
    expected = {}
    for name in ("/tokens/MatMul", "/head/Gemm"):
        float_node = graphs.node(reference, name)
        inputs = tensor_values(reference, float_node.input[0])
        weight = graphs.tensors(reference)[float_node.input[1]].astype(np.float64)
        stored, scales = graphs.weight_parts(plain, name)
        scale = graphs.input_scale(plain, name)
        rounded = np.clip(np.rint(inputs / np.float32(scale)), -128, 127) * scale
        axis = 0 if name == "/head/Gemm" else 1  # of the output channels
        dequantized = stored * np.expand_dims(scales.astype(np.float64), 1 - axis)
        if axis == 0:
            weight, dequantized = weight.T, dequantized.T
        expected[name] = (
            (inputs.astype(np.float64) @ weight - rounded @ dequantized).reshape(-1, weight.shape[1]).mean(0)
        )
    before, after = graphs.tensors(plain), graphs.tensors(model)
    added, head = graphs.node(plain, "/tokens/Add"), graphs.node(plain, "/head/Gemm")
    (constant,) = (name for name in added.input if name in before)
    for name, bias in (("/tokens/MatMul", constant), ("/head/Gemm", head.input[2])):
        np.testing.assert_allclose(after[bias] - before[bias], expected[name], rtol=2e-3, atol=2e-7)


@every_onnx_variant
def test_a_second_correction_of_a_graph_would_add_nothing(backend: str, weights: str, activations: str | None) -> None:
    rules, feed = graph_rules(weights, activations), graph_feed()
    plain = graphs.quantize(backend, branches(), rules, feed if activations else [])
    model = corrected(backend, branches(), rules, feed if activations else [], correct_on=feed)
    applied = backend_of(backend).applied(plain)
    assert backend_of(backend).applied(model) == applied
    first, second = (remaining_shifts(backend, branches(), graph, feed) for graph in (plain, model))
    for name in applied:
        assert abs(second[name]).max() < (1e-7 if backend != "onnxruntime" else 3e-5)  # int32 has steps
        assert abs(second[name]).max() < 0.2 * abs(first[name]).max()
    # every layer had a bias, or an Add behind it
    assert len(model.proto.initializer) == len(plain.proto.initializer)
    assert Counter(node.op_type for node in model.proto.node) == Counter(node.op_type for node in plain.proto.node)
    before, after = (layer_errors(backend, branches(), graph, applied, feed) for graph in (plain, model))
    assert all(after[name].outputs > before[name].outputs for name in applied)
    assert all(after[name].weights == before[name].weights for name in applied)


class WithoutBiases(nn.Module):
    """A convolution and two linear layers without a bias; the last is a MatMul whose output is that of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.first = nn.Linear(32, 32, bias=False)
        self.second = nn.Linear(32, 24, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        tokens = self.stem(image).flatten(2).transpose(1, 2)
        return self.second(self.first(tokens))


def graph_without_biases() -> Graph:
    graph = exported(networks.seeded(WithoutBiases), torch.zeros(2, 3, 8, 8))
    # the name that correction would give to a new node
    next(node for node in graph.proto.node if node.op_type == "Transpose").name = "/first/MatMul/bias_correction"
    return Graph(graph.model)


@every_onnx_backend
def test_layers_without_a_bias_get_one(backend: str, tmp_path: Path) -> None:
    rules = [graphs.rule(pattern) for pattern in ("Conv", "MatMul")]
    plain = graphs.quantize(backend, graph_without_biases(), rules, graph_feed())
    output = graphs.node(plain, "/first/MatMul").output[0]
    model = corrected(backend, graph_without_biases(), rules, graph_feed())
    shifts = remaining_shifts(backend, graph_without_biases(), model, graph_feed())
    assert all(abs(shift).max() < 3e-5 for shift in shifts.values())
    names = [node.name for node in model.proto.node]
    assert len(set(names)) == len(names)
    makers = graphs.made_by(model)
    assert makers[output].op_type == "Add"
    assert len(model.readers[output]) == len(plain.readers[output])
    assert [value.name for value in model.proto.output] == ["scores"]
    path = graphs.saved(backend, model, tmp_path / "model.onnx")
    loaded = backend_of(backend).load(path, graph_without_biases)
    result = graphs.run(loaded, pictures(seed=1))
    np.testing.assert_array_equal(result, graphs.run(model, pictures(seed=1)))
    assert graphs.error(result, graphs.run(graph_without_biases(), pictures(seed=1))) < 0.1
    bias = graphs.node(model, "/stem/Conv").input[2]
    if backend == "onnxruntime":
        assert graphs.tensors(model)[makers[bias].input[0]].dtype == np.int32
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "fused.onnx")
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        op_types = {node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node}
        assert "QLinearConv" in op_types  # with a float bias it would be a float convolution
        assert "Conv" not in op_types
    else:
        assert graphs.tensors(model)[bias].dtype == np.float32


@every_onnx_backend
def test_a_shared_bias_is_corrected_for_each_layer(backend: str) -> None:
    reference = graphs.tied(2)
    shared = graphs.tensors(reference)[graphs.node(reference, LAYERS["left"]).input[2]]
    model = corrected(backend, reference, [graphs.rule("left")], graph_feed())
    float_layer = graphs.node(model, LAYERS["right"])
    np.testing.assert_array_equal(graphs.tensors(model)[float_layer.input[2]], shared)
    model = corrected(backend, reference, [graphs.rule("left"), graphs.rule("right")], graph_feed())
    shifts = remaining_shifts(backend, reference, model, graph_feed())
    assert all(abs(shift).max() < 3e-5 for shift in shifts.values())


@pytest.mark.parametrize(("beta", "bias"), [(2.0, True), (0.0, True), (2.0, False)])
def test_the_bias_of_a_gemm_has_a_factor(beta: float, bias: bool) -> None:
    reference = branches()
    gemm = graphs.node(reference, "/head/Gemm")
    next(item for item in gemm.attribute if item.name == "beta").f = beta
    if not bias:
        del gemm.input[2:]
    reference = Graph(reference.model)
    model = corrected("modelopt.onnx", reference, [graphs.rule("head")], graph_feed())
    assert abs(remaining_shifts("modelopt.onnx", reference, model, graph_feed())["/head/Gemm"]).max() < 1e-7


def test_a_computed_bias_gets_an_add_behind_the_layer() -> None:
    reference = branches()
    conv = graphs.node(reference, LAYERS["left"])
    position = next(index for index, node in enumerate(reference.proto.node) if node.name == conv.name)
    reference.proto.node.insert(position, onnx.helper.make_node("Neg", [conv.input[2]], ["negative"], "negate"))
    graphs.node(reference, LAYERS["left"]).input[2] = "negative"
    reference = Graph(reference.model)
    model = corrected("modelopt.onnx", reference, [graphs.rule("left")], graph_feed())
    assert graphs.node(model, "/left/Conv/bias_correction").op_type == "Add"
    assert abs(remaining_shifts("modelopt.onnx", reference, model, graph_feed())["/left/Conv"]).max() < 1e-7


def test_a_constant_with_another_reader_is_not_changed() -> None:
    reference = branches()
    add = graphs.node(reference, "/tokens/Add")
    (index,) = (index for index, name in enumerate(add.input) if name in graphs.tensors(reference))
    constant = add.input[index]
    reference.proto.node.append(onnx.helper.make_node("Identity", [constant], ["copy"], "copy"))
    reference.proto.output.append(onnx.helper.make_tensor_value_info("copy", TensorProto.FLOAT, (64,)))
    reference = Graph(reference.model)
    model = corrected("modelopt.onnx", reference, [graphs.rule("tokens")], graph_feed())
    before, after = graphs.tensors(reference)[constant], graphs.tensors(model)
    np.testing.assert_array_equal(after[constant], before)
    corrected_constant = graphs.node(model, "/tokens/Add").input[index]
    assert corrected_constant != constant
    assert not np.array_equal(after[corrected_constant], before)


def test_a_float16_graph_is_refused() -> None:
    options = {"high_precision_dtype": "fp16"}
    model = graphs.quantize("modelopt.onnx", branches(), [graphs.rule("left")], graph_feed(), options)
    message = (
        "quantize.bias_correction: layers of a float16 graph cannot be compared with those of the float graph\n"
        "hint: take high_precision_dtype: fp16 out of quantize.backend_kwargs"
    )
    with pytest.raises(TaoqError) as error:
        remaining_shifts("modelopt.onnx", branches(), model, graph_feed())
    assert str(error.value) == message
    with pytest.raises(TaoqError) as error:  # before calibration
        graphs.plan_of("modelopt.onnx", branches(), [graphs.rule("left")], options, bias_correction=True)
    assert str(error.value) == message


def test_a_graph_with_a_fixed_batch_is_corrected() -> None:
    reference, feed = branches(batch=4), graphs.feed(pictures(8, 1))
    model = corrected("onnxruntime", reference, [graphs.rule("left")], feed)
    assert abs(remaining_shifts("onnxruntime", reference, model, feed)["/left/Conv"]).max() < 3e-5
