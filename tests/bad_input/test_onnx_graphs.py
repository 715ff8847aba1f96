"""A graph whose inputs, outputs or nodes do not fit is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from support.commands import Taoq
from support.onnx_files import EXPORT_AGAIN, Change, change_file, remove_properties, set_classes, set_shape
from support.small_spec import CALIBRATION_NOTICES, Quantize, Refused, RefusedByAll, every_onnx_backend
from taoq.pipeline.artifacts import read_artifact

OTHER_TASK = "hint: the file is of another task, or of another number of classes\n"
DATA = "the data is float32 [N, 3, 32, 32]\nhint: export the network for inputs like the data\n"
SIZE = (
    "the data is float32 [N, 3, 32, 32]\n"
    "hint: set the input size of the data to that of the file, or export the network for inputs like the data\n"
)


def remove_inputs(model: onnx.ModelProto) -> None:
    image = numpy_helper.from_array(np.zeros((1, 3, 32, 32), np.float32), model.graph.input[0].name)
    model.graph.ClearField("input")
    model.graph.initializer.append(image)


def add_input(name: str, *sizes: int | str) -> Change:
    value = helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes)
    return lambda model: model.graph.input.append(value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(remove_inputs, "has no inputs\nhint: export the network with its inputs\n", id="none"),
        pytest.param(
            add_input("mask", "batch", 3),
            "has 2 input(s) (input, mask), the data has 1 (input)\n"
            "hint: export the network without its pre- and post-processing\n",
            id="two",
        ),
        pytest.param(
            add_input("mask", 1, 3),
            "its inputs have different batches: 'input' float32 [?, 3, 32, 32], 'mask' float32 [1, 3]\n"
            "hint: export it with one batch size\n",
            id="two of different batches",
        ),
        pytest.param(
            lambda model: set_shape(model.graph.input[0], "batch", 3072),
            f"its input 'input' is float32 [N, 3072], {DATA}",
            id="a matrix",
        ),
        pytest.param(
            lambda model: set_shape(model.graph.input[0]),
            f"its input 'input' is float32 [], {DATA}",
            id="a number",
        ),
        pytest.param(
            lambda model: set_shape(model.graph.input[0], "batch", 1, 32, 32),
            f"its input 'input' is float32 [N, 1, 32, 32], {SIZE}",
            id="one channel",
        ),
        pytest.param(
            lambda model: set_shape(model.graph.input[0], "batch", 32, 32, 3),
            f"its input 'input' is float32 [N, 32, 32, 3], {SIZE}",
            id="channels last",
        ),
        pytest.param(
            lambda model: set_shape(model.graph.input[0], "batch", 3, 32, 32, dtype=TensorProto.INT64),
            f"its input 'input' is int64 [N, 3, 32, 32], {DATA}",
            id="whole numbers",
        ),
        pytest.param(
            lambda model: set_shape(model.graph.input[0], "batch", 3, 32, 32, dtype=TensorProto.UINT8),
            f"its input 'input' is uint8 [N, 3, 32, 32], {DATA}",
            id="bytes",
        ),
        pytest.param(
            lambda model: model.graph.input[0].type.tensor_type.ClearField("shape"),
            f"is not a valid ONNX file: Field 'shape' of 'type' is required but missing.\n{EXPORT_AGAIN}",
            id="without a shape",
        ),
        pytest.param(
            lambda model: set_shape(model.graph.input[0], "batch", 3, 48, 64),
            f"its input 'input' is float32 [N, 3, 48, 64], {SIZE}",
            id="another size",
        ),
        pytest.param(
            lambda model: set_shape(model.graph.input[0], "batch", 3, "height", 64),
            f"its input 'input' is float32 [N, 3, ?, 64], {SIZE}",
            id="another width",
        ),
    ],
)
def test_inputs_that_do_not_fit_the_data_are_refused(
    refused_by_all: RefusedByAll, change: Change, message: str
) -> None:
    change_file(change)
    assert refused_by_all() == (1, f"float.onnx: {message}")


def end_in(name: str, *sizes: int | str) -> Change:
    """End the graph in another tensor, by the name of its node; `classes` is the best class of each image."""

    def change(model: onnx.ModelProto) -> None:
        model.graph.node.append(helper.make_node("ArgMax", ["output"], ["classes"], axis=1, keepdims=0))
        (last,) = (node for node in model.graph.node if node.name.endswith(name) or name in node.output)
        dtype = TensorProto.INT64 if name == "classes" else TensorProto.FLOAT
        model.graph.ClearField("output")
        model.graph.output.append(helper.make_tensor_value_info(last.output[0], dtype, sizes))

    return change


@pytest.mark.parametrize(
    ("change", "outputs"),
    [
        pytest.param(set_classes(12), "'output' [?, 12]", id="classes"),
        pytest.param(
            end_in("/Flatten", "batch", 128), "'/global_pool/flatten/Flatten_output_0' [?, 128]", id="features"
        ),
        pytest.param(end_in("classes", "batch"), "'classes' [?]", id="the class alone"),
    ],
)
def test_outputs_that_do_not_fit_the_task_are_refused(
    onnx_file: Path, refused: Refused, change: Change, outputs: str
) -> None:
    change_file(remove_properties, change)
    message = f"has no output 'output' [N, 10]: its outputs are {outputs}\n{OTHER_TASK}"
    assert refused("evaluate") == (1, f"float.onnx: {message}")
    assert refused("inference") == (1, f"float.onnx: {message}")


def test_two_outputs_that_both_fit_are_refused(onnx_file: Path, refused: Refused) -> None:
    def add_scores(model: onnx.ModelProto) -> None:
        model.graph.node[-1].output[0] = "logits"
        model.graph.node.append(helper.make_node("Softmax", ["logits"], ["scores"]))
        model.graph.ClearField("output")
        for name in ("logits", "scores"):
            model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 10]))

    change_file(remove_properties, add_scores)
    outputs = "'logits' [?, 10], 'scores' [?, 10]"
    message = f"has no output 'output' [N, 10]: its outputs are {outputs}\n{OTHER_TASK}"
    assert refused("evaluate") == (1, f"float.onnx: {message}")


def remove_names(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        node.name = ""


@every_onnx_backend
def test_nodes_need_no_names(quantize: Quantize, onnx_file: Path, backend: str) -> None:
    change_file(remove_names)
    rule = "quantize.layers=[{module_name: Conv, weights: {dtype: int8}, activations: {dtype: int8}}]"
    assert quantize(f"quantize.backend={backend}", rule) == (0, CALIBRATION_NOTICES[backend])
    rows = read_artifact(Path("results/quantize")).manifest.plan
    assert sum(row["weights"] is not None for row in rows) == 21
    assert len({row["layer"] for row in rows}) == len(rows)


def set_opset(version: int) -> Change:
    """Make it the file of an exporter that knows no later opset."""

    def change(model: onnx.ModelProto) -> None:
        model.opset_import[0].version = version
        for node in model.graph.node:
            if node.op_type == "MaxPool":
                kept = [attribute for attribute in node.attribute if attribute.name not in ("ceil_mode", "dilations")]
                node.ClearField("attribute")
                node.attribute.extend(kept)

    return change


@pytest.mark.parametrize(("version", "backend"), [(9, "onnxruntime"), (10, "modelopt.onnx")])
def test_an_old_opset_quantizes(taoq: Taoq, quantize: Quantize, onnx_file: Path, version: int, backend: str) -> None:
    change_file(set_opset(version))
    assert quantize(f"quantize.backend={backend}") == (0, CALIBRATION_NOTICES[backend])
    assert taoq("classification_pyt", "evaluate", "-e", "spec.yaml")[0] == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(
            lambda model: setattr(model.opset_import[0], "version", 9),
            "Unrecognized attribute: ceil_mode for operator MaxPool",
            id="an older opset than its nodes",
        ),
        pytest.param(
            lambda model: setattr(model.opset_import[0], "version", 0),
            "No Op registered for Conv with domain_version of 0",
            id="opset 0",
        ),
        pytest.param(
            lambda model: setattr(model.opset_import[0], "domain", "my.ops"),
            "No opset import for domain ''",
            id="no standard operators",
        ),
        pytest.param(
            lambda model: setattr(model.graph.node[-1], "op_type", "Fancy"),
            "No Op registered for Fancy with domain_version of 17",
            id="an unknown operator",
        ),
        pytest.param(
            lambda model: setattr(model.graph.node[-1], "domain", "my.ops"),
            "No opset import for domain 'my.ops'",
            id="an operator of an unknown set",
        ),
        pytest.param(
            lambda model: model.graph.node[5].input.__setitem__(0, "nowhere"),
            "Nodes in a graph must be topologically sorted, however input 'nowhere' of node: ",
            id="a loose end",
        ),
        pytest.param(
            lambda model: model.graph.node[3].output.__setitem__(0, model.graph.node[2].output[0]),
            "Graph must be in single static assignment (SSA) form, however '/maxpool/MaxPool_output_0' has been used"
            " as output names multiple times.",
            id="a tensor made twice",
        ),
    ],
)
def test_a_graph_that_breaks_the_rules_of_onnx_is_refused(
    refused_by_all: RefusedByAll, change: Change, reason: str
) -> None:
    change_file(change)
    assert refused_by_all() == (1, f"float.onnx: is not a valid ONNX file: {reason}\n{EXPORT_AGAIN}")


def test_an_operator_that_onnxruntime_lacks_is_refused(onnx_file: Path, refused: Refused) -> None:
    def use_custom_operator(model: onnx.ModelProto) -> None:
        model.opset_import.append(helper.make_opsetid("my.ops", 1))
        model.graph.node[-1].domain = "my.ops"

    change_file(remove_properties, use_custom_operator)
    assert refused("evaluate") == (
        1,
        "float.onnx: onnxruntime cannot run it: Fatal error: my.ops:Gemm(-1) is not a registered function/op\n"
        "hint: export it again, or run it on the device that it was made for\n",
    )


def set_a_weight(layer: str, value: float) -> Change:
    """Set one number of a layer's weight."""

    def change(model: onnx.ModelProto) -> None:
        (name,) = (node.input[1] for node in model.graph.node if node.name == layer)
        (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
        array = numpy_helper.to_array(tensor).copy()
        array.flat[3] = value
        tensor.CopyFrom(numpy_helper.from_array(array, name))

    return change


@every_onnx_backend
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(onnx_file: Path, refused: Refused, backend: str, value: float) -> None:
    change_file(set_a_weight("/layer1/0/conv1/Conv", value), set_a_weight("/fc/Gemm", value))
    hint = "hint: look for NaN or infinite values in the checkpoint\n"
    assert refused("quantize", f"quantize.backend={backend}") == (
        1,
        f"{CALIBRATION_NOTICES[backend]}"
        f"/layer1/0/conv1/Conv: its weight is not finite\n{hint}"
        f"/fc/Gemm: its weight is not finite\n{hint}",
    )
