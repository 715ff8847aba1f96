"""ONNX files from quantize to evaluate and inference, with both ONNX backends."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import yaml

from support.commands import Taoq, Words, read_json
from support.examples import CHECKPOINTS
from support.onnx_artifacts import (
    CONV_AND_GEMM,
    FEW_IMAGES,
    FILES_OF_ARTIFACT,
    INT8,
    MODELOPT,
    ONNXRUNTIME,
    Metrics,
    file_names,
    quantized_layers,
)
from support.small_spec import PURPOSE, every_onnx_backend
from taoq.files import sha256
from taoq.pipeline.artifacts import read_artifact

pytestmark = pytest.mark.usefixtures("one_thread")


@every_onnx_backend
def test_a_classifier_from_quantize_to_evaluate(
    taoq: Taoq, digits_words: Words, resnet: Path, metrics: Metrics, tmp_path: Path, backend: str
) -> None:
    folder = tmp_path / "results" / "quantize"
    options = (f"quantize.backend={backend}", f"quantize.model_path={resnet}")
    code, out, err = taoq(*digits_words("quantize", "resnet_18", *options, CONV_AND_GEMM))
    assert (code, err) == (0, PURPOSE[backend])  # and nothing of the libraries
    titles = [line.strip() for line in out.splitlines() if not re.match(r"[│┏┃┡└]", line)]
    titles = [title for title in titles if not title.startswith(("largest errors of", "worse", "report: "))]
    assert titles[:2] == [
        f"{backend}, static_ptq, minmax",
        "22 of 22 quantizable layers are quantized; 28 layers without a weight matrix are not listed",
    ]
    assert re.fullmatch(
        r"quantized 22 of 22 layers with 200 calibration images in [0-9.]+ s on cpu;"
        r" 2\.88 MB as float32, 0\.7\d+ MB now",
        titles[2],
    )
    assert titles[3:] == [f"artifact: {folder}"]
    assert file_names(folder) == FILES_OF_ARTIFACT
    onnx.checker.check_model(str(folder / "quantized_model.onnx"), full_check=True)

    manifest, payload = read_artifact(folder).manifest, folder / "quantized_model.onnx"
    assert (manifest.task, manifest.backend, manifest.format) == ("classification_pyt", backend, "onnx")
    assert (manifest.payload, manifest.sha256, manifest.size) == (
        payload.name, sha256(payload), payload.stat().st_size,
    )  # fmt: skip
    assert manifest.source == {"path": str(resnet), "sha256": sha256(resnet)}
    assert manifest.calibration == {"num_samples": 200, "seed": 0}
    assert set(manifest.versions) >= {"python", "onnx", "onnxruntime-gpu", "timm"}
    assert len(quantized_layers(folder)) == 22
    rows = {row["layer"]: row for row in manifest.plan}
    assert rows["/layer1/0/downsample/0/Conv"] == {
        "layer": "/layer1/0/downsample/0/Conv",
        "alias": "layer1.0.downsample.0",
        "type": "Conv",
        "weights": {"dtype": "int8", "axis": 0, "asked": "int8"},
        "activations": {"dtype": "int8", "axis": None, "asked": "int8"},
        "rule": "quantize.layers[0]",
        "reason": "",
    }
    assert (rows["/fc/Gemm"]["alias"], rows["/fc/Gemm"]["rule"]) == ("fc", "quantize.layers[1]")
    report = read_json(folder / "quantization_report.json")
    assert (report["layers_quantized"], report["layers_quantizable"], report["warnings"]) == (22, 22, [])
    assert [{key: row[key] for key in manifest.plan[0]} for row in report["layers"]] == list(manifest.plan)
    assert yaml.safe_load((folder / "experiment.yaml").read_text())["quantize"]["backend"] == backend

    figures = metrics("resnet_18", folder)
    assert metrics("resnet_18", payload) == figures
    assert abs(figures["val_acc_1"] - metrics("resnet_18", CHECKPOINTS["resnet_18"])["val_acc_1"]) <= 0.003


@every_onnx_backend
def test_a_detector_from_quantize_to_evaluate(
    taoq: Taoq,
    scenes_words: Words,
    float_file: Callable[[str], Path],
    metrics: Metrics,
    tmp_path: Path,
    backend: str,
) -> None:
    file, folder = float_file("detector"), tmp_path / "results" / "quantize"
    rules = (f"quantize.layers=[{{module_name: Conv, {INT8}}}]", "quantize.skip_names=['decoder.*']")
    options = (f"quantize.backend={backend}", f"quantize.model_path={file}")
    code, out, err = taoq(*scenes_words("quantize", *options, *rules))
    assert (code, err) == (0, PURPOSE[backend])
    assert "quantized 46 of 106 layers with 40 calibration images in " in out
    assert file_names(folder) == FILES_OF_ARTIFACT
    rows = {row["layer"]: row for row in read_artifact(folder).manifest.plan}
    first = rows["/model/backbone/model/embedder/embedder/0/convolution/Conv"]
    assert (first["alias"], first["rule"]) == ("backbone.conv1.conv1_1.conv", "quantize.layers[0]")
    skipped = [row for row in rows.values() if row["rule"] == "quantize.skip_names[0]"]
    assert skipped
    assert all(row["alias"].startswith("decoder.") and not row["weights"] for row in skipped)
    assert set(quantized_layers(folder)) == {
        row["layer"] for row in rows.values() if row["rule"] == "quantize.layers[0]"
    }
    figures = metrics("detector", folder)
    assert figures["val_mAP"] > 0.8
    assert abs(figures["val_mAP"] - metrics("detector", file)["val_mAP"]) < 0.01


@pytest.mark.parametrize("network", ["resnet_18", "detector"])
def test_a_float_file_has_the_metrics_of_torch(
    float_file: Callable[[str], Path], metrics: Metrics, network: str
) -> None:
    in_torch = metrics(network, CHECKPOINTS[network])
    assert metrics(network, float_file(network)) == pytest.approx(in_torch, abs=1e-3)


def test_a_new_process_gives_the_same_metrics(
    taoq: Taoq, digits_words: Words, resnet: Path, metrics: Metrics, tmp_path: Path
) -> None:
    options = (MODELOPT, f"quantize.model_path={resnet}", CONV_AND_GEMM, FEW_IMAGES)
    assert taoq(*digits_words("quantize", "resnet_18", *options))[0] == 0
    folder = tmp_path / "results" / "quantize"
    here = metrics("resnet_18", folder)
    words = digits_words("evaluate", "resnet_18", f"evaluate.checkpoint={folder}")
    process = subprocess.run([sys.executable, "-m", "taoq", *words], capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, f"{folder}: quantized by modelopt.onnx, 22 layers\n")
    assert read_json(tmp_path / "results" / "evaluate" / "results.json")["metrics"] == here


def test_inference_writes_what_torch_writes(
    taoq: Taoq, digits_words: Words, digits: Path, resnet: Path, tmp_path: Path
) -> None:
    for digit in ("3", "8"):
        (tmp_path / "images" / digit).mkdir(parents=True)
        for image in sorted((digits / "val" / digit).iterdir())[:2]:
            (tmp_path / "images" / digit / image.name).write_bytes(image.read_bytes())
    words = (ONNXRUNTIME, f"quantize.model_path={resnet}", CONV_AND_GEMM, FEW_IMAGES)
    assert taoq(*digits_words("quantize", "resnet_18", *words))[0] == 0
    written, rows = {}, {}
    models = {"torch": CHECKPOINTS["resnet_18"], "float": resnet, "int8": tmp_path / "results" / "quantize"}
    for kind, checkpoint in models.items():
        options = (f"inference.checkpoint={checkpoint}", f"inference.results_dir={tmp_path / kind}")
        images = f"dataset.test_dataset.images_dir={tmp_path / 'images'}"
        assert taoq(*digits_words("inference", "resnet_18", *options, images))[0] == 0
        written[kind] = file_names(tmp_path / kind)
        with (tmp_path / kind / "result.csv").open(newline="") as file:
            rows[kind] = [row[:2] for row in csv.reader(file)]
    assert written["torch"] == written["float"] == written["int8"]
    assert rows["torch"] == rows["float"] == rows["int8"]
    assert len(rows["torch"]) in (4, 5)  # with or without a header


def test_inference_of_a_detector_writes_what_torch_writes(
    taoq: Taoq, scenes_words: Words, scenes: Path, float_file: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    for number in (1, 2):
        (tmp_path / "images" / f"{number}.jpg").write_bytes((scenes / "val" / f"000{number}.jpg").read_bytes())
    written, detections = {}, {}
    for kind, checkpoint in {"torch": CHECKPOINTS["detector"], "onnx": float_file("detector")}.items():
        options = (f"inference.checkpoint={checkpoint}", f"inference.results_dir={tmp_path / kind}")
        images = f"dataset.infer_data_sources.image_dir=[{tmp_path / 'images'}]"
        assert taoq(*scenes_words("inference", *options, images))[0] == 0
        written[kind] = file_names(tmp_path / kind)
        annotations = read_json(tmp_path / kind / "detections.json")["annotations"]
        detections[kind] = [(entry["image_id"], entry["category_id"]) for entry in annotations]
    assert written["torch"] == written["onnx"]
    assert "detections.json" in written["onnx"]
    assert detections["torch"] == detections["onnx"]


@every_onnx_backend
def test_ranges_are_kept_for_the_next_run(
    taoq: Taoq, digits_words: Words, resnet: Path, tmp_path: Path, backend: str
) -> None:
    cache, payload = tmp_path / "cache" / "ranges.json", tmp_path / "results" / "quantize" / "quantized_model.onnx"
    options = (f"quantize.backend={backend}", f"quantize.model_path={resnet}", CONV_AND_GEMM, FEW_IMAGES)
    where = f"quantize.calibration.cache={cache}"
    field = f"override {where}: quantize.calibration.cache: "

    def run(*more: str) -> str:
        code, _, err = taoq(*digits_words("quantize", "resnet_18", *options, where, *more))
        assert code == 0
        assert err.startswith(PURPOSE[backend])
        return err.removeprefix(PURPOSE[backend])

    assert run() == ""
    first, ranges = payload.read_bytes(), cache.read_bytes()
    tensors = len(json.loads(ranges)["ranges"])
    assert run() == f"{field}ranges of {tensors} tensors taken from {cache}; nothing was calibrated\n"
    assert (payload.read_bytes(), cache.read_bytes()) == (first, ranges)
    assert run("quantize.calibration.seed=1") == f"{field}{cache} differs in images: calibrating again\n"
    assert payload.read_bytes() != first
    assert run("quantize.calibration.seed=1", "quantize.algorithm=entropy") == (
        f"{field}{cache} differs in algorithm: calibrating again\n"
    )
    assert file_names(cache.parent) == ["ranges.json"]
    log = (payload.parent / "log.txt").read_text()
    assert "DEBUG taoq.library: Finding optimal threshold for each tensor using 'entropy' algorithm ..." in log
    assert "nothing was calibrated\n" in log
