"""What the libraries do without saying so, and what taoq does about it. Real libraries, one test a turn."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn.utils.parametrizations import weight_norm

import taoq
from support.networks import (
    BACKENDS,
    VARIANTS,
    backend_of,
    error,
    feed,
    fresh_tiny_net,
    images,
    normal,
    notices,
    parts,
    plan_of,
    quantize,
    quantized_tiny_net,
    rows,
    rule,
    rules,
    run,
    same,
    saved_and_loaded,
    scheme,
    schemes,
    seeded,
    tiny_net,
)
from taoq.checkpoint import load_weights
from taoq.errors import SpecError, TaoqError
from taoq.files import sha256
from taoq.pipeline.artifacts import SCHEMA_VERSION, Manifest, versions
from taoq.pipeline.experiment import bind
from taoq.pipeline.models import open_runtime
from taoq.spec.load import spec_from_dict, spec_to_dict
from taoq.tasks import load_task

every_variant = pytest.mark.parametrize(("backend", "dtype"), VARIANTS, ids=[" ".join(variant) for variant in VARIANTS])
every_backend = pytest.mark.parametrize("backend", BACKENDS)
torchao_dtype = pytest.mark.parametrize("dtype", ["int8", "fp8_e4m3fn", "fp8_e5m2"])
modelopt_dtype = pytest.mark.parametrize("dtype", ["int8", "fp8_e4m3fn"])

MODELOPT = "modelopt.pytorch"
NOT_FINITE = "its calibration range is not a finite number"
LOOK_FOR_NAN = "look for NaN or infinite values in the calibration images or in the checkpoint"


def linears(*sizes: int) -> nn.Sequential:
    """Linear layers one after the other, in eval mode, always the same."""
    return seeded(lambda: nn.Sequential(*itertools.starmap(nn.Linear, itertools.pairwise(sizes)))).eval()


def obstacles(backend: str, model: nn.Module) -> dict[str, str]:
    """Why each layer with a weight cannot be quantized, by layer."""
    return {layer.name: layer.obstacle for layer in backend_of(backend).layers(model, {}) if layer.weight_shape}


def dequantized(model: nn.Module, layer: str) -> Tensor:
    """The weight of a quantized linear layer without a bias, as the layer applies it to its float input."""
    weight_shape = model.get_submodule(layer).weight.shape
    return run(model.get_submodule(layer), torch.eye(weight_shape[1])).T


# --- which layers -------------------------------------------------------------------------------------------------


def test_modelopt_quantizes_nothing_that_is_not_planned() -> None:
    model = quantize(MODELOPT, tiny_net(), rules(MODELOPT, "int8", "fc1"), feed(images()))
    found = {name: module for name, module in model.named_modules() if isinstance(module, TensorQuantizer)}
    assert len(found) > 6  # it puts quantizers everywhere, batch norm included
    assert sorted(name for name, module in found.items() if module.is_enabled) == [
        "fc1.input_quantizer",
        "fc1.weight_quantizer",
    ]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "Conv2d",
            "quantize.layers[0].module_name: pattern 'Conv2d' matches 1 layer(s), none of which torchao can quantize:"
            " torchao does not quantize Conv2d\nhint: torchao quantizes Linear",
        ),
        (
            "stem",
            "quantize.layers[0].module_name: pattern 'stem' matches 1 layer(s), none of which torchao can quantize:"
            " torchao does not quantize Conv2d\nhint: torchao quantizes Linear",
        ),
        ("fc3", "quantize.layers[0].module_name: pattern 'fc3' matches no layer\nhint: did you mean 'fc2' or 'fc1'?"),
        (
            "linear",
            "quantize.layers[0].module_name: pattern 'linear' matches no layer\nhint: did you mean 'Linear'?",
        ),
    ],
    ids=["type", "convolution", "unknown", "case"],
)
def test_a_name_that_torchao_would_ignore_or_convert_and_fail_never_reaches_it(pattern: str, message: str) -> None:
    with pytest.raises(SpecError) as error:
        plan_of("torchao", tiny_net(), rules("torchao", "int8", pattern))
    assert str(error.value) == message


@every_backend
def test_a_container_is_not_a_layer(backend: str) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 4))
    with pytest.raises(SpecError) as error:
        plan_of(backend, model, rules(backend, "int8", "0"))
    assert str(error.value) == (
        "quantize.layers[0].module_name: pattern '0' matches no layer\nhint: did you mean '0.*'?"
    )


@torchao_dtype
def test_torchao_leaves_convolutions_alone_under_a_star(dtype: str) -> None:
    model = quantize("torchao", tiny_net(), rules("torchao", dtype, "*"))
    assert type(model.stem.weight) is nn.Parameter
    assert torch.equal(model.stem.weight, tiny_net().stem.weight)
    assert run(model, images()).isfinite().all()


class Doubled(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Named(nn.Linear):
    """A linear layer under another name."""


@pytest.mark.parametrize(
    ("backend", "obstacle"),
    [
        ("torchao", "Doubled has a forward of its own"),
        (MODELOPT, "Doubled has a forward of its own, which ModelOpt does not convert"),
    ],
    ids=BACKENDS,
)
def test_subclasses_are_converted_only_if_they_keep_the_forward(backend: str, obstacle: str) -> None:
    model = seeded(lambda: nn.Sequential(Named(8, 8), Doubled(8, 4))).eval()
    assert obstacles(backend, model) == {"0": "", "1": obstacle}
    model = quantize(backend, model, rules(backend, "int8", "*"), feed(normal(16, 8)))
    assert list(backend_of(backend).applied(model)) == ["0"]


class Attention(nn.Module):
    """Attention and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0])


@every_backend
def test_the_projections_of_attention_are_reported_and_left_alone(backend: str) -> None:
    why = "nn.MultiheadAttention computes with its weights itself, past any quantizer"
    names = ("attention", "attention.out_proj")
    model = seeded(Attention).eval()
    before = parts(model)
    assert obstacles(backend, model) == {**dict.fromkeys(names, why), "head": ""}
    plan = plan_of(backend, model, rules(backend, "int8", "*"))
    assert {name: row["reason"] for name, row in rows(plan).items()} == {**dict.fromkeys(names, why), "head": ""}
    model = quantize(backend, model, rules(backend, "int8", "*"), feed(normal(4, 5, 16)))
    after = parts(model)
    inside = [key for key in before if key.startswith("attention.")]
    assert inside == [key for key in after if key.startswith("attention.")]
    assert all(same(before[key], after[key]) for key in inside)
    assert 0 < error(run(model, normal(4, 5, 16)), run(seeded(Attention).eval(), normal(4, 5, 16))) < 0.03


class Tied(nn.Module):
    """Two linear layers that share a weight, and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(16, 16)
        self.up = nn.Linear(16, 16)
        self.up.weight = self.down.weight
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(torch.relu(self.down(x))))


@every_backend
def test_tied_weights_stay_tied_and_float(backend: str, tmp_path: Path) -> None:
    model = seeded(Tied).eval()
    assert obstacles(backend, model) == {
        "down": "it shares its weight with another layer",
        "up": "it shares its weight with 'down'",
        "head": "",
    }
    model = quantize(backend, model, rules(backend, "int8", "*"), feed(normal(32, 16)))
    assert list(backend_of(backend).applied(model)) == ["head"]
    assert model.up.weight is model.down.weight
    assert same(model.down.weight, seeded(Tied).down.weight)
    loaded = saved_and_loaded(backend, model, lambda: Tied().eval(), tmp_path / "payload.pth")
    assert loaded.up.weight.data_ptr() == loaded.down.weight.data_ptr()
    assert torch.equal(run(loaded, normal(8, 16)), run(model, normal(8, 16)))


@every_backend
def test_a_rule_that_names_only_a_tied_layer_is_refused(backend: str) -> None:
    with pytest.raises(SpecError) as error:
        plan_of(backend, seeded(Tied), rules(backend, "int8", "up"))
    assert str(error.value) == (
        f"quantize.layers[0].module_name: pattern 'up' matches 1 layer(s), none of which {backend} can quantize:"
        f" it shares its weight with 'down'\nhint: {backend} quantizes"
        f" {', '.join(backend_of(backend).capability.layer_types)}"
    )


def parametrized() -> nn.Module:
    return seeded(lambda: nn.Sequential(weight_norm(nn.Linear(8, 8)), nn.Linear(8, 4))).eval()


@every_backend
def test_a_parametrized_layer_is_reported_under_its_own_name(backend: str) -> None:
    why = "its weight is parametrized; remove the parametrization first"
    assert obstacles(backend, parametrized()) == {"0": why, "1": ""}
    plan = plan_of(backend, parametrized(), rules(backend, "int8", "*"))
    assert {name: row["reason"] for name, row in rows(plan).items()} == {"0": why, "1": ""}


def test_torchao_quantizes_the_layers_beside_a_parametrized_one() -> None:
    model = quantize("torchao", parametrized(), rules("torchao", "int8", "*"))
    before, after = parts(parametrized()), parts(model)
    assert list(backend_of("torchao").applied(model)) == ["1"]
    assert all(same(before[key], after[key]) for key in before if key.startswith("0."))
    assert 0 < error(run(model, normal(4, 8)), run(parametrized(), normal(4, 8))) < 0.01


def test_modelopt_refuses_a_network_with_a_parametrized_layer_instead_of_failing_on_it() -> None:
    with pytest.raises(TaoqError) as error:
        quantize(MODELOPT, parametrized(), rules(MODELOPT, "int8", "1"), feed(normal(16, 8)))
    assert str(error.value) == (
        "0: its weight is parametrized, and ModelOpt fails on a network with such a layer\n"
        "hint: remove the parametrization before you save the checkpoint:"
        " torch.nn.utils.parametrize.remove_parametrizations"
    )


@every_backend
def test_a_rule_that_names_only_a_parametrized_layer_is_refused(backend: str) -> None:
    with pytest.raises(SpecError) as error:
        plan_of(backend, parametrized(), rules(backend, "int8", "0"))
    assert str(error.value) == (
        f"quantize.layers[0].module_name: pattern '0' matches 1 layer(s), none of which {backend} can quantize:"
        f" its weight is parametrized; remove the parametrization first\nhint: {backend} quantizes"
        f" {', '.join(backend_of(backend).capability.layer_types)}"
    )


@every_backend
def test_a_layer_name_is_not_read_as_a_pattern(backend: str) -> None:
    model = nn.Sequential()
    for name in ("a[0]", "a*", "ab"):
        model.add_module(name, nn.Linear(8, 8))
    model = quantize(backend, model.eval(), rules(backend, "int8", "a[[]0]", "a[*]"), feed(normal(16, 8)))
    assert list(backend_of(backend).applied(model)) == ["a[0]", "a*"]


# --- calibration of modelopt.pytorch --------------------------------------------------------------------------------


class Unused(nn.Module):
    """A network that never calls one of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(8, 4)
        self.spare = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@pytest.mark.parametrize("algorithm", ["max", "entropy"])
def test_a_layer_that_saw_no_data_is_refused_not_quantized_dynamically(algorithm: str) -> None:
    with pytest.raises(TaoqError) as error:
        quantize(MODELOPT, Unused(), rules(MODELOPT, "int8", "*"), feed(normal(16, 8)), algorithm=algorithm)
    assert str(error.value) == (
        "spare: saw no calibration data\nhint: the model does not call this layer: put it into quantize.skip_names"
    )


@pytest.mark.parametrize("algorithm", ["max", "entropy"])
def test_the_layer_that_is_never_called_can_be_skipped(algorithm: str) -> None:
    model = quantize(
        MODELOPT,
        Unused(),
        rules(MODELOPT, "int8", "*"),
        feed(normal(16, 8)),
        algorithm=algorithm,
        skip_names=["spare"],
    )
    assert list(backend_of(MODELOPT).applied(model)) == ["used"]


@pytest.mark.parametrize("algorithm", ["max", "entropy"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("batch", [0, 1], ids=["first_batch", "second_batch"])
def test_calibration_data_that_are_not_finite_are_refused(algorithm: str, value: float, batch: int) -> None:
    data = [images(1), images(2)]
    data[batch][3, 1, 4, 5] = value
    with pytest.raises(TaoqError) as error:
        quantize(MODELOPT, tiny_net(), rules(MODELOPT, "int8", "stem"), feed(*data), algorithm=algorithm)
    assert str(error.value) == f"stem: {NOT_FINITE}\nhint: {LOOK_FOR_NAN}"


@pytest.mark.parametrize("algorithm", ["max", "entropy"])
def test_a_checkpoint_that_makes_activations_nan_is_refused(algorithm: str) -> None:
    model = tiny_net()
    model.norm.running_var[2] = -1.0
    with pytest.raises(TaoqError) as error:
        quantize(MODELOPT, model, rules(MODELOPT, "int8", "fc1"), feed(images()), algorithm=algorithm)
    assert str(error.value) == f"fc1: {NOT_FINITE}\nhint: {LOOK_FOR_NAN}"


@every_variant
def test_a_weight_that_is_not_finite_is_refused(backend: str, dtype: str) -> None:
    model = tiny_net()
    model.fc2.weight.data[0, 0] = float("nan")
    with pytest.raises(TaoqError) as error:
        quantize(backend, model, [rule("fc2", dtype, activations=False)])
    assert str(error.value) == (
        "fc2: its weight is not finite\nhint: look for NaN or infinite values in the checkpoint"
    )


@pytest.fixture
def fast_path() -> Iterator[None]:
    """The fused inference path of nn.TransformerEncoderLayer turned on, as torch has it."""
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(True)
    yield
    torch.backends.mha.set_fastpath_enabled(was)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


@every_variant
def test_the_fast_path_of_transformers_does_not_bypass_the_quantizers(
    backend: str, dtype: str, fast_path: None, tmp_path: Path
) -> None:
    data = normal(4, 5, 16)
    reference = run(seeded(encoder), data)
    model = quantize(backend, seeded(encoder), rules(backend, dtype, "*"), feed(normal(8, 5, 16, seed=1)))
    names = [f"layers.{index}.{name}" for index in (0, 1) for name in ("linear1", "linear2")]
    assert list(backend_of(backend).applied(model)) == names
    output = run(model, data)
    assert 1e-3 < error(output, reference) < 0.1
    loaded = saved_and_loaded(backend, model, encoder, tmp_path / "payload.pth")
    assert torch.equal(run(loaded, data), output)
    assert torch.equal(run(copy.deepcopy(model), data), output)
    assert torch.backends.mha.get_fastpath_enabled()  # other networks of the process still take it


@modelopt_dtype
def test_the_input_quantizers_of_a_transformer_see_the_whole_range(dtype: str, fast_path: None) -> None:
    data = normal(8, 5, 16)
    seen: dict[str, float] = {}
    model = seeded(encoder)
    torch.backends.mha.set_fastpath_enabled(False)
    for name, module in model.named_modules():
        if name.endswith(("linear1", "linear2")):
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: seen.__setitem__(name, float(inputs[0].abs().max()))
            )
    run(model, data)
    torch.backends.mha.set_fastpath_enabled(True)
    model = quantize(MODELOPT, seeded(encoder), rules(MODELOPT, dtype, "*"), feed(data))
    assert len(seen) == 4
    for name, top in seen.items():
        assert float(model.get_submodule(f"{name}.input_quantizer").amax) == pytest.approx(top, rel=1e-5)


@every_backend
def test_train_mode_of_parts_is_not_flipped(backend: str) -> None:
    model = tiny_net().train()
    model.norm.eval()  # a frozen batch norm
    model = quantize(backend, model, rules(backend, "int8", "*"), feed(images(), images(1)))
    assert not model.norm.training
    before = tiny_net().norm.state_dict()
    assert all(torch.equal(value, before[key]) for key, value in model.norm.state_dict().items() if key in before)


@pytest.mark.parametrize(("dtype", "algorithm"), [("int8", "max"), ("int8", "entropy"), ("fp8_e4m3fn", "max")])
def test_an_input_that_was_always_zero_gives_no_nan(dtype: str, algorithm: str, tmp_path: Path) -> None:
    zeros = torch.zeros(8, 16)
    model = linears(16, 8)
    bias = model[0].bias.detach().clone()
    model = quantize(MODELOPT, model, rules(MODELOPT, dtype, "*"), feed(zeros, zeros), algorithm=algorithm)
    loaded = saved_and_loaded(MODELOPT, model, lambda: linears(16, 8), tmp_path / "payload.pth")
    for found in (model, loaded):
        assert torch.equal(run(found, zeros), bias.expand(8, -1))
        assert run(found, normal(8, 16)).isfinite().all()


def test_minmax_is_modelopts_max() -> None:
    states = [
        parts(quantize(MODELOPT, tiny_net(), rules(MODELOPT, "int8", "*"), feed(images()), algorithm=algorithm))
        for algorithm in ("minmax", "max")
    ]
    assert all(same(states[0][key], states[1][key]) for key in states[0])
    assert float(states[0]["stem.input_quantizer._amax"]) == float(images().abs().max())


# --- formats ----------------------------------------------------------------------------------------------------


@modelopt_dtype
def test_modelopt_stores_quantized_weights_not_float32(dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "payload.pth"
    backend_of(MODELOPT).save(quantized_tiny_net(MODELOPT, dtype), path, {})
    stored = torch.load(path, weights_only=True)["model_state_dict"]
    one_byte = torch.int8 if dtype == "int8" else torch.float8_e4m3fn
    assert {name: stored[f"{name}.weight"].dtype for name in ("stem", "fc1", "fc2")} == dict.fromkeys(
        ("stem", "fc1", "fc2"), one_byte
    )
    assert stored["fc1.weight"].shape == (384, 256)
    assert stored["norm.weight"].dtype == torch.float32


def test_a_true_e5m2_is_coarser_than_e4m3() -> None:
    errors = {}
    for dtype in ("int8", "fp8_e4m3fn", "fp8_e5m2"):
        model = seeded(lambda: nn.Sequential(nn.Linear(256, 64, bias=False))).eval()
        weight = model[0].weight.detach().clone()
        model = quantize("torchao", model, rules("torchao", dtype, "*"))
        errors[dtype] = error(dequantized(model, "0"), weight)
    assert errors["int8"] < 0.01
    assert 0.015 < errors["fp8_e4m3fn"] < 0.035
    assert 1.5 * errors["fp8_e4m3fn"] < errors["fp8_e5m2"] < 0.07


def test_e5m2_is_realised_as_e4m3_by_modelopt_and_says_so() -> None:
    plan = plan_of(MODELOPT, tiny_net(), rules(MODELOPT, "fp8_e5m2", "fc1"))
    says = f"{MODELOPT} has no static fp8_e5m2 and realises it as fp8_e4m3fn"
    assert notices(plan) == [
        f"quantize.layers[0].weights.dtype: {says}",
        f"quantize.layers[0].activations.dtype: {says}",
    ]
    (decided,) = plan.quantized
    assert str(decided.weights) == "fp8_e4m3fn axis 0 (asked: fp8_e5m2)"
    assert str(decided.activations) == "fp8_e4m3fn per tensor (asked: fp8_e5m2)"
    assert rows(plan)["fc1"]["weights"] == {"dtype": "fp8_e4m3fn", "axis": 0, "asked": "fp8_e5m2"}
    states = [
        parts(quantize(MODELOPT, tiny_net(), rules(MODELOPT, dtype, "fc1"), feed(images())))
        for dtype in ("fp8_e5m2", "fp8_e4m3fn")
    ]
    assert all(same(states[0][key], states[1][key]) for key in states[0])


def channels(axis: int, weight: Tensor) -> Tensor:
    """A weight whose channels along an axis differ by up to 10000 in size."""
    shape = [1] * weight.ndim
    shape[axis] = -1
    return weight * torch.logspace(-4, 0, weight.shape[axis]).view(shape)


def worst_channel(axis: int, found: Tensor, wanted: Tensor) -> float:
    others = [index for index in range(wanted.ndim) if index != axis]
    return float((vector_norm(found - wanted, dim=others) / vector_norm(wanted, dim=others)).max())


@every_variant
def test_weights_have_one_scale_per_output_channel_by_default(backend: str, dtype: str) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(64, 32, bias=False))).eval()
    model[0].weight.data = channels(0, model[0].weight.data)
    weight = model[0].weight.detach().clone()
    model = quantize(backend, model, [rule("*", dtype, activations=False)])
    assert schemes(backend, model) == {"0": (scheme(dtype, 0), None)}
    assert worst_channel(0, dequantized(model, "0"), weight) < 0.08


@modelopt_dtype
@pytest.mark.parametrize("axis", [1, -1])
def test_quant_axis_of_weights_is_honoured(dtype: str, axis: int, tmp_path: Path) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(64, 32, bias=False))).eval()
    model[0].weight.data = channels(1, model[0].weight.data)
    weight = model[0].weight.detach().clone()
    model = quantize(MODELOPT, model, [rule("*", dtype, activations=False, weight_axis=axis)])
    assert schemes(MODELOPT, model) == {"0": (scheme(dtype, 1), None)}
    assert model[0].weight_quantizer.amax.shape == (1, 64)
    assert worst_channel(1, dequantized(model, "0"), weight) < 0.08
    loaded = saved_and_loaded(
        MODELOPT, model, lambda: nn.Sequential(nn.Linear(64, 32, bias=False)).eval(), tmp_path / "payload.pth"
    )
    assert torch.equal(dequantized(loaded, "0"), dequantized(model, "0"))


@modelopt_dtype
@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution_has_its_output_channels_on_axis_1(dtype: str, groups: int, tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.ConvTranspose2d(4, 8, 3, groups=groups, bias=False)).eval()

    model = seeded(build)
    model[0].weight.data = channels(1, model[0].weight.data)
    reference = run(model, normal(4, 4, 6, 6))
    model = quantize(MODELOPT, model, [rule("ConvTranspose2d", dtype, activations=False)])
    assert schemes(MODELOPT, model) == {"0": (scheme(dtype, 1), None)}
    assert model[0].weight_quantizer.amax.shape == (1, 8 // groups, 1, 1)
    output = run(model, normal(4, 4, 6, 6))
    assert worst_channel(1, output, reference) < 0.08
    loaded = saved_and_loaded(MODELOPT, model, build, tmp_path / "payload.pth")
    assert torch.equal(run(loaded, normal(4, 4, 6, 6)), output)


@modelopt_dtype
def test_quant_axis_of_activations_is_honoured_by_linear_layers_of_any_rank(dtype: str) -> None:
    data = channels(2, normal(4, 5, 16))
    model = quantize(MODELOPT, linears(16, 8), [rule("*", dtype, input_axis=-1)], feed(data, data[:3, :2]))
    assert model[0].input_quantizer.amax.flatten().equal(data.abs().amax(dim=(0, 1)))


@modelopt_dtype
def test_quant_axis_of_activations_is_honoured_by_convolutions(dtype: str) -> None:
    data = channels(1, images())
    model = quantize(MODELOPT, tiny_net(), [rule("stem", dtype, input_axis=1)], feed(data))
    assert schemes(MODELOPT, model) == {"stem": (scheme(dtype, 0), scheme(dtype, 1))}
    amax = model.stem.input_quantizer.amax
    assert amax.shape == (1, 3, 1, 1)
    assert torch.equal(amax.flatten(), data.abs().amax(dim=(0, 2, 3)))


def test_an_activation_axis_that_modelopt_would_turn_into_one_range_is_refused() -> None:
    with pytest.raises(SpecError) as error:
        plan_of(MODELOPT, linears(16, 8), [rule("*", "int8", input_axis=2)])
    assert str(error.value) == (
        "quantize.layers[0].activations.quant_axis: axis 2 is not the channel axis of the input of '0' (Linear)\n"
        "hint: write -1 for one scale per channel, or leave it out for one scale per tensor"
    )


def test_torchao_refuses_another_axis() -> None:
    with pytest.raises(TaoqError) as error:
        quantize("torchao", linears(16, 8), [rule("*", "int8", activations=False, weight_axis=1)])
    assert str(error.value) == (
        "quantize.layers[0].weights.quant_axis: axis 1 is not that of the output channels of '0' (Linear)\n"
        "hint: leave it out: this backend has one scale a channel"
    )


@every_variant
@pytest.mark.parametrize("value", [0.0, 1e-44], ids=["zeros", "denormal"])
def test_a_dead_output_row_gives_exact_zeros_and_no_nan(backend: str, dtype: str, value: float, tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(16, 8, bias=False)).eval()

    model = seeded(build)
    model[0].weight.data[3] = value
    reference = run(model, normal(4, 16))
    model = quantize(backend, model, rules(backend, dtype, "*"), feed(normal(32, 16)))
    loaded = saved_and_loaded(backend, model, build, tmp_path / "payload.pth")
    for found in (model, loaded):
        output = run(found, normal(4, 16))
        assert output.isfinite().all()
        assert torch.equal(output[:, 3], torch.zeros(4))
        assert error(output, reference) < 0.1


@modelopt_dtype
def test_a_dead_channel_of_a_convolution_gives_no_nan(dtype: str, tmp_path: Path) -> None:
    def pruned() -> nn.Module:
        model = tiny_net()
        model.stem.weight.data[5] = 0
        return model

    reference = run(pruned(), images())
    model = quantize(MODELOPT, pruned(), rules(MODELOPT, dtype, "*"), feed(images()))
    loaded = saved_and_loaded(MODELOPT, model, fresh_tiny_net, tmp_path / "payload.pth")
    assert error(run(model, images()), reference) < 0.1
    assert torch.equal(run(loaded, images()), run(model, images()))


@every_variant
def test_a_weight_of_zeros_alone_gives_no_nan(backend: str, dtype: str) -> None:
    model = linears(16, 8)
    model[0].weight.data.zero_()
    bias = model[0].bias.detach().clone()
    model = quantize(backend, model, rules(backend, dtype, "*"), feed(normal(32, 16)))
    assert torch.equal(run(model, normal(4, 16)), bias.expand(4, -1))


def test_torchao_says_that_it_is_slower_than_float() -> None:
    assert backend_of("torchao").capability.target == (
        "smaller files and less memory; on a CPU in eager mode slower than float"
    )


# --- files ------------------------------------------------------------------------------------------------------


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self.path), "w")


@every_backend
@pytest.mark.parametrize("forced", [False, True], ids=["plain", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
@pytest.mark.parametrize("place", ["whole", "in_the_state", "in_the_library_state"])
def test_a_pickle_with_code_in_it_does_not_run(
    backend: str, forced: bool, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, crater = tmp_path / "payload.pth", tmp_path / "crater"
    backend_of(backend).save(quantized_tiny_net(backend, "int8"), path, {})
    stored = torch.load(path, weights_only=True)
    if place == "whole":
        stored = Bomb(crater)
    elif place == "in_the_state":
        (stored if backend == "torchao" else stored["model_state_dict"])["fc1.bias"] = Bomb(crater)
    else:
        stored["modelopt_state"] = Bomb(crater)
    torch.save(stored, path)
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(pickle.UnpicklingError):
        backend_of(backend).load(path, fresh_tiny_net)
    assert not crater.exists()


def test_the_pickle_of_these_tests_would_run(tmp_path: Path) -> None:
    torch.save(Bomb(tmp_path / "crater"), tmp_path / "payload.pth")
    torch.load(tmp_path / "payload.pth", weights_only=False).close()
    assert (tmp_path / "crater").exists()


@every_backend
def test_an_artifact_with_code_in_its_payload_is_refused_in_two_lines(backend: str, tmp_path: Path) -> None:
    library, crater = backend_of(backend), tmp_path / "crater"
    task = dataclasses.replace(load_task("classification_pyt"), build_model=lambda *_: fresh_tiny_net())
    payload = tmp_path / library.capability.payload
    torch.save(Bomb(crater), payload)
    spec = spec_from_dict({"evaluate": {"device": "cpu"}}, task.spec)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        taoq=taoq.__version__,
        task=task.name,
        backend=backend,
        format="torch",
        payload=payload.name,
        sha256=sha256(payload),
        size=payload.stat().st_size,
        float_size=0,
        source={},
        spec=spec_to_dict(spec),
        plan=(),
        calibration={},
        versions=versions(library.capability.libraries),
    )
    (tmp_path / "manifest.json").write_text(json.dumps(dataclasses.asdict(manifest)))
    section = dataclasses.replace(spec.evaluate, checkpoint=str(tmp_path))
    with pytest.raises(TaoqError) as error:
        open_runtime(bind(task, spec), section, "evaluate")
    assert str(error.value) == (
        f"{payload}: holds objects besides tensors, which taoq does not load: they could run code\nhint: quantize again"
    )
    assert not crater.exists()


@every_backend
def test_quantizing_an_artifact_is_refused(
    backend: str, tmp_path: Path, taoq: Callable[..., tuple[int, str, str]]
) -> None:
    artifact, spec = tmp_path / "artifact", tmp_path / "spec.yaml"
    artifact.mkdir()
    payload = artifact / backend_of(backend).capability.payload
    backend_of(backend).save(quantized_tiny_net(backend, "int8"), payload, {})
    (artifact / "manifest.json").write_text(json.dumps({"payload": payload.name}))
    for path in (artifact, payload):
        spec.write_text(
            f"results_dir: {tmp_path / 'results'}\n"
            "dataset: {num_classes: 10}\n"
            "quantize:\n"
            f"  backend: {backend}\n"
            f"  mode: {backend_of(backend).capability.modes[0]}\n"
            "  layers: [{module_name: Linear, weights: {dtype: int8}}]\n"
            f"  model_path: {path}\n"
            "  device: cpu\n"
        )
        assert taoq("classification_pyt", "quantize", "-e", str(spec)) == (
            2,
            "",
            f"{spec}:7: quantize.model_path: {path} is quantized already\n"
            "hint: give the float checkpoint it was made from\n",
        )
    assert not (tmp_path / "results").exists()


@every_backend
def test_a_payload_without_its_manifest_is_not_a_float_checkpoint(backend: str, tmp_path: Path) -> None:
    path = tmp_path / "payload.pth"
    backend_of(backend).save(quantized_tiny_net(backend, "int8"), path, {})
    with pytest.raises(TaoqError) as error:
        load_weights(fresh_tiny_net(), str(path))
    assert str(error.value) == (
        f"{path}: is the payload of a quantized model, without the manifest.json that belongs to it\n"
        "hint: give the folder that quantize wrote, or quantize again"
    )
