"""Prepared ONNX graphs: names of nodes, stored weights, opsets, and what keeps a layer from being quantized."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from support.nodes import branching, from_x_to_y, matmul, random_array, run_model
from taoq.errors import TaoqError
from taoq.quantization.formats.onnx.graph import Graph, opset
from taoq.quantization.formats.onnx.layers import TYPES, list_layers, prepare


def prepared(model: onnx.ModelProto) -> onnx.ModelProto:
    """A prepared copy."""
    return prepare(Graph(model).copy(), "model.onnx").model


def obstacles(model: onnx.ModelProto) -> dict[str, str]:
    """What keeps each layer from being quantized."""
    return {layer.name: layer.obstacle for layer in list_layers(Graph(model), TYPES, "its type")}


def node_names(model: onnx.ModelProto) -> list[str]:
    return [node.name for node in model.graph.node]


def assert_close(first: Any, second: Any) -> None:
    np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "unique"),
    [
        (["", "", ""], ["MatMul_1", "MatMul_2", "MatMul_3"]),
        (["same", "same", ""], ["same_1", "same_2", "MatMul_1"]),
        (["same", "same_1", "same"], ["same_2", "same_1", "same_3"]),
        (["", "MatMul_1", "own"], ["MatMul_2", "MatMul_1", "own"]),
    ],
)
def test_every_node_gets_a_name_of_its_own_and_keeps_one_that_it_has(given: list[str], unique: list[str]) -> None:
    first, second, third = given
    nodes = [matmul(first, output="p"), matmul(second, "p", output="q"), matmul(third, "q")]
    weight = random_array(4, 4)
    model = prepared(from_x_to_y(nodes, {"w": weight}))
    assert node_names(model) == unique
    assert_close(run_model(model), random_array(1, 4) @ weight @ weight @ weight)


def test_a_weight_of_a_constant_node_is_a_weight() -> None:
    value = numpy_helper.from_array(random_array(4, 4), "any")
    model = from_x_to_y([helper.make_node("Constant", [], ["w"], "constant", value=value), matmul()], {})
    assert obstacles(model) == {
        "constant": "it has no weight matrix or kernel",
        "layer": "its second input is computed, it has no weight",
    }
    assert obstacles(prepared(model)) == {"layer": ""}
    assert_close(run_model(prepared(model)), run_model(model))


def test_a_weight_behind_identities_is_a_weight() -> None:
    nodes = [
        helper.make_node("Identity", ["w"], ["v"], "first"),
        helper.make_node("Identity", ["v"], ["u"], "second"),
        matmul(weight="u"),
    ]
    model = from_x_to_y(nodes, {"w": random_array(4, 4)})
    assert obstacles(prepared(model)) == {"layer": ""}
    assert_close(run_model(prepared(model)), run_model(model))


@pytest.mark.parametrize("op_type", ["Constant", "Identity"])
def test_a_constant_that_is_an_output_stays_a_node(op_type: str) -> None:
    if op_type == "Constant":
        value = numpy_helper.from_array(random_array(4, 4), "any")
        node = helper.make_node("Constant", [], ["y"], "node", value=value)
    else:
        node = helper.make_node("Identity", ["w"], ["y"], "node")
    model = prepared(from_x_to_y([node], {"w": random_array(4, 4)}))
    assert node_names(model) == ["node"]
    assert np.array_equal(run_model(model), random_array(4, 4))


def test_a_branch_that_reads_an_identity_of_a_weight_reads_the_weight() -> None:
    model = branching()
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == "one")
    tensor.name = "uno"
    model.graph.node.insert(0, helper.make_node("Identity", ["uno"], ["one"], "identity"))
    assert_close(run_model(prepared(model)), run_model(model))


def test_weights_that_are_listed_as_inputs_are_weights() -> None:
    model = from_x_to_y([matmul()], {"w": random_array(4, 4)}, weights_as_inputs=True)
    assert [value.name for value in prepared(model).graph.input] == ["x"]
    assert obstacles(prepared(model)) == {"layer": ""}
    assert_close(run_model(prepared(model)), run_model(model))


def test_an_old_opset_is_converted() -> None:
    nodes = [matmul(output="p"), helper.make_node("Softmax", ["p"], ["q"], "softmax", axis=1)]
    nodes.append(helper.make_node("ReduceSum", ["q"], ["y"], "sum", axes=[1]))  # an input since opset 13
    model = from_x_to_y(nodes, {"w": random_array(4, 4)}, opset=11)
    assert opset(prepared(model)) == 19
    assert obstacles(prepared(model))["layer"] == ""
    assert_close(run_model(prepared(model)), run_model(model))


def test_a_newer_opset_stays() -> None:
    assert opset(prepared(from_x_to_y([matmul()], {"w": random_array(4, 4)}, opset=20))) == 20


def test_an_opset_that_cannot_be_converted_is_refused() -> None:
    nodes = [matmul(output="p"), helper.make_node("Pad", ["p"], ["y"], "pad", paddings=[0, 0, 0, 0])]
    model = from_x_to_y(nodes, {"w": random_array(4, 4)}, opset=1, weights_as_inputs=True)
    with pytest.raises(TaoqError) as error:
        prepared(model)
    first, second = str(error.value).splitlines()
    assert first.startswith("model.onnx: its opset 1 cannot be converted to 19: ")
    assert second == "hint: export it again with opset_version: 19"


@pytest.mark.parametrize(
    ("weight", "source", "obstacle"),
    [
        (random_array(4, 4), "x", ""),
        (random_array(4), "x", "its weight is a vector"),
        (random_array(4, 4), "w", "its input is a constant"),
    ],
    ids=["matrix", "vector", "constant"],
)
def test_what_keeps_a_layer_from_being_quantized_is_said(weight: Any, source: str, obstacle: str) -> None:
    model = from_x_to_y([matmul(source=source)], {"w": weight}, rank=weight.ndim)
    assert obstacles(model) == {"layer": obstacle}


def test_a_weight_in_float16_is_not_quantized() -> None:
    to_half = helper.make_node("Cast", ["x"], ["h"], "in", to=TensorProto.FLOAT16)
    to_float = helper.make_node("Cast", ["p"], ["y"], "out", to=TensorProto.FLOAT)
    nodes = [to_half, matmul(source="h", output="p"), to_float]
    model = from_x_to_y(nodes, {"w": random_array(4, 4).astype(np.float16)})
    assert obstacles(model)["layer"] == "its weight is FLOAT16, not FLOAT"


@pytest.mark.parametrize(
    ("name", "alias"),
    [
        ("/blocks/0/fc1/MatMul", "blocks.0.fc1"),
        ("/fc/MatMul_3", "fc"),
        ("MatMul", ""),
        ("/MatMul", ""),
        ("/fc/Gemm", ""),
        ("/fc/MatMul_x", ""),
    ],
)
def test_the_module_of_a_node_is_its_alias(name: str, alias: str) -> None:
    (layer,) = list_layers(Graph(from_x_to_y([matmul(name)], {"w": random_array(4, 4)})), TYPES, "")
    assert layer.alias == alias
