"""What only the backend onnxruntime does: unsigned activations, absorbed Relu nodes. Real library, small graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from support.graphs import (
    LAYERS,
    ORT,
    branches,
    error,
    feed,
    made_by,
    node,
    pictures,
    plan_of,
    quantize,
    rule,
    run,
    tensors,
    weight_of,
    weight_parts,
)
from support.networks import scheme
from taoq.errors import SpecError
from taoq.quantization.formats.onnx import qdq
from taoq.quantization.formats.onnx.graph import Graph

FP8 = "fp8_e4m3fn"


def test_onnxruntimes_activations_are_unsigned_and_its_weights_signed_per_channel() -> None:
    model = quantize(ORT, branches(), [rule("*")], feed(pictures()))
    values, makers = tensors(model), made_by(model)
    for layer, channels in (("stem", 32), ("left", 32), ("tokens", 64), ("head", 10)):
        dequantize = makers[node(model, LAYERS[layer]).input[0]]
        assert values[dequantize.input[2]].dtype == np.uint8
        stored, scale = weight_parts(model, LAYERS[layer])
        assert (stored.dtype, scale.shape) == (np.int8, (channels,))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            [rule("left", "native", "int8")],
            "quantize.layers[0]: rule 'left' has activations only, onnxruntime quantizes them with the weights\n"
            "hint: write weights: {dtype: int8} as well",
        ),
        (
            [rule("left", FP8, None)],
            "quantize.layers[0].weights.dtype: backend onnxruntime has no fp8_e4m3fn weights\n"
            "hint: choose one of int8, native",
        ),
        (
            [rule("left", "int8", FP8)],
            "quantize.layers[0].activations.dtype: backend onnxruntime has no fp8_e4m3fn activations\n"
            "hint: choose one of int8, native",
        ),
        (
            [rule("left", axis=1)],
            "quantize.layers[0].weights.quant_axis: axis 1 is not that of the output channels of '/left/Conv' (Conv)\n"
            "hint: leave it out: this backend has one scale a channel",
        ),
    ],
    ids=["activations alone", "fp8 weights", "fp8 activations", "axis"],
)
def test_rules_that_onnxruntime_cannot_follow_are_refused(layers: list[Any], message: str) -> None:
    with pytest.raises(SpecError) as refused:
        plan_of(ORT, branches(), layers)
    assert str(refused.value) == message


def relus(model: Graph) -> list[str]:
    return [node.name for node in model.proto.node if node.op_type == "Relu"]


def test_a_relu_behind_a_planned_layer_is_absorbed() -> None:
    model = quantize(ORT, branches(), [rule("Conv")], feed(pictures()))
    assert relus(model) == ["/Relu_2"]
    assert 0 < error(run(model, pictures(seed=1)), run(branches(), pictures(seed=1))) < 0.03


@pytest.mark.parametrize(
    "layers", [[rule("stem")], [rule("stem"), rule("left")], [rule("stem"), rule("right", "int8", None)]]
)
def test_a_relu_that_a_float_layer_reads_stays(layers: list[Any]) -> None:
    model = quantize(ORT, branches(), layers, feed(pictures()))
    assert "/Relu" in relus(model)
    assert node(model, "/right/Conv").input[0] == "/Relu_output_0"
    assert 0 < error(run(model, pictures(seed=1)), run(branches(), pictures(seed=1))) < 0.03


def test_a_relu_at_the_output_of_the_graph_is_absorbed() -> None:
    model = branches()
    del model.proto.node[2:]
    model.proto.output[0].CopyFrom(
        onnx.helper.make_tensor_value_info("/Relu_output_0", TensorProto.FLOAT, ["batch", 32, 8, 8])
    )
    quantized = quantize(ORT, model, [rule("stem")], feed(pictures()))
    assert [value.name for value in quantized.proto.output] == ["/Relu_output_0"]
    assert run(quantized, pictures(seed=1)).min() == 0
    assert 0 < error(run(quantized, pictures(seed=1)), run(model, pictures(seed=1))) < 0.03


def test_weights_of_layers_with_float_activations_are_quantized_by_taoq() -> None:
    model = quantize(ORT, branches(), [rule("left"), rule("right", "int8", None)], feed(pictures()))
    stored, scale = weight_parts(model, "/right/Conv")
    expected_stored, expected_scale = qdq.quantize_weight(weight_of(branches(), "/right/Conv"), scheme("int8", 0))
    assert np.array_equal(stored, expected_stored)
    assert np.array_equal(scale, expected_scale)
