"""Tiny ONNX models made node by node, and what onnxruntime computes with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

Shapes = Mapping[str, Sequence[int | str | None]]
"""Shape by the name of an input or output; a name or None is an axis of any size."""


def random_array(*shape: int) -> Any:
    """Normally distributed float32 numbers, always the same."""
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def make_model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Shapes,
    outputs: Shapes,
    tensors: Mapping[str, Any] | None = None,
    *,
    opset: int = 19,
    input_type: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """A valid model; its outputs are float32.

    Args:
        nodes: The nodes, in the order in which they run.
        inputs: The inputs.
        outputs: The outputs.
        tensors: Stored tensors by name.
        opset: Version of the standard operators.
        input_type: Element type of the inputs.
    """
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, input_type, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (tensors or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def from_x_to_y(
    nodes: Sequence[onnx.NodeProto],
    weights: Mapping[str, Any],
    *,
    opset: int = 19,
    weights_as_inputs: bool = False,
    rank: int = 2,
) -> onnx.ModelProto:
    """A model of one input x [1, 4] and one output y; old exporters list its weights as inputs as well."""
    listed = {name: value.shape for name, value in weights.items()} if weights_as_inputs else {}
    return make_model(nodes, {"x": [1, 4], **listed}, {"y": [None] * rank}, weights, opset=opset)


def matmul(name: str = "layer", source: str = "x", weight: str = "w", output: str = "y") -> onnx.NodeProto:
    return helper.make_node("MatMul", [source, weight], [output], name)


def branching() -> onnx.ModelProto:
    """A layer, and an If whose branches read a stored tensor of the graph around them, `one`."""
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("s", "t")]
    branches = {
        "then_branch": helper.make_graph([helper.make_node("Neg", ["one"], ["s"])], "then", [], [results[0]]),
        "else_branch": helper.make_graph([helper.make_node("Abs", ["one"], ["t"])], "else", [], [results[1]]),
    }
    nodes = [
        matmul(output="p"),
        helper.make_node("If", ["yes"], ["q"], "if", **branches),
        helper.make_node("Add", ["p", "q"], ["y"], "add"),
    ]
    return from_x_to_y(nodes, {"w": random_array(4, 4), "yes": np.array(True), "one": np.float32([1])})


def run_model(model: onnx.ModelProto, feed: Mapping[str, Any] | None = None) -> Any:
    """The first output of a valid model, as it is written: no operator is replaced. By default x is random."""
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(feed or {"x": random_array(1, 4)}))[0]
