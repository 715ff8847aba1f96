"""ONNX files of other exporters, and files with their weights beside them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import helper

from support.commands import Taoq, Words
from support.examples import CHECKPOINTS, SPECS
from support.onnx_artifacts import (
    CONV_AND_GEMM,
    FEW_IMAGES,
    FILES_OF_ARTIFACT,
    MODELOPT,
    ONNXRUNTIME,
    Metrics,
    file_names,
    quantized_layers,
)
from support.small_spec import PURPOSE
from taoq.actions.base import load_experiment
from taoq.pipeline.artifacts import read_artifact
from taoq.spec.source import read_spec
from taoq.tasks import load_task

pytestmark = pytest.mark.usefixtures("one_thread")


def export_with_torch(file: Path, **options: Any) -> onnx.ModelProto:
    """The example ResNet by torch's own exporter: its names, batch norms as they are."""
    task = load_task("classification_pyt")
    experiment = load_experiment(task, read_spec(str(SPECS["resnet_18"]), []), "export")
    net = experiment.build(str(CHECKPOINTS["resnet_18"])).eval()
    names = {"input_names": ["pixels"], "output_names": ["scores"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(net, (torch.zeros(1, 3, 32, 32),), str(file), dynamo=False, **names, **options)
    return onnx.load(str(file))


def written_by_hand(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph by hand: unnamed nodes, every weight a Constant node, one image a batch."""
    weights = model.graph.initializer
    constants = [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in weights]
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in model.graph.node]
    for node in nodes:
        node.name = ""
    graph = helper.make_graph([*constants, *nodes], "by hand", model.graph.input, model.graph.output)
    return helper.make_model(graph, opset_imports=list(model.opset_import), ir_version=8)


EXPORTS = {
    "torch's exporter": ({"opset_version": 17, "dynamic_axes": {"pixels": {0: "n"}, "scores": {0: "n"}}}, False),
    "an old opset": ({"opset_version": 11, "dynamic_axes": {"pixels": {0: "n"}, "scores": {0: "n"}}}, False),
    "batch norms": (
        {"opset_version": 17, "training": torch.onnx.TrainingMode.PRESERVE, "do_constant_folding": False},
        False,
    ),
    "no names, one image": ({"opset_version": 17}, True),
}
"""Options of torch's exporter, and whether the graph is written again by hand."""


@pytest.mark.parametrize(
    ("backend", "kind"),
    [
        ("onnxruntime", "torch's exporter"),
        ("modelopt.onnx", "an old opset"),
        ("onnxruntime", "batch norms"),
        ("modelopt.onnx", "no names, one image"),
        ("onnxruntime", "no names, one image"),
    ],
)
def test_the_file_of_another_exporter(
    taoq: Taoq, digits_words: Words, metrics: Metrics, tmp_path: Path, backend: str, kind: str
) -> None:
    file, folder = tmp_path / "foreign.onnx", tmp_path / "results" / "quantize"
    options, by_hand = EXPORTS[kind]
    model = export_with_torch(file, **options)
    if by_hand:
        onnx.save(written_by_hand(model), str(file))
    words = (f"quantize.backend={backend}", f"quantize.model_path={file}", CONV_AND_GEMM, FEW_IMAGES)
    code, out, err = taoq(*digits_words("quantize", "resnet_18", *words))
    assert (code, err) == (0, PURPOSE[backend])
    assert "quantized 22 of 22 layers with 16 calibration images" in out
    layers = quantized_layers(folder)
    assert len(set(layers)) == 22
    if by_hand:
        assert layers[0].startswith("Conv")
    assert abs(metrics("resnet_18", folder)["val_acc_1"] - 0.9966) < 0.005
    if by_hand:
        assert metrics("resnet_18", file)["val_acc_1"] == pytest.approx(0.9966, abs=1e-3)


def test_a_float_file_with_its_weights_beside_it(
    taoq: Taoq, digits_words: Words, resnet: Path, metrics: Metrics, tmp_path: Path
) -> None:
    file = tmp_path / "large.onnx"
    beside = {"save_as_external_data": True, "location": "elsewhere.bin", "size_threshold": 0}
    onnx.save(onnx.load(str(resnet)), str(file), **beside)
    options = [ONNXRUNTIME, f"quantize.model_path={file}", CONV_AND_GEMM, FEW_IMAGES]
    words = digits_words("quantize", "resnet_18", *options)
    assert taoq(*words)[0] == 0
    folder = tmp_path / "results" / "quantize"
    assert file_names(folder) == FILES_OF_ARTIFACT
    assert metrics("resnet_18", file) == pytest.approx(metrics("resnet_18", resnet))
    (tmp_path / "elsewhere.bin").unlink()
    code, _, err = taoq(*words)
    assert code == 1
    assert err.startswith(f"{file}: its weights beside it cannot be read: ")
    assert err.endswith("\nhint: copy elsewhere.bin beside it\n")
    assert len(quantized_layers(folder)) == 22  # the artifact of the first run is whole


def test_an_artifact_with_its_weights_beside_the_file(
    taoq: Taoq, digits_words: Words, resnet: Path, metrics: Metrics, tmp_path: Path
) -> None:
    folder = tmp_path / "results" / "quantize"
    words = digits_words(
        "quantize",
        "resnet_18",
        MODELOPT,
        f"quantize.model_path={resnet}",
        CONV_AND_GEMM,
        FEW_IMAGES,
    )
    beside = "quantize.backend_kwargs={use_external_data_format: true}"
    assert taoq(*words, beside)[0] == 0
    assert file_names(folder) == sorted([*FILES_OF_ARTIFACT, "quantized_model.onnx_data"])
    payload, data = folder / "quantized_model.onnx", folder / "quantized_model.onnx_data"
    manifest = read_artifact(folder).manifest
    assert manifest.size == payload.stat().st_size + data.stat().st_size
    assert data.stat().st_size > 0.8 * manifest.size
    figures = metrics("resnet_18", folder)
    assert figures["val_acc_1"] > 0.99

    good = data.read_bytes()
    data.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    evaluate = digits_words("evaluate", "resnet_18", f"evaluate.checkpoint={folder}")
    changed = (
        f"{payload}: is not the file that its manifest names (sha256 differs)\n"
        "hint: the file was changed or cut off after it was written: quantize again\n"
    )
    code, _, err = taoq(*evaluate)
    assert (code, err) == (1, changed)
    data.unlink()
    assert taoq(*evaluate)[::2] == (1, changed)

    data.write_bytes(good)
    assert taoq(*words)[0] == 0
    assert file_names(folder) == FILES_OF_ARTIFACT
    assert metrics("resnet_18", folder) == figures
