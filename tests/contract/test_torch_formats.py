"""Numeric formats and axes of the torch backends, and weights of zeros. Real libraries."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.linalg import vector_norm

from support.networks import (
    backend_of,
    error,
    every_modelopt_dtype,
    every_torch_variant,
    feed,
    fresh_tiny_net,
    images,
    linears,
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
from taoq.errors import SpecError, TaoqError

MODELOPT = "modelopt.pytorch"


def dequantized(model: nn.Module, layer: str) -> Tensor:
    """The weight of a quantized linear layer without a bias, as the layer applies it to its float input."""
    weight_shape = model.get_submodule(layer).weight.shape
    return run(model.get_submodule(layer), torch.eye(weight_shape[1])).T


@every_modelopt_dtype
def test_modelopt_stores_quantized_weights_not_float32(dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "payload.pth"
    backend_of(MODELOPT).save(quantized_tiny_net(MODELOPT, dtype), path, {})
    stored = torch.load(path, weights_only=True)["model_state_dict"]
    stored_dtype = torch.int8 if dtype == "int8" else torch.float8_e4m3fn
    assert all(stored[f"{name}.weight"].dtype == stored_dtype for name in ("stem", "fc1", "fc2"))
    assert stored["fc1.weight"].shape == (384, 256)
    assert stored["norm.weight"].dtype == torch.float32


def test_e5m2_of_torchao_is_coarser_than_e4m3() -> None:
    errors = {}
    for dtype in ("int8", "fp8_e4m3fn", "fp8_e5m2"):
        model = seeded(lambda: nn.Sequential(nn.Linear(256, 64, bias=False))).eval()
        weight = model[0].weight.detach().clone()
        model = quantize("torchao", model, rules("torchao", dtype, "*"))
        errors[dtype] = error(dequantized(model, "0"), weight)
    assert errors["int8"] < 0.01
    assert 0.015 < errors["fp8_e4m3fn"] < 0.035
    assert 1.5 * errors["fp8_e4m3fn"] < errors["fp8_e5m2"] < 0.07


def test_modelopt_realises_e5m2_as_e4m3_with_a_notice() -> None:
    plan = plan_of(MODELOPT, tiny_net(), rules(MODELOPT, "fp8_e5m2", "fc1"))
    notice = f"{MODELOPT} has no static fp8_e5m2 and realises it as fp8_e4m3fn"
    assert notices(plan) == [
        f"quantize.layers[0].weights.dtype: {notice}",
        f"quantize.layers[0].activations.dtype: {notice}",
    ]
    (fc1,) = plan.quantized
    assert str(fc1.weights) == "fp8_e4m3fn axis 0 (asked: fp8_e5m2)"
    assert str(fc1.activations) == "fp8_e4m3fn per tensor (asked: fp8_e5m2)"
    assert rows(plan)["fc1"]["weights"] == {"dtype": "fp8_e4m3fn", "axis": 0, "asked": "fp8_e5m2"}
    states = [
        parts(quantize(MODELOPT, tiny_net(), rules(MODELOPT, dtype, "fc1"), feed(images())))
        for dtype in ("fp8_e5m2", "fp8_e4m3fn")
    ]
    assert all(same(states[0][key], states[1][key]) for key in states[0])


def with_uneven_channels(axis: int, tensor: Tensor) -> Tensor:
    """The tensor, its channels along an axis scaled by factors from 0.0001 to 1."""
    shape = [1] * tensor.ndim
    shape[axis] = -1
    return tensor * torch.logspace(-4, 0, tensor.shape[axis]).view(shape)


def worst_channel_error(axis: int, result: Tensor, reference: Tensor) -> float:
    """The largest relative error of a channel."""
    dim = [index for index in range(reference.ndim) if index != axis]
    return float((vector_norm(result - reference, dim=dim) / vector_norm(reference, dim=dim)).max())


@every_torch_variant
def test_weights_have_one_scale_per_output_channel_by_default(backend: str, dtype: str) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(64, 32, bias=False))).eval()
    model[0].weight.data = with_uneven_channels(0, model[0].weight.data)
    weight = model[0].weight.detach().clone()
    model = quantize(backend, model, [rule("*", dtype, activations=False)])
    assert schemes(backend, model) == {"0": (scheme(dtype, 0), None)}
    assert worst_channel_error(0, dequantized(model, "0"), weight) < 0.08


@every_modelopt_dtype
@pytest.mark.parametrize("axis", [1, -1])
def test_quant_axis_of_weights_is_honoured(dtype: str, axis: int, tmp_path: Path) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(64, 32, bias=False))).eval()
    model[0].weight.data = with_uneven_channels(1, model[0].weight.data)
    weight = model[0].weight.detach().clone()
    model = quantize(MODELOPT, model, [rule("*", dtype, activations=False, weight_axis=axis)])
    assert schemes(MODELOPT, model) == {"0": (scheme(dtype, 1), None)}
    assert model[0].weight_quantizer.amax.shape == (1, 64)
    assert worst_channel_error(1, dequantized(model, "0"), weight) < 0.08
    loaded = saved_and_loaded(
        MODELOPT, model, lambda: nn.Sequential(nn.Linear(64, 32, bias=False)).eval(), tmp_path / "payload.pth"
    )
    assert torch.equal(dequantized(loaded, "0"), dequantized(model, "0"))


@every_modelopt_dtype
@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution_has_its_output_channels_on_axis_1(dtype: str, groups: int, tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.ConvTranspose2d(4, 8, 3, groups=groups, bias=False)).eval()

    model = seeded(build)
    model[0].weight.data = with_uneven_channels(1, model[0].weight.data)
    reference = run(model, normal(4, 4, 6, 6))
    model = quantize(MODELOPT, model, [rule("ConvTranspose2d", dtype, activations=False)])
    assert schemes(MODELOPT, model) == {"0": (scheme(dtype, 1), None)}
    assert model[0].weight_quantizer.amax.shape == (1, 8 // groups, 1, 1)
    output = run(model, normal(4, 4, 6, 6))
    assert worst_channel_error(1, output, reference) < 0.08
    loaded = saved_and_loaded(MODELOPT, model, build, tmp_path / "payload.pth")
    assert torch.equal(run(loaded, normal(4, 4, 6, 6)), output)


@every_modelopt_dtype
def test_quant_axis_of_activations_is_honoured_by_linear_layers_of_any_rank(dtype: str) -> None:
    data = with_uneven_channels(2, normal(4, 5, 16))
    model = quantize(MODELOPT, linears(16, 8), [rule("*", dtype, input_axis=-1)], feed(data, data[:3, :2]))
    assert model[0].input_quantizer.amax.flatten().equal(data.abs().amax(dim=(0, 1)))


@every_modelopt_dtype
def test_quant_axis_of_activations_is_honoured_by_convolutions(dtype: str) -> None:
    data = with_uneven_channels(1, images())
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


@every_torch_variant
@pytest.mark.parametrize("value", [0.0, 1e-44], ids=["zeros", "denormal"])
def test_a_dead_output_row_gives_exact_zeros_and_no_nan(backend: str, dtype: str, value: float, tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(16, 8, bias=False)).eval()

    model = seeded(build)
    model[0].weight.data[3] = value
    reference = run(model, normal(4, 16))
    model = quantize(backend, model, rules(backend, dtype, "*"), feed(normal(32, 16)))
    loaded = saved_and_loaded(backend, model, build, tmp_path / "payload.pth")
    for quantized in (model, loaded):
        output = run(quantized, normal(4, 16))
        assert output.isfinite().all()
        assert torch.equal(output[:, 3], torch.zeros(4))
        assert error(output, reference) < 0.1


@every_modelopt_dtype
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


@every_torch_variant
def test_a_weight_of_zeros_alone_gives_no_nan(backend: str, dtype: str) -> None:
    model = linears(16, 8)
    model[0].weight.data.zero_()
    bias = model[0].bias.detach().clone()
    model = quantize(backend, model, rules(backend, dtype, "*"), feed(normal(32, 16)))
    assert torch.equal(run(model, normal(4, 16)), bias.expand(4, -1))


def test_torchao_is_described_as_slower_than_float() -> None:
    assert backend_of("torchao").capability.target == (
        "smaller files and less memory; on a CPU in eager mode slower than float"
    )
