"""A detector from quantize to inference, on real scenes with a trained network."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from support.commands import Taoq, Words, read_json, status_lines
from support.examples import CHECKPOINTS
from taoq.actions import quantize
from taoq.actions.base import nowhere
from taoq.spec.source import read_spec
from taoq.tasks import load_task
from taoq.tasks.rtdetr.names import SENSITIVE, original_name

RELOAD = """
import json, sys
from pathlib import Path
import torch
from taoq.pipeline.artifacts import read_artifact
from taoq.quantization.backends import load_backend
from taoq.spec.load import spec_from_dict
from taoq.tasks import load_task
directory = Path(sys.argv[1])
manifest = read_artifact(directory).manifest
task = load_task(manifest.task)
spec = spec_from_dict(manifest.spec, task.spec)
model = load_backend(manifest.backend).load(directory / manifest.payload, lambda: task.build_model(spec, None))
images = torch.load(sys.argv[2], weights_only=True)
with torch.inference_mode():
    torch.save(model(images), sys.argv[3])
"""
INT8 = "weights: {dtype: int8}, activations: {dtype: int8}"


def report(tmp_path: Path) -> dict[str, Any]:
    """The report of the last quantization."""
    report: dict[str, Any] = read_json(tmp_path / "results" / "quantize" / "quantization_report.json")
    return report


def quantized(tmp_path: Path) -> set[str]:
    """Original names of the quantized layers."""
    return {row["alias"] for row in report(tmp_path)["layers"] if row["weights"] or row["activations"]}


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param((), id="modelopt.pytorch int8"),
        pytest.param(
            (
                "quantize.backend=torchao",
                "quantize.mode=weight_only_ptq",
                "quantize.layers=[{module_name: Linear, weights: {dtype: fp8_e4m3fn}}]",
                "quantize.skip_names=[]",
            ),
            id="torchao fp8",
        ),
        pytest.param((f"quantize.layers=[{{module_name: '*', {INT8}}}]", "quantize.skip_names=[]"), id="everything"),
    ],
)
def test_an_artifact_reloads_bit_for_bit_in_a_new_process(
    scenes_words: Words, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    _, _, _, spec, *fields = scenes_words("quantize", *overrides)
    result = quantize.run(load_task("rtdetr"), read_spec(spec, fields), nowhere)
    images = torch.rand(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        outputs = result.model(images)
    torch.save(images, tmp_path / "images.pt")
    directory = tmp_path / "results" / "quantize"
    subprocess.run(
        [sys.executable, "-c", RELOAD, str(directory), str(tmp_path / "images.pt"), str(tmp_path / "outputs.pt")],
        check=True,
        capture_output=True,
    )
    reloaded = torch.load(tmp_path / "outputs.pt", weights_only=True)
    assert len(outputs) == 2
    assert all(torch.equal(output, again) for output, again in zip(outputs, reloaded, strict=True))


def test_int8_by_recipe_a_is_as_good_as_float(taoq: Taoq, scenes_words: Words, tmp_path: Path) -> None:
    assert taoq(*scenes_words("quantize"))[0] == 0
    float_checkpoint = f"evaluate.checkpoint={CHECKPOINTS['detector']}"
    for name, overrides in {"float": [float_checkpoint], "int8": []}.items():
        assert taoq(*scenes_words("evaluate", *overrides, f"evaluate.results_dir={tmp_path / name}"))[0] == 0
    results = {name: read_json(tmp_path / name / "results.json") for name in ("float", "int8")}
    assert results["float"]["num_images"] == 24
    assert results["float"]["metrics"]["val_mAP"] > 0.8
    assert abs(results["float"]["metrics"]["val_mAP"] - results["int8"]["metrics"]["val_mAP"]) < 0.01
    assert sorted(path.name for path in (tmp_path / "int8").iterdir()) == [
        "detections.json", "experiment.yaml", "log.txt", "precision_recall.png", "results.json", "status.json",
    ]  # fmt: skip
    lines = status_lines(tmp_path / "int8")
    assert [line["status"] for line in lines] == ["STARTED", "RUNNING", "SUCCESS"]
    metrics, kpi = results["int8"]["metrics"], lines[1]["kpi"]
    assert (kpi["test_mAP"], kpi["test_mAP50"]) == (str(metrics["val_mAP"]), str(metrics["val_mAP50"]))  # as in TAO
    assert [name for name in kpi if name.startswith("val_")] == []
    assert kpi["AP75"] == metrics["AP75"]


def test_the_ap_over_all_classes_stands_beside_that_of_the_chosen_ones(
    taoq: Taoq, scenes_words: Words, tmp_path: Path
) -> None:
    """TAO's evaluate ignores the field."""
    options = [f"evaluate.checkpoint={CHECKPOINTS['detector']}"]
    assert taoq(*scenes_words("evaluate", *options))[0] == 0
    over_all = read_json(tmp_path / "results" / "evaluate" / "results.json")["metrics"]
    override = "dataset.eval_class_ids=[1,3]"
    code, _, err = taoq(*scenes_words("evaluate", *options, override, f"evaluate.results_dir={tmp_path}"))
    assert code == 0
    warning = f"warning: override {override}: dataset.eval_class_ids: "
    assert f"{warning}2 of 10 classes are evaluated; TAO's evaluate ignores this field\n" in err
    assert (
        f"{warning}over all 10 classes, as TAO's evaluate counts: val_mAP {over_all['val_mAP']:.4f}, val_mAP50"
        f" {over_all['val_mAP50']:.4f}\n" in err
    )
    results, kpi = read_json(tmp_path / "results.json"), status_lines(tmp_path)[1]["kpi"]
    for name in ("val_mAP", "val_mAP50"):
        assert results["all_classes"][name] == pytest.approx(over_all[name], abs=1e-12)
        assert results["metrics"][name] != results["all_classes"][name]
        assert kpi[f"test_{name.removeprefix('val_')}"] == str(results["metrics"][name])
    everything = f"dataset.eval_class_ids={list(range(1, 11))}"
    _, _, err = taoq(*scenes_words("evaluate", *options, everything, f"evaluate.results_dir={tmp_path}"))
    assert "eval_class_ids: " not in err
    results = read_json(tmp_path / "results.json")
    assert (results["metrics"], "all_classes" in results) == (over_all, False)


def test_the_skip_list_of_tao_skips_exactly_the_heads(taoq: Taoq, scenes_words: Words, tmp_path: Path) -> None:
    code, _, err = taoq(
        *scenes_words(
            "quantize",
            "quantize.backend=torchao",
            "quantize.mode=weight_only_ptq",
            "quantize.layers=[{module_name: Linear, weights: {dtype: int8}}]",
            "quantize.skip_names=['*dec_score_head*', '*dec_bbox_head*', '*enc_*_head*']",
        )
    )
    assert code == 0
    assert "warning" not in err
    linear = {row["alias"] for row in report(tmp_path)["layers"] if row["type"] == "Linear"}
    assert linear - quantized(tmp_path) == {name for name in linear if "head." in f"{name}." and "query" not in name}
    assert linear - quantized(tmp_path) == {
        "decoder.enc_score_head", "decoder.dec_score_head.2",
        *(f"decoder.enc_bbox_head.layers.{number}" for number in range(3)),
        *(f"decoder.dec_bbox_head.{layer}.layers.{number}" for layer in range(3) for number in range(3)),
    }  # fmt: skip


def test_a_rule_on_sensitive_layers_says_so(taoq: Taoq, scenes_words: Words) -> None:
    rules = f"[{{module_name: Conv2d, {INT8}}}, {{module_name: 'decoder.decoder.*', {INT8}}}]"
    code, out, err = taoq(*scenes_words("quantize", f"quantize.layers={rules}", "quantize.skip_names=[]", "--dry-run"))
    assert code == 0
    warnings = [line for line in err.splitlines() if line.startswith("warning: ")]
    where = (
        "warning: override quantize.layers=" + rules + ": quantize.layers[1]: 'decoder.decoder.*' quantizes 3 layer(s)"
    )
    names = [f"decoder.decoder.layers.{layer}.cross_attn" for layer in range(3)]
    assert warnings == [
        f"{where} known to lose accuracy: {kind} ({', '.join(f'{name}.{part}' for name in names)});"
        " quantize.skip_names keeps them float"
        for part, kind in (
            ("sampling_offsets", "sampling offsets"),
            ("attention_weights", "attention weights of the deformable attention"),
        )
    ]
    assert "(sensitive: sampling offsets)" in " ".join(out.split())
    assert set(SENSITIVE) >= {"*.sampling_offsets", "*.attention_weights"}


@pytest.mark.parametrize(
    "pattern", ["model.encoder.lateral_convs.0.conv", "encoder.lateral_convs.0.conv", "encoder.lateral_convs.[0]*"]
)
def test_a_pattern_matches_our_name_or_the_original_one(
    taoq: Taoq, scenes_words: Words, tmp_path: Path, pattern: str
) -> None:
    rules = f"[{{module_name: '{pattern}', {INT8}}}]"
    code, _, _ = taoq(*scenes_words("quantize", f"quantize.layers={rules}", "quantize.skip_names=[]"))
    assert code == 0
    assert quantized(tmp_path) == {original_name("model.encoder.lateral_convs.0.conv")}


def test_inference_writes_pictures_labels_and_one_json(
    taoq: Taoq, scenes_words: Words, scenes: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in (1, 2, 3):
        (folder / f"{number}.jpg").write_bytes((scenes / "val" / f"000{number}.jpg").read_bytes())
    options = [
        f"inference.checkpoint={CHECKPOINTS['detector']}",
        f"dataset.infer_data_sources.image_dir={folder}",  # a text where a list is meant, as in TAO
    ]
    assert taoq(*scenes_words("inference", *options))[0] == 0
    results = tmp_path / "results" / "inference"
    assert sorted(path.name for path in (results / "images_annotated").iterdir()) == ["1.jpg", "2.jpg", "3.jpg"]
    data = read_json(results / "detections.json")
    assert [image["file_name"] for image in data["images"]] == ["1.jpg", "2.jpg", "3.jpg"]
    assert [category["name"] for category in data["categories"]] == [str(digit) for digit in range(10)]
    truth = read_json(scenes / "val.json")
    wanted = sorted(
        (entry["image_id"], str(entry["category_id"] - 1)) for entry in truth["annotations"] if entry["image_id"] <= 3
    )
    assert sorted((entry["image_id"], str(entry["category_id"])) for entry in data["annotations"]) == wanted
    lines = [line for number in (1, 2, 3) for line in (results / "labels" / f"{number}.txt").read_text().splitlines()]
    assert len(lines) == len(wanted)
    assert {len(line.split()) for line in lines} == {16}


def test_scenes_without_annotations_are_refused(taoq: Taoq, scenes: Path, scenes_words: Words, tmp_path: Path) -> None:
    data = read_json(scenes / "val_24.json")
    empty = tmp_path / "empty.json"
    empty.write_text(json.dumps(data | {"annotations": [], "images": data["images"][:2]}), encoding="utf-8")
    words = [f"dataset.test_data_sources.json_file={empty}", "quantize.evaluate=true"]
    weights = ["quantize.backend=torchao", "quantize.mode=weight_only_ptq", "quantize.skip_names=[]"]
    rule = "quantize.layers=[{module_name: Linear, weights: {dtype: int8}}]"
    code, _, err = taoq(*scenes_words("quantize", *words, *weights, rule))
    assert (code, err.splitlines()[-2:]) == (
        1,
        [
            f"{empty}: has no annotations with a box, so there is nothing to find",
            "hint: name a COCO json with annotations",
        ],
    )
    assert not (tmp_path / "results" / "quantize" / "manifest.json").exists()
