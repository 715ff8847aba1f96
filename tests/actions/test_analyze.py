"""`analyze`, and `quantize` with an accuracy budget: on the example networks, with the real libraries."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.commands import export_words
from support.pages import check_page
from taoq.actions.analysis import Evaluations, given_notes

from taoq.actions.analyze import advice
from taoq.pipeline.artifacts import read_artifact
from taoq.quantization.types import LayerPlan
from taoq.tasks.base import Metric

Taoq = Callable[..., tuple[int, str, str]]
Words = Callable[..., list[str]]

STATIC = [
    "quantize.backend=modelopt.pytorch",
    "quantize.mode=static_ptq",
    'quantize.layers=[{"module_name": "*", "weights": {"dtype": "int8"}, "activations": {"dtype": "int8"}}]',
    "quantize.device=cpu",
    "quantize.calibration.num_samples=16",
]
FEW = ["analyze.num_samples=4", "analyze.confirm=1", 'analyze.groups=["blocks.*"]']


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_analyze_ranks_confirms_and_resumes(taoq: Taoq, digits_words: Words, tmp_path: Path) -> None:
    words = digits_words("analyze", "vit_tiny", *STATIC, *FEW)
    code, out, err = taoq(*words)
    assert code == 0, err
    directory = tmp_path / "results" / "analyze"
    first = read(directory / "analysis.json")
    units = {unit["name"]: unit for unit in first["units"]}
    assert set(units) == {"patch_embed.proj", "blocks.*", "head"}
    assert len(units["blocks.*"]["layers"]) == 24
    decibels = [unit["sqnr"] for unit in first["units"]]
    assert decibels == sorted(decibels)
    assert all(10 < value < 80 for value in decibels)
    assert first["units"][0]["metric"] > 0.9
    assert first["units"][1]["metric"] is None
    assert first["macs"] > sum(unit["macs"] for unit in first["units"]) * 0.99
    assert f"results: {directory / 'analysis.json'}" in out
    check_page(directory / "analysis.html")
    code, _, err = taoq(*words)  # nothing is measured again
    assert code == 0
    assert f"{directory / 'analysis.json'}: {len(first['found'])} measurements are taken from it" in err
    assert read(directory / "analysis.json")["units"] == first["units"]


def test_what_cannot_change_an_analysis_does_not_discard_it(taoq: Taoq, digits_words: Words, tmp_path: Path) -> None:
    words = digits_words("analyze", "resnet_18", *STATIC, *FEW[:1], 'analyze.groups=["*"]', "analyze.confirm=0")
    file = tmp_path / "results" / "analyze" / "analysis.json"
    assert taoq(*words)[0] == 0
    first = read(file)
    others = ["dataset.workers=1", f"dataset.test_dataset.images_dir={tmp_path}", "evaluate.checkpoint=other.pth"]
    code, _, err = taoq(*words, *others)
    assert code == 0
    assert f"{file}: {len(first['found'])} measurements are taken from it" in err
    assert "is of another" not in err
    code, _, err = taoq(*words, "model.head.topk=[1, 3]")
    assert f"{file}: is of another evaluation: all but the ranking is measured again" in err
    classes = tmp_path / "classes.txt"  # in another order: the figures are others
    classes.write_text("\n".join(map(str, reversed(range(10)))), encoding="utf-8")
    code, _, err = taoq(*words, f"dataset.classes_file={classes}")
    assert code == 0, err
    assert f"{file}: is of another evaluation: all but the ranking is measured again" in err
    assert read(file)["float"] < 0.5 < first["float"]
    code, _, err = taoq(*words)
    assert f"{file}: is of another evaluation: all but the ranking is measured again" in err
    assert f"{file}: 1 measurements are taken from it" in err
    assert read(file)["float"] == first["float"]
    assert read(file)["key"] == first["key"]
    content = file.read_bytes()  # a run that fails leaves it alone
    (tmp_path / "bad" / "0").mkdir(parents=True)
    (tmp_path / "bad" / "0" / "a.png").write_bytes(b"nothing")
    for number in range(1, 10):
        (tmp_path / "bad" / str(number)).mkdir()
    bad = [f"dataset.val_dataset.images_dir={tmp_path / 'bad'}", "quantize.calibration.num_samples=8"]
    assert taoq(*words, *bad)[0] == 1
    assert file.read_bytes() == content


def test_layers_that_the_library_leaves_out_are_named(taoq: Taoq, digits_words: Words, tmp_path: Path) -> None:
    file = tmp_path / "float.onnx"
    assert taoq(*export_words(digits_words, "resnet_18", file))[0] == 0
    words = [*STATIC, "quantize.backend=modelopt.onnx", f"quantize.model_path={file}", *FEW[:1], "analyze.confirm=0"]
    words[2] = words[2].replace("int8", "fp8_e4m3fn")
    code, out, err = taoq(*digits_words("analyze", "resnet_18", *words, 'analyze.groups=["*"]'))
    assert code == 0, err
    assert "layer(s) stay float (" in err
    assert "ModelOpt leaves it out: TensorRT has no fast fp8 kernel for its shape" in err
    analysis = read(tmp_path / "results" / "analyze" / "analysis.json")
    assert f"{analysis['layers']} of 22 quantizable layers are quantized" in out
    assert analysis["layers"] < 22


def test_a_search_tries_what_the_artifact_will_be_with_corrected_biases(
    taoq: Taoq, digits_words: Words, tmp_path: Path
) -> None:
    budget = "quantize.accuracy={max_drop: 0.006, action: search, max_evaluations: 1}"
    words = [*STATIC, *FEW[:1], 'analyze.groups=["*"]', "quantize.algorithm=entropy", "quantize.bias_correction=true"]
    words += ["quantize.calibration.num_samples=200"]
    code, _, err = taoq(*digits_words("quantize", "mobilenetv3_small", *words, budget))
    assert code == 0, err
    report = read(tmp_path / "results" / "quantize" / "quantization_report.json")
    (trial,) = report["search"]["evaluations"]
    assert trial["drop"] == report["accuracy"]["drop"]
    assert report["search"]["share"] == pytest.approx(report["macs_quantized"])
    assert report["macs_quantized"] < 1.0  # the classifier has a forward of its own
    assert report["command"].startswith("taoq classification_pyt quantize -e ")


def test_what_is_for_a_search_has_no_effect_on_a_check(taoq: Taoq, digits_words: Words) -> None:
    budget = "quantize.accuracy={max_drop: 1, maximize: bytes, max_evaluations: 3}"
    code, _, err = taoq(*digits_words("quantize", "vit_tiny", *STATIC, budget))
    assert code == 0
    for name in ("maximize", "max_evaluations"):
        assert f"quantize.accuracy.{name}: has no effect: it is for action: search\n" in err
    assert "accuracy.dtypes" not in err
    assert "from chance" not in err


@pytest.mark.parametrize(
    ("left_out", "certain", "words"),
    [
        (0, False, "no layer has to be left out: no loss is certain"),
        (2, False, "without them the loss is not certain"),
        (2, True, "the best of what was tried: without them the loss is still certain"),
        (0, True, "the loss is certain, and leaving layers out did not make it smaller"),
    ],
)
def test_what_the_curve_advises(left_out: int, certain: bool, words: str) -> None:
    assert advice(left_out, certain=certain) == words


def test_a_group_that_fits_nothing(taoq: Taoq, digits_words: Words) -> None:
    code, _, err = taoq(*digits_words("analyze", "vit_tiny", *STATIC, 'analyze.groups=["block.*"]'))
    assert code == 2
    assert "analyze.groups[0]: 'block.*' matches no layer that is quantized\nhint: see the plan: --dry-run" in err


def test_a_search_writes_a_spec_that_quantize_runs_unchanged(taoq: Taoq, digits_words: Words, tmp_path: Path) -> None:
    budget = "quantize.accuracy={max_drop: 0.01, action: search, max_evaluations: 3, dtypes: [int8, fp8_e4m3fn]}"
    code, out, err = taoq(*digits_words("quantize", "vit_tiny", *STATIC, *FEW, budget))
    assert code == 0, err
    directory = tmp_path / "results" / "quantize"
    report, manifest = read(directory / "quantization_report.json"), read_artifact(directory).manifest
    assert report["search"]["share"] == 1.0
    assert [one["what"] for one in report["search"]["evaluations"]] == ["everything"]
    assert report["accuracy"]["met"] is True
    assert manifest.accuracy == report["accuracy"]
    assert "plans were evaluated" in out
    assert "Trade-off" in check_page(directory / "quantization_report.html")
    tuned = yaml.safe_load((directory / "tuned.yaml").read_text(encoding="utf-8"))
    assert tuned["quantize"]["accuracy"]["action"] == "check"
    again = tmp_path / "again"
    code, _, err = taoq(
        "classification_pyt", "quantize", "-e", str(directory / "tuned.yaml"), f"quantize.results_dir={again}"
    )
    assert code == 0, err
    assert read_artifact(again).manifest.plan == manifest.plan
    assert read_artifact(again).manifest.sha256 == manifest.sha256


def test_an_artifact_that_loses_more_than_its_trial_is_searched_on(
    taoq: Taoq, digits_words: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Evaluations.of

    def flattering(evaluations: Evaluations, items: Sequence[LayerPlan]) -> float:
        return honest(evaluations, () if len(items) == 26 else items)

    monkeypatch.setattr(Evaluations, "of", flattering)
    budget = "quantize.accuracy={max_drop: 0.0001, action: search, max_evaluations: 3}"
    code, _, err = taoq(*digits_words("quantize", "vit_tiny", *STATIC, *FEW, budget))
    assert code == 0, err
    assert "the artifact loses more than the trial of its plan did: searching on" in err
    report = read(tmp_path / "results" / "quantize" / "quantization_report.json")
    first = report["search"]["evaluations"][0]
    assert (first["what"], first["within"]) == ("everything", False)
    assert first["drop"] > 0.0001
    assert report["layers_quantized"] < 26
    assert report["accuracy"]["met"] is True
    # where no plan is left, what is there stays as it is
    directory = tmp_path / "results" / "quantize"
    before = {name: (directory / name).read_bytes() for name in ("manifest.json", "tuned.yaml", "experiment.yaml")}
    code, _, err = taoq(*digits_words("quantize", "vit_tiny", *STATIC, *FEW, budget.replace("3}", "1}")))
    assert code == 4
    assert "the artifact loses more than the trial of its plan did: searching on" in err
    assert "no plan of 1 keeps val_acc_1 within 0.0001" in err
    assert {name: (directory / name).read_bytes() for name in before} == before


def test_an_interrupted_search_goes_on_where_it_was(
    taoq: Taoq, digits_words: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = "quantize.accuracy={max_drop: 0.0001, action: search, max_evaluations: 3}"
    words = digits_words("quantize", "vit_tiny", *STATIC, *FEW, budget)
    measured: list[int] = []
    original = Evaluations._measure

    def interrupted(evaluations: Evaluations, items: Sequence[LayerPlan]) -> Metric:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(len(items))
        return original(evaluations, items)

    monkeypatch.setattr(Evaluations, "_measure", interrupted)
    assert taoq(*words)[0] == 130
    directory = tmp_path / "results" / "quantize"
    kept = read(directory / "analysis.unfinished.json")["found"]
    assert not (directory / "manifest.json").exists()
    measured.clear()
    measured.append(-1)  # one more than before
    assert taoq(*words)[0] == 130
    assert measured[1] not in (0, 26)  # the float model and everything are known
    assert read(directory / "analysis.unfinished.json")["found"].items() > kept.items()
    monkeypatch.setattr(Evaluations, "_measure", original)
    assert taoq(*words)[0] == 0
    assert len(read(directory / "quantization_report.json")["search"]["evaluations"]) <= 3


def test_a_search_that_finds_nothing_is_exit_code_4(taoq: Taoq, digits_words: Words, tmp_path: Path) -> None:
    budget = "quantize.accuracy={max_drop: 0, action: search, max_evaluations: 1}"
    code, _, err = taoq(*digits_words("quantize", "vit_tiny", *STATIC, *FEW, budget))
    assert code == 4
    assert "quantize.accuracy.max_drop: no plan of 1 keeps val_acc_1 within 0 of 0.9849; the best found loses" in err
    assert not (tmp_path / "results" / "quantize" / "manifest.json").exists()
    other = tmp_path / "results" / "quantize" / "analysis.json"
    words = digits_words("quantize", "resnet_18", *STATIC)
    named = f"quantize.accuracy={{max_drop: 0.01, action: search, analysis: {other}}}"
    code, _, err = taoq(*words, named, f"quantize.results_dir={tmp_path / 'other'}")
    assert code == 2
    assert f"quantize.accuracy.analysis: {other} is of another model" in err


def test_a_drop_above_the_budget_keeps_and_marks_the_artifact(taoq: Taoq, digits_words: Words, tmp_path: Path) -> None:
    code, _, err = taoq(*digits_words("quantize", "vit_tiny", *STATIC, "quantize.accuracy={max_drop: 0}"))
    assert code == 4
    assert "quantize.accuracy.max_drop: val_acc_1 falls from 0.9849 to " in err
    assert "hint: the artifact is kept and marked; accuracy.action: search looks for the layers to leave float" in err
    manifest = read_artifact(tmp_path / "results" / "quantize").manifest
    assert manifest.accuracy["met"] is False
    assert "Accuracy budget not met" in check_page(tmp_path / "results" / "quantize" / "quantization_report.html")


def test_a_budget_that_the_images_cannot_resolve_gets_a_warning(
    taoq: Taoq, digits_words: Words, tmp_path: Path
) -> None:
    code, _, err = taoq(*digits_words("quantize", "vit_tiny", *STATIC, "quantize.accuracy={max_drop: 0.0001}"))
    directory = tmp_path / "results" / "quantize"
    report = read(directory / "quantization_report.json")
    (one,) = report["evaluation"]["differences"]
    warning = (
        "quantize.accuracy.max_drop: 0.0001 is less than 597 images can tell from chance,"
        f" which is {one['value'] - one['low']:.4f} here: evaluate on more images"
    )
    assert code == (4 if one["value"] < -0.0001 else 0)
    assert warning.removeprefix("quantize.accuracy.max_drop") in err
    assert report["warnings"][-1] == warning
    assert warning.replace("'", "&#39;") in check_page(directory / "quantization_report.html")


@pytest.mark.parametrize("name", ["val_mAP", "val_acc_7"])
def test_a_figure_that_the_task_lacks(taoq: Taoq, digits_words: Words, name: str) -> None:
    budget = f"quantize.accuracy={{max_drop: 0.01, metric: {name}}}"
    code, _, err = taoq(*digits_words("quantize", "vit_tiny", *STATIC, budget))
    assert code == 2
    assert f"quantize.accuracy.metric: classification_pyt measures no figure '{name}'" in err


def test_evaluate_of_an_onnx_backend_measures_both_files(taoq: Taoq, digits_words: Words, tmp_path: Path) -> None:
    file = tmp_path / "float.onnx"
    assert taoq(*export_words(digits_words, "resnet_18", file))[0] == 0
    words = [*STATIC, "quantize.backend=onnxruntime", f"quantize.model_path={file}", "quantize.evaluate=true"]
    code, _, err = taoq(*digits_words("quantize", "resnet_18", *words))
    assert code == 0, err
    report = read(tmp_path / "results" / "quantize" / "quantization_report.json")
    assert report["evaluation"]["num_images"] == 597
    (one,) = report["evaluation"]["differences"]
    assert one["figure"] == "val_acc_1"
    assert one["low"] <= one["value"] <= one["high"]
    assert all(row["outputs_sqnr"] > 20 and row["macs"] > 0 for row in report["layers"])
    check_page(tmp_path / "results" / "quantize" / "quantization_report.html")
    words = [*STATIC, "quantize.backend=onnxruntime", f"quantize.model_path={file}", *FEW[:2]]
    code, _, err = taoq(*digits_words("analyze", "resnet_18", *words, 'analyze.groups=["layer*"]'))
    assert code == 0, err
    assert len(read(tmp_path / "results" / "analyze" / "analysis.json")["units"]) == 3


def test_an_analysis_of_other_evaluation_data_gives_its_ranking_alone(tmp_path: Path) -> None:
    found = {"noise, 1 layers 0a": 0.5, "val_acc_1, 1 layers 0a": 0.9}
    file, key = tmp_path / "analysis.json", {"model": "m", "evaluation": "these images"}
    file.write_text(json.dumps({"key": key, "found": found}), encoding="utf-8")
    assert given_notes(file, key, "quantize.accuracy.analysis") == found
    other = key | {"evaluation": "other images"}
    assert given_notes(file, other, "quantize.accuracy.analysis") == {"noise, 1 layers 0a": 0.5}
