"""A detector exported with post-processing: what the file computes, what is refused, and every action on it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

import taoq as package
from support.commands import Taoq, Words, read_json, rules
from support.examples import CHECKPOINTS
from support.exported import (
    exported_network,
    files_of,
    layer_weights,
    module_of,
    properties_of,
    random_images,
    run_onnxruntime,
    shape_of,
)
from support.onnx_artifacts import quantized_layers
from support.onnx_files import remove_properties
from taoq.errors import TaoqError
from taoq.pipeline.experiment import Experiment
from taoq.pipeline.models import OpenedModel, start
from taoq.pipeline.proof import prove_postprocess
from taoq.quantization.formats.onnx.file import read_graph
from taoq.tasks.rtdetr.data import Targets
from taoq.tasks.rtdetr.predict import detections

FEW = ("quantize.calibration.num_samples=8", "quantize.skip_names=[decoder.*]")
Metrics = Callable[[str, Path], dict[str, float]]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def network_file(float_file: Callable[[str], Path]) -> Path:
    """The file of the example detector, without post-processing."""
    return float_file("detector")


@pytest.fixture
def file(taoq: Taoq, export_network: Words, export_folder: Path) -> Path:
    """The file of the example detector with post-processing, exported once."""
    path = export_folder / "detections.onnx"
    if not path.exists():
        code, _, err = taoq(*export_network("detector", "export.postprocess=true", f"export.onnx_file={path}"))
        assert code == 0, err
    return path


def run_file(file: Path, images: torch.Tensor, sizes: Any) -> dict[str, Any]:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    feed = {"images": images.numpy(), "orig_target_sizes": np.int64(sizes)}
    return dict(zip(names, session.run(names, feed), strict=True))


def test_inputs_and_outputs_are_those_of_the_authors(file: Path) -> None:
    graph = onnx.load(str(file)).graph
    shapes = {
        value.name: (shape_of(value), value.type.tensor_type.elem_type) for value in (*graph.input, *graph.output)
    }
    assert list(shapes.items()) == [
        ("images", (["batch", 3, 160, 160], onnx.TensorProto.FLOAT)),
        ("orig_target_sizes", (["batch", 2], onnx.TensorProto.INT64)),
        ("labels", (["batch", 30], onnx.TensorProto.INT64)),
        ("boxes", (["batch", 30, 4], onnx.TensorProto.FLOAT)),
        ("scores", (["batch", 30], onnx.TensorProto.FLOAT)),
    ]
    assert properties_of(file)["spec"]["export"]["postprocess"] is True


def test_the_network_is_the_same_as_without(file: Path, network_file: Path) -> None:
    network, whole = read_graph(network_file), read_graph(file)
    nodes = [(node.name, node.op_type, list(node.output)) for node in whole.proto.node]
    assert nodes[: len(network.proto.node)] == [
        (node.name, node.op_type, list(node.output)) for node in network.proto.node
    ]
    assert {name.split("/")[1] for name, _, _ in nodes[len(network.proto.node) :]} == {"postprocess"}
    assert layer_weights(whole).keys() == layer_weights(network).keys()
    assert "postprocess" not in {module_of(name) for name in layer_weights(whole)}


@pytest.mark.parametrize("count", [1, 3])
def test_the_detections_are_those_of_evaluate(file: Path, network_file: Path, count: int) -> None:
    experiment, _ = exported_network(file, CHECKPOINTS["detector"])
    images, sizes = random_images(count, 160), [[640, 480], [33, 500], [160, 160]][:count]
    outputs = {name: torch.from_numpy(value) for name, value in run_onnxruntime(network_file, images).items()}
    found = run_file(file, images, sizes)
    targets = Targets(tuple(range(count)), torch.tensor(sizes).float())
    for row, image in enumerate(detections(experiment.spec, outputs, targets, 0.0)):
        assert np.array_equal(found["labels"][row], image.labels)
        assert np.array_equal(found["boxes"][row], image.boxes)
        np.testing.assert_allclose(found["scores"][row], image.scores, rtol=0, atol=2e-7)


def test_the_report_compares_network_and_detections(file: Path) -> None:
    proof = read_json(file.with_name("detections_export.json"))["proof"]
    assert (proof["images"], proof["left_out_for_ties"], proof["tolerance"]) == (8, 0, 1e-3)
    assert list(proof["outputs"]) == ["pred_logits", "pred_boxes", "labels", "boxes", "scores"]
    assert proof["outputs"]["labels"] == {"largest_difference": 0.0, "largest_value": 9.0}
    assert proof["outputs"]["boxes"]["largest_difference"] < 1e-3
    assert proof["outputs"]["scores"]["largest_difference"] < 1e-6


def change_constant(op_type: str, add: float) -> Callable[[onnx.ModelProto], None]:
    """Add to the constants of one operator of the post-processing."""

    def change(model: onnx.ModelProto) -> None:
        nodes = [node for node in model.graph.node if node.op_type == op_type and "postprocess" in node.name]
        names = {name for node in nodes for name in node.input}
        changed = [tensor for tensor in model.graph.initializer if tensor.name in names]
        assert changed
        for tensor in changed:
            values = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array((values + add).astype(values.dtype), tensor.name))

    return change


@pytest.mark.parametrize(
    ("op_type", "add", "outputs"),
    [("Clip", 40, "boxes by 40, "), ("Mul", 1, "labels by [1-9]"), ("Div", 1, "labels by [1-9].*; boxes by ")],
)
def test_a_file_with_another_post_processing_is_caught(
    file: Path, network_file: Path, tmp_path: Path, op_type: str, add: float, outputs: str
) -> None:
    model = onnx.load(str(file))
    change_constant(op_type, add)(model)
    onnx.save(model, str(tmp_path / "bad.onnx"))
    experiment, _ = exported_network(file, CHECKPOINTS["detector"])
    assert experiment.postprocess is not None
    postprocess = experiment.postprocess()
    network = opened(experiment, network_file)
    with pytest.raises(TaoqError) as error:
        prove_postprocess(postprocess, network, opened(postprocess.experiment, tmp_path / "bad.onnx"))
    first, hint = str(error.value).splitlines()
    assert re.match(f"export.tolerance: evaluate and the post-processing in the file differ: {outputs}", first)
    assert hint == "hint: the file was not written; export.tolerance is 0.001 of the largest value"


def opened(experiment: Experiment, file: Path) -> Any:
    return start(experiment, OpenedModel(read_graph(file), "onnx", file, False), "cpu", "export.on_cpu")


def test_a_fixed_batch_and_a_single_image(taoq: Taoq, export_network: Words, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    options = ("export.postprocess=true", "export.batch_size=2", "export.check_images=1", f"export.onnx_file={file}")
    code, out, _ = taoq(*export_network("detector", *options, "model.num_select=7"))
    assert code == 0
    assert "input [2, 3, 160, 160], [2, 2]\n" in out
    found = run_file(file, random_images(2, 160), [[100, 50], [7, 9]])
    assert {name: value.shape for name, value in found.items()} == {
        "labels": (2, 7),
        "boxes": (2, 7, 4),
        "scores": (2, 7),
    }
    assert found["boxes"][1].max() <= 9


REFUSALS = {
    "classification": (
        "resnet_18",
        ["export.postprocess=true"],
        "override export.postprocess=true: export.postprocess: classification_pyt has no post-processing:"
        " the metric takes the network's outputs\n"
        "hint: leave it out\n",
    ),
    "deepstream": (
        "detector",
        ["export.postprocess=true", "export.serialize_nvdsinfer=true"],
        "override export.postprocess=true: export.postprocess: DeepStream's parser reads the outputs of the network,"
        " without post-processing\n"
        "hint: leave it out, or serialize_nvdsinfer\n",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_file_that_cannot_be_is_refused(taoq: Taoq, export_network: Words, tmp_path: Path, case: str) -> None:
    network, overrides, message = REFUSALS[case]
    code, out, err = taoq(*export_network(network, *overrides))
    assert (code, out, err) == (2, "", message)
    assert not (tmp_path / "results" / "export").exists() or not files_of(tmp_path / "results" / "export")


def test_evaluate_gives_the_metrics_of_the_network(file: Path, network_file: Path, metrics: Metrics) -> None:
    assert metrics("detector", file) == metrics("detector", network_file)


def test_a_file_of_another_exporter_with_these_names_is_evaluated(
    file: Path, network_file: Path, metrics: Metrics, tmp_path: Path
) -> None:
    model = onnx.load(str(file))
    remove_properties(model)
    onnx.save(model, str(tmp_path / "foreign.onnx"))
    assert metrics("detector", tmp_path / "foreign.onnx") == metrics("detector", network_file)


def test_padded_images_of_another_size(
    taoq: Taoq, scenes: Path, scenes_words: Words, export_network: Words, tmp_path: Path
) -> None:
    """The scenes in a wide input: the network is worse there, but the same with and without post-processing."""
    size = ("dataset.augmentation.eval_spatial_size=[96,224]", "dataset.augmentation.preserve_aspect_ratio=true")
    results = {}
    for name, flag in (("network", "false"), ("detections", "true")):
        file = tmp_path / f"{name}.onnx"
        options = (f"export.postprocess={flag}", f"export.onnx_file={file}", "export.check_images=1")
        assert taoq(*export_network("detector", *options, *size))[0] == 0
        assert taoq(*scenes_words("evaluate", f"evaluate.checkpoint={file}", *size))[0] == 0
        results[name] = read_json(tmp_path / "results" / "evaluate" / "results.json")["metrics"]
    assert results["network"] == pytest.approx(results["detections"], abs=1e-6)
    assert results["network"]["val_mAP50"] > 0.1


def test_inference_writes_the_same_detections(
    taoq: Taoq, scenes: Path, scenes_words: Words, file: Path, network_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    for number in (1, 2):
        (tmp_path / "images" / f"{number}.jpg").write_bytes((scenes / "val" / f"000{number}.jpg").read_bytes())
    written = []
    for path in (network_file, file):
        options = [f"inference.checkpoint={path}", f"dataset.infer_data_sources.image_dir=[{tmp_path / 'images'}]"]
        assert taoq(*scenes_words("inference", *options))[0] == 0
        written.append(read_json(tmp_path / "results" / "inference" / "detections.json"))
    assert len(written[0]["annotations"]) > 2
    assert written[0] == written[1]


@pytest.mark.parametrize("backend", ["onnxruntime", "modelopt.onnx"])
def test_quantizing_gives_what_quantizing_the_network_gives(
    taoq: Taoq, scenes_words: Words, file: Path, network_file: Path, metrics: Metrics, tmp_path: Path, backend: str
) -> None:
    layers, measured = [], []
    for name, path in (("network", network_file), ("detections", file)):
        options = [f"quantize.backend={backend}", f"quantize.model_path={path}", rules(pattern="Conv"), *FEW]
        code, _, err = taoq(*scenes_words("quantize", *options, f"quantize.results_dir={tmp_path / name}"))
        assert code == 0, err
        layers.append(quantized_layers(tmp_path / name))
        measured.append(metrics("detector", tmp_path / name))
    assert layers[0] == layers[1]
    assert measured[0] == measured[1]
    runtime = package.load(tmp_path / "detections", device="cpu")
    assert not isinstance(runtime, torch.nn.Module)
    found = runtime.run({"images": random_images(2, 160), "orig_target_sizes": torch.tensor([[640, 480], [20, 30]])})
    assert {name: list(value.shape) for name, value in found.items()} == {
        "labels": [2, 30], "boxes": [2, 30, 4], "scores": [2, 30],
    }  # fmt: skip
    mixed_files_are_refused(taoq, scenes_words, tmp_path, network_file)
    if backend == "onnxruntime":
        words = [f"benchmark.checkpoint={tmp_path / 'detections'}", "benchmark.device=cpu"]
        code, out, err = taoq(*scenes_words("benchmark", *words, "benchmark.runs=1", "benchmark.batch_sizes=[1]"))
        assert code == 0, err
        assert out.count("MB of memory on the CPU at batch 1") == 2


def mixed_files_are_refused(taoq: Taoq, scenes_words: Words, folder: Path, network_file: Path) -> None:
    """Two files of which only one has post-processing do different work, and read different inputs."""
    baseline = f"benchmark.baseline={network_file}"
    options = [f"benchmark.checkpoint={folder / 'detections'}", baseline, "benchmark.device=cpu"]
    code, out, err = taoq(*scenes_words("benchmark", *options))
    assert (code, out) == (2, "")
    assert err.endswith(
        f"override {baseline}: benchmark.baseline: the outputs of the two files are labels, boxes, scores and"
        " pred_logits, pred_boxes: only one of them has post-processing\n"
        "hint: name the float file that it was quantized from\n"
    )
    code, out, err = taoq("compare", str(folder / "network"), str(folder / "detections"))
    assert (code, out, err) == (
        2,
        "",
        f"{folder / 'detections'}: has the outputs labels, boxes, scores; {folder / 'network'} has pred_logits,"
        " pred_boxes\n"
        "hint: compare artifacts that all have post-processing, or none of them\n",
    )


def test_another_number_of_detections_is_another_file(taoq: Taoq, scenes_words: Words, file: Path) -> None:
    code, _, err = taoq(*scenes_words("evaluate", f"evaluate.checkpoint={file}", "model.num_select=12"))
    assert code == 2
    assert err.splitlines()[-2:] == [
        "override model.num_select=12: model.num_select: is 12, the artifact was made with 30",
        "hint: use the spec that it was quantized with",
    ]
