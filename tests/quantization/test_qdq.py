"""Q/DQ nodes: their numbers against onnxruntime's own operators, and what is put into a graph and read back."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from support.networks import scheme
from support.nodes import branching, from_x_to_y, make_model, matmul, random_array, run_model
from taoq.quantization.dtypes import DTYPES, FP8_E5M2
from taoq.quantization.formats.onnx import qdq
from taoq.quantization.formats.onnx.graph import Graph
from taoq.quantization.types import Applied, Layer, LayerPlan, Scales, Scheme

every_dtype = pytest.mark.parametrize("dtype", ["fp8_e4m3fn", "int8"])


# --- numbers ------------------------------------------------------------------------------------------------------


def through_onnxruntime(weight: Any, scale: Any, dtype: str, axis: int | None) -> Any:
    """The weight after QuantizeLinear and DequantizeLinear, as onnxruntime computes them."""
    element_type = TensorProto.DataType.Value(DTYPES[dtype].onnx)
    zeros = helper.make_tensor("zero", element_type, np.shape(scale), np.zeros(np.shape(scale)).reshape(-1))
    attributes = {} if axis is None else {"axis": axis}
    nodes = [
        helper.make_node("QuantizeLinear", ["w", "scale", "zero"], ["q"], **attributes),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"], **attributes),
    ]
    tensors = {"scale": scale, "zero": numpy_helper.to_array(zeros)}
    return run_model(make_model(nodes, {"w": weight.shape}, {"y": weight.shape}, tensors), {"w": weight})


def expanded(scale: Any, rank: int, axis: int | None) -> Any:
    return scale if axis is None else scale.reshape([-1 if index == axis else 1 for index in range(rank)])


@every_dtype
@pytest.mark.parametrize("axis", [None, 0, 1, 3])
def test_a_weight_is_quantized_as_onnxruntime_does(dtype: str, axis: int | None) -> None:
    weight = random_array(5, 6, 3, 2)
    weight[2], weight[:, 3], weight[..., 1] = weight[2] * 100, weight[:, 3] * 1e-6, weight[..., 1] * 3
    stored, scale = qdq.quantize_weight(weight, scheme(dtype, axis))
    assert scale.shape == (() if axis is None else (weight.shape[axis],))
    dequantized = stored.astype(np.float32) * expanded(scale, 4, axis)
    assert np.array_equal(dequantized, through_onnxruntime(weight, scale, dtype, axis))


@every_dtype
def test_a_channel_of_zeros_is_stored_as_zeros_with_scale_one(dtype: str) -> None:
    weight = random_array(4, 8)
    weight[1], weight[2] = 0, 1e-44
    stored, scale = qdq.quantize_weight(weight, scheme(dtype, 0))
    assert scale[1:3].tolist() == [1, 1]
    assert not stored[1:3].astype(np.float32).any()
    assert np.array_equal(stored.astype(np.float32) * scale[:, None], through_onnxruntime(weight, scale, dtype, 0))


@every_dtype
def test_the_largest_magnitude_of_a_channel_is_exact(dtype: str) -> None:
    weight = random_array(16, 32)
    stored, scale = qdq.quantize_weight(weight, scheme(dtype, 0))
    largest = np.abs(stored.astype(np.float32) * scale[:, None]).max(1)
    np.testing.assert_allclose(largest, np.abs(weight).max(1), rtol=1e-6)


@every_dtype
def test_given_scales_are_used_and_what_is_larger_is_cut_off(dtype: str) -> None:
    weight = np.float32([[1, 1000], [-1000, 2]])
    stored, scale = qdq.quantize_weight(weight, scheme(dtype, 0), np.float32([0.5, 1]))
    largest = DTYPES[dtype].largest
    assert scale.tolist() == [0.5, 1]
    assert stored.astype(np.float32).tolist() == [[2, largest], [-largest, 2]]


def test_int8_is_symmetric_and_rounds_half_to_even() -> None:
    weight = np.float32([[-127, 0.5, 1.5, -0.5, 2.5, 127]])
    stored, scale = qdq.quantize_weight(weight, scheme("int8"))
    assert (stored.dtype, float(scale)) == (np.int8, 1)
    assert stored.tolist() == [[-127, 0, 2, 0, 2, 127]]


@pytest.mark.parametrize("unsupported", [scheme("uint8"), scheme("int8", 0, symmetric=False)], ids=str)
def test_a_scheme_that_needs_a_zero_point_is_refused(unsupported: Scheme) -> None:
    with pytest.raises(ValueError, match=f"^no weights are stored as {unsupported}$"):
        qdq.quantize_weight(random_array(4, 4), unsupported)


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
    scales = qdq.scale_of(largest, DTYPES[dtype])
    assert scales.dtype == np.float32
    assert scales.tolist() == np.float32(scale).tolist()


# --- nodes --------------------------------------------------------------------------------------------------------


def plan_of_layer(name: str, weights: Scheme | None, activations: Scheme | None = None) -> LayerPlan:
    return LayerPlan(layer=Layer(name=name, type="MatMul"), weights=weights, activations=activations)


def two_readers() -> Graph:
    """Two layers that read the same tensor with the same weight."""
    nodes = [matmul("a", output="p"), matmul("b", output="q"), helper.make_node("Add", ["p", "q"], ["y"], "add")]
    return Graph(from_x_to_y(nodes, {"w": random_array(4, 4)}))


def run(graph: Graph) -> Any:
    return run_model(graph.model)


def schemes_in(applied: Applied) -> dict[str, tuple[Scheme | None, Scheme | None]]:
    return {name: (layer.weights, layer.activations) for name, layer in applied.items()}


@every_dtype
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_what_is_put_in_is_what_is_read_back(dtype: str, axis: int | None) -> None:
    graph = two_readers()
    weights, inputs = scheme(dtype, axis), scheme(dtype)
    qdq.insert(graph, [plan_of_layer("a", weights, inputs)], {"a": Scales(activations=0.05)})
    applied = qdq.read(graph)
    assert schemes_in(applied) == {"a": (weights, inputs)}
    largest = DTYPES[dtype].largest * 0.05
    assert applied["a"].input_range == pytest.approx((-largest, largest))


def test_what_layers_share_is_stored_once() -> None:
    graph = two_readers()
    per_channel = scheme("int8", 1)
    qdq.insert(graph, [plan_of_layer("a", per_channel), plan_of_layer("b", per_channel)], {})
    assert [name for name in graph.tensors if name.endswith("quantized")] == ["w_int8_axis1_quantized"]
    assert "w" not in graph.tensors


def test_a_float_reader_keeps_the_weight_that_it_shares() -> None:
    graph = two_readers()
    qdq.insert(graph, [plan_of_layer("a", scheme("int8", 1))], {})
    assert list(graph.nodes["b"].input) == ["x", "w"]
    assert np.array_equal(numpy_helper.to_array(graph.tensors["w"]), random_array(4, 4))


def test_one_tensor_may_have_two_formats() -> None:
    graph, reference = two_readers(), run(two_readers())
    int8, fp8 = scheme("int8"), scheme("fp8_e4m3fn")
    plans = [plan_of_layer("a", int8, int8), plan_of_layer("b", fp8, fp8)]
    qdq.insert(graph, plans, {"a": Scales(activations=0.02), "b": Scales(activations=0.01)})
    assert schemes_in(qdq.read(graph)) == {"a": (int8, int8), "b": (fp8, fp8)}
    assert 0 < np.abs(run(graph) - reference).max() < 0.2


def test_a_format_that_was_asked_for_under_two_names_is_one_format() -> None:
    graph, e4m3 = two_readers(), scheme("fp8_e4m3fn")
    asked_as_e5m2 = dataclasses.replace(e4m3, requested=FP8_E5M2)
    qdq.insert(graph, [plan_of_layer("a", e4m3), plan_of_layer("b", asked_as_e5m2)], {})
    assert np.isfinite(run(graph)).all()


def test_what_a_branch_reads_stays_in_the_graph() -> None:
    graph, reference = Graph(branching()), run_model(branching())
    qdq.insert(graph, [plan_of_layer("layer", scheme("int8", 1))], {})
    assert 0 < np.abs(run(graph) - reference).max() < 0.1
