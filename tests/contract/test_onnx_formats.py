"""Numeric formats of quantized graphs, and how their weights are stored. Real libraries, small graphs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from support.graphs import (
    MODELOPT,
    ORT,
    branches,
    bytes_of,
    dequantized_inputs,
    error,
    every_onnx_backend,
    feed,
    heavy,
    pictures,
    plan_of,
    quantize,
    rule,
    run,
    run_file,
    saved,
    weight_of,
    weight_parts,
)
from support.networks import Untouched, backend_of, calibrate, float_size, scheme, schemes
from taoq.quantization.plan import verify

FP8 = "fp8_e4m3fn"


def test_modelopt_has_int8_fp8_native_and_weights_alone_in_one_model(tmp_path: Path) -> None:
    rules = [
        rule("stem"),
        rule("left", FP8, FP8),
        rule("right", "native", "int8"),
        rule("tokens", FP8, None),
        rule("head", "int8", "native"),
    ]
    model = quantize(MODELOPT, branches(), rules, feed(pictures()))
    int8, fp8 = scheme("int8"), scheme(FP8)
    expected = {
        "/stem/Conv": (scheme("int8", 0), int8),
        "/left/Conv": (scheme(FP8, 0), fp8),
        "/right/Conv": (None, int8),
        "/tokens/MatMul": (scheme(FP8, 1), None),
        "/head/Gemm": (scheme("int8", 0), None),
    }
    assert schemes(MODELOPT, model) == expected
    path = saved(MODELOPT, model, tmp_path / "model.onnx")
    assert schemes(MODELOPT, backend_of(MODELOPT).load(path, branches)) == expected
    images = pictures(seed=1)
    assert 0 < error(run_file(path, images), run(branches(), images)) < 0.05


@pytest.mark.parametrize("dtype", ["int8", FP8])
@pytest.mark.parametrize("axis", [0, 1, None])
def test_weight_scales_of_modelopt_may_be_along_any_axis(dtype: str, axis: int | None) -> None:
    plan = plan_of(MODELOPT, branches(), [rule("Conv", dtype, None), rule("MatMul", dtype, None)])
    if axis != 0:  # no rule has these axes, but a graph can store them
        layers = [
            dataclasses.replace(layer, weights=scheme(dtype, axis)) if layer.weights else layer for layer in plan.layers
        ]
        plan = dataclasses.replace(plan, layers=tuple(layers))
    model = calibrate(MODELOPT, branches(), plan, Untouched()).quantize(plan)
    verify(plan, backend_of(MODELOPT).applied(model))
    stored, scale = weight_parts(model, "/left/Conv")
    assert (str(stored.dtype), scale.shape) == (
        "int8" if dtype == "int8" else "float8_e4m3fn",
        () if axis is None else (32,),
    )
    assert 0 < error(run(model, pictures()), run(branches(), pictures())) < 0.05


@pytest.mark.parametrize("axis", [0, 1])
def test_a_rule_sets_the_axis_of_modelopts_weights(axis: int) -> None:
    model = quantize(MODELOPT, branches(), [rule("tokens", "int8", None, axis)])
    assert schemes(MODELOPT, model) == {"/tokens/MatMul": (scheme("int8", axis), None)}
    assert weight_parts(model, "/tokens/MatMul")[1].shape == ((32,) if axis == 0 else (64,))


@pytest.mark.parametrize(("backend", "dtype"), [(MODELOPT, "int8"), (MODELOPT, FP8), (ORT, "int8")])
@pytest.mark.parametrize("external", [False, True])
def test_weights_are_stored_quantized(backend: str, dtype: str, external: bool, tmp_path: Path) -> None:
    model = quantize(backend, heavy(), [rule("*", dtype, dtype)], feed(pictures()))
    saved(backend, model, tmp_path / "model.onnx", {"use_external_data_format": external})
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size <= 0.30 * float_size(backend, heavy())
    assert len(list(tmp_path.iterdir())) == 1 + external


@every_onnx_backend
def test_weights_can_be_stored_in_a_file_beside_the_graph(backend: str, tmp_path: Path) -> None:
    options = {"use_external_data_format": True}
    model = quantize(backend, heavy(), [rule("*")], feed(pictures()), options)
    path = saved(backend, model, tmp_path / "model.onnx", options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx_data"]
    assert path.stat().st_size < 10_000
    loaded = backend_of(backend).load(path, heavy)
    assert np.array_equal(run(loaded, pictures()), run(model, pictures()))


def test_an_e5m2_rule_is_realised_as_e4m3() -> None:
    e5m2 = quantize(MODELOPT, branches(), [rule("left", "fp8_e5m2", "fp8_e5m2")], feed(pictures()))
    e4m3 = quantize(MODELOPT, branches(), [rule("left", FP8, FP8)], feed(pictures()))
    assert bytes_of(e5m2) == bytes_of(e4m3)


def test_layers_with_rules_of_e4m3_and_e5m2_may_share_their_input() -> None:
    rules = [rule("left", FP8, FP8), rule("right", "fp8_e5m2", "fp8_e5m2")]
    onnx.checker.check_model(quantize(MODELOPT, branches(), rules, feed(pictures())).model)


def test_the_rest_of_the_graph_can_be_float16(tmp_path: Path) -> None:
    model = quantize(
        MODELOPT, branches(), [rule("left"), rule("head")], feed(pictures()), {"high_precision_dtype": "fp16"}
    )
    assert dequantized_inputs(model) == {"/left/Conv": [0, 1], "/head/Gemm": [0, 1]}
    assert weight_of(model, "/right/Conv").dtype == np.float16
    inputs_and_outputs = [*model.proto.input, *model.proto.output]
    assert {value.type.tensor_type.elem_type for value in inputs_and_outputs} == {TensorProto.FLOAT}
    path, images = saved(MODELOPT, model, tmp_path / "model.onnx"), pictures(seed=1)
    assert 0 < error(run_file(path, images), run(branches(), images)) < 0.03
