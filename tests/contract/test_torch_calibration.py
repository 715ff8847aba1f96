"""Calibration of torch networks: layers without data, values that are not finite, transformers. Real libraries."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from support.networks import (
    backend_of,
    calibrate,
    error,
    every_algorithm,
    every_modelopt_dtype,
    every_torch_backend,
    every_torch_variant,
    feed,
    images,
    linears,
    normal,
    parts,
    plan_of,
    quantize,
    rule,
    rules,
    run,
    same,
    saved_and_loaded,
    seeded,
    tiny_net,
)
from taoq.errors import TaoqError

MODELOPT = "modelopt.pytorch"
NOT_FINITE = "its calibration range is not a finite number"
LOOK_FOR_NAN = "look for NaN or infinite values in the calibration images or in the checkpoint"


class Unused(nn.Module):
    """A network that never calls one of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(8, 4)
        self.spare = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@every_algorithm
def test_a_layer_that_saw_no_data_is_refused_not_quantized_dynamically(algorithm: str) -> None:
    with pytest.raises(TaoqError) as error:
        quantize(MODELOPT, Unused(), rules(MODELOPT, "int8", "*"), feed(normal(16, 8)), algorithm=algorithm)
    assert str(error.value) == (
        "quantize.layers: 1 layer(s) saw no calibration data (spare): the model does not call them\n"
        "hint: add to quantize.skip_names: spare"
    )


@every_algorithm
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


@every_algorithm
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("batch", [0, 1], ids=["first_batch", "second_batch"])
def test_calibration_data_that_are_not_finite_are_refused(algorithm: str, value: float, batch: int) -> None:
    data = [images(1), images(2)]
    data[batch][3, 1, 4, 5] = value
    with pytest.raises(TaoqError) as error:
        quantize(MODELOPT, tiny_net(), rules(MODELOPT, "int8", "stem"), feed(*data), algorithm=algorithm)
    assert str(error.value) == f"stem: {NOT_FINITE}\nhint: {LOOK_FOR_NAN}"


@every_algorithm
def test_a_checkpoint_that_makes_activations_nan_is_refused(algorithm: str) -> None:
    model = tiny_net()
    model.norm.running_var[2] = -1.0
    with pytest.raises(TaoqError) as error:
        quantize(MODELOPT, model, rules(MODELOPT, "int8", "fc1"), feed(images()), algorithm=algorithm)
    assert str(error.value) == f"fc1: {NOT_FINITE}\nhint: {LOOK_FOR_NAN}"


@every_torch_variant
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
    """Enable the fused inference path of nn.TransformerEncoderLayer, as it is by default in torch."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(True)
    yield
    torch.backends.mha.set_fastpath_enabled(enabled)


def encoder() -> nn.Module:
    """Two transformer layers."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


@every_torch_variant
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
    assert torch.backends.mha.get_fastpath_enabled()  # other networks of the process still take it


@every_torch_variant
def test_a_copy_of_a_network_does_not_take_the_fast_path_either(backend: str, dtype: str, fast_path: None) -> None:
    data = normal(4, 5, 16)
    plan = plan_of(backend, seeded(encoder), rules(backend, dtype, "*"))
    calibrated = calibrate(backend, seeded(encoder), plan, feed(normal(8, 5, 16, seed=1)))
    model = calibrated.with_only(plan.quantized)
    assert 1e-3 < error(run(model, data), run(seeded(encoder), data)) < 0.1
    assert torch.equal(run(copy.deepcopy(model), data), run(model, data))
    if backend == "torchao":  # ModelOpt's compressed weights cannot be copied
        model = calibrated.quantize(plan)
        assert torch.equal(run(copy.deepcopy(model), data), run(model, data))


@every_modelopt_dtype
def test_the_input_quantizers_of_a_transformer_see_the_whole_range(dtype: str, fast_path: None) -> None:
    data = normal(8, 5, 16)
    largest_inputs: dict[str, float] = {}
    model = seeded(encoder)
    torch.backends.mha.set_fastpath_enabled(False)
    for name, module in model.named_modules():
        if name.endswith(("linear1", "linear2")):
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: largest_inputs.__setitem__(name, float(inputs[0].abs().max()))
            )
    run(model, data)
    torch.backends.mha.set_fastpath_enabled(True)
    model = quantize(MODELOPT, seeded(encoder), rules(MODELOPT, dtype, "*"), feed(data))
    assert len(largest_inputs) == 4
    for name, largest in largest_inputs.items():
        assert float(model.get_submodule(f"{name}.input_quantizer").amax) == pytest.approx(largest, rel=1e-5)


@every_torch_backend
def test_a_frozen_batch_norm_of_a_model_in_train_mode_stays_frozen(backend: str) -> None:
    model = tiny_net().train()
    model.norm.eval()
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
    for quantized in (model, loaded):
        assert torch.equal(run(quantized, zeros), bias.expand(8, -1))
        assert run(quantized, normal(8, 16)).isfinite().all()


def test_minmax_is_modelopts_max() -> None:
    states = [
        parts(quantize(MODELOPT, tiny_net(), rules(MODELOPT, "int8", "*"), feed(images()), algorithm=algorithm))
        for algorithm in ("minmax", "max")
    ]
    assert all(same(states[0][key], states[1][key]) for key in states[0])
    assert float(states[0]["stem.input_quantizer._amax"]) == float(images().abs().max())
