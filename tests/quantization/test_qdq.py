"""Q/DQ nodes and prepared graphs, against onnxruntime's own operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from taoq.errors import TaoqError
from taoq.quantization.formats.onnx import layers as onnx_layers
from taoq.quantization.formats.onnx import qdq
from taoq.quantization.plan import Layer, LayerPlan, TensorScheme
from taoq.quantization.types import Scales

onnxruntime.set_default_logger_severity(3)

TYPES = {"int8": TensorProto.INT8, "fp8_e4m3fn": TensorProto.FLOAT8E4M3FN}
every_dtype = pytest.mark.parametrize("dtype", sorted(TYPES))


def normal(*shape: int) -> Any:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def graph(
    nodes: Sequence[onnx.NodeProto], weights: dict[str, Any], *, opset: int = 19, listed: bool = False, rank: int = 2
) -> onnx.ModelProto:
    """From x [1, 4] to y; weights are inputs too where they are listed, as old exporters have them."""
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])]
    if listed:
        inputs += [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape) for name, value in weights.items()
        ]
    made = helper.make_graph(
        nodes,
        "graph",
        inputs,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    onnx.checker.check_model(model)
    return model


def run(model: onnx.ModelProto, feed: dict[str, Any] | None = None) -> Any:
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feed or {"x": normal(1, 4)})[0]


def matmul(name: str = "layer", source: str = "x", weight: str = "w", output: str = "y") -> onnx.NodeProto:
    return helper.make_node("MatMul", [source, weight], [output], name)


def through_onnxruntime(weight: Any, scale: Any, dtype: str, axis: int | None) -> Any:
    """The weight after QuantizeLinear and DequantizeLinear, as onnxruntime computes them."""
    tensors = [
        numpy_helper.from_array(np.asarray(scale), "scale"),
        helper.make_tensor("zero", TYPES[dtype], np.shape(scale), np.zeros(np.shape(scale)).reshape(-1)),
    ]
    attributes = {} if axis is None else {"axis": axis}
    nodes = [
        helper.make_node("QuantizeLinear", ["w", "scale", "zero"], ["q"], **attributes),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"], **attributes),
    ]
    made = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("w", TensorProto.FLOAT, weight.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, weight.shape)],
        tensors,
    )
    return run(helper.make_model(made, opset_imports=[helper.make_opsetid("", 19)], ir_version=9), {"w": weight})


def close(first: Any, second: Any) -> None:
    np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-6)


def expanded(scale: Any, rank: int, axis: int | None) -> Any:
    return scale if axis is None else scale.reshape([-1 if index == axis else 1 for index in range(rank)])


# --- numbers ------------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("axis", [None, 0, 1, 3])
def test_a_weight_is_quantized_as_onnxruntime_does(dtype: str, axis: int | None) -> None:
    weight = normal(5, 6, 3, 2)
    weight[2], weight[:, 3], weight[..., 1] = weight[2] * 100, weight[:, 3] * 1e-6, weight[..., 1] * 3
    stored, scale = qdq.quantize_weight(weight, TensorScheme(dtype, axis))
    assert scale.shape == (() if axis is None else (weight.shape[axis],))
    dequantized = stored.astype(np.float32) * expanded(scale, 4, axis)
    assert np.array_equal(dequantized, through_onnxruntime(weight, scale, dtype, axis))


@every_dtype
def test_a_channel_of_zeros_is_stored_as_zeros_with_scale_one(dtype: str) -> None:
    weight = normal(4, 8)
    weight[1], weight[2] = 0, 1e-44
    stored, scale = qdq.quantize_weight(weight, TensorScheme(dtype, 0))
    assert scale[1:3].tolist() == [1, 1]
    assert not stored[1:3].astype(np.float32).any()
    assert np.array_equal(stored.astype(np.float32) * scale[:, None], through_onnxruntime(weight, scale, dtype, 0))


@every_dtype
def test_the_largest_magnitude_of_a_channel_is_exact(dtype: str) -> None:
    weight = normal(16, 32)
    stored, scale = qdq.quantize_weight(weight, TensorScheme(dtype, 0))
    found = np.abs(stored.astype(np.float32) * scale[:, None]).max(1)
    np.testing.assert_allclose(found, np.abs(weight).max(1), rtol=1e-6)


@every_dtype
def test_given_scales_are_used_and_what_is_larger_is_cut_off(dtype: str) -> None:
    weight = np.float32([[1, 1000], [-1000, 2]])
    stored, scale = qdq.quantize_weight(weight, TensorScheme(dtype, 0), np.float32([0.5, 1]))
    largest = qdq.LARGEST[dtype]
    assert scale.tolist() == [0.5, 1]
    assert stored.astype(np.float32).tolist() == [[2, largest], [-largest, 2]]


def test_int8_is_symmetric_and_rounds_half_to_even() -> None:
    weight = np.float32([[-127, 0.5, 1.5, -0.5, 2.5, 127]])
    stored, scale = qdq.quantize_weight(weight, TensorScheme("int8", None))
    assert (stored.dtype, float(scale)) == (np.int8, 1)
    assert stored.tolist() == [[-127, 0, 2, 0, 2, 127]]


@pytest.mark.parametrize(
    ("largest", "dtype", "scale"),
    [
        (127, "int8", 1),
        (63.5, "int8", 0.5),
        (448, "fp8_e4m3fn", 1),
        (1, "fp8_e4m3fn", np.float32(1) / np.float32(448)),
        (0, "int8", 1),
        (1e-31, "int8", 1),
        (1e-29, "int8", np.float32(1e-29) / np.float32(127)),
        ([0, 127], "int8", [1, 1]),
    ],
)
def test_a_scale_maps_the_largest_magnitude_to_that_of_the_format(largest: Any, dtype: str, scale: Any) -> None:
    found = qdq.scale_of(largest, dtype)
    assert found.dtype == np.float32
    assert found.tolist() == np.float32(scale).tolist()


# --- nodes --------------------------------------------------------------------------------------------------------


def planned(name: str, weights: TensorScheme | None, activations: TensorScheme | None = None) -> LayerPlan:
    return LayerPlan(layer=Layer(name=name, type="MatMul"), weights=weights, activations=activations)


def two_readers() -> onnx.ModelProto:
    """Two layers that read the same tensor with the same weight."""
    nodes = [matmul("a", output="p"), matmul("b", output="q"), helper.make_node("Add", ["p", "q"], ["y"], "add")]
    return graph(nodes, {"w": normal(4, 4)})


@every_dtype
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_what_is_put_in_is_what_is_read_back(dtype: str, axis: int | None) -> None:
    model = two_readers()
    weights, inputs = TensorScheme(dtype, axis), TensorScheme(dtype, None)
    qdq.insert(model, [planned("a", weights, inputs)], {"a": Scales(activations=0.05)})
    assert qdq.read(model) == {"a": (weights, inputs)}


def test_what_layers_share_is_stored_once_and_a_float_reader_keeps_it_float() -> None:
    model = two_readers()
    scheme = TensorScheme("int8", 1)
    qdq.insert(model, [planned("a", scheme), planned("b", scheme)], {})
    assert [tensor.name for tensor in model.graph.initializer if tensor.name.endswith("quantized")] == [
        "w_int8_axis1_quantized"
    ]
    assert "w" not in [tensor.name for tensor in model.graph.initializer]
    model = two_readers()
    qdq.insert(model, [planned("a", scheme)], {})
    assert [list(node.input) for node in model.graph.node if node.name == "b"] == [["x", "w"]]
    (kept,) = (numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.name == "w")
    assert np.array_equal(kept, normal(4, 4))


def test_one_tensor_may_have_two_formats() -> None:
    model = two_readers()
    reference = run(two_readers())
    int8, fp8 = TensorScheme("int8", None), TensorScheme("fp8_e4m3fn", None)
    plan = [planned("a", int8, int8), planned("b", fp8, fp8)]
    qdq.insert(model, plan, {"a": Scales(activations=0.02), "b": Scales(activations=0.01)})
    assert qdq.read(model) == {"a": (int8, int8), "b": (fp8, fp8)}
    assert 0 < np.abs(run(model) - reference).max() < 0.2


def test_a_format_that_was_asked_for_under_two_names_is_one_format() -> None:
    model = two_readers()
    first, second = TensorScheme("fp8_e4m3fn", None), TensorScheme("fp8_e4m3fn", None, "fp8_e5m2")
    qdq.insert(model, [planned("a", first), planned("b", second)], {})
    assert np.isfinite(run(model)).all()


def branching() -> onnx.ModelProto:
    """A layer, and an If whose branches read an initializer of the graph around them."""
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("s", "t")]
    branches = {
        "then_branch": helper.make_graph([helper.make_node("Neg", ["one"], ["s"])], "then", [], [made[0]]),
        "else_branch": helper.make_graph([helper.make_node("Abs", ["one"], ["t"])], "else", [], [made[1]]),
    }
    nodes = [
        matmul(output="p"),
        helper.make_node("If", ["yes"], ["q"], "if", **branches),
        helper.make_node("Add", ["p", "q"], ["y"], "add"),
    ]
    return graph(nodes, {"w": normal(4, 4), "yes": np.array(True), "one": np.float32([1])})


def test_what_a_branch_reads_stays_in_the_graph() -> None:
    model, reference = branching(), run(branching())
    qdq.insert(model, [planned("layer", TensorScheme("int8", 1))], {})
    assert 0 < np.abs(run(model) - reference).max() < 0.1


# --- prepared graphs ----------------------------------------------------------------------------------------------


def prepared(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    return onnx_layers.prepare(copy, "model.onnx")


def names(model: onnx.ModelProto) -> list[str]:
    return [node.name for node in model.graph.node]


def layers(model: onnx.ModelProto) -> dict[str, str]:
    """Obstacle by layer."""
    return {layer.name: layer.obstacle for layer in onnx_layers.list_layers(model, onnx_layers.TYPES)}


@pytest.mark.parametrize(
    ("given", "made"),
    [
        (["", "", ""], ["MatMul", "MatMul_1", "MatMul_2"]),
        (["same", "same", ""], ["same_1", "same_2", "MatMul"]),
        (["same", "same_1", "same"], ["same_2", "same_1", "same_3"]),
        (["", "MatMul_1", "own"], ["MatMul", "MatMul_1", "own"]),
    ],
)
def test_every_node_gets_a_name_of_its_own_and_keeps_one_that_it_has(given: list[str], made: list[str]) -> None:
    first, second, third = given
    nodes = [matmul(first, output="p"), matmul(second, "p", output="q"), matmul(third, "q")]
    model = graph(nodes, {"w": normal(4, 4)})
    assert names(prepared(model)) == made
    close(run(prepared(model)), normal(1, 4) @ normal(4, 4) @ normal(4, 4) @ normal(4, 4))


def test_a_weight_of_a_constant_node_is_a_weight() -> None:
    constant = helper.make_node("Constant", [], ["w"], "constant", value=numpy_helper.from_array(normal(4, 4), "any"))
    model = graph([constant, matmul()], {})
    assert layers(model) == {
        "constant": "it has no weight matrix or kernel",
        "layer": "its second input is computed, it has no weight",
    }
    assert layers(prepared(model)) == {"layer": ""}
    close(run(prepared(model)), run(model))


def test_a_weight_behind_identities_is_a_weight() -> None:
    nodes = [
        helper.make_node("Identity", ["w"], ["v"], "first"),
        helper.make_node("Identity", ["v"], ["u"], "second"),
        matmul(weight="u"),
    ]
    model = graph(nodes, {"w": normal(4, 4)})
    assert layers(prepared(model)) == {"layer": ""}
    close(run(prepared(model)), run(model))


@pytest.mark.parametrize("op_type", ["Constant", "Identity"])
def test_a_constant_that_is_an_output_stays_a_node(op_type: str) -> None:
    if op_type == "Constant":
        node = helper.make_node("Constant", [], ["y"], "node", value=numpy_helper.from_array(normal(4, 4), "any"))
    else:
        node = helper.make_node("Identity", ["w"], ["y"], "node")
    model = graph([node], {"w": normal(4, 4)})
    assert names(prepared(model)) == ["node"]
    assert np.array_equal(run(prepared(model)), normal(4, 4))


def test_a_branch_that_reads_an_identity_of_a_weight_reads_the_weight() -> None:
    model = branching()
    model.graph.initializer[2].name = "uno"
    model.graph.node.insert(0, helper.make_node("Identity", ["uno"], ["one"], "identity"))
    close(run(prepared(model)), run(model))


def test_weights_that_are_listed_as_inputs_are_weights() -> None:
    model = graph([matmul()], {"w": normal(4, 4)}, listed=True)
    assert [value.name for value in prepared(model).graph.input] == ["x"]
    assert layers(prepared(model)) == {"layer": ""}
    close(run(prepared(model)), run(model))


def test_an_old_opset_is_converted() -> None:
    nodes = [matmul(output="p"), helper.make_node("Softmax", ["p"], ["q"], "softmax", axis=1)]
    nodes.append(helper.make_node("ReduceSum", ["q"], ["y"], "sum", axes=[1]))  # an input since opset 13
    model = graph(nodes, {"w": normal(4, 4)}, opset=11)
    assert onnx_layers.opset(prepared(model)) == 19
    assert layers(prepared(model))["layer"] == ""
    close(run(prepared(model)), run(model))


def test_a_newer_opset_stays() -> None:
    assert onnx_layers.opset(prepared(graph([matmul()], {"w": normal(4, 4)}, opset=20))) == 20


def test_an_opset_that_cannot_be_converted_is_refused() -> None:
    nodes = [matmul(output="p"), helper.make_node("Pad", ["p"], ["y"], "pad", paddings=[0, 0, 0, 0])]
    model = graph(nodes, {"w": normal(4, 4)}, opset=1, listed=True)
    with pytest.raises(TaoqError) as error:
        prepared(model)
    first, second = str(error.value).splitlines()
    assert first.startswith("model.onnx: its opset 1 cannot be converted to 19: ")
    assert second == "hint: export it again with opset_version: 19"


@pytest.mark.parametrize(
    ("weight", "source", "obstacle"),
    [
        (normal(4, 4), "x", ""),
        (normal(4), "x", "its weight is a vector"),
        (normal(4, 4), "w", "its input is a constant"),
    ],
    ids=["matrix", "vector", "constant"],
)
def test_what_keeps_a_layer_from_being_quantized_is_said(weight: Any, source: str, obstacle: str) -> None:
    model = graph([matmul(source=source)], {"w": weight}, rank=weight.ndim)
    assert layers(model) == {"layer": obstacle}


def test_a_weight_in_float16_is_not_quantized() -> None:
    cast = helper.make_node("Cast", ["x"], ["h"], "in", to=TensorProto.FLOAT16)
    back = helper.make_node("Cast", ["p"], ["y"], "out", to=TensorProto.FLOAT)
    model = graph([cast, matmul(source="h", output="p"), back], {"w": normal(4, 4).astype(np.float16)})
    assert layers(model)["layer"] == "its weight is FLOAT16, not FLOAT"


def test_the_module_of_a_node_is_its_alias() -> None:
    for name, alias in [
        ("/blocks/0/fc1/MatMul", "blocks.0.fc1"),
        ("/fc/MatMul_3", "fc"),
        ("MatMul", ""),
        ("/MatMul", ""),
        ("/fc/Gemm", ""),
        ("/fc/MatMul_x", ""),
    ]:
        (layer,) = onnx_layers.list_layers(graph([matmul(name)], {"w": normal(4, 4)}), onnx_layers.TYPES)
        assert layer.alias == alias
