"""The runtime onnxruntime: batches, the CPU's arithmetic, what inputs and outputs a graph must have, devices."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from support.nodes import make_model
from taoq.errors import TaoqError
from taoq.network import Inputs, OutputSpec
from taoq.quantization.formats.onnx.file import read_graph
from taoq.quantization.formats.onnx.graph import Graph
from taoq.runtimes.base import Runtime
from taoq.runtimes.onnxruntime import RUNTIME, round_in_float32

ANOTHER_TASK = "hint: the file is of another task, or of another number of classes"
ANOTHER_SIZE = (
    "hint: set the input size of the data to that of the file, or export the network for inputs like the data"
)
PROCESSING = "hint: export the network without its pre- and post-processing"
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def write(path: Path, model: onnx.ModelProto) -> Path:
    onnx.save(model, str(path))
    return path


def images(count: int) -> Tensor:
    """Images of 4 x 4; the values of image n add up to n."""
    return torch.arange(count, dtype=torch.float32).reshape(-1, 1, 1, 1).expand(-1, 3, 4, 4) / 48


def open_file(
    path: Path,
    outputs: Mapping[str, tuple[int | str, ...]],
    example: Inputs | None = None,
    device: str = "cpu",
    where: str = "device",
) -> Runtime:
    """A file in a session; by default the data are images of 4 x 4."""
    expected = {name: OutputSpec(shape) for name, shape in outputs.items()}
    return RUNTIME.open(read_graph(path), path, example or {"image": images(1)}, expected, device, where, {})


def refusal(path: Path, outputs: Mapping[str, tuple[int | str, ...]], example: Inputs | None = None) -> str:
    with pytest.raises(TaoqError) as error:
        open_file(path, outputs, example)
    return str(error.value)


def classifier(path: Path, batch: int | str = "batch", size: int = 4) -> Path:
    """Sum of an image, and twice that."""
    nodes = [
        helper.make_node("ReduceSum", ["image", "axes"], ["sums"], keepdims=0),
        helper.make_node("Unsqueeze", ["sums", "one"], ["column"]),
        helper.make_node("Mul", ["column", "factors"], ["output"]),
    ]
    tensors = {"axes": np.int64([1, 2, 3]), "one": np.int64([1]), "factors": np.float32([1, 2])}
    return write(path, make_model(nodes, {"image": [batch, 3, size, size]}, {"output": [batch, 2]}, tensors))


@pytest.mark.parametrize("batch", ["batch", 1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_a_fixed_batch_is_filled_up_and_cut(tmp_path: Path, batch: int | str, count: int) -> None:
    runtime = open_file(classifier(tmp_path / "model.onnx", batch), {"output": ("N", 2)})
    assert runtime.fixed_batch == (None if batch == "batch" else batch)
    (output,) = runtime.run({"image": images(count)}).values()
    torch.testing.assert_close(output, torch.tensor([[number, 2.0 * number] for number in range(count)]))


# --- arithmetic ---------------------------------------------------------------------------------------------------


def test_the_outputs_are_float32_whatever_the_graph_has(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("ReduceMean", ["image", "axes"], ["half"], keepdims=0),
        helper.make_node("Cast", ["half"], ["output"], to=TensorProto.FLOAT),
    ]
    shapes = {"image": ["n", 3, 4, 4]}, {"output": ["n", 3]}
    model = make_model(nodes, *shapes, {"axes": np.int64([2, 3])}, input_type=TensorProto.FLOAT16)
    path = write(tmp_path / "model.onnx", model)
    (output,) = open_file(path, {"output": ("N", 3)}).run({"image": images(2)}).values()
    assert output.dtype == torch.float32
    assert output[1].tolist() == pytest.approx([1 / 48] * 3, rel=1e-3)


def through_float16(scale: float) -> onnx.ModelProto:
    """Float16 through QuantizeLinear and back: [n, 3, 4, 4] to [n, 3, 4, 4]."""
    nodes = [
        helper.make_node("Cast", ["image"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("QuantizeLinear", ["half", "scale", "zero"], ["stored"], "quantize"),
        helper.make_node("DequantizeLinear", ["stored", "scale", "zero"], ["back"], "dequantize"),
        helper.make_node("Cast", ["back"], ["output"], to=TensorProto.FLOAT),
    ]
    tensors = {"scale": np.float16(scale), "zero": np.int8(0)}
    return make_model(nodes, {"image": ["n", 3, 4, 4]}, {"output": ["n", 3, 4, 4]}, tensors)


@pytest.mark.parametrize("scale", [0.5, 0.25, 0.0371])
def test_float16_is_rounded_and_not_cut_off_on_the_cpu(tmp_path: Path, scale: float) -> None:
    path = write(tmp_path / "model.onnx", through_float16(scale))
    pixels = torch.linspace(-3, 3, 48 * 50).reshape(50, 3, 4, 4)
    (output,) = open_file(path, {"output": ("N", 3, 4, 4)}).run({"image": pixels}).values()
    step = np.float32(np.float16(scale))
    expected = np.clip(np.rint(pixels.numpy().astype(np.float16).astype(np.float32) / step), -128, 127) * step
    np.testing.assert_allclose(output.numpy(), expected, rtol=1e-3)


def test_float16_is_widened_before_it_is_quantized() -> None:
    graph = Graph(through_float16(0.5))
    assert round_in_float32(graph)
    assert [node.op_type for node in graph.proto.node] == [
        "Cast", "Cast", "QuantizeLinear", "DequantizeLinear", "Cast",
    ]  # fmt: skip
    onnx.checker.check_model(graph.model, full_check=True)


def test_float32_is_not_widened() -> None:
    graph = Graph(quantized_convolution(np.int8))
    before = graph.model.SerializeToString(deterministic=True)
    assert not round_in_float32(graph)
    assert graph.model.SerializeToString(deterministic=True) == before


def quantized_convolution(kind: Any) -> onnx.ModelProto:
    """A convolution of 1 x 1 with a quantized input and a quantized weight: [n, 3, 4, 4] to [n, 5, 4, 4]."""
    weight = np.random.default_rng(0).normal(size=(5, 3, 1, 1)).astype(np.float32)
    largest = 127 if kind == np.int8 else 448
    scale = (np.abs(weight).max(axis=(1, 2, 3)) / largest).astype(np.float32)
    stored = weight / scale.reshape(-1, 1, 1, 1)
    stored = (np.rint(stored) if kind == np.int8 else stored).astype(kind)
    tensors = {
        "weight": stored,
        "scales": scale,
        "zeros": np.zeros(5, kind),
        "scale": np.float32(3 / largest),
        "zero": np.zeros((), kind),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["weight", "scales", "zeros"], ["kernel"], "kernel", axis=0),
        helper.make_node("QuantizeLinear", ["image", "scale", "zero"], ["numbers"], "numbers"),
        helper.make_node("DequantizeLinear", ["numbers", "scale", "zero"], ["pixels"], "pixels"),
        helper.make_node("Conv", ["pixels", "kernel"], ["output"], "conv"),
    ]
    return make_model(nodes, {"image": ["n", 3, 4, 4]}, {"output": ["n", 5, 4, 4]}, tensors)


@pytest.mark.parametrize("kind", [np.int8, ml_dtypes.float8_e4m3fn])
def test_a_quantized_graph_runs_on_the_cpu_as_it_is_written(tmp_path: Path, kind: Any) -> None:
    model = quantized_convolution(kind)
    path = write(tmp_path / "model.onnx", model)
    pixels = torch.linspace(-3, 3, 4 * 48).reshape(4, 3, 4, 4)
    (output,) = open_file(path, {"output": ("N", 5, 4, 4)}).run({"image": pixels}).values()
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weight = values["weight"].astype(np.float32) * values["scales"].reshape(-1, 1, 1, 1)
    divided = pixels.numpy() / values["scale"]
    divided = np.rint(divided) if kind == np.int8 else divided.astype(kind).astype(np.float32)
    expected = np.einsum("ncij,oc->noij", divided * values["scale"], weight[..., 0, 0])
    np.testing.assert_allclose(output.numpy(), expected, rtol=1e-4, atol=1e-5)


# --- outputs ------------------------------------------------------------------------------------------------------


def heads(path: Path, **sizes: int) -> Path:
    """Outputs of some names and sizes, all of zeros."""
    nodes, tensors = [], {"axes": np.int64([1, 2, 3]), "last": np.int64([1])}
    for name, size in sizes.items():
        tensors[f"{name}_zeros"] = np.zeros((1, size), np.float32)
        nodes += [
            helper.make_node("ReduceMean", ["image", "axes"], [f"{name}_mean"], keepdims=0),
            helper.make_node("Unsqueeze", [f"{name}_mean", "last"], [f"{name}_column"]),
            helper.make_node("Mul", [f"{name}_column", f"{name}_zeros"], [name]),
        ]
    outputs = {name: ["n", size] for name, size in sizes.items()}
    return write(path, make_model(nodes, {"image": ["n", 3, 4, 4]}, outputs, tensors))


def test_outputs_are_found_by_name(tmp_path: Path) -> None:
    path = heads(tmp_path / "model.onnx", other=2, output=2, third=7)
    assert list(open_file(path, {"output": ("N", 2)}).run({"image": images(1)})) == ["output"]


def test_an_output_of_another_name_is_the_only_one_that_fits(tmp_path: Path) -> None:
    path = heads(tmp_path / "model.onnx", boxes=4, scores=10)
    runtime = open_file(path, {"pred_logits": ("N", 10), "pred_boxes": ("N", 4)})
    shapes = {name: list(value.shape) for name, value in runtime.run({"image": images(2)}).items()}
    assert shapes == {"pred_logits": [2, 10], "pred_boxes": [2, 4]}


def test_two_outputs_that_fit_are_refused(tmp_path: Path) -> None:
    path = heads(tmp_path / "model.onnx", one=10, two=10)
    assert refusal(path, {"output": ("N", 10)}) == (
        f"{path}: has no output 'output' [N, 10]: its outputs are 'one' [?, 10], 'two' [?, 10]\n{ANOTHER_TASK}"
    )


@pytest.mark.parametrize("expected", [(1000,), (4, 10)], ids=["size", "rank"])
def test_an_output_of_another_shape_is_refused(tmp_path: Path, expected: tuple[int, ...]) -> None:
    path = heads(tmp_path / "model.onnx", output=10)
    shape = ", ".join(map(str, expected))
    assert refusal(path, {"output": ("N", *expected)}) == (
        f"{path}: has no output 'output' [N, {shape}]: its outputs are 'output' [?, 10]\n{ANOTHER_TASK}"
    )


def test_one_output_is_not_taken_for_two(tmp_path: Path) -> None:
    """A detector of four classes whose file has boxes, and no classes of that size."""
    path = heads(tmp_path / "model.onnx", pred_boxes=4, features=256)
    assert refusal(path, {"pred_logits": ("N", 4), "pred_boxes": ("N", 4)}) == (
        f"{path}: has no output 'pred_logits' [N, 4]:"
        f" its outputs are 'pred_boxes' [?, 4], 'features' [?, 256]\n{ANOTHER_TASK}"
    )


# --- inputs -------------------------------------------------------------------------------------------------------


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    path = classifier(tmp_path / "model.onnx", size=6)
    assert refusal(path, {"output": ("N", 2)}) == (
        f"{path}: its input 'image' is float32 [N, 3, 6, 6], the data is float32 [N, 3, 4, 4]\n{ANOTHER_SIZE}"
    )


def difference_of_two_inputs(path: Path) -> Path:
    """The first input minus twice the second, an integer for each image."""
    nodes = [
        helper.make_node("Cast", ["count"], ["number"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["number", "two"], ["twice"]),
        helper.make_node("Sub", ["sum", "twice"], ["output"]),
    ]
    model = make_model(nodes, {"sum": ["n", 1], "count": ["n", 1]}, {"output": ["n", 1]}, {"two": np.float32(2)})
    model.graph.input[1].type.tensor_type.elem_type = TensorProto.INT64
    onnx.checker.check_model(model)
    return write(path, model)


@pytest.mark.parametrize("names", [("sum", "count"), ("a", "b")])
def test_two_inputs_are_fed_by_name_or_else_in_order(tmp_path: Path, names: tuple[str, str]) -> None:
    path = difference_of_two_inputs(tmp_path / "model.onnx")
    inputs = dict(zip(names, (torch.tensor([[7.0], [8.0]]), torch.tensor([[1], [2]])), strict=True))
    runtime = open_file(path, {"output": ("N", 1)}, example=inputs)
    assert runtime.run(inputs)["output"].tolist() == [[5.0], [4.0]]


def test_inputs_with_the_names_of_the_graph_may_have_another_order(tmp_path: Path) -> None:
    path = difference_of_two_inputs(tmp_path / "model.onnx")
    inputs = {"count": torch.tensor([[1]]), "sum": torch.tensor([[7.0]])}
    assert open_file(path, {"output": ("N", 1)}, example=inputs).run(inputs)["output"].tolist() == [[5.0]]


def test_a_graph_with_more_inputs_than_the_data_is_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", ["image", "mask"], ["output"])]
    inputs = {"image": ["n", 3, 4, 4], "mask": ["n", 3, 4, 4]}
    path = write(tmp_path / "two.onnx", make_model(nodes, inputs, {"output": ["n", 3, 4, 4]}))
    assert refusal(path, {"output": ("N", 3, 4, 4)}) == (
        f"{path}: has 2 input(s) (image, mask), the data has 1 (image)\n{PROCESSING}"
    )


def test_inputs_of_different_batches_are_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", ["image", "mask"], ["output"])]
    inputs = {"image": [1, 3, 4, 4], "mask": [2, 3, 4, 4]}
    path = write(tmp_path / "model.onnx", make_model(nodes, inputs, {"output": [2, 3, 4, 4]}))
    assert refusal(path, {"output": ("N", 3, 4, 4)}) == (
        f"{path}: its inputs have different batches: 'image' float32 [1, 3, 4, 4], 'mask' float32 [2, 3, 4, 4]\n"
        "hint: export it with one batch size"
    )


def test_a_graph_without_inputs_is_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("Constant", [], ["output"], value=numpy_helper.from_array(np.zeros((1, 4), np.float32)))]
    path = write(tmp_path / "none.onnx", make_model(nodes, {}, {"output": [1, 4]}))
    assert refusal(path, {"output": ("N", 4)}) == f"{path}: has no inputs\nhint: export the network with its inputs"


@pytest.mark.parametrize(
    ("shape", "element_type", "described", "hint"),
    [
        (["n", 4, 4, 3], TensorProto.FLOAT, "float32 [N, 4, 4, 3]", ANOTHER_SIZE),
        (["n", 1, 4, 4], TensorProto.FLOAT, "float32 [N, 1, 4, 4]", ANOTHER_SIZE),
        (["n", 12], TensorProto.FLOAT, "float32 [N, 12]", "hint: export the network for inputs like the data"),
        (["n", 3, 4, 4], TensorProto.UINT8, "uint8 [N, 3, 4, 4]", "hint: export the network for inputs like the data"),
    ],
)
def test_an_input_that_is_no_batch_of_such_images_is_refused(
    tmp_path: Path, shape: list[Any], element_type: int, described: str, hint: str
) -> None:
    nodes = [helper.make_node("Cast", ["data"], ["output"], to=TensorProto.FLOAT)]
    path = write(
        tmp_path / "model.onnx", make_model(nodes, {"data": shape}, {"output": shape}, input_type=element_type)
    )
    assert refusal(path, {"output": ("N", *shape[1:])}) == (
        f"{path}: its input 'data' is {described}, the data is float32 [N, 3, 4, 4]\n{hint}"
    )


def test_weights_that_are_listed_as_inputs_do_not_count(tmp_path: Path) -> None:
    path = classifier(tmp_path / "model.onnx")
    model = onnx.load(str(path))
    model.graph.input.insert(0, helper.make_tensor_value_info("factors", TensorProto.FLOAT, [2]))
    (output,) = open_file(write(path, model), {"output": ("N", 2)}).run({"image": images(2)}).values()
    assert output[1].tolist() == pytest.approx([1, 2])


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"not an ONNX file", "cut"])
def test_a_file_that_is_no_whole_onnx_file_is_refused(tmp_path: Path, content: bytes | str) -> None:
    path = classifier(tmp_path / "model.onnx")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] if isinstance(content, str) else content)
    text = refusal(path, {"output": ("N", 2)})
    assert text.startswith(f"{path}: is not an ONNX file") or text.startswith(f"{path}: is not a valid ONNX file: ")
    assert text.endswith("\nhint: export it again, or copy it again: a part may be missing")
    assert text.count("\n") == 1


def test_an_operator_that_onnxruntime_does_not_have_is_refused(tmp_path: Path) -> None:
    path = classifier(tmp_path / "strange.onnx")
    model = onnx.load(str(path))
    model.graph.node[0].domain = "com.example"
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    text = refusal(write(path, model), {"output": ("N", 2)})
    assert text.startswith(f"{path}: onnxruntime cannot run it: ")
    assert "com.example" in text
    assert text.endswith("\nhint: export it again, or run it on the device that it was made for")


# --- devices ------------------------------------------------------------------------------------------------------


@without_gpu
@pytest.mark.parametrize(
    ("device", "notice"),
    [
        ("cuda", "cuda is not available on this machine; running on the CPU"),
        ("cuda:1", "cuda:1 is not available on this machine; running on the CPU"),
        ("trt", "TensorRT needs a GPU, and this machine has none; running on the CPU"),
    ],
)
def test_without_a_gpu_a_graph_runs_on_the_cpu_and_a_notice_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, device: str, notice: str
) -> None:
    path = classifier(tmp_path / "model.onnx")
    runtime = open_file(path, {"output": ("N", 2)}, device=device, where="evaluate.device")
    assert runtime.device == "cpu"
    assert caplog.messages == [f"evaluate.device: {notice}"]
    (output,) = runtime.run({"image": images(1)}).values()
    assert output.tolist() == [[0.0, 0.0]]


@without_gpu
def test_a_provider_that_does_not_start_is_replaced_by_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    device_0 = {"device_id": 0}
    providers = [("TensorrtExecutionProvider", device_0), ("CUDAExecutionProvider", device_0), "CPUExecutionProvider"]
    monkeypatch.setattr("taoq.runtimes.onnxruntime.execution_providers", lambda *_: (providers, "trt"))
    runtime = open_file(classifier(tmp_path / "model.onnx"), {"output": ("N", 2)}, device="trt")
    assert [record.message for record in caplog.records] == [
        "device: onnxruntime could not start TensorrtExecutionProvider; running on cuda:0",
        "device: onnxruntime could not start CUDAExecutionProvider; running on cpu",
    ]
    assert runtime.device == "cpu"
    assert runtime.run({"image": images(2)})["output"].tolist() == [[0.0, 0.0], [1.0, 2.0]]
