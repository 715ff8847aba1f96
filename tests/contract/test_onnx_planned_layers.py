"""Exactly the planned layers of a graph are quantized; the others keep their values. Real libraries, small graphs."""

from __future__ import annotations

import pytest
from onnx import TensorProto

from support.graphs import (
    LAYERS,
    MODELOPT,
    branches,
    dequantized_inputs,
    error,
    every_onnx_backend,
    feed,
    input_scale,
    node,
    pictures,
    plan_of,
    quantize,
    rule,
    run,
    tensors,
    tied,
    weight_of,
)
from support.networks import Untouched, backend_of, calibrate, notices
from taoq.errors import SpecError, TaoqError
from taoq.quantization.formats.onnx.graph import Graph
from taoq.quantization.plan import leave_out, verify

FP8 = "fp8_e4m3fn"


def renamed(**names: str) -> Graph:
    """Branches with layers renamed."""
    model = branches()
    for layer, name in names.items():
        node(model, LAYERS[layer]).name = name
    return Graph(model.model)


@every_onnx_backend
@pytest.mark.parametrize("planned", [["left"], ["stem", "head"], ["right", "tokens"], list(LAYERS)], ids="-".join)
def test_exactly_the_planned_layers_are_quantized(backend: str, planned: list[str]) -> None:
    model = quantize(backend, branches(), [rule(layer) for layer in planned], feed(pictures()))
    assert sorted(backend_of(backend).applied(model)) == sorted(LAYERS[layer] for layer in planned)
    assert dequantized_inputs(model) == {LAYERS[layer]: [0, 1] for layer in LAYERS if layer in planned}
    assert 0 < error(run(model, pictures(seed=1)), run(branches(), pictures(seed=1))) < 0.03


@every_onnx_backend
@pytest.mark.parametrize("activations", ["int8", None])
def test_a_float_layer_keeps_its_weight_and_its_input_beside_a_planned_one(
    backend: str, activations: str | None
) -> None:
    batches = feed(pictures()) if activations else Untouched()
    model = quantize(backend, branches(), [rule("left", "int8", activations)], batches)
    left_input = node(model, "/left/Conv").input[0]
    if activations is None:
        assert left_input == "/Relu_output_0"
    else:
        assert [reader.name for reader in model.proto.node if left_input in reader.input] == ["/left/Conv"]
    for layer in ("/stem/Conv", "/right/Conv", "/tokens/MatMul", "/head/Gemm"):
        assert weight_of(model, layer).tobytes() == weight_of(branches(), layer).tobytes()
    assert node(model, "/right/Conv").input[0] == node(branches(), "/right/Conv").input[0]
    assert tensors(model)["right.bias"].tobytes() == tensors(branches())["right.bias"].tobytes()


@every_onnx_backend
def test_a_float_layer_keeps_a_weight_that_it_shares_with_a_planned_one(backend: str) -> None:
    model = quantize(backend, tied(1), [rule("left")], feed(pictures()))
    assert weight_of(model, "/right/Conv").tobytes() == weight_of(branches(), "/left/Conv").tobytes()


@every_onnx_backend
def test_a_float_layer_keeps_a_bias_that_it_shares_with_a_planned_one(backend: str) -> None:
    model = quantize(backend, tied(2), [rule("left")], feed(pictures()))
    bias = tensors(model)[node(model, "/right/Conv").input[2]]
    assert bias.tobytes() == tensors(branches())["left.bias"].tobytes()


@every_onnx_backend
def test_layers_that_share_a_weight_may_differ_in_their_activations(backend: str) -> None:
    model = quantize(backend, tied(1), [rule("left"), rule("right", "int8", None)], feed(pictures()))
    assert dequantized_inputs(model) == {"/left/Conv": [0, 1], "/right/Conv": [1]}


@every_onnx_backend
def test_a_rule_that_matches_nothing_is_an_error(backend: str) -> None:
    with pytest.raises(SpecError) as refused:
        plan_of(backend, branches(), [rule("/stem/conv"), rule("Relu")])
    assert str(refused.value) == (
        "quantize.layers[0].module_name: pattern '/stem/conv' matches no layer\n"
        "hint: did you mean '/stem/Conv' or '/left/Conv'?\n"
        f"quantize.layers[1].module_name: pattern 'Relu' matches 3 layer(s), none of which {backend} can quantize:"
        " it has no weight matrix or kernel\n"
        f"hint: {backend} quantizes {', '.join(backend_of(backend).capability.layer_types)}"
    )


@every_onnx_backend
@pytest.mark.parametrize("planned", ["left", "right", "stem"])
@pytest.mark.parametrize(
    "layers",
    [("/a/Conv", "/a/Conv_1", "/a/Conv_10"), ("/a.b/Conv", "/axb/Conv", "/a.b/Conv.1"), ("x+y|z", "xxy", "z")],
    ids=["prefix", "dot", "operators"],
)
def test_only_the_layer_of_exactly_that_name_is_quantized(
    backend: str, planned: str, layers: tuple[str, str, str]
) -> None:
    name = dict(zip(("left", "right", "stem"), layers, strict=True))
    model = quantize(backend, renamed(**name), [rule(name[planned])], feed(pictures()))
    assert dequantized_inputs(model) == {name[planned]: [0, 1]}
    with_usual_names = quantize(backend, branches(), [rule(planned)], feed(pictures()))
    assert input_scale(model, name[planned]) == input_scale(with_usual_names, LAYERS[planned])


@every_onnx_backend
@pytest.mark.parametrize("batch", [None, 1])
def test_gemm_and_matmul_are_quantized_one_image_at_a_time(backend: str, batch: int | None) -> None:
    model = quantize(backend, branches(batch), [rule("Gemm"), rule("MatMul")], feed(*pictures(3).split(1)))
    assert dequantized_inputs(model) == {"/tokens/MatMul": [0, 1], "/head/Gemm": [0, 1]}
    whole = quantize(backend, branches(), [rule("Gemm"), rule("MatMul")], feed(pictures(3)))
    assert input_scale(model, "/head/Gemm") == pytest.approx(input_scale(whole, "/head/Gemm"), rel=1e-5)


@every_onnx_backend
def test_the_rest_of_the_graph_stays_float32(backend: str) -> None:
    model = quantize(backend, branches(), [rule("left")], feed(pictures()))
    assert {str(values.dtype) for values in tensors(model).values()} <= {"float32", "int8", "uint8", "int32", "int64"}
    assert "Cast" not in [node.op_type for node in model.proto.node]
    assert all(value.type.tensor_type.elem_type == TensorProto.FLOAT for value in model.proto.output)


def test_modelopt_leaves_a_three_channel_stem_out_in_fp8_and_says_why() -> None:
    plan = plan_of(MODELOPT, branches(), [rule("*", FP8, FP8)])
    calibrated = calibrate(MODELOPT, branches(), plan, feed(pictures()))
    reason = "ModelOpt leaves it out: TensorRT has no fast fp8 kernel for its shape"
    reasons = calibrated.left_out(plan)
    assert reasons == {"/stem/Conv": reason}
    without_stem = leave_out(plan, reasons, strict=False)
    model = calibrated.quantize(without_stem)
    verify(without_stem, backend_of(MODELOPT).applied(model))
    assert notices(without_stem) == [f"quantize.layers[0]: 1 layer(s) stay float (/stem/Conv): {reason}"]
    assert weight_of(model, "/stem/Conv").tobytes() == weight_of(branches(), "/stem/Conv").tobytes()
    with pytest.raises(TaoqError) as refused:
        leave_out(plan, reasons, strict=True)
    assert str(refused.value) == (
        f"quantize.layers[0]: /stem/Conv cannot be quantized: {reason}\n"
        "hint: put them into quantize.skip_names, or set quantize.strict: false to leave them float"
    )
