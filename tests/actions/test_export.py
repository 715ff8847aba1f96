"""export: the file, its proof, and the Q/DQ graphs of torch artifacts."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml
from onnx import numpy_helper
from taoq.actions.open_model import open_artifact
from torch import nn

import taoq as package
from taoq.actions import export
from taoq.errors import TaoqError
from taoq.files import sha256
from taoq.pipeline.artifacts import read_artifact
from taoq.quantization.backends import load_backend
from taoq.quantization.formats.onnx.file import read_properties
from taoq.spec.load import spec_from_dict
from taoq.tasks import load_task
from taoq.tasks.base import Task

Taoq = Callable[..., tuple[int, str, str]]
Words = Callable[..., list[str]]

EXAMPLES = Path(__file__).parents[2] / "examples"
CHECKPOINTS = {
    "resnet_18": EXAMPLES / "digits" / "checkpoints" / "resnet_18.safetensors",
    "vit_tiny": EXAMPLES / "digits" / "checkpoints" / "vit_tiny.safetensors",
    "detector": EXAMPLES / "digit_scenes" / "checkpoints" / "rtdetr_small",
}
SIZES = {"resnet_18": 32, "vit_tiny": 32, "detector": 160}
OUTPUTS = {
    "resnet_18": {"output": ["batch", 10]},
    "vit_tiny": {"output": ["batch", 10]},
    "detector": {"pred_logits": ["batch", 30, 10], "pred_boxes": ["batch", 30, 4]},
}
every_network = pytest.mark.parametrize("network", CHECKPOINTS)
NO_IMAGES = [
    f"dataset.{name}.images_dir=nowhere" for name in ("quant_calibration_dataset", "val_dataset", "test_dataset")
]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def words(digits_words: Words, scenes_words: Words) -> Words:
    """Words of a command line on any of the three example networks: (action, network, *overrides)."""

    def of(action: str, network: str, *overrides: str) -> list[str]:
        if network == "detector":
            return scenes_words(action, *overrides)
        return digits_words(action, network, *overrides)

    return of


@pytest.fixture
def exporting(words: Words) -> Words:
    """Words of an export: (network, *overrides)."""

    def of(network: str, *overrides: str) -> list[str]:
        return words(
            "export", network, "export.on_cpu=true", f"export.checkpoint={CHECKPOINTS[network]}", *overrides
        )  # fmt: skip

    return of


@pytest.fixture
def exported(
    taoq: Taoq, exporting: Words, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, onnx.ModelProto]]:
    """The exported file of an example network, made once."""
    folder = tmp_path_factory.getbasetemp() / "exported"

    def of(network: str) -> tuple[Path, onnx.ModelProto]:
        file = folder / f"{network}.onnx"
        if not file.exists():
            code, _, err = taoq(*exporting(network, f"export.onnx_file={file}"))
            assert code == 0, err
        return file, onnx.load(str(file))

    return of


def loaded(model: onnx.ModelProto, checkpoint: Path) -> tuple[Task[Any], Any, nn.Module]:
    """Task, spec and torch network, from what a file says of itself."""
    properties = read_properties(model, Path("it"))
    task = load_task(properties["task"])
    spec = spec_from_dict(properties["spec"], task.spec)
    return task, spec, task.build_model(spec, str(checkpoint)).eval()


def images(count: int, size: int) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(count))


def run(file: Path | onnx.ModelProto, pixels: torch.Tensor) -> dict[str, Any]:
    source = str(file) if isinstance(file, Path) else file.SerializeToString()
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {session.get_inputs()[0].name: pixels.numpy()}), strict=True))


def shape(value: onnx.ValueInfoProto) -> list[Any]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def tensors(model: onnx.ModelProto) -> dict[str, Any]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def weighted(model: onnx.ModelProto) -> dict[str, Any]:
    """Weight of each Conv, Gemm and MatMul that has one, by name of the node."""
    values = tensors(model)
    return {
        node.name: values[node.input[1]]
        for node in model.graph.node
        if node.op_type in ("Conv", "Gemm", "MatMul") and node.input[1] in values
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("log.txt", "status.json")}


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@every_network
def test_inputs_and_outputs_have_tao_s_names_and_any_batch(exported: Any, network: str) -> None:
    file, model = exported(network)
    size, names = SIZES[network], OUTPUTS[network]
    name = "inputs" if network == "detector" else "input"
    assert {value.name: shape(value) for value in model.graph.input} == {name: ["batch", 3, size, size]}
    assert {value.name: shape(value) for value in model.graph.output} == names
    for count in (1, 3, 8):
        found = run(file, images(count, size))
        assert {name: list(value.shape) for name, value in found.items()} == {
            name: [count, *dims[1:]] for name, dims in names.items()
        }


@every_network
def test_the_file_computes_what_torch_computes(exported: Any, network: str) -> None:
    file, model = exported(network)
    task, spec, net = loaded(model, CHECKPOINTS[network])
    pixels = images(3, SIZES[network])
    with torch.inference_mode():
        outputs = net(pixels)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    reference = dict(zip(task.outputs(spec), outputs, strict=True))
    found = {name: torch.from_numpy(value) for name, value in run(file, pixels).items()}
    for largest, value in export.differences(reference, found, task.export.align, None).values():
        assert largest < 1e-4 * max(value, 1)


@every_network
def test_nodes_are_named_by_the_module_they_come_from(exported: Any, network: str) -> None:
    _, model = exported(network)
    modules = dict(loaded(model, CHECKPOINTS[network])[2].named_modules())
    assert len({node.name for node in model.graph.node}) == len(model.graph.node)
    found = set()
    for node in model.graph.node:
        path, slash, last = node.name.removeprefix("/").rpartition("/")
        assert node.name.startswith("/")
        assert re.fullmatch(rf"{node.op_type}(_\d+)?", last)
        assert path.replace("/", ".") in modules
        assert slash or not path
    for name, weight in weighted(model).items():
        module = name.removeprefix("/").rpartition("/")[0].replace("/", ".")
        kind = name.rpartition("/")[2]
        found.add(module)
        parameter = getattr(modules[module], "weight", None)
        if parameter is None:  # its three matrices are one parameter
            assert isinstance(modules[module], nn.MultiheadAttention)
            continue
        mine = tuple(parameter.shape)
        assert tuple(weight.shape) == (mine[::-1] if kind.startswith("MatMul") else mine)
    layers = {name for name, module in modules.items() if isinstance(module, nn.Conv2d | nn.Linear)}
    assert layers - found == set()


@every_network
def test_a_file_has_standard_operators_alone_and_no_batch_norm(exported: Any, network: str) -> None:
    file, model = exported(network)
    onnx.checker.check_model(str(file), full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]
    assert {node.domain for node in model.graph.node} == {""}
    types = {node.op_type for node in model.graph.node}
    assert not types & {"BatchNormalization", "Identity", "Constant", "ATen", "PythonOp"}


def test_the_opset_is_the_one_that_was_asked_for(taoq: Taoq, exporting: Words, tmp_path: Path) -> None:
    code, out, _ = taoq(*exporting("resnet_18", "export.opset_version=18"))
    file = tmp_path / "results" / "export" / "model.onnx"
    assert code == 0
    assert out.endswith(f"exported 2.88 MB: opset 18, 50 nodes, input [any, 3, 32, 32]\n{file}\n")
    assert [(entry.domain, entry.version) for entry in onnx.load(str(file)).opset_import] == [("", 18)]
    assert read(file.with_name("model_export.json"))["opset_version"] == 18


@pytest.mark.parametrize("version", [8, 99])
def test_an_opset_that_cannot_be_written_is_refused(taoq: Taoq, exporting: Words, tmp_path: Path, version: int) -> None:
    code, _, err = taoq(*exporting("resnet_18", f"export.opset_version={version}"))
    assert (code, err) == (
        2,
        f"override export.opset_version={version}: export.opset_version: torch's exporter writes opset 9 to 23,"
        f" not {version}\nhint: write 17, which every network here takes\n",
    )
    assert not (tmp_path / "results").exists()


def test_an_opset_that_is_too_old_for_the_network_is_refused(taoq: Taoq, exporting: Words, tmp_path: Path) -> None:
    code, _, err = taoq(*exporting("vit_tiny", "export.opset_version=13"))
    assert (code, err) == (
        2,
        "override export.opset_version=13: export.opset_version: the network cannot be written with opset 13:"
        " Exporting the operator 'aten::scaled_dot_product_attention' to ONNX opset version 13 is not supported."
        " Support for this operator was added in version 14, try exporting with this version\n"
        "hint: write 17, which every network here takes\n",
    )
    assert not contents(tmp_path / "results" / "export")


def test_a_fixed_batch_is_in_the_file(taoq: Taoq, exporting: Words, tmp_path: Path) -> None:
    code, out, _ = taoq(*exporting("resnet_18", "export.batch_size=2"))
    assert code == 0
    assert "input [2, 3, 32, 32]\n" in out
    file = tmp_path / "results" / "export" / "model.onnx"
    model = onnx.load(str(file))
    assert [shape(value) for value in (*model.graph.input, *model.graph.output)] == [[2, 3, 32, 32], [2, 10]]
    run(file, images(2, 32))
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument):
        run(file, images(3, 32))


@pytest.mark.parametrize("network", ["vit_tiny", "detector"])
def test_the_same_export_gives_the_same_graph(taoq: Taoq, exporting: Words, exported: Any, tmp_path: Path, network: str) -> None:  # fmt: skip  # noqa: E501
    _, model = exported(network)
    assert taoq(*exporting(network, "export.check_images=1"))[0] == 0
    again = onnx.load(str(tmp_path / "results" / "export" / "model.onnx"))
    assert again.graph.SerializeToString(deterministic=True) == model.graph.SerializeToString(deterministic=True)


def test_the_same_command_gives_the_same_bytes(taoq: Taoq, exporting: Words, tmp_path: Path) -> None:
    taoq(*exporting("resnet_18"))
    first = (tmp_path / "results" / "export" / "model.onnx").read_bytes()
    code, _, err = taoq(*exporting("resnet_18"))
    file = tmp_path / "results" / "export" / "model.onnx"
    assert code == 0
    assert file.read_bytes() == first
    assert err == f"export.onnx_file: {file} was made from the same checkpoint and will be replaced\n"


@every_network
def test_the_report_says_how_far_torch_and_onnx_are_apart(exported: Any, network: str) -> None:
    file, model = exported(network)
    report = read(file.with_name(f"{network}_export.json"))
    assert (report["onnx_file"], report["checkpoint"]) == (str(file), str(CHECKPOINTS[network]))
    assert (report["opset_version"], report["nodes"]) == (17, len(model.graph.node))
    assert (report["quantized_layers"], report["size"]) == (0, file.stat().st_size)
    assert set(report["versions"]) >= {"python", "torch", "onnx", "onnxruntime-gpu"}
    proof = report["proof"]
    assert (proof["images"], proof["left_out_for_ties"], proof["tolerance"]) == (8, 0, 1e-3)
    assert list(proof["outputs"]) == list(OUTPUTS[network])
    for found in proof["outputs"].values():
        assert found["largest_difference"] < 1e-4
        assert found["largest_value"] > 0.5


@every_network
def test_a_file_says_what_it_was_made_from(exported: Any, network: str) -> None:
    _, model = exported(network)
    properties = read_properties(model, Path("it"))
    assert properties["taoq"] == package.__version__
    assert properties["task"] == ("rtdetr" if network == "detector" else "classification_pyt")
    assert properties["source"] == {"path": str(CHECKPOINTS[network]), "sha256": sha256(CHECKPOINTS[network])}
    assert properties["spec"]["dataset"]["num_classes"] == 10


def test_the_proof_is_on_as_many_images_as_asked(taoq: Taoq, exporting: Words, tmp_path: Path) -> None:
    """More than a batch of the data set, and no multiple of one."""
    code, out, _ = taoq(*exporting("resnet_18", "export.check_images=70"))
    assert code == 0
    assert "torch beside ONNX on 70 images" in out
    assert read(tmp_path / "results" / "export" / "model_export.json")["proof"]["images"] == 70


def queries(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "pred_logits": 10 * torch.rand(2, 30, 10, generator=generator) - 7,
        "pred_boxes": torch.rand(2, 30, 4, generator=generator),
    }


def changed(change: Callable[[dict[str, torch.Tensor]], None]) -> dict[str, float]:
    """Differences of queries to a changed copy of them."""
    outputs = {name: value.clone() for name, value in queries().items()}
    change(outputs)
    align = load_task("rtdetr").export.align
    return {name: off for name, (off, _) in export.differences(queries(), outputs, align, None).items()}


def test_queries_in_another_order_are_the_same() -> None:
    def permute(outputs: dict[str, torch.Tensor]) -> None:
        order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
        for name in outputs:
            outputs[name] = outputs[name][:, order]

    assert changed(permute) == {"pred_logits": 0.0, "pred_boxes": 0.0}


def test_another_order_in_one_output_alone_is_a_difference() -> None:
    def permute(outputs: dict[str, torch.Tensor]) -> None:
        outputs["pred_boxes"] = outputs["pred_boxes"].flip(1)

    assert max(changed(permute).values()) > 0.1


@pytest.mark.parametrize(("name", "step"), [("pred_logits", 0.25), ("pred_boxes", 0.03125)])
def test_one_changed_value_of_one_query_is_a_difference(name: str, step: float) -> None:
    def change(outputs: dict[str, torch.Tensor]) -> None:
        outputs[name][1, 17, 2] += step

    found = changed(change)
    assert found.pop(name) == pytest.approx(step, rel=1e-3)
    assert list(found.values()) == [0.0]


def test_a_missing_query_is_a_difference() -> None:
    """Its place has a copy of another: each query of the file has its like in torch's, but not the other way round."""

    def change(outputs: dict[str, torch.Tensor]) -> None:
        for value in outputs.values():
            value[0, 4] = value[0, 5]

    assert min(changed(change).values()) > 0.01


def test_images_in_another_order_are_a_difference() -> None:
    def change(outputs: dict[str, torch.Tensor]) -> None:
        for name in outputs:
            outputs[name] = outputs[name].flip(0)

    assert min(changed(change).values()) > 0.01


@pytest.mark.parametrize("name", ["pred_logits", "pred_boxes"])
def test_a_value_that_is_no_number_is_a_difference(name: str) -> None:
    def change(outputs: dict[str, torch.Tensor]) -> None:
        outputs[name][0, 3, 1] = float("nan")

    assert not all(off < 1 for off in changed(change).values())


def test_a_class_that_is_no_number_is_a_difference() -> None:
    reference, outputs = {"output": torch.ones(2, 10)}, {"output": torch.full((2, 10), float("nan"))}
    ((off, _),) = export.differences(reference, outputs, load_task("classification_pyt").export.align, None).values()
    assert not off < 1


def test_a_quantized_detector_is_compared_on_what_it_finds() -> None:
    task = load_task("rtdetr")
    reference = {"pred_logits": torch.full((1, 2, 10), -6.0), "pred_boxes": torch.rand(1, 2, 4)}
    reference["pred_logits"][0, 0, 3] = 3.0
    for query, seen in ((0, True), (1, False)):
        outputs = {name: value.clone() for name, value in reference.items()}
        outputs["pred_boxes"][0, query] += 0.5
        found = export.differences(reference, outputs, task.export.align, task.export.found)
        assert (max(off for off, _ in found.values()) > 0.1) is seen


def prove(file: Path, checkpoint: Path) -> Mapping[str, Any]:
    """The proof of export, on a file as it is now."""
    task, spec, net = loaded(onnx.load(str(file)), checkpoint)
    return export._prove(task, spec, spec.export, export._Source(net, net, {}, {}), file)


@pytest.mark.parametrize(
    ("network", "node", "output"), [("resnet_18", "/fc/Gemm", "output"), ("detector", "Gather", "pred_boxes")]
)
def test_a_file_that_was_changed_is_caught(exported: Any, tmp_path: Path, network: str, node: str, output: str) -> None:
    """One bias of the classifier, and the sizes of all boxes."""
    _, model = exported(network)
    if network == "resnet_18":
        (name,) = (item.input[2] for item in model.graph.node if item.name == node)
        (bias,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
        values = numpy_helper.to_array(bias).copy()
        values[7] += 0.5
        bias.CopyFrom(numpy_helper.from_array(values, name))
    else:
        (last,) = (item for item in model.graph.node if "pred_boxes" in item.output)
        last.output[0] = "boxes"
        model.graph.initializer.append(numpy_helper.from_array(np.float32([1, 1, 1.02, 1.02]), "factors"))
        model.graph.node.append(onnx.helper.make_node("Mul", ["boxes", "factors"], ["pred_boxes"], "/Mul_of_boxes"))
    bad = tmp_path / "bad.onnx"
    onnx.save(model, str(bad))
    with pytest.raises(TaoqError) as error:
        prove(bad, CHECKPOINTS[network])
    assert re.fullmatch(
        rf"export\.tolerance: torch and ONNX differ: {output} by [0-9.]+, its largest value is [0-9.]+\n"
        r"hint: the file was not written; export\.tolerance is 0\.001 of the largest value",
        str(error.value),
    )


TOO_SMALL = re.compile(
    r"override export\.tolerance=1e-9: export\.tolerance: torch and ONNX differ:"
    r" output by [0-9.]+e-0\d, its largest value is [0-9.]+\n"
    r"hint: the file was not written; export\.tolerance is 1e-09 of the largest value\n"
)


def test_a_file_that_differs_too_much_is_not_written(taoq: Taoq, exporting: Words, tmp_path: Path) -> None:
    code, out, err = taoq(*exporting("resnet_18", "export.tolerance=1e-9"))
    folder = tmp_path / "results" / "export"
    assert (code, out) == (1, "")
    assert TOO_SMALL.fullmatch(err)
    assert sorted(path.name for path in folder.iterdir()) == ["log.txt", "status.json"]
    assert json.loads((folder / "status.json").read_text().splitlines()[-1])["status"] == "FAILURE"


def test_a_failed_export_keeps_the_older_file(taoq: Taoq, exporting: Words, tmp_path: Path) -> None:
    folder = tmp_path / "results" / "export"
    assert taoq(*exporting("resnet_18", "export.serialize_nvdsinfer=true"))[0] == 0
    before = contents(folder)
    assert sorted(before) == ["labels.txt", "model.onnx", "model_export.json", "nvdsinfer_config.yaml"]
    code, _, err = taoq(*exporting("resnet_18", "export.tolerance=1e-9", "export.serialize_nvdsinfer=true"))
    assert code == 1
    assert TOO_SMALL.search(err)
    assert contents(folder) == before


def test_a_file_made_from_something_else_is_not_replaced(taoq: Taoq, exporting: Words, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    other = tmp_path / "other.safetensors"
    other.write_bytes(CHECKPOINTS["resnet_18"].read_bytes() + b" ")
    shutil.copy(CHECKPOINTS["resnet_18"], other.with_name("same.safetensors"))
    assert taoq(*exporting("resnet_18", f"export.onnx_file={file}"))[0] == 0
    data = file.read_bytes()
    code, _, err = taoq(*exporting("resnet_18", f"export.onnx_file={file}", f"export.checkpoint={other}"))
    assert (code, err) == (
        1,
        f"override export.onnx_file={file}: export.onnx_file: {file} is there already, made from"
        f" {CHECKPOINTS['resnet_18']}\n"
        "hint: name another file, or set export.overwrite: true\n",
    )
    assert file.read_bytes() == data
    same = f"export.checkpoint={other.with_name('same.safetensors')}"  # the bytes count, not the name
    assert taoq(*exporting("resnet_18", f"export.onnx_file={file}", same))[0] == 0
    assert read_properties(onnx.load(str(file)), Path("it"))["source"]["path"].endswith("same.safetensors")


@pytest.mark.parametrize("text", [b"no ONNX file\n", b""])
def test_a_file_of_someone_else_is_replaced_only_where_asked(
    taoq: Taoq, exporting: Words, tmp_path: Path, text: bytes
) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(text)
    words = exporting("resnet_18", f"export.onnx_file={file}")
    code, _, err = taoq(*words)
    assert (code, err) == (
        1,
        f"override export.onnx_file={file}: export.onnx_file: {file} is there already, made from something else\n"
        "hint: name another file, or set export.overwrite: true\n",
    )
    assert file.read_bytes() == text
    assert taoq(*words, "export.overwrite=true")[0] == 0
    assert read_properties(onnx.load(str(file)), Path("it"))["task"] == "classification_pyt"


def test_the_payload_of_an_artifact_is_never_overwritten(
    taoq: Taoq, digits_words: Words, exporting: Words, exported: Any, tmp_path: Path
) -> None:
    file, _ = exported("resnet_18")
    quantize = digits_words(
        "quantize",
        "resnet_18",
        "quantize.backend=onnxruntime",
        f"quantize.model_path={file}",
        "quantize.layers=[{module_name: Gemm, weights: {dtype: int8}}]",
    )
    assert taoq(*quantize)[0] == 0
    payload = tmp_path / "results" / "quantize" / "quantized_model.onnx"
    before = contents(payload.parent)
    code, _, err = taoq(*exporting("resnet_18", f"export.onnx_file={payload}", "export.overwrite=true"))
    assert (code, err) == (
        2,
        f"override export.onnx_file={payload}: export.onnx_file: {payload} is the payload of an artifact\n"
        "hint: name another file\n",
    )
    assert contents(payload.parent) == before
    code, _, err = taoq(*exporting("resnet_18", f"export.checkpoint={payload.parent}"))
    assert (code, err) == (
        2,
        f"{payload.parent}: quantized by onnxruntime, 1 layers\n"
        f"override export.checkpoint={payload.parent}: export.checkpoint: {payload.parent} is an artifact of"
        " onnxruntime: its payload is an ONNX file\n"
        f"hint: take {payload} as it is\n",
    )


def test_a_spec_without_images_is_said(taoq: Taoq, exporting: Words, tmp_path: Path) -> None:
    code, out, err = taoq(*exporting("resnet_18", *NO_IMAGES, "export.check_images=3"))
    lines = err.splitlines()
    assert (code, len(lines)) == (0, 4)
    assert lines[-1] == (
        "warning: override export.check_images=3: export.check_images: the spec has no images"
        " (dataset.quant_calibration_dataset.images_dir: there is no folder nowhere): compared on noise"
    )
    assert "torch beside ONNX on 3 images" in out
    assert (tmp_path / "results" / "export" / "model.onnx").is_file()


def test_images_that_are_named_and_not_there_are_said(taoq: Taoq, exporting: Words) -> None:
    override = "dataset.quant_calibration_dataset.images_dir=nowhere"
    code, _, err = taoq(*exporting("resnet_18", override))
    where = "dataset.quant_calibration_dataset.images_dir"
    said = f"warning: override {override}: {where}: there is no folder nowhere; export looks for other images\n"
    assert (code, err) == (0, said)


def test_another_input_size_than_that_of_the_data_set(taoq: Taoq, exporting: Words, tmp_path: Path) -> None:
    code, out, _ = taoq(*exporting("resnet_18", "export.input_height=64", "export.input_width=64"))
    model = onnx.load(str(tmp_path / "results" / "export" / "model.onnx"))
    assert code == 0
    assert "input [any, 3, 64, 64]\n" in out
    assert shape(model.graph.input[0]) == ["batch", 3, 64, 64]
    assert read_properties(model, Path("it"))["spec"]["dataset"]["img_size"] == 64


def test_a_network_for_one_size_alone_is_refused_another(taoq: Taoq, exporting: Words, tmp_path: Path) -> None:
    code, _, err = taoq(*exporting("vit_tiny", "export.input_height=64", "export.input_width=64"))
    assert code in (1, 2)
    assert err.count("\n") == 2
    assert not contents(tmp_path / "results" / "export")


REFUSALS = {
    "not square": (
        ["export.input_height=64"],
        "override export.input_height=64: export.input_height: the input is 64 x 32 (height x width),"
        " classification_pyt has square inputs\n"
        "hint: write the same input_height and input_width\n",
    ),
    "one channel": (
        ["export.input_channel=1"],
        "override export.input_channel=1: export.input_channel: the input has 1 channels, every network here has 3\n"
        "hint: leave it out\n",
    ),
    "no images": (
        ["export.batch_size=0"],
        "override export.batch_size=0: export.batch_size: 0 images are no batch\n"
        "hint: write -1 for any number of images\n",
    ),
    "a file of torch": (
        ["export.onnx_file=model.pth"],
        "override export.onnx_file=model.pth: export.onnx_file: model.pth does not end in .onnx\n"
        "hint: write model.onnx\n",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_wrong_section_is_refused_before_anything_starts(
    taoq: Taoq, exporting: Words, tmp_path: Path, case: str
) -> None:
    overrides, text = REFUSALS[case]
    code, out, err = taoq(*exporting("resnet_18", *overrides))
    assert (code, out, err) == (2, "", text)
    assert not (tmp_path / "results").exists()


def test_a_checkpoint_that_is_not_there_or_is_onnx_already_is_refused(
    taoq: Taoq, exporting: Words, exported: Any, tmp_path: Path
) -> None:
    file, _ = exported("resnet_18")
    assert taoq(*exporting("resnet_18", f"export.checkpoint={file}")) == (
        2,
        "",
        f"override export.checkpoint={file}: export.checkpoint: {file} is an ONNX file already\n"
        "hint: name the checkpoint it was made from\n",
    )
    assert taoq(*exporting("resnet_18", "export.checkpoint=nowhere.pth")) == (
        1,
        "",
        "override export.checkpoint=nowhere.pth: export.checkpoint: there is no nowhere.pth\n"
        "hint: name a checkpoint or an artifact\n",
    )
    assert not (tmp_path / "results").exists()


def test_is_quantized_must_not_contradict_the_checkpoint(taoq: Taoq, exporting: Words) -> None:
    code, _, err = taoq(*exporting("resnet_18", "export.is_quantized=true"))
    assert (code, err) == (
        2,
        "override export.is_quantized=true: export.is_quantized: is true, but"
        f" {CHECKPOINTS['resnet_18']} is no artifact\n"
        "hint: leave the field out: the artifact knows\n",
    )
    assert taoq(*exporting("resnet_18", "export.is_quantized=false", "export.check_images=1"))[0] == 0


def test_without_a_name_the_file_is_in_the_results_folder(taoq: Taoq, exporting: Words, tmp_path: Path) -> None:
    assert taoq(*exporting("resnet_18", f"export.results_dir={tmp_path}/mine", "export.check_images=1"))[0] == 0
    names = ["log.txt", "model.onnx", "model_export.json", "status.json"]
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == names
    status = [json.loads(line) for line in (tmp_path / "mine" / "status.json").read_text().splitlines()]
    assert [(line["status"], line["message"]) for line in status] == [
        ("STARTED", "Starting classification_pyt export."),
        ("RUNNING", "Exported."),
        ("SUCCESS", "Export finished successfully."),
    ]
    assert status[1]["kpi"]["size_mb"] == (tmp_path / "mine" / "model.onnx").stat().st_size / 1e6


def test_a_classifier_for_deepstream(taoq: Taoq, exporting: Words, tmp_path: Path) -> None:
    file = tmp_path / "models" / "digits.onnx"
    code, _, err = taoq(*exporting("resnet_18", f"export.onnx_file={file}", "export.serialize_nvdsinfer=true"))
    assert (code, err) == (
        0,
        "warning: override export.serialize_nvdsinfer=true: export.serialize_nvdsinfer: DeepStream has one scale for"
        " all channels, dataset.augmentation.std has three: their mean is written\n",
    )
    assert sorted(contents(file.parent)) == [
        "digits.onnx", "digits_export.json", "labels.txt", "nvdsinfer_config.yaml",
    ]  # fmt: skip
    assert yaml.safe_load((file.parent / "nvdsinfer_config.yaml").read_text()) == {
        "property": {
            "gpu-id": 0,
            "model-color-format": 0,
            "onnx-file": "digits.onnx",
            "labelfile-path": "labels.txt",
            "infer-dims": "3;32;32",
            "batch-size": 1,
            "network-mode": 2,
            "network-type": 1,
            "net-scale-factor": pytest.approx(1 / (255 * (0.229 + 0.224 + 0.225) / 3)),
            "offsets": "123.6750;116.2800;103.5300",
            "output-blob-names": "output",
        }
    }
    assert (file.parent / "labels.txt").read_text() == "0;1;2;3;4;5;6;7;8;9\n"


def test_a_detector_for_deepstream_with_a_size_and_a_batch(taoq: Taoq, exporting: Words, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    options = ("export.serialize_nvdsinfer=true", "export.batch_size=4", "export.check_images=1")
    size = ("export.input_height=128", "export.input_width=192")
    assert taoq(*exporting("detector", f"export.onnx_file={file}", *options, *size))[0] == 0
    model = onnx.load(str(file))
    assert shape(model.graph.input[0]) == [4, 3, 128, 192]
    assert [shape(value) for value in model.graph.output] == [[4, 30, 10], [4, 30, 4]]
    augmentation = read_properties(model, Path("it"))["spec"]["dataset"]["augmentation"]
    assert augmentation["eval_spatial_size"] == [128, 192]
    assert yaml.safe_load((tmp_path / "nvdsinfer_config.yaml").read_text()) == {
        "property": {
            "gpu-id": 0,
            "model-color-format": 0,
            "onnx-file": "model.onnx",
            "labelfile-path": "labels.txt",
            "infer-dims": "3;128;192",
            "batch-size": 4,
            "network-mode": 2,
            "network-type": 0,
            "net-scale-factor": pytest.approx(1 / 255),
            "offsets": "0;0;0",
            "maintain-aspect-ratio": 0,
            "num-detected-classes": 10,
            "cluster-mode": 4,
            "output-blob-names": "pred_boxes;pred_logits",
            "parse-bbox-func-name": "NvDsInferParseCustomDDETRTAO",
            "custom-lib-path": "/opt/nvidia/deepstream/deepstream/lib/libnvds_infercustomparser_tao.so",
        }
    }
    assert (tmp_path / "labels.txt").read_text() == "".join(f"{digit}\n" for digit in range(10))


def stored(model: onnx.ModelProto) -> dict[str, tuple[Any, Any, Any]]:
    """Numbers and scale of the weight, and scale of the input, of each quantized layer, by its module."""
    made_by = {name: node for node in model.graph.node for name in node.output}
    values = tensors(model)
    found = {}
    for node in model.graph.node:
        weight, pixels = (made_by.get(name) for name in node.input[1::-1]) if len(node.input) > 1 else (None, None)
        if node.op_type in ("Conv", "Gemm", "MatMul") and weight is not None and weight.op_type == "DequantizeLinear":
            assert pixels is not None
            assert pixels.op_type == "DequantizeLinear"
            assert made_by[pixels.input[0]].op_type == "QuantizeLinear"
            module = node.name.removeprefix("/").rpartition("/")[0].replace("/", ".")
            numbers, scale = values[weight.input[0]], values[weight.input[1]]
            if node.op_type == "MatMul":
                numbers = numbers.T
            found[module] = (numbers, scale, values[pixels.input[1]])
    return found


ARTIFACTS = {
    "resnet_18 int8": ("resnet_18", "int8", "int8", 22),
    "resnet_18 fp8": ("resnet_18", "fp8_e4m3fn", "float8_e4m3fn", 22),
    "vit_tiny int8": ("vit_tiny", "int8", "int8", 5),
    "detector int8": ("detector", "int8", "int8", 46),
}


@pytest.mark.parametrize("case", ARTIFACTS)
def test_an_artifact_of_modelopt_becomes_a_graph_with_its_very_numbers(
    taoq: Taoq, words: Words, exporting: Words, tmp_path: Path, case: str
) -> None:
    network, dtype, name, count = ARTIFACTS[case]
    rule = f"weights: {{dtype: {dtype}}}, activations: {{dtype: {dtype}}}"
    rules = f"[{{module_name: Conv2d, {rule}}}, {{module_name: Linear, {rule}}}]"
    if network == "detector":
        rules = f"[{{module_name: Conv2d, {rule}}}]"
    if network == "vit_tiny":
        rules = f"[{{module_name: 'blocks.[0]*', {rule}}}, {{module_name: head, {rule}}}]"
    quantize = words("quantize", network, f"quantize.layers={rules}", "quantize.calibration.num_samples=8")
    assert taoq(*quantize)[0] == 0
    artifact, file = tmp_path / "results" / "quantize", tmp_path / "results" / "export" / "model.onnx"
    code, out, err = taoq(*exporting(network, f"export.checkpoint={artifact}"))
    assert (code, err) == (
        0,
        f"{artifact}: quantized by modelopt.pytorch, {count} layers\n"
        "export.opset_version: a quantized graph needs 19; 17 is not enough\n",
    )
    assert f" nodes, {count} layers quantized, input [any, 3, " in out
    report = read(file.with_name("model_export.json"))
    assert (report["opset_version"], report["quantized_layers"], report["proof"]["tolerance"]) == (19, count, 0.1)

    model = onnx.load(str(file))
    onnx.checker.check_model(str(file), full_check=True)
    found = stored(model)
    manifest = read_artifact(artifact).manifest
    net = open_artifact(load_task(manifest.task), artifact, manifest)
    state, _ = load_backend(manifest.backend).dequantized(net)
    assert set(found) == {row["layer"] for row in manifest.plan if row["weights"]}
    assert len(found) == count
    top = 127 if dtype == "int8" else 448
    for module, (numbers, scale, input_scale) in found.items():
        layer = net.get_submodule(module)
        assert numbers.dtype.name == name
        assert np.array_equal(scale, layer.weight_quantizer.amax.flatten().numpy() / np.float32(top))
        assert input_scale == layer.input_quantizer.amax.numpy() / np.float32(top)
        torchs = layer.weight.as_subclass(torch.Tensor)
        mine = torch.from_numpy(numbers.astype(np.float32))
        assert torch.equal(mine, torchs.float())
        weight = state[f"{module}.weight"]
        rebuilt = mine * torch.tensor(scale).reshape(-1, *[1] * (weight.ndim - 1))
        torch.testing.assert_close(rebuilt, weight, rtol=1e-6, atol=0)

    metric = "val_mAP" if network == "detector" else "val_acc_1"
    figures = {}
    for kind, checkpoint in (("torch", artifact), ("onnx", file)):
        options = (f"evaluate.checkpoint={checkpoint}", f"evaluate.results_dir={tmp_path / kind}")
        assert taoq(*words("evaluate", network, *options))[0] == 0
        figures[kind] = read(tmp_path / kind / "results.json")["metrics"][metric]
    assert figures["torch"] > 0.8
    assert abs(figures["torch"] - figures["onnx"]) < 0.005


def test_an_artifact_of_torchao_has_no_graph_but_a_float_one(
    taoq: Taoq, words: Words, exporting: Words, tmp_path: Path
) -> None:
    quantize = words(
        "quantize",
        "vit_tiny",
        "quantize.backend=torchao",
        "quantize.mode=weight_only_ptq",
        "quantize.layers=[{module_name: Linear, weights: {dtype: int8}}]",
    )
    assert taoq(*quantize)[0] == 0
    artifact, folder = tmp_path / "results" / "quantize", tmp_path / "results" / "export"
    code, _, err = taoq(*exporting("vit_tiny", f"export.checkpoint={artifact}"))
    assert (code, err) == (
        2,
        f"{artifact}: quantized by torchao, 25 layers\n"
        f"override export.checkpoint={artifact}: export.checkpoint: torchao quantizes weights in a way that ONNX has no"
        " operator for\n"
        "hint: set export.dequantize: true for a float file with these weights, or quantize the float ONNX file\n",
    )
    assert not contents(folder)

    code, _, err = taoq(*exporting("vit_tiny", f"export.checkpoint={artifact}", "export.dequantize=true"))
    assert (code, err) == (
        0,
        f"{artifact}: quantized by torchao, 25 layers\n"
        "warning: override export.dequantize=true: export.dequantize: the file has plain float32 weights, with the"
        " values of the quantized ones\n",
    )
    model = onnx.load(str(folder / "model.onnx"))
    assert not {node.op_type for node in model.graph.node} & {"QuantizeLinear", "DequantizeLinear"}
    assert model.opset_import[0].version == 17
    manifest = read_artifact(artifact).manifest
    net = open_artifact(load_task(manifest.task), artifact, manifest)
    for name, weight in weighted(model).items():
        module = net.get_submodule(name.removeprefix("/").rpartition("/")[0].replace("/", "."))
        value = module.weight.dequantize() if isinstance(module, nn.Linear) else module.weight
        assert np.array_equal(weight.T if "/MatMul" in name else weight, value.numpy())
    pixels = images(4, 32)
    with torch.inference_mode():
        np.testing.assert_allclose(run(model, pixels)["output"], net(pixels).numpy(), atol=1e-4)
    assert read_properties(model, Path("it"))["source"] == {"path": str(artifact), "sha256": sha256(artifact)}


def test_a_dequantized_artifact_of_modelopt_is_a_float_file(
    taoq: Taoq, words: Words, exporting: Words, tmp_path: Path
) -> None:
    assert taoq(*words("quantize", "resnet_18", "quantize.calibration.num_samples=4"))[0] == 0
    artifact, file = tmp_path / "results" / "quantize", tmp_path / "results" / "export" / "model.onnx"
    assert taoq(*exporting("resnet_18", f"export.checkpoint={artifact}", "export.dequantize=true"))[0] == 0
    model = onnx.load(str(file))
    assert not {node.op_type for node in model.graph.node} & {
        "QuantizeLinear", "DequantizeLinear", "BatchNormalization",
    }  # fmt: skip
    manifest = read_artifact(artifact).manifest
    state, _ = load_backend(manifest.backend).dequantized(open_artifact(load_task(manifest.task), artifact, manifest))
    assert np.array_equal(weighted(model)["/fc/Gemm"], state["fc.weight"].numpy())
    assert not np.array_equal(weighted(model)["/fc/Gemm"], weighted_float()["fc.weight"])
    report = read(file.with_name("model_export.json"))
    assert (report["quantized_layers"], report["proof"]["tolerance"]) == (0, 1e-3)


def weighted_float() -> dict[str, Any]:
    from safetensors.numpy import load_file

    return load_file(CHECKPOINTS["resnet_18"])


def test_the_checkpoint_is_hashed_as_a_whole(exported: Any) -> None:
    """Of a folder the hash is that of a list of its files; of a file its own."""
    _, model = exported("resnet_18")
    digest = hashlib.sha256(CHECKPOINTS["resnet_18"].read_bytes()).hexdigest()
    assert read_properties(model, Path("it"))["source"]["sha256"] == digest
