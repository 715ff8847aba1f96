"""Which layers of a network the torch backends quantize, and which they leave alone. Real libraries."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from support.networks import (
    BACKENDS,
    backend_of,
    error,
    every_torch_backend,
    feed,
    images,
    normal,
    parts,
    plan_of,
    quantize,
    rows,
    rules,
    run,
    same,
    saved_and_loaded,
    seeded,
    tiny_net,
)
from taoq.errors import SpecError, TaoqError

MODELOPT = "modelopt.pytorch"


def obstacles(backend: str, model: nn.Module) -> dict[str, str]:
    """Why each layer with a weight cannot be quantized, by layer."""
    return {layer.name: layer.obstacle for layer in backend_of(backend).layers(model, {}) if layer.weight_shape}


def test_modelopt_quantizes_nothing_that_is_not_planned() -> None:
    model = quantize(MODELOPT, tiny_net(), rules(MODELOPT, "int8", "fc1"), feed(images()))
    quantizers = {name: module for name, module in model.named_modules() if isinstance(module, TensorQuantizer)}
    assert len(quantizers) > 6  # ModelOpt inserts quantizers everywhere, batch norm included
    assert sorted(name for name, module in quantizers.items() if module.is_enabled) == [
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


@every_torch_backend
def test_a_container_is_not_a_layer(backend: str) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 4))
    with pytest.raises(SpecError) as error:
        plan_of(backend, model, rules(backend, "int8", "0"))
    assert str(error.value) == (
        "quantize.layers[0].module_name: pattern '0' matches no layer\nhint: did you mean '0.*'?"
    )


@pytest.mark.parametrize("dtype", ["int8", "fp8_e4m3fn", "fp8_e5m2"])
def test_torchao_leaves_convolutions_float_where_a_rule_matches_all_layers(dtype: str) -> None:
    model = quantize("torchao", tiny_net(), rules("torchao", dtype, "*"))
    assert type(model.stem.weight) is nn.Parameter
    assert torch.equal(model.stem.weight, tiny_net().stem.weight)
    assert run(model, images()).isfinite().all()


class Doubled(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    """A linear layer whose class has another name."""


@pytest.mark.parametrize(
    ("backend", "obstacle"),
    [
        ("torchao", "Doubled has a forward of its own"),
        (MODELOPT, "Doubled has a forward of its own, which ModelOpt does not convert"),
    ],
    ids=BACKENDS,
)
def test_subclasses_are_converted_only_if_they_keep_the_forward(backend: str, obstacle: str) -> None:
    model = seeded(lambda: nn.Sequential(Renamed(8, 8), Doubled(8, 4))).eval()
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


@every_torch_backend
def test_the_projections_of_attention_are_reported_and_left_alone(backend: str) -> None:
    reason = "nn.MultiheadAttention computes with its weights itself, past any quantizer"
    names = ("attention", "attention.out_proj")
    model = seeded(Attention).eval()
    before = parts(model)
    assert obstacles(backend, model) == {**dict.fromkeys(names, reason), "head": ""}
    plan = plan_of(backend, model, rules(backend, "int8", "*"))
    assert {name: row["reason"] for name, row in rows(plan).items()} == {**dict.fromkeys(names, reason), "head": ""}
    model = quantize(backend, model, rules(backend, "int8", "*"), feed(normal(4, 5, 16)))
    after = parts(model)
    attention_keys = [key for key in before if key.startswith("attention.")]
    assert attention_keys == [key for key in after if key.startswith("attention.")]
    assert all(same(before[key], after[key]) for key in attention_keys)
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


@every_torch_backend
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


@every_torch_backend
def test_a_rule_that_names_only_a_tied_layer_is_refused(backend: str) -> None:
    with pytest.raises(SpecError) as error:
        plan_of(backend, seeded(Tied), rules(backend, "int8", "up"))
    assert str(error.value) == (
        f"quantize.layers[0].module_name: pattern 'up' matches 1 layer(s), none of which {backend} can quantize:"
        f" it shares its weight with 'down'\nhint: {backend} quantizes"
        f" {', '.join(backend_of(backend).capability.layer_types)}"
    )


def parametrized() -> nn.Module:
    """A linear layer with weight normalization, and one without."""
    return seeded(lambda: nn.Sequential(weight_norm(nn.Linear(8, 8)), nn.Linear(8, 4))).eval()


@every_torch_backend
def test_a_parametrized_layer_is_reported_under_its_own_name(backend: str) -> None:
    reason = "its weight is parametrized; remove the parametrization first"
    assert obstacles(backend, parametrized()) == {"0": reason, "1": ""}
    plan = plan_of(backend, parametrized(), rules(backend, "int8", "*"))
    assert {name: row["reason"] for name, row in rows(plan).items()} == {"0": reason, "1": ""}


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


@every_torch_backend
def test_a_rule_that_names_only_a_parametrized_layer_is_refused(backend: str) -> None:
    with pytest.raises(SpecError) as error:
        plan_of(backend, parametrized(), rules(backend, "int8", "0"))
    assert str(error.value) == (
        f"quantize.layers[0].module_name: pattern '0' matches 1 layer(s), none of which {backend} can quantize:"
        f" its weight is parametrized; remove the parametrization first\nhint: {backend} quantizes"
        f" {', '.join(backend_of(backend).capability.layer_types)}"
    )


@every_torch_backend
def test_a_layer_name_is_not_read_as_a_pattern(backend: str) -> None:
    model = nn.Sequential()
    for name in ("a[0]", "a*", "ab"):
        model.add_module(name, nn.Linear(8, 8))
    model = quantize(backend, model.eval(), rules(backend, "int8", "a[[]0]", "a[*]"), feed(normal(16, 8)))
    assert list(backend_of(backend).applied(model)) == ["a[0]", "a*"]
