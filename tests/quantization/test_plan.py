from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from taoq.errors import SpecError
from taoq.quantization.plan import Layer, QuantizationPlan, Support, TensorScheme, check, matches, resolve
from taoq.quantization.spec import LayerSpec, QuantizeSpec, TensorSpec

STATIC = Support(
    modes=("static_ptq",),
    algorithms=("minmax", "max", "entropy"),
    weights=("int8", "fp8_e4m3fn"),
    activations=("int8", "fp8_e4m3fn"),
    entropy_activations=("int8",),
    layer_types=("Conv2d", "Linear"),
    devices=("cuda", "cpu"),
    realised={"fp8_e5m2": "fp8_e4m3fn"},
    target="tests",
)
WEIGHT_ONLY = Support(
    modes=("weight_only_ptq",),
    algorithms=(),
    weights=("int8", "fp8_e5m2"),
    activations=(),
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
INT8 = TensorSpec(dtype="int8")
FP8 = TensorSpec(dtype="fp8_e4m3fn")
NATIVE = TensorSpec(dtype="native")


def spec(*layers: LayerSpec, **fields: Any) -> QuantizeSpec:
    fields = {"backend": "modelopt.pytorch", "mode": "static_ptq", **fields}
    return QuantizeSpec(layers=list(layers), **fields)


def rule(name: str, weights: TensorSpec | None = None, activations: TensorSpec | None = None) -> LayerSpec:
    return LayerSpec(module_name=name, weights=weights, activations=activations)


def plan(*layers: LayerSpec, **fields: Any) -> QuantizationPlan:
    section = spec(*layers, **fields)
    return resolve(section, LAYERS, STATIC, check(section, STATIC))


def decided(result: QuantizationPlan) -> dict[str, tuple[str, str, str]]:
    return {item.layer.name: (str(item.weights), str(item.activations), item.rule) for item in result.quantized}


def faults(*layers: LayerSpec, support: Support = STATIC, **fields: Any) -> list[str]:
    section = spec(*layers, **fields)
    with pytest.raises(SpecError) as error:
        resolve(section, LAYERS, support, check(section, support))
    return [f"{fault.where}: {fault.what} | {fault.hint}" for fault in error.value.faults]


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
    result = plan(rule("head", INT8))
    assert decided(result) == {"head": ("int8 axis 0", "None", "quantize.layers[0]")}
    assert result.layers[0].reason == "no rule names it"


def test_the_last_matching_rule_decides_the_whole_layer() -> None:
    result = plan(rule("Linear", INT8, INT8), rule("blocks.*", FP8))
    assert decided(result) == {
        "blocks.0.fc1": ("fp8_e4m3fn axis 0", "None", "quantize.layers[1]"),
        "blocks.0.fc2": ("fp8_e4m3fn axis 0", "None", "quantize.layers[1]"),
        "head": ("int8 axis 0", "int8 per tensor", "quantize.layers[0]"),
    }


def test_native_takes_a_layer_out_again() -> None:
    result = plan(rule("Linear", INT8), rule("head", NATIVE))
    assert sorted(decided(result)) == ["blocks.0.fc1", "blocks.0.fc2"]
    head = result.layers[-1]
    assert (head.rule, head.reason) == ("quantize.layers[1]", "native")


def test_skip_names_win_over_any_rule() -> None:
    result = plan(rule("Linear", INT8), rule("head", FP8), skip_names=["hea?"])
    head = result.layers[-1]
    assert (head.quantized, head.rule, head.reason) == (False, "quantize.skip_names[0]", "skipped")


def test_a_skip_name_matching_nothing_is_a_warning() -> None:
    result = plan(rule("Linear", INT8), skip_names=["classifier.fc", "BatchNorm2d", "blocks"])
    assert result.warnings == (
        "quantize.skip_names[0]: 'classifier.fc' matches no layer",
        "quantize.skip_names[2]: 'blocks' matches no layer; did you mean 'blocks.*'?",
    )


def test_weights_get_one_scale_per_output_channel_and_activations_one_per_tensor() -> None:
    assert decided(plan(rule("stem", INT8, INT8), rule("up", INT8, INT8))) == {
        "stem": ("int8 axis 0", "int8 per tensor", "quantize.layers[0]"),
        "up": ("int8 axis 1", "int8 per tensor", "quantize.layers[1]"),
    }


def test_quant_axis_is_honoured_and_counted_from_the_front() -> None:
    result = plan(
        rule("stem", TensorSpec(dtype="int8", quant_axis=-3)), rule("head", TensorSpec(dtype="int8", quant_axis=1))
    )
    assert [str(item.weights) for item in result.quantized] == ["int8 axis 1", "int8 axis 1"]


def test_an_axis_outside_of_a_weight_is_an_error() -> None:
    assert faults(rule("stem", INT8), rule("head", TensorSpec(dtype="int8", quant_axis=2))) == [
        "quantize.layers[1].weights.quant_axis: axis 2 is outside of the weight of 'head', shape [10, 8]"
        " | the output channels are axis 0"
    ]


def test_activations_may_have_one_scale_per_channel_and_nothing_else() -> None:
    result = plan(rule("stem", INT8, TensorSpec(dtype="int8", quant_axis=1)))
    assert str(result.quantized[0].activations) == "int8 axis 1"
    assert faults(rule("head", INT8, TensorSpec(dtype="int8", quant_axis=7))) == [
        "quantize.layers[0].activations.quant_axis: axis 7 is not the channel axis of the input of 'head' (Linear)"
        " | write -1 for one scale per channel, or leave it out for one scale per tensor"
    ]


def test_only_activations_need_calibration() -> None:
    assert not plan(rule("Linear", INT8)).needs_calibration
    assert plan(rule("Linear", None, INT8)).needs_calibration


def test_a_dtype_that_the_backend_realises_as_another_is_said() -> None:
    e5m2 = TensorSpec(dtype="fp8_e5m2")
    result = plan(rule("head", e5m2, e5m2))
    assert result.quantized[0].weights == TensorScheme("fp8_e4m3fn", 0, "fp8_e5m2")
    assert str(result.quantized[0].activations) == "fp8_e4m3fn per tensor (asked: fp8_e5m2)"
    assert result.warnings == (
        "quantize.layers[0].weights.dtype: modelopt.pytorch has no static fp8_e5m2 and realises it as fp8_e4m3fn",
        "quantize.layers[0].activations.dtype: modelopt.pytorch has no static fp8_e5m2 and realises it as fp8_e4m3fn",
    )


def test_deprecated_fields_get_one_warning() -> None:
    result = plan(rule("head", INT8), default_layer_dtype="int8", default_activation_dtype="native")
    assert result.warnings == (
        "quantize.default_layer_dtype, quantize.default_activation_dtype: deprecated, no effect;"
        " the dtype comes from each rule",
    )


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
    assert faults(rule("Linear", INT8), rule(pattern, INT8)) == [f"quantize.layers[1].module_name: {message}"]


def test_a_star_quantizes_what_can_be_quantized() -> None:
    assert len(plan(rule("*", INT8)).quantized) == 5


def test_nothing_left_to_quantize_is_an_error() -> None:
    message = (
        "quantize.layers: no layer is left to quantize"
        " | take a pattern out of quantize.skip_names, or give a rule another dtype than native"
    )
    assert faults(rule("Linear", INT8), skip_names=["*"]) == [message]
    assert faults(rule("Linear", NATIVE)) == [message]


def test_everything_that_needs_no_model_is_checked_at_once() -> None:
    assert faults(rule("head"), rule("stem", FP8, FP8), mode="weight_only_ptq", device="trt", algorithm="entropy") == [
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
    assert faults(rule("head", INT8, axis), algorithm="entropy") == [
        "quantize.layers[0].activations.quant_axis: entropy finds one range for a tensor, not one per index"
        " | write algorithm: max, or leave the axis out"
    ]


def test_smoothquant_takes_int8_and_no_axis() -> None:
    smooth = dataclasses.replace(STATIC, algorithms=("max", "smoothquant"), smoothquant=("int8",))
    axis = TensorSpec(dtype="int8", quant_axis=-1)
    layers = (rule("head", INT8, axis), rule("fc1", FP8, INT8), rule("fc2", NATIVE, FP8), rule("stem", FP8))
    assert faults(*layers, support=smooth, algorithm="smoothquant") == [
        "quantize.layers[0].activations.quant_axis: smoothquant has one scale for a tensor, not one per index"
        " | write algorithm: max, or leave the axis out",
        "quantize.algorithm: smoothquant cannot take fp8_e4m3fn weights (quantize.layers[1])"
        " | write algorithm: max, or weights: {dtype: int8}",
        "quantize.algorithm: smoothquant cannot take fp8_e4m3fn activations (quantize.layers[2])"
        " | write algorithm: max, or activations: {dtype: int8}",
    ]


def test_an_algorithm_that_the_backend_lacks_is_refused() -> None:
    one = dataclasses.replace(STATIC, algorithms=("max",))
    for algorithm in ("entropy", "smoothquant"):
        assert faults(rule("head", INT8, INT8), support=one, algorithm=algorithm) == [
            f"quantize.algorithm: backend modelopt.pytorch has no algorithm {algorithm}"
            f" | write algorithm: max, or choose a backend that has {algorithm}"
        ]


def test_empty_layers_are_an_error() -> None:
    assert faults() == [
        "quantize.layers: empty: nothing would be quantized"
        " | write at least one rule: {module_name: Linear, weights: {dtype: int8}}"
    ]


def test_a_weight_only_backend_says_that_activations_have_no_effect() -> None:
    section = spec(rule("Linear", INT8, INT8), backend="torchao", mode="weight_only_ptq", device="cpu", algorithm="max")
    result = resolve(section, LAYERS, WEIGHT_ONLY, check(section, WEIGHT_ONLY))
    assert not result.needs_calibration
    assert result.warnings == (
        "quantize.algorithm: max has no effect, torchao calibrates nothing",
        "quantize.layers[0].activations: int8 has no effect, torchao quantizes weights only",
    )


def test_a_weight_only_backend_refuses_a_rule_of_activations_alone() -> None:
    fields = {"backend": "torchao", "mode": "weight_only_ptq", "device": "cpu"}
    assert faults(rule("Linear", None, INT8), support=WEIGHT_ONLY, **fields) == [
        "quantize.layers[0]: rule 'Linear' has activations only, torchao quantizes weights only"
        " | write weights: {dtype: int8}, or choose a backend that quantizes activations"
    ]


def test_a_dtype_that_the_backend_lacks_is_refused() -> None:
    fields = {"backend": "torchao", "mode": "weight_only_ptq", "device": "cpu"}
    assert faults(rule("Linear", FP8), support=WEIGHT_ONLY, **fields) == [
        "quantize.layers[0].weights.dtype: backend torchao has no fp8_e4m3fn weights"
        " | choose one of int8, fp8_e5m2, native"
    ]
