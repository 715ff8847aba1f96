"""Bias correction, against shifts computed by hand. Real libraries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networks
import numpy as np
import onnx
import onnx_networks
import onnxruntime
import pytest
import torch
from networks import VARIANTS, backend_of, bare, correct_biases, fresh_bare, images, normal
from onnx import TensorProto
from onnx_networks import LAYERS, branches, pictures
from torch import Tensor, nn

from taoq.errors import TaoqError
from taoq.onnx_export import export_graph
from taoq.quantization.backends import onnx_layers

ONNX_VARIANTS = [
    ("modelopt.onnx", "int8", "int8"),
    ("modelopt.onnx", "fp8_e4m3fn", "fp8_e4m3fn"),
    ("modelopt.onnx", "int8", None),
    ("onnxruntime", "int8", "int8"),
]
every_torch = pytest.mark.parametrize(("backend", "dtype"), VARIANTS, ids=[" ".join(variant) for variant in VARIANTS])
every_onnx = pytest.mark.parametrize(
    ("backend", "weights", "activations"), ONNX_VARIANTS, ids=[" ".join(map(str, each)) for each in ONNX_VARIANTS]
)


def batches() -> list[Any]:
    return networks.feed(images(1), images(2)[:5])  # of different sizes: a mean of means would be another


def quantized(backend: str, dtype: str) -> nn.Module:
    return networks.quantize(backend, bare(), networks.rules(backend, dtype, "*"), batches())


def corrected(backend: str, dtype: str) -> nn.Module:
    model, library = quantized(backend, dtype), backend_of(backend)
    return correct_biases(library, bare(), model, list(library.applied(model)), batches())


def shifts(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Mean of float minus quantized output for each channel, all images at once."""
    reference, apart = bare(), {name: [] for name in names}

    def hook(name: str) -> Callable[..., None]:
        def look(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            difference = output - model.get_submodule(name)(*inputs)
            axes = (0, 2, 3) if output.ndim == 4 else (0, 1)
            apart[name].append(difference.double().mean(axes))

        return look

    for name in names:
        reference.get_submodule(name).register_forward_hook(hook(name))
    networks.run(reference, torch.cat([inputs["image"] for inputs in batches()]))
    return {name: torch.stack(found).mean(0) for name, found in apart.items()}


@every_torch
def test_the_correction_is_the_mean_shift(backend: str, dtype: str) -> None:
    library, model = backend_of(backend), quantized(backend, dtype)
    names, ranges = library.applied(model), library.ranges(model)
    by_hand = shifts(model, list(names))
    assert all(shift.abs().max() > 1e-5 for shift in by_hand.values())
    before = {name: getattr(model.get_submodule(name).bias, "data", torch.zeros(())).clone() for name in names}
    returned = correct_biases(library, bare(), model, list(names), iter(batches()))
    assert returned is model
    for name, shift in by_hand.items():
        found = model.get_submodule(name).bias - before[name]
        # a value between two steps may be rounded either way: the images ran one by one there, and all at once here
        torch.testing.assert_close(found.double(), shift, rtol=1e-2, atol=4e-6)
    assert all(shift.abs().max() < 4e-6 for shift in shifts(model, list(names)).values())
    assert (library.applied(model), library.ranges(model)) == (names, ranges)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@every_torch
def test_a_reloaded_model_has_the_new_biases(backend: str, dtype: str, tmp_path: Path) -> None:
    """In a new process: test_smoothquant.py, since each process takes seconds."""
    model = corrected(backend, dtype)
    loaded = networks.saved_and_loaded(backend, model, fresh_bare, tmp_path / "payload.pth")
    assert torch.equal(networks.run(loaded, images()), networks.run(model, images()))
    assert ("stem.bias" in loaded.state_dict()) == (backend == "modelopt.pytorch")
    assert "fc.bias" in loaded.state_dict()
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("key", ["norm.offset", "fc.extra", "other.bias"])
def test_nothing_but_biases_of_layers_is_let_through(key: str, tmp_path: Path) -> None:
    library, model = backend_of("torchao"), corrected("torchao", "int8")
    torch.save({**model.state_dict(), key: torch.zeros(6)}, tmp_path / "payload.pth")
    with pytest.raises(RuntimeError, match=rf'Unexpected key\(s\) in state_dict: "{key}"'):
        library.load(tmp_path / "payload.pth", fresh_bare)


class Wrapped(nn.Module):
    """What a network may have beside layers: a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.bias = None

    def forward(self, image: Tensor) -> Tensor:
        return self.fc(image)


def test_a_bias_that_is_not_a_layer_s_is_not_let_through(tmp_path: Path) -> None:
    library = backend_of("torchao")
    model = networks.quantize("torchao", Wrapped().eval(), networks.rules("torchao", "int8", "fc"))
    torch.save({**model.state_dict(), "bias": torch.zeros(4)}, tmp_path / "payload.pth")
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "bias"'):
        library.load(tmp_path / "payload.pth", lambda: Wrapped().eval())


def test_weights_alone_are_corrected_too() -> None:
    library = backend_of("modelopt.pytorch")
    model = networks.quantize("modelopt.pytorch", bare(), [networks.rule("fc", "int8", activations=False)])
    weight = library.dequantized(model)[0]["fc.weight"]
    correct_biases(library, bare(), model, ["fc"], batches())
    assert model.stem.bias is None
    reference, seen = bare(), []
    reference.fc.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    networks.run(reference, torch.cat([inputs["image"] for inputs in batches()]))
    expected = (reference.fc.weight.double() - weight) @ seen[0].double().mean((0, 1))
    torch.testing.assert_close(model.fc.bias.double(), expected, rtol=1e-3, atol=1e-7)


def test_a_layer_that_no_image_reaches_keeps_its_bias() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)

        def forward(self, image: Tensor) -> Tensor:
            return self.used(image)

    library, build = backend_of("torchao"), lambda: networks.seeded(Unused).eval()
    model = networks.quantize("torchao", build(), networks.rules("torchao", "int8", "*"))
    correct_biases(library, build(), model, ["used", "unused"], networks.feed(normal(8, 4)))
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
            onnx_networks.feed(pictures() * torch.nan),
            "quantize.calibration: the calibration images have values that are not finite\n"
            "hint: look at the normalisation of the dataset section",
        ),
        (
            "onnxruntime",
            onnx_networks.feed(pictures().sign() * 3e38),
            "quantize.bias_correction: the mean output of /left/Conv is not a finite number\n"
            "hint: look for NaN or infinite values in the calibration images or in the checkpoint",
        ),
    ],
    ids=["torch-none", "torch-nan", "onnx-none", "onnx-nan", "onnx-infinite"],
)
def test_no_mean_is_an_error(backend: str, feed: list[Any], message: str) -> None:
    library = backend_of(backend)
    if backend == "torchao":
        reference, model = bare(), quantized(backend, "int8")
    else:
        reference = branches()
        model = onnx_networks.quantize(backend, reference, [onnx_networks.rule("left", "int8", None)])
    with pytest.raises(TaoqError) as error:
        correct_biases(library, reference, model, list(library.applied(model)), feed)
    assert str(error.value) == message


def graph_feed() -> list[Any]:
    return onnx_networks.feed(pictures(8, 1), pictures(3, 2))


def graph(backend: str, weights: str, activations: str | None) -> onnx.ModelProto:
    layers = [layer for layer in LAYERS if weights == "int8" or layer != "stem"]  # FP8 leaves three channels out
    rules = [onnx_networks.rule(layer, weights, activations) for layer in layers]
    return onnx_networks.quantize(backend, branches(), rules, graph_feed() if activations else [])


def correct(backend: str, reference: onnx.ModelProto, model: onnx.ModelProto, feed: list[Any]) -> onnx.ModelProto:
    library = backend_of(backend)
    names = list(library.applied(model))
    found = correct_biases(library, reference, model, names, feed)
    onnx.checker.check_model(found, full_check=True)
    assert list(library.applied(found)) == names
    return found


def left(backend: str, reference: onnx.ModelProto, model: onnx.ModelProto, feed: list[Any]) -> dict[str, Any]:
    """Shifts that a second correction would add."""
    library = backend_of(backend)
    return library.bias_shifts(reference, model, list(library.applied(model)), feed, device="cpu")


def tapped(model: onnx.ModelProto, *names: str) -> list[Any]:
    """Values of tensors of a graph, on all images."""
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    session = onnxruntime.InferenceSession(copy.SerializeToString(), providers=["CPUExecutionProvider"])
    fed = np.concatenate([inputs["image"].numpy() for inputs in graph_feed()])
    return session.run(None, {"image": fed})


def test_the_shift_of_a_graph_is_that_computed_by_hand() -> None:
    model, reference = graph("modelopt.onnx", "int8", "int8"), branches()
    before = onnx_networks.tensors(model)
    expected = {}
    for name in ("/tokens/MatMul", "/head/Gemm"):
        float_node = onnx_networks.node(reference, name)
        (given,) = tapped(reference, float_node.input[0])
        weight = onnx_networks.tensors(reference)[float_node.input[1]].astype(np.float64)
        stored, scales = onnx_networks.weight_parts(model, name)
        scale = onnx_networks.input_scale(model, name)
        rounded = np.clip(np.rint(given / np.float32(scale)), -128, 127) * scale
        axis = 0 if name == "/head/Gemm" else 1  # of the output channels
        dequantized = stored * np.expand_dims(scales.astype(np.float64), 1 - axis)
        if axis == 0:
            weight, dequantized = weight.T, dequantized.T
        expected[name] = (
            (given.astype(np.float64) @ weight - rounded @ dequantized).reshape(-1, weight.shape[1]).mean(0)
        )
    added, head = onnx_networks.node(model, "/tokens/Add"), onnx_networks.node(model, "/head/Gemm")
    (constant,) = (name for name in added.input if name in before)
    correct("modelopt.onnx", reference, model, graph_feed())
    after = onnx_networks.tensors(model)
    for name, bias in (("/tokens/MatMul", constant), ("/head/Gemm", head.input[2])):
        np.testing.assert_allclose(after[bias] - before[bias], expected[name], rtol=2e-3, atol=2e-7)


@every_onnx
def test_nothing_is_left_to_correct(backend: str, weights: str, activations: str | None) -> None:
    library, model = backend_of(backend), graph(backend, weights, activations)
    names, ranges = list(library.applied(model)), library.ranges(model)
    kinds, size = Counter(node.op_type for node in model.graph.node), len(model.graph.initializer)
    errors = library.layer_errors(branches(), model, names, graph_feed(), device="cpu")
    first = left(backend, branches(), model, graph_feed())
    correct(backend, branches(), model, graph_feed())
    second = left(backend, branches(), model, graph_feed())
    for name in names:
        assert abs(second[name]).max() < (1e-7 if backend != "onnxruntime" else 3e-5)  # int32 has steps
        assert abs(second[name]).max() < 0.2 * abs(first[name]).max()
    assert library.ranges(model) == ranges
    # every layer had a bias, or an Add behind it
    assert (Counter(node.op_type for node in model.graph.node), len(model.graph.initializer)) == (kinds, size)
    after = library.layer_errors(branches(), model, names, graph_feed(), device="cpu")
    assert all(after[name].outputs > errors[name].outputs for name in names)
    assert all(after[name].weights == errors[name].weights for name in names)


class Plain(nn.Module):
    """Convolution, MatMul and Gemm without a bias; a MatMul is the output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.first = nn.Linear(32, 32, bias=False)
        self.second = nn.Linear(32, 24, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        tokens = self.stem(image).flatten(2).transpose(1, 2)
        return self.second(self.first(tokens))


def plain() -> onnx.ModelProto:
    example = {"image": torch.zeros(2, 3, 8, 8)}
    model = export_graph(networks.seeded(Plain), example, ["scores"], opset=19, dynamic=True, fold=True)
    return onnx_layers.prepare(model, "model.onnx")


@pytest.mark.parametrize("backend", ["modelopt.onnx", "onnxruntime"])
def test_layers_without_a_bias_get_one(backend: str, tmp_path: Path) -> None:
    rules = [onnx_networks.rule(pattern) for pattern in ("Conv", "MatMul")]
    model = onnx_networks.quantize(backend, plain(), rules, graph_feed())
    # a name that is taken
    model.graph.node[0].name = "/first/MatMul/bias_correction"
    readers = Counter(name for node in model.graph.node for name in node.input)
    output = onnx_networks.node(model, "/first/MatMul").output[0]
    correct(backend, plain(), model, graph_feed())
    assert max(abs(shift).max() for shift in left(backend, plain(), model, graph_feed()).values()) < 3e-5
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    makers = onnx_networks.made_by(model)
    assert makers[output].op_type == "Add"
    assert Counter(name for node in model.graph.node for name in node.input)[output] == readers[output]
    assert [value.name for value in model.graph.output] == ["scores"]
    path = onnx_networks.saved(backend, model, tmp_path / "model.onnx")
    loaded = backend_of(backend).load(path, plain)
    result = onnx_networks.run(loaded, pictures(seed=1))
    np.testing.assert_array_equal(result, onnx_networks.run(model, pictures(seed=1)))
    assert onnx_networks.error(result, onnx_networks.run(plain(), pictures(seed=1))) < 0.1
    bias = onnx_networks.node(model, "/stem/Conv").input[2]
    if backend == "onnxruntime":
        assert onnx_networks.tensors(model)[makers[bias].input[0]].dtype == np.int32
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "fused.onnx")
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        kinds = {node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node}
        assert "QLinearConv" in kinds  # with a float bias it would be a float convolution
        assert "Conv" not in kinds
    else:
        assert onnx_networks.tensors(model)[bias].dtype == np.float32


@pytest.mark.parametrize("backend", ["modelopt.onnx", "onnxruntime"])
def test_a_shared_bias_is_corrected_for_each_layer(backend: str) -> None:
    reference = branches()
    left_, right = (onnx_networks.node(reference, LAYERS[layer]) for layer in ("left", "right"))
    right.input[2] = left_.input[2]
    shared = onnx_networks.tensors(reference)[left_.input[2]]
    model = onnx_networks.quantize(backend, reference, [onnx_networks.rule("left")], graph_feed())
    correct(backend, reference, model, graph_feed())
    float_layer = onnx_networks.node(model, LAYERS["right"])
    np.testing.assert_array_equal(onnx_networks.tensors(model)[float_layer.input[2]], shared)
    both = [onnx_networks.rule("left"), onnx_networks.rule("right")]
    model = onnx_networks.quantize(backend, reference, both, graph_feed())
    correct(backend, reference, model, graph_feed())
    rest = left(backend, reference, model, graph_feed())
    assert all(abs(shift).max() < 3e-5 for shift in rest.values())


@pytest.mark.parametrize(("beta", "bias"), [(2.0, True), (0.0, True), (2.0, False)])
def test_the_bias_of_a_gemm_has_a_factor(beta: float, bias: bool) -> None:
    reference = branches()
    gemm = onnx_networks.node(reference, "/head/Gemm")
    next(item for item in gemm.attribute if item.name == "beta").f = beta
    if not bias:
        del gemm.input[2:]
    model = onnx_networks.quantize("modelopt.onnx", reference, [onnx_networks.rule("head")], graph_feed())
    correct("modelopt.onnx", reference, model, graph_feed())
    assert abs(left("modelopt.onnx", reference, model, graph_feed())["/head/Gemm"]).max() < 1e-7


def test_a_computed_bias_gets_an_add_behind_the_layer() -> None:
    reference = branches()
    conv = onnx_networks.node(reference, LAYERS["left"])
    position = next(index for index, node in enumerate(reference.graph.node) if node.name == conv.name)
    reference.graph.node.insert(position, onnx.helper.make_node("Neg", [conv.input[2]], ["negative"], "negate"))
    onnx_networks.node(reference, LAYERS["left"]).input[2] = "negative"
    model = onnx_networks.quantize("modelopt.onnx", reference, [onnx_networks.rule("left")], graph_feed())
    correct("modelopt.onnx", reference, model, graph_feed())
    assert onnx_networks.node(model, "/left/Conv/bias_correction").op_type == "Add"
    assert abs(left("modelopt.onnx", reference, model, graph_feed())["/left/Conv"]).max() < 1e-7


def test_a_constant_that_others_read_as_well_stays_as_it_is() -> None:
    reference = branches()
    add = onnx_networks.node(reference, "/tokens/Add")
    (index,) = (index for index, name in enumerate(add.input) if name in onnx_networks.tensors(reference))
    constant = add.input[index]
    reference.graph.node.append(onnx.helper.make_node("Identity", [constant], ["copy"], "copy"))
    reference.graph.output.append(onnx.helper.make_tensor_value_info("copy", TensorProto.FLOAT, (64,)))
    model = onnx_networks.quantize("modelopt.onnx", reference, [onnx_networks.rule("tokens")], graph_feed())
    correct("modelopt.onnx", reference, model, graph_feed())
    before, after = onnx_networks.tensors(reference)[constant], onnx_networks.tensors(model)
    np.testing.assert_array_equal(after[constant], before)
    own = onnx_networks.node(model, "/tokens/Add").input[index]
    assert own != constant
    assert not np.array_equal(after[own], before)


def test_a_float16_graph_is_refused() -> None:
    options = {"high_precision_dtype": "fp16"}
    model = onnx_networks.quantize("modelopt.onnx", branches(), [onnx_networks.rule("left")], graph_feed(), options)
    with pytest.raises(TaoqError) as error:
        correct("modelopt.onnx", branches(), model, graph_feed())
    message = (
        "quantize.bias_correction: layers of a float16 graph cannot be compared with those of the float graph\n"
        "hint: take high_precision_dtype: fp16 out of quantize.backend_kwargs"
    )
    assert str(error.value) == message
    with pytest.raises(TaoqError) as error:  # before any work
        onnx_networks.plan_of(
            "modelopt.onnx",
            branches(),
            [onnx_networks.rule("left")],
            bias_correction=True,
            backend_kwargs=options,
        )
    assert str(error.value) == message


def test_a_graph_with_a_fixed_batch_is_corrected() -> None:
    reference = branches(batch=4)
    feed = onnx_networks.feed(pictures(8, 1))
    model = onnx_networks.quantize("onnxruntime", reference, [onnx_networks.rule("left")], feed)
    correct("onnxruntime", reference, model, feed)
    assert abs(left("onnxruntime", reference, model, feed)["/left/Conv"]).max() < 3e-5
