"""Which layer gets which scheme by which rule, and what is refused; no model, no library."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from support.networks import notices, scheme
from taoq.errors import SpecError
from taoq.quantization.capability import Algorithm, Capability, TensorCapability, check
from taoq.quantization.dtypes import FP8_E4M3FN, FP8_E5M2, INT8
from taoq.quantization.plan import common_patterns, matches, resolve
from taoq.quantization.spec import LayerSpec, QuantizeSpec, TensorSpec
from taoq.quantization.types import (
    Granularity,
    Layer,
    PerAxis,
    PerBlock,
    PerGroup,
    PerTensor,
    QuantizationPlan,
    Rule,
    Scheme,
)

MAX = Algorithm(name="max", activations=(INT8, FP8_E4M3FN))
ENTROPY = Algorithm(name="entropy", activations=(INT8,), per_tensor=True)
SMOOTHQUANT = Algorithm(name="smoothquant", activations=(INT8,), weights=(INT8,), per_tensor=True, smooths=True)

STATIC = Capability(
    name="modelopt.pytorch",
    format="torch",
    payload="model.pth",
    libraries=(),
    modes=("static_ptq",),
    algorithms=(dataclasses.replace(MAX, name="minmax"), MAX, ENTROPY),
    weights=TensorCapability(dtypes=(INT8, FP8_E4M3FN)),
    activations=TensorCapability(dtypes=(INT8, FP8_E4M3FN)),
    layer_types=("Conv2d", "Linear"),
    devices=("cuda", "cpu"),
    realised={FP8_E5M2: FP8_E4M3FN},
    target="tests",
)
SMOOTHING = dataclasses.replace(STATIC, algorithms=(MAX, SMOOTHQUANT))
WEIGHT_ONLY = Capability(
    name="torchao",
    format="torch",
    payload="model.pth",
    libraries=(),
    modes=("weight_only_ptq",),
    weights=TensorCapability(dtypes=(INT8, FP8_E5M2)),
    layer_types=("Linear",),
    devices=("cpu",),
    target="tests",
)
LAYERS = (
    Layer(name="stem", type="Conv2d", weight_shape=(8, 3, 3, 3)),
    Layer(name="norm", type="BatchNorm2d", obstacle="it has no weight matrix or kernel"),
    Layer(name="blocks.0.fc1", type="Linear", weight_shape=(16, 8)),
    Layer(name="blocks.0.fc2", type="Linear", weight_shape=(8, 16)),
    Layer(name="up", type="ConvTranspose2d", weight_shape=(8, 4, 2, 2), channel_axis=1),
    Layer(name="head", type="Linear", weight_shape=(10, 8), input_axis=-1),
)
IN_INT8 = TensorSpec(dtype="int8")
IN_FP8 = TensorSpec(dtype="fp8_e4m3fn")
NATIVE = TensorSpec(dtype="native")


def section_of(*rules: LayerSpec, **fields: Any) -> QuantizeSpec:
    return QuantizeSpec(layers=list(rules), **{"backend": "modelopt.pytorch", "mode": "static_ptq", **fields})


def weight_only_section(*rules: LayerSpec, **fields: Any) -> QuantizeSpec:
    return section_of(*rules, backend="torchao", mode="weight_only_ptq", device="cpu", **fields)


def rule(pattern: str, weights: TensorSpec | None = None, activations: TensorSpec | None = None) -> LayerSpec:
    return LayerSpec(module_name=pattern, weights=weights, activations=activations)


def checked_plan(section: QuantizeSpec, capability: Capability = STATIC) -> QuantizationPlan:
    return resolve(section, LAYERS, capability, check(section, capability))


def plan(*rules: LayerSpec, **fields: Any) -> QuantizationPlan:
    return checked_plan(section_of(*rules, **fields))


def decisions(result: QuantizationPlan) -> dict[str, tuple[str, str, str]]:
    """Weights, activations and the deciding rule of each quantized layer."""
    return {
        item.layer.name: (str(item.weights), str(item.activations), item.rule.field if item.rule else "")
        for item in result.quantized
    }


def faults_of(section: QuantizeSpec, capability: Capability = STATIC) -> list[str]:
    with pytest.raises(SpecError) as error:
        checked_plan(section, capability)
    return [f"{fault.where}: {fault.what} | {fault.hint}" for fault in error.value.faults]


def faults(*rules: LayerSpec, **fields: Any) -> list[str]:
    return faults_of(section_of(*rules, **fields))


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("Linear", ["blocks.0.fc1", "blocks.0.fc2", "head"]),
        ("head", ["head"]),
        ("blocks.*", ["blocks.0.fc1", "blocks.0.fc2"]),
        ("*fc[12]", ["blocks.0.fc1", "blocks.0.fc2"]),
        ("*.fc?", ["blocks.0.fc1", "blocks.0.fc2"]),
        ("linear", []),
        ("*", [layer.name for layer in LAYERS]),
        ("hea", []),
    ],
)
def test_a_pattern_matches_the_name_or_the_type_case_sensitively(pattern: str, names: list[str]) -> None:
    assert [layer.name for layer in LAYERS if matches(pattern, layer)] == names


def test_layers_that_no_rule_names_stay_float() -> None:
    result = plan(rule("head", IN_INT8))
    assert decisions(result) == {"head": ("int8 axis 0", "None", "quantize.layers[0]")}
    stem = result.layers[0]
    assert (stem.quantized, stem.rule, stem.reason) == (False, None, "no rule names it")


def test_the_last_matching_rule_decides_the_whole_layer() -> None:
    result = plan(rule("Linear", IN_INT8, IN_INT8), rule("blocks.*", IN_FP8))
    assert decisions(result) == {
        "blocks.0.fc1": ("fp8_e4m3fn axis 0", "None", "quantize.layers[1]"),
        "blocks.0.fc2": ("fp8_e4m3fn axis 0", "None", "quantize.layers[1]"),
        "head": ("int8 axis 0", "int8 per tensor", "quantize.layers[0]"),
    }


def test_native_takes_a_layer_out_again() -> None:
    result = plan(rule("Linear", IN_INT8), rule("head", NATIVE))
    assert sorted(decisions(result)) == ["blocks.0.fc1", "blocks.0.fc2"]
    head = result.layers[-1]
    assert (head.rule, head.reason) == (Rule("layers", 1, "head"), "native")


def test_skip_names_win_over_any_rule() -> None:
    result = plan(rule("Linear", IN_INT8), rule("head", IN_FP8), skip_names=["hea?"])
    head = result.layers[-1]
    assert (head.quantized, head.rule, head.reason) == (False, Rule("skip_names", 0, "hea?"), "skipped")


def test_a_skip_name_matching_nothing_gets_a_notice() -> None:
    result = plan(rule("Linear", IN_INT8), skip_names=["classifier.fc", "BatchNorm2d", "blocks"])
    assert notices(result) == [
        "quantize.skip_names[0]: 'classifier.fc' matches no layer",
        "quantize.skip_names[2]: 'blocks' matches no layer; did you mean 'blocks.*'?",
    ]


def test_weights_get_one_scale_per_output_channel_and_activations_one_per_tensor() -> None:
    assert decisions(plan(rule("stem", IN_INT8, IN_INT8), rule("up", IN_INT8, IN_INT8))) == {
        "stem": ("int8 axis 0", "int8 per tensor", "quantize.layers[0]"),
        "up": ("int8 axis 1", "int8 per tensor", "quantize.layers[1]"),
    }


def test_quant_axis_is_honoured_and_counted_from_the_front() -> None:
    result = plan(
        rule("stem", TensorSpec(dtype="int8", quant_axis=-3)), rule("head", TensorSpec(dtype="int8", quant_axis=1))
    )
    assert [str(item.weights) for item in result.quantized] == ["int8 axis 1", "int8 axis 1"]


def test_an_axis_outside_of_a_weight_is_an_error() -> None:
    assert faults(rule("stem", IN_INT8), rule("head", TensorSpec(dtype="int8", quant_axis=2))) == [
        "quantize.layers[1].weights.quant_axis: axis 2 is outside of the weight of 'head', shape [10, 8]"
        " | the output channels are axis 0"
    ]


def test_activations_may_have_one_scale_per_channel_and_nothing_else() -> None:
    result = plan(rule("stem", IN_INT8, TensorSpec(dtype="int8", quant_axis=1)))
    assert str(result.quantized[0].activations) == "int8 axis 1"
    assert faults(rule("head", IN_INT8, TensorSpec(dtype="int8", quant_axis=7))) == [
        "quantize.layers[0].activations.quant_axis: axis 7 is not the channel axis of the input of 'head' (Linear)"
        " | write -1 for one scale per channel, or leave it out for one scale per tensor"
    ]


def test_only_activations_need_calibration() -> None:
    assert not plan(rule("Linear", IN_INT8)).needs_calibration
    assert plan(rule("Linear", None, IN_INT8)).needs_calibration


def test_a_dtype_that_the_backend_realises_as_another_gets_a_notice() -> None:
    e5m2 = TensorSpec(dtype="fp8_e5m2")
    result = plan(rule("head", e5m2, e5m2))
    weights = result.quantized[0].weights
    assert weights is not None
    assert (weights, weights.requested) == (scheme("fp8_e4m3fn", 0), FP8_E5M2)
    assert str(result.quantized[0].activations) == "fp8_e4m3fn per tensor (asked: fp8_e5m2)"
    assert notices(result) == [
        "quantize.layers[0].weights.dtype: modelopt.pytorch has no static fp8_e5m2 and realises it as fp8_e4m3fn",
        "quantize.layers[0].activations.dtype: modelopt.pytorch has no static fp8_e5m2 and realises it as fp8_e4m3fn",
    ]


def test_each_deprecated_field_gets_one_notice() -> None:
    result = plan(rule("head", IN_INT8), default_layer_dtype="int8", default_activation_dtype="native")
    assert notices(result) == [
        "quantize.default_layer_dtype: deprecated, no effect; the dtype comes from each rule",
        "quantize.default_activation_dtype: deprecated, no effect; the dtype comes from each rule",
    ]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("haed", "pattern 'haed' matches no layer | did you mean 'head'?"),
        ("linear", "pattern 'linear' matches no layer | did you mean 'Linear'?"),
        ("blocks", "pattern 'blocks' matches no layer | did you mean 'blocks.*'?"),
        (
            "nothing_like_it",
            "pattern 'nothing_like_it' matches no layer"
            " | the quantizable types of this model are Conv2d, ConvTranspose2d, Linear",
        ),
        (
            "BatchNorm2d",
            "pattern 'BatchNorm2d' matches 1 layer(s), none of which modelopt.pytorch can quantize:"
            " it has no weight matrix or kernel | modelopt.pytorch quantizes Conv2d, Linear",
        ),
    ],
)
def test_a_rule_that_matches_nothing_quantizable_is_an_error(pattern: str, message: str) -> None:
    assert faults(rule("Linear", IN_INT8), rule(pattern, IN_INT8)) == [f"quantize.layers[1].module_name: {message}"]


def test_a_star_quantizes_what_can_be_quantized() -> None:
    assert len(plan(rule("*", IN_INT8)).quantized) == 5


def test_nothing_left_to_quantize_is_an_error() -> None:
    message = (
        "quantize.layers: no layer is left to quantize"
        " | take a pattern out of quantize.skip_names, or give a rule another dtype than native"
    )
    assert faults(rule("Linear", IN_INT8), skip_names=["*"]) == [message]
    assert faults(rule("Linear", NATIVE)) == [message]


def test_everything_that_needs_no_model_is_checked_at_once() -> None:
    assert faults(
        rule("head"), rule("stem", IN_FP8, IN_FP8), mode="weight_only_ptq", device="trt", algorithm="entropy"
    ) == [
        "quantize.mode: backend modelopt.pytorch has no mode weight_only_ptq"
        " | write mode: static_ptq, or choose a backend that has weight_only_ptq",
        "quantize.device: backend modelopt.pytorch does not run on trt | choose one of cuda, cpu",
        "quantize.layers[0]: rule 'head' says nothing of weights or activations"
        " | write weights: {dtype: int8}, or weights: {dtype: native} to keep the layers float",
        "quantize.algorithm: entropy cannot calibrate fp8_e4m3fn activations (quantize.layers[1])"
        " | write algorithm: max, or activations: {dtype: int8}",
    ]


def test_entropy_takes_no_axis() -> None:
    axis = TensorSpec(dtype="int8", quant_axis=1)
    assert faults(rule("head", IN_INT8, axis), algorithm="entropy") == [
        "quantize.layers[0].activations.quant_axis: entropy finds one range for a tensor, not one per index"
        " | write algorithm: max, or leave the axis out"
    ]


def test_smoothquant_takes_int8_and_no_axis() -> None:
    axis = TensorSpec(dtype="int8", quant_axis=-1)
    rules = (
        rule("head", IN_INT8, axis),
        rule("fc1", IN_FP8, IN_INT8),
        rule("fc2", NATIVE, IN_FP8),
        rule("stem", IN_FP8),
    )
    assert faults_of(section_of(*rules, algorithm="smoothquant"), SMOOTHING) == [
        "quantize.layers[0].activations.quant_axis: smoothquant finds one range for a tensor, not one per index"
        " | write algorithm: max, or leave the axis out",
        "quantize.algorithm: smoothquant cannot calibrate fp8_e4m3fn weights (quantize.layers[1])"
        " | write algorithm: max, or weights: {dtype: int8}",
        "quantize.algorithm: smoothquant cannot calibrate fp8_e4m3fn activations (quantize.layers[2])"
        " | write algorithm: max, or activations: {dtype: int8}",
    ]


@pytest.mark.parametrize("algorithm", ["entropy", "smoothquant"])
def test_an_algorithm_that_the_backend_lacks_is_refused(algorithm: str) -> None:
    only_max = dataclasses.replace(STATIC, algorithms=(MAX,))
    assert faults_of(section_of(rule("head", IN_INT8, IN_INT8), algorithm=algorithm), only_max) == [
        f"quantize.algorithm: backend modelopt.pytorch has no algorithm {algorithm}"
        f" | write algorithm: max, or choose a backend that has {algorithm}"
    ]


def test_empty_layers_are_an_error() -> None:
    assert faults() == [
        "quantize.layers: empty: nothing would be quantized"
        " | write at least one rule: {module_name: Linear, weights: {dtype: int8}}"
    ]


def test_a_weight_only_backend_says_that_activations_have_no_effect() -> None:
    result = checked_plan(weight_only_section(rule("Linear", IN_INT8, IN_INT8), algorithm="max"), WEIGHT_ONLY)
    assert not result.needs_calibration
    assert notices(result) == [
        "quantize.algorithm: max has no effect, torchao calibrates nothing",
        "quantize.layers[0].activations: int8 has no effect, torchao quantizes weights only",
    ]


def test_a_weight_only_backend_refuses_a_rule_of_activations_alone() -> None:
    assert faults_of(weight_only_section(rule("Linear", None, IN_INT8)), WEIGHT_ONLY) == [
        "quantize.layers[0]: rule 'Linear' has activations only, torchao quantizes weights only"
        " | write weights: {dtype: int8}, or choose a backend that quantizes activations"
    ]


def test_a_dtype_that_the_backend_lacks_is_refused() -> None:
    assert faults_of(weight_only_section(rule("Linear", IN_FP8)), WEIGHT_ONLY) == [
        "quantize.layers[0].weights.dtype: backend torchao has no fp8_e4m3fn weights"
        " | choose one of int8, fp8_e5m2, native"
    ]


@pytest.mark.parametrize(
    ("granularity", "fields"),
    [
        (PerTensor(), {"axis": None}),
        (PerAxis(1), {"axis": 1}),
        (PerGroup(1, 128), {"axis": 1, "group_size": 128}),
        (PerBlock((1, 32)), {"axis": None, "block_shape": [1, 32]}),
    ],
    ids=str,
)
def test_a_scheme_is_stored_with_its_granularity(granularity: Granularity, fields: dict[str, Any]) -> None:
    assert Scheme(INT8, granularity).to_json() == {"dtype": "int8", **fields, "asked": "int8"}


@pytest.mark.parametrize(
    ("names", "others", "patterns"),
    [
        (["blocks.0.qkv", "blocks.11.qkv"], ["blocks.0.proj"], ["blocks.*.qkv"]),
        (["blocks.0.qkv", "blocks.1.qkv"], ["blocks.2.qkv"], ["blocks.0.qkv", "blocks.1.qkv"]),
        (["head"], ["blocks.0.qkv"], ["head"]),
        (["stage1.a", "stage2.a", "b.0[x]"], [], ["stage*.a", "b.0[[]x]"]),
    ],
)
def test_patterns_that_match_some_layers_and_no_others(
    names: list[str], others: list[str], patterns: list[str]
) -> None:
    assert common_patterns(names, [*names, *others]) == patterns
