"""`evaluate` and `inference` of float and quantized classifiers, on the example networks."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from support.commands import Taoq, Words, read_json, status_lines

VARIANTS = {
    "torchao-int8": ("torchao", "weight_only_ptq", "{module_name: Linear, weights: {dtype: int8}}"),
    "torchao-fp8_e5m2": ("torchao", "weight_only_ptq", "{module_name: Linear, weights: {dtype: fp8_e5m2}}"),
    "modelopt-int8": (
        "modelopt.pytorch",
        "static_ptq",
        "{module_name: '*', weights: {dtype: int8}, activations: {dtype: int8}}",
    ),
    "modelopt-fp8": (
        "modelopt.pytorch",
        "static_ptq",
        "{module_name: '*', weights: {dtype: float8_e4m3fn}, activations: {dtype: float8_e4m3fn}}",
    ),
}


def options_of(variant: str) -> tuple[str, ...]:
    """Overrides of a variant."""
    backend, mode, rule = VARIANTS[variant]
    return (f"quantize.backend={backend}", f"quantize.mode={mode}", f"quantize.layers=[{rule}]")


def test_the_float_networks_are_good_enough_to_measure_on(taoq: Taoq, digits_words: Words, tmp_path: Path) -> None:
    for network in ("resnet_18", "vit_tiny"):
        assert taoq(*digits_words("evaluate", network, "evaluate.checkpoint=${quantize.model_path}"))[0] == 0
        assert read_json(tmp_path / "results" / "evaluate" / "results.json")["metrics"]["val_acc_1"] >= 0.97


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_quantized_network_keeps_its_accuracy(taoq: Taoq, digits_words: Words, tmp_path: Path, variant: str) -> None:
    assert taoq(*digits_words("quantize", "vit_tiny", *options_of(variant)))[0] == 0
    artifact = tmp_path / "results" / "quantize"
    code, out, _ = taoq(*digits_words("evaluate", "vit_tiny", f"evaluate.checkpoint={artifact}"))
    assert code == 0
    results = read_json(tmp_path / "results" / "evaluate" / "results.json")
    assert results["metrics"]["val_acc_1"] >= 0.97
    assert results["metrics"]["val_acc_5"] >= results["metrics"]["val_acc_1"]
    assert f"│ val_acc_1 │ {results['metrics']['val_acc_1']:.4f} │" in out


def test_results_json_has_classes_and_the_confusion_matrix(taoq: Taoq, digits_words: Words, tmp_path: Path) -> None:
    options = ["evaluate.checkpoint=${quantize.model_path}", "evaluate.batch_size=100"]
    assert taoq(*digits_words("evaluate", "resnet_18", *options))[0] == 0
    directory = tmp_path / "results" / "evaluate"
    results = read_json(directory / "results.json")
    matrix = results["confusion_matrix"]
    assert (results["num_images"], results["device"]) == (597, "cpu")
    assert sum(map(sum, matrix)) == 597
    assert results["metrics"]["val_acc_1"] == pytest.approx(sum(matrix[i][i] for i in range(10)) / 597)
    assert list(results["classes"]) == [str(number) for number in range(10)]
    three = results["classes"]["3"]
    assert three == {"images": sum(matrix[3]), "accuracy": pytest.approx(matrix[3][3] / sum(matrix[3]))}
    with Image.open(directory / "confusion_matrix.png") as picture:
        assert min(picture.size) > 300
    status = status_lines(directory)
    assert status[1]["kpi"] == results["metrics"]
    assert [line["status"] for line in status] == ["STARTED", "RUNNING", "SUCCESS"]


def read_table(path: Path) -> list[list[str]]:
    """The rows of a csv file, its header first."""
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_evaluate_writes_the_table_of_tao(taoq: Taoq, digits_words: Words, digits: Path, tmp_path: Path) -> None:
    options = ["evaluate.checkpoint=${quantize.model_path}", "evaluate.batch_size=100"]
    assert taoq(*digits_words("evaluate", "resnet_18", *options))[0] == 0
    directory = tmp_path / "results" / "evaluate"
    header, *rows = read_table(directory / "result.csv")
    assert header == ["img_name", *"0123456789", "pred_label", "pred_score", "gt_label"]
    images = sorted((digits / "val").rglob("*.png"))
    assert [row[0] for row in rows] == [str(path) for path in images]
    assert [row[13] for row in rows] == [path.parent.name for path in images]
    for row in rows:
        assert float(row[12]) == max(map(float, row[1:11])) == float(row[1 + int(row[11])])
        assert sum(map(float, row[1:11])) == pytest.approx(1, abs=1e-4)
    accuracy = read_json(directory / "results.json")["metrics"]["val_acc_1"]
    assert sum(row[11] == row[13] for row in rows) / len(rows) == pytest.approx(accuracy)


@pytest.mark.parametrize("variant", ["torchao-fp8_e5m2", "modelopt-int8"])
def test_an_artifact_is_the_same_model_in_a_new_process_from_its_manifest_alone(
    taoq: Taoq, digits_words: Words, digits: Path, tmp_path: Path, variant: str
) -> None:
    taoq(*digits_words("quantize", "vit_tiny", *options_of(variant)))
    artifact = tmp_path / "results" / "quantize"
    spec = tmp_path / "data.yaml"  # no model, no quantize section
    test_images = digits / "val" / "3"
    spec.write_text(
        f"results_dir: {tmp_path}/new\n"
        "dataset:\n  {num_classes: 10, img_size: 32, workers: 0, batch_size: 64,\n"
        f"   test_dataset: {{images_dir: {test_images}}}}}\n"
        f"inference: {{checkpoint: {artifact}, device: cpu, vis_after_n_batches: 0}}\n"
    )
    words = ["classification_pyt", "inference", "-e", str(spec)]
    assert taoq(*words, f"results_dir={tmp_path}/here")[0] == 0
    subprocess.run([sys.executable, "-m", "taoq", *words], check=True, capture_output=True)
    here, new = read_table(tmp_path / "here/inference/result.csv"), read_table(tmp_path / "new/inference/result.csv")
    assert here == new
    assert sum(row[1] == "3" for row in here[1:]) > 0.9 * (len(here) - 1)


def test_inference_writes_a_table_and_pictures(taoq: Taoq, digits_words: Words, tmp_path: Path) -> None:
    words = digits_words("inference", "resnet_18", "inference.checkpoint=${quantize.model_path}")
    code, out, _ = taoq(*words, "inference.vis_after_n_batches=5")
    directory = tmp_path / "results" / "inference"
    assert (code, out) == (0, f"597 images on cpu; wrote {directory}/result.csv, {directory}/visualize\n")
    rows = read_table(directory / "result.csv")
    assert rows[0] == ["image", "prediction", "score", "ground_truth", *"0123456789"]
    assert len(rows) == 598
    assert sum(row[1] == row[3] for row in rows[1:]) / 597 >= 0.97
    assert float(rows[1][2]) == max(map(float, rows[1][4:]))
    assert sum(map(float, rows[1][4:])) == pytest.approx(1, abs=1e-4)
    pictures = sorted(directory.glob("visualize/**/*.png"))
    assert len(pictures) == 128  # batches 0 and 5 of 64
    with Image.open(pictures[0]) as picture:
        assert picture.width == 224


def test_an_unlabelled_folder_serves_for_inference(
    taoq: Taoq, digits_words: Words, tmp_path: Path, digits: Path
) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted((digits / "val" / "7").iterdir())[:3]):
        (flat / f"{number}.png").write_bytes(path.read_bytes())
    words = digits_words("inference", "resnet_18", "inference.checkpoint=${quantize.model_path}")
    assert taoq(*words, f"dataset.test_dataset.images_dir={flat}")[0] == 0
    rows = read_table(tmp_path / "results" / "inference" / "result.csv")
    assert [(row[0], row[1], row[3]) for row in rows[1:]] == [(f"{number}.png", "7", "") for number in range(3)]
