"""`export`: the file of a float network, what it computes, and what is written beside it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import taoq as package
from support.commands import Taoq, Words, read_json, status_lines
from support.examples import CHECKPOINTS, OUTPUTS, SIZES
from support.exported import (
    exported_network,
    layer_weights,
    module_of,
    properties_of,
    random_images,
    run_onnxruntime,
    shape_of,
)
from taoq.files import sha256
from taoq.pipeline.proof import output_differences
from taoq.quantization.formats.onnx.file import read_graph

every_network = pytest.mark.parametrize("network", SIZES)
FloatFile = Callable[[str], Path]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    """The file that `export` writes if the spec names none."""
    return tmp_path / "results" / "export" / "model.onnx"


@every_network
def test_inputs_and_outputs_have_tao_s_names_and_any_batch(float_file: FloatFile, network: str) -> None:
    file = float_file(network)
    graph = onnx.load(str(file)).graph
    size, outputs = SIZES[network], OUTPUTS[network]
    name = "inputs" if network == "detector" else "input"
    assert {value.name: shape_of(value) for value in graph.input} == {name: ["batch", 3, size, size]}
    assert {value.name: shape_of(value) for value in graph.output} == outputs
    for count in (1, 3, 8):
        results = run_onnxruntime(file, random_images(count, size))
        assert {name: list(value.shape) for name, value in results.items()} == {
            name: [count, *dims[1:]] for name, dims in outputs.items()
        }


@every_network
def test_the_file_computes_what_torch_computes(float_file: FloatFile, network: str) -> None:
    file = float_file(network)
    experiment, net = exported_network(file, CHECKPOINTS[network])
    images = random_images(3, SIZES[network])
    with torch.inference_mode():
        outputs = net(images)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    reference = dict(zip(experiment.outputs, outputs, strict=True))
    results = {name: torch.from_numpy(value) for name, value in run_onnxruntime(file, images).items()}
    for difference in output_differences(experiment, reference, results, only_significant=False).values():
        assert difference.largest_difference < 1e-4 * max(difference.largest_value, 1)


@every_network
def test_nodes_are_named_by_the_module_they_come_from(float_file: FloatFile, network: str) -> None:
    file = float_file(network)
    graph = read_graph(file)
    modules = dict(exported_network(file, CHECKPOINTS[network])[1].named_modules())
    assert len({node.name for node in graph.proto.node}) == len(graph.proto.node)
    for node in graph.proto.node:
        path, slash, last = node.name.removeprefix("/").rpartition("/")
        assert node.name.startswith("/")
        assert re.fullmatch(rf"{node.op_type}(_\d+)?", last)
        assert path.replace("/", ".") in modules
        assert slash or not path
    with_weight = set()
    for name, weight in layer_weights(graph).items():
        module, kind = module_of(name), name.rpartition("/")[2]
        with_weight.add(module)
        parameter = getattr(modules[module], "weight", None)
        if parameter is None:  # its three matrices are one parameter
            assert isinstance(modules[module], nn.MultiheadAttention)
            continue
        expected = tuple(parameter.shape)
        assert tuple(weight.shape) == (expected[::-1] if kind.startswith("MatMul") else expected)
    layers = {name for name, module in modules.items() if isinstance(module, nn.Conv2d | nn.Linear)}
    assert layers - with_weight == set()


@every_network
def test_a_file_has_only_standard_operators_and_no_batch_norm(float_file: FloatFile, network: str) -> None:
    file = float_file(network)
    model = onnx.load(str(file))
    onnx.checker.check_model(str(file), full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]
    assert {node.domain for node in model.graph.node} == {""}
    types = {node.op_type for node in model.graph.node}
    assert not types & {"BatchNormalization", "Identity", "Constant", "ATen", "PythonOp"}


@pytest.mark.parametrize(("network", "nodes"), [("resnet_18", []), ("vit_tiny", ["Shape", "Where"]), ("detector", [])])
def test_sizes_are_constants(float_file: FloatFile, network: str, nodes: list[str]) -> None:
    """The ViT repeats its class token for each image of the batch; no other size depends on the batch."""
    types = [node.op_type for node in onnx.load(str(float_file(network))).graph.node]
    assert [name for name in types if name in ("Shape", "Where", "ConstantOfShape", "Range", "Size")] == nodes


def test_the_opset_of_the_spec_is_written(taoq: Taoq, export_network: Words, model_file: Path) -> None:
    code, out, _ = taoq(*export_network("resnet_18", "export.opset_version=18"))
    assert code == 0
    assert out.endswith(f"exported 2.88 MB: opset 18, 50 nodes, input [any, 3, 32, 32]\n{model_file}\n")
    assert [(entry.domain, entry.version) for entry in onnx.load(str(model_file)).opset_import] == [("", 18)]
    assert read_json(model_file.with_name("model_export.json"))["opset_version"] == 18


def test_a_fixed_batch_is_in_the_file(taoq: Taoq, export_network: Words, model_file: Path) -> None:
    code, out, _ = taoq(*export_network("resnet_18", "export.batch_size=2"))
    assert code == 0
    assert "input [2, 3, 32, 32]\n" in out
    graph = onnx.load(str(model_file)).graph
    assert [shape_of(value) for value in (*graph.input, *graph.output)] == [[2, 3, 32, 32], [2, 10]]
    run_onnxruntime(model_file, random_images(2, 32))
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument):
        run_onnxruntime(model_file, random_images(3, 32))


def test_another_input_size_than_that_of_the_data_set(taoq: Taoq, export_network: Words, model_file: Path) -> None:
    code, out, _ = taoq(*export_network("resnet_18", "export.input_height=64", "export.input_width=64"))
    assert code == 0
    assert "input [any, 3, 64, 64]\n" in out
    assert shape_of(onnx.load(str(model_file)).graph.input[0]) == ["batch", 3, 64, 64]
    assert properties_of(model_file)["spec"]["dataset"]["img_size"] == 64


@pytest.mark.parametrize("network", ["vit_tiny", "detector"])
def test_the_same_export_gives_the_same_graph(
    taoq: Taoq, export_network: Words, float_file: FloatFile, model_file: Path, network: str
) -> None:
    first = onnx.load(str(float_file(network)))
    assert taoq(*export_network(network, "export.check_images=1"))[0] == 0
    again = onnx.load(str(model_file))
    assert again.graph.SerializeToString(deterministic=True) == first.graph.SerializeToString(deterministic=True)


def test_the_same_command_gives_the_same_bytes(taoq: Taoq, export_network: Words, model_file: Path) -> None:
    taoq(*export_network("resnet_18"))
    first = model_file.read_bytes()
    code, _, err = taoq(*export_network("resnet_18"))
    assert code == 0
    assert model_file.read_bytes() == first
    assert err == f"export.onnx_file: {model_file} was made from the same checkpoint and will be replaced\n"


@every_network
def test_the_report_says_how_far_torch_and_onnx_are_apart(float_file: FloatFile, network: str) -> None:
    file = float_file(network)
    report = read_json(file.with_name(f"{network}_export.json"))
    assert (report["onnx_file"], report["checkpoint"]) == (str(file), str(CHECKPOINTS[network]))
    assert (report["opset_version"], report["nodes"]) == (17, len(onnx.load(str(file)).graph.node))
    assert (report["quantized_layers"], report["size"]) == (0, file.stat().st_size)
    assert set(report["versions"]) >= {"python", "torch", "onnx", "onnxruntime-gpu"}
    proof = report["proof"]
    assert (proof["images"], proof["left_out_for_ties"], proof["tolerance"]) == (8, 0, 1e-3)
    assert list(proof["outputs"]) == list(OUTPUTS[network])
    for difference in proof["outputs"].values():
        assert difference["largest_difference"] < 1e-4
        assert difference["largest_value"] > 0.5


@every_network
def test_a_file_says_what_it_was_made_from(float_file: FloatFile, network: str) -> None:
    properties = properties_of(float_file(network))
    assert properties["taoq"] == package.__version__
    assert properties["task"] == ("rtdetr" if network == "detector" else "classification_pyt")
    assert properties["source"] == {"path": str(CHECKPOINTS[network]), "sha256": sha256(CHECKPOINTS[network])}
    assert properties["spec"]["dataset"]["num_classes"] == 10


def test_the_checkpoint_is_hashed_as_a_whole(float_file: FloatFile) -> None:
    """The hash of a file is its own; that of a folder is that of a list of its files."""
    digest = hashlib.sha256(CHECKPOINTS["resnet_18"].read_bytes()).hexdigest()
    assert properties_of(float_file("resnet_18"))["source"]["sha256"] == digest


def test_without_a_name_the_file_is_in_the_results_folder(taoq: Taoq, export_network: Words, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    assert taoq(*export_network("resnet_18", f"export.results_dir={folder}", "export.check_images=1"))[0] == 0
    names = ["log.txt", "model.onnx", "model_export.json", "status.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    lines = status_lines(folder)
    assert [(line["status"], line["message"]) for line in lines] == [
        ("STARTED", "Starting classification_pyt export."),
        ("RUNNING", "Exported."),
        ("SUCCESS", "Export finished successfully."),
    ]
    assert lines[1]["kpi"]["size_mb"] == (folder / "model.onnx").stat().st_size / 1e6
