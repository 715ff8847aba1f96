"""OnnxRuntime: batches, the CPU's arithmetic, what a graph must have, devices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from taoq.onnx_runtime import OnnxRuntime, round_in_float32

from taoq.errors import TaoqError

SHAPE = (1, 3, 4, 4)


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: dict[str, list[Any]],
    outputs: dict[str, list[Any]],
    tensors: dict[str, Any] | None = None,
    kind: int = TensorProto.FLOAT,
) -> Path:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (tensors or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    return path


def classifier(path: Path, batch: int | str = "batch", size: int = 4, channels: int | str = 3) -> Path:
    """Sum of an image, and twice that."""
    nodes = [
        helper.make_node("ReduceSum", ["image", "axes"], ["sums"], keepdims=0),
        helper.make_node("Unsqueeze", ["sums", "one"], ["column"]),
        helper.make_node("Mul", ["column", "factors"], ["output"]),
    ]
    tensors = {"axes": np.int64([1, 2, 3]), "one": np.int64([1]), "factors": np.float32([1, 2])}
    return save(path, nodes, {"image": [batch, channels, size, size]}, {"output": [batch, 2]}, tensors)


def opened(path: Path, sizes: dict[str, int], shape: tuple[int, ...] = SHAPE, device: str = "cpu") -> OnnxRuntime:
    return OnnxRuntime(path, sizes, shape, device)


def images(count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.float32).reshape(-1, 1, 1, 1).expand(-1, 3, 4, 4) / 48


def refusal(path: Path, sizes: dict[str, int], shape: tuple[int, ...] = SHAPE) -> str:
    with pytest.raises(TaoqError) as error:
        opened(path, sizes, shape)
    return str(error.value)


@pytest.mark.parametrize("batch", ["batch", 1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_a_fixed_batch_is_filled_up_and_cut(tmp_path: Path, batch: int | str, count: int) -> None:
    runtime = opened(classifier(tmp_path / "model.onnx", batch), {"output": 2})
    (output,) = runtime.run({"image": images(count)}).values()
    torch.testing.assert_close(output, torch.tensor([[number, 2.0 * number] for number in range(count)]))


def test_the_outputs_are_float32_whatever_the_graph_has(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("ReduceMean", ["image", "axes"], ["half"], keepdims=0),
        helper.make_node("Cast", ["half"], ["output"], to=TensorProto.FLOAT),
    ]
    path = save(
        tmp_path / "model.onnx",
        nodes,
        {"image": ["n", 3, 4, 4]},
        {"output": ["n", 3]},
        {"axes": np.int64([2, 3])},
        TensorProto.FLOAT16,
    )
    (output,) = opened(path, {"output": 3}).run({"image": images(2)}).values()
    assert output.dtype == torch.float32
    assert output[1].tolist() == pytest.approx([1 / 48] * 3, rel=1e-3)


def halves(path: Path, scale: float) -> Path:
    """Float16 through QuantizeLinear and back: [n, 3, 4, 4] to [n, 3, 4, 4]."""
    nodes = [
        helper.make_node("Cast", ["image"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("QuantizeLinear", ["half", "scale", "zero"], ["stored"], "quantize"),
        helper.make_node("DequantizeLinear", ["stored", "scale", "zero"], ["back"], "dequantize"),
        helper.make_node("Cast", ["back"], ["output"], to=TensorProto.FLOAT),
    ]
    tensors = {"scale": np.float16(scale), "zero": np.int8(0)}
    return save(path, nodes, {"image": ["n", 3, 4, 4]}, {"output": ["n", 3, 4, 4]}, tensors)


@pytest.mark.parametrize("scale", [0.5, 0.25, 0.0371])
def test_float16_is_rounded_and_not_cut_off_on_the_cpu(tmp_path: Path, scale: float) -> None:
    runtime = opened(halves(tmp_path / "model.onnx", scale), {"output": 4})
    pixels = torch.linspace(-3, 3, 48 * 50).reshape(50, 3, 4, 4)
    (output,) = runtime.run({"image": pixels}).values()
    step = np.float32(np.float16(scale))
    wanted = np.clip(np.rint(pixels.numpy().astype(np.float16).astype(np.float32) / step), -128, 127) * step
    np.testing.assert_allclose(output.numpy(), wanted, rtol=1e-3)


def test_only_float16_is_widened(tmp_path: Path) -> None:
    model = onnx.load(str(halves(tmp_path / "half.onnx", 0.5)))
    assert round_in_float32(model)
    assert [node.op_type for node in model.graph.node] == [
        "Cast", "Cast", "QuantizeLinear", "DequantizeLinear", "Cast",
    ]  # fmt: skip
    onnx.checker.check_model(model, full_check=True)
    single = onnx.load(str(quantized(tmp_path / "single.onnx", np.int8)))
    before = single.SerializeToString(deterministic=True)
    assert not round_in_float32(single)
    assert single.SerializeToString(deterministic=True) == before


def quantized(path: Path, kind: Any) -> Path:
    """A convolution of 1 x 1 with a quantized input and a quantized weight: [n, 3, 4, 4] to [n, 5, 4, 4]."""
    weight = np.random.default_rng(0).normal(size=(5, 3, 1, 1)).astype(np.float32)
    top = 127 if kind == np.int8 else 448
    scale = (np.abs(weight).max(axis=(1, 2, 3)) / top).astype(np.float32)
    stored = weight / scale.reshape(-1, 1, 1, 1)
    stored = (np.rint(stored) if kind == np.int8 else stored).astype(kind)
    tensors = {
        "weight": stored,
        "scales": scale,
        "zeros": np.zeros(5, kind),
        "scale": np.float32(3 / top),
        "zero": np.zeros((), kind),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["weight", "scales", "zeros"], ["kernel"], "kernel", axis=0),
        helper.make_node("QuantizeLinear", ["image", "scale", "zero"], ["numbers"], "numbers"),
        helper.make_node("DequantizeLinear", ["numbers", "scale", "zero"], ["pixels"], "pixels"),
        helper.make_node("Conv", ["pixels", "kernel"], ["output"], "conv"),
    ]
    return save(path, nodes, {"image": ["n", 3, 4, 4]}, {"output": ["n", 5, 4, 4]}, tensors)


@pytest.mark.parametrize("kind", [np.int8, ml_dtypes.float8_e4m3fn])
def test_a_quantized_graph_runs_on_the_cpu_as_it_is_written(tmp_path: Path, kind: Any) -> None:
    path = quantized(tmp_path / "model.onnx", kind)
    pixels = torch.linspace(-3, 3, 4 * 48).reshape(4, 3, 4, 4)
    (output,) = opened(path, {"output": 4}).run({"image": pixels}).values()
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(str(path)).graph.initializer}
    weight = values["weight"].astype(np.float32) * values["scales"].reshape(-1, 1, 1, 1)
    divided = pixels.numpy() / values["scale"]
    divided = np.rint(divided) if kind == np.int8 else divided.astype(kind).astype(np.float32)
    wanted = np.einsum("ncij,oc->noij", divided * values["scale"], weight[..., 0, 0])
    np.testing.assert_allclose(output.numpy(), wanted, rtol=1e-4, atol=1e-5)


def heads(path: Path, **sizes: int) -> Path:
    """Outputs of some names and sizes, all of zeros."""
    nodes, tensors = [], {"first": np.int64([0]), "last": np.int64([1]), "axis": np.int64([3])}
    for name, size in sizes.items():
        tensors[f"{name}_zeros"] = np.zeros((1, size), np.float32)
        nodes += [
            helper.make_node("ReduceMean", ["image", "axes"], [f"{name}_mean"], keepdims=0),
            helper.make_node("Unsqueeze", [f"{name}_mean", "last"], [f"{name}_column"]),
            helper.make_node("Mul", [f"{name}_column", f"{name}_zeros"], [name]),
        ]
    tensors["axes"] = np.int64([1, 2, 3])
    return save(path, nodes, {"image": ["n", 3, 4, 4]}, {name: ["n", size] for name, size in sizes.items()}, tensors)


def test_outputs_are_found_by_name(tmp_path: Path) -> None:
    path = heads(tmp_path / "model.onnx", other=2, output=2, third=7)
    assert list(opened(path, {"output": 2}).run({"image": images(1)})) == ["output"]


def test_an_output_of_another_name_is_the_only_one_that_fits(tmp_path: Path) -> None:
    path = heads(tmp_path / "model.onnx", boxes=4, scores=10)
    found = opened(path, {"pred_logits": 10, "pred_boxes": 4}).run({"image": images(2)})
    assert {name: list(value.shape) for name, value in found.items()} == {"pred_logits": [2, 10], "pred_boxes": [2, 4]}


def test_outputs_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = heads(tmp_path / "model.onnx", one=10, two=10)
    hint = "\nhint: the file is of another task, or of another number of classes"
    assert refusal(path, {"output": 10}) == (
        f"{path}: has no output 'output' with 10 values each: its outputs are 'one' [..., 10], 'two' [..., 10]{hint}"
    )
    path = heads(tmp_path / "classes.onnx", output=10)
    assert refusal(path, {"output": 1000}) == (
        f"{path}: has no output 'output' with 1000 values each: its outputs are 'output' [..., 10]{hint}"
    )


def test_one_output_is_not_taken_for_two(tmp_path: Path) -> None:
    """A detector of four classes whose file has boxes, and no classes of that size."""
    path = heads(tmp_path / "model.onnx", pred_boxes=4, features=256)
    assert "has no output 'pred_logits'" in refusal(path, {"pred_logits": 4, "pred_boxes": 4})


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    path = classifier(tmp_path / "model.onnx", size=6)
    assert refusal(path, {"output": 2}) == (
        f"{path}: takes images of 6 x 6 (height x width), those of the spec are 4 x 4\n"
        "hint: set the input size in the dataset section to that of the file"
    )


def test_a_graph_with_two_inputs_or_none_is_refused(tmp_path: Path) -> None:
    hint = "\nhint: export the network without its pre- and post-processing"
    nodes = [helper.make_node("Add", ["image", "mask"], ["output"])]
    inputs = {"image": ["n", 3, 4, 4], "mask": ["n", 3, 4, 4]}
    path = save(tmp_path / "two.onnx", nodes, inputs, {"output": ["n", 3, 4, 4]})
    assert refusal(path, {"output": 4}) == (
        f"{path}: has 2 inputs (image, mask): taoq runs graphs with one image input{hint}"
    )
    nodes = [helper.make_node("Constant", [], ["output"], value=numpy_helper.from_array(np.zeros((1, 4), np.float32)))]
    path = save(tmp_path / "none.onnx", nodes, {}, {"output": [1, 4]})
    assert refusal(path, {"output": 4}) == f"{path}: has 0 inputs (none): taoq runs graphs with one image input{hint}"


@pytest.mark.parametrize(
    ("shape", "kind", "said"),
    [
        (["n", 4, 4, 3], TensorProto.FLOAT, "float32 ['?', 4, 4, 3]"),
        (["n", 1, 4, 4], TensorProto.FLOAT, "float32 ['?', 1, 4, 4]"),
        (["n", 12], TensorProto.FLOAT, "float32 ['?', 12]"),
        (["n", 3, 4, 4], TensorProto.UINT8, "uint8 ['?', 3, 4, 4]"),
    ],
)
def test_an_input_that_is_no_batch_of_rgb_images_is_refused(
    tmp_path: Path, shape: list[Any], kind: int, said: str
) -> None:
    nodes = [helper.make_node("Cast", ["data"], ["output"], to=TensorProto.FLOAT)]
    path = save(tmp_path / "model.onnx", nodes, {"data": shape}, {"output": shape}, kind=kind)
    assert refusal(path, {"output": 3}) == (
        f"{path}: its input 'data' is {said}, not float [batch, 3, height, width]\n"
        "hint: export the network for batches of RGB images"
    )


def test_weights_that_are_listed_as_inputs_do_not_count(tmp_path: Path) -> None:
    path = classifier(tmp_path / "model.onnx")
    model = onnx.load(str(path))
    model.graph.input.insert(0, helper.make_tensor_value_info("factors", TensorProto.FLOAT, [2]))
    onnx.save(model, str(path))
    (output,) = opened(path, {"output": 2}).run({"image": images(2)}).values()
    assert output[1].tolist() == pytest.approx([1, 2])


@pytest.mark.parametrize("content", [b"", b"not an ONNX file", "cut"])
def test_a_file_that_is_no_whole_onnx_file_is_refused(tmp_path: Path, content: bytes | str) -> None:
    path = classifier(tmp_path / "model.onnx")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] if content == "cut" else content)
    text = refusal(path, {"output": 2})
    assert text.startswith(f"{path}: is not an ONNX file") or text.startswith(f"{path}: is no valid ONNX file: ")
    assert text.endswith("\nhint: export it again, or copy it again: a part may be missing")
    assert text.count("\n") == 1


def test_an_operator_that_onnxruntime_does_not_have_is_refused(tmp_path: Path) -> None:
    model = onnx.load(str(classifier(tmp_path / "model.onnx")))
    model.graph.node[0].domain = "com.example"
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    path = tmp_path / "strange.onnx"
    onnx.save(model, str(path))
    text = refusal(path, {"output": 2})
    assert text.startswith(f"{path}: onnxruntime cannot run it: ")
    assert "com.example" in text
    assert text.endswith("\nhint: export it again, or run it where it was made for")


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("cuda", "cuda is not available on this machine; running on the CPU"),
        ("cuda:1", "cuda:1 is not available on this machine; running on the CPU"),
        ("trt", "TensorRT needs a GPU, and this machine has none; running on the CPU"),
    ],
)
def test_without_a_gpu_a_graph_runs_on_the_cpu_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, device: str, said: str
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    path = classifier(tmp_path / "model.onnx")
    runtime = OnnxRuntime(path, {"output": 2}, SHAPE, device, where="evaluate.device")
    assert runtime.device == "cpu"
    assert [record.getMessage() for record in caplog.records] == [f"evaluate.device: {said}"]
    (output,) = runtime.run({"image": images(1)}).values()
    assert output.tolist() == [[0.0, 0.0]]


def test_evaluate_says_where_it_runs(
    taoq: Any, digits_words: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A float file through the command line, on a device that is not there."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    file = tmp_path_factory.getbasetemp() / "exported" / "resnet_18.onnx"
    if not file.exists():
        checkpoint = Path(__file__).parents[1] / "examples" / "digits" / "checkpoints" / "resnet_18.safetensors"
        export = (f"export.checkpoint={checkpoint}", f"export.onnx_file={file}", "export.on_cpu=true")
        assert taoq(*digits_words("export", "resnet_18", *export))[0] == 0
    words = digits_words("evaluate", "resnet_18", f"evaluate.checkpoint={file}", "evaluate.device=trt")
    code, out, err = taoq(*words)
    assert (code, err) == (
        0,
        "warning: override evaluate.device=trt: evaluate.device: TensorRT needs a GPU, and this machine has none;"
        " running on the CPU\n",
    )
    assert f"{file}: 597 images on cpu\n" in out
    assert json.loads((tmp_path / "results" / "evaluate" / "results.json").read_text())["device"] == "cpu"
