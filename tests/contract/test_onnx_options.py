"""`backend_kwargs` of the ONNX backends. Real libraries, small graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from support.graphs import (
    LAYERS,
    MODELOPT,
    ORT,
    branches,
    dequantized_inputs,
    feed,
    input_scales,
    pictures,
    plan_of,
    quantize,
    rule,
    weight_parts,
)
from support.networks import faults_of
from taoq.errors import SpecError


def faults(backend: str, **options: Any) -> list[str]:
    return [f"{fault.where}: {fault.what} | {fault.hint}" for fault in faults_of(backend, options)]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        (
            "calibrate_per_nodes",
            True,
            "ModelOpt's quantize has no argument 'calibrate_per_nodes' | did you mean 'calibrate_per_node'?",
        ),
        (
            "speed",
            1,
            "ModelOpt's quantize has no argument 'speed' | taoq takes use_external_data_format, calibrate_per_node,"
            " op_types_to_quantize, op_types_to_exclude, high_precision_dtype",
        ),
        (
            "quantize_mode",
            "fp8",
            "'quantize_mode' of ModelOpt's quantize is decided by taoq | give dtypes in quantize.layers",
        ),
        (
            "autotune",
            True,
            "'autotune' of ModelOpt's quantize is decided by taoq | leave it out: taoq takes only"
            " use_external_data_format, calibrate_per_node, op_types_to_quantize, op_types_to_exclude,"
            " high_precision_dtype",
        ),
        ("calibrate_per_node", "yes", "'yes' is not true or false | write true or false"),
        ("op_types_to_quantize", "Conv", "'Conv' is not a list of op types | write a list of op types"),
        ("op_types_to_quantize", ["conv"], "taoq quantizes no op type 'conv' | did you mean 'Conv'?"),
        ("op_types_to_exclude", ["Add"], "taoq quantizes no op type 'Add' | Conv, ConvTranspose, Gemm, MatMul"),
        ("high_precision_dtype", "bf16", "'bf16' is not fp32 or fp16 | write fp32 or fp16"),
    ],
)
def test_options_that_modelopt_does_not_take_are_refused(option: str, value: Any, message: str) -> None:
    assert faults(MODELOPT, **{option: value}) == [f"quantize.backend_kwargs.{option}: {message}"]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        (
            "reduce_ranges",
            True,
            "onnxruntime's quantize_static has no argument 'reduce_ranges' | did you mean 'reduce_range'?",
        ),
        (
            "per_channel",
            False,
            "'per_channel' of onnxruntime's quantize_static is decided by taoq"
            " | taoq takes reduce_range, use_external_data_format",
        ),
        ("reduce_range", 1, "'1' is not true or false | write true or false"),
    ],
)
def test_options_that_onnxruntime_does_not_take_are_refused(option: str, value: Any, message: str) -> None:
    assert faults(ORT, **{option: value}) == [f"quantize.backend_kwargs.{option}: {message}"]


def test_valid_options_have_no_faults() -> None:
    assert faults(ORT, reduce_range=True, use_external_data_format=False) == []
    types = {"op_types_to_quantize": ["Conv"], "op_types_to_exclude": []}
    assert faults(MODELOPT, calibrate_per_node=True, high_precision_dtype="fp16", **types) == []


@pytest.mark.parametrize(
    ("options", "planned"),
    [
        ({"op_types_to_quantize": ["Conv"]}, ["stem", "left", "right"]),
        ({"op_types_to_exclude": ["Conv", "Gemm"]}, ["tokens"]),
        ({"op_types_to_quantize": ["Conv", "Gemm"], "op_types_to_exclude": ["Conv"]}, ["head"]),
    ],
)
def test_op_types_limit_what_modelopt_quantizes(options: dict[str, Any], planned: list[str]) -> None:
    model = quantize(MODELOPT, branches(), [rule("*")], feed(pictures()), options)
    assert list(dequantized_inputs(model)) == [LAYERS[layer] for layer in planned]


def test_a_rule_for_an_op_type_that_options_exclude_is_an_error() -> None:
    with pytest.raises(SpecError) as refused:
        plan_of(MODELOPT, branches(), [rule("Conv")], {"op_types_to_exclude": ["Conv"]})
    assert str(refused.value) == (
        "quantize.layers[0].module_name: pattern 'Conv' matches 3 layer(s), none of which modelopt.onnx can quantize:"
        " quantize.backend_kwargs leaves its type out\nhint: modelopt.onnx quantizes Conv, ConvTranspose, Gemm, MatMul"
    )


@pytest.mark.parametrize("batch", [None, 4])
def test_calibration_by_node_gives_the_same_ranges(batch: int | None) -> None:
    at_once, by_node = (
        quantize(MODELOPT, branches(batch), [rule("*")], feed(*pictures(10).split(4)), {"calibrate_per_node": value})
        for value in (False, True)
    )
    assert input_scales(by_node) == pytest.approx(input_scales(at_once), rel=1e-6)


def test_reduced_range_weights_have_seven_bits() -> None:
    model = quantize(ORT, branches(), [rule("left")], feed(pictures()), {"reduce_range": True})
    assert np.abs(weight_parts(model, "/left/Conv")[0].astype(int)).max() <= 64
