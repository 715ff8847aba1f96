"""`quantize` with an accuracy budget: what a check refuses, and what a search finds, on the example networks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from support.commands import Taoq, Words, read_json, rules
from support.pages import check_page
from taoq.pipeline.analyze import Measurements
from taoq.pipeline.artifacts import read_artifact
from taoq.quantization.types import LayerPlan
from taoq.tasks.base import Metric

STATIC = [
    "quantize.backend=modelopt.pytorch",
    "quantize.mode=static_ptq",
    rules("int8"),
    "quantize.device=cpu",
    "quantize.calibration.num_samples=16",
]
FEW_SAMPLES = "analyze.num_samples=4"
FEW = [FEW_SAMPLES, "analyze.confirm=1", 'analyze.groups=["blocks.*"]']
SMALL_SEARCH = "quantize.accuracy={max_drop: 0.0001, action: search, max_evaluations: 3}"
ALL_LAYERS = 26
"""Number of quantizable layers of the example ViT."""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Where `quantize` writes."""
    return tmp_path / "results" / "quantize"


def test_a_search_tries_what_the_artifact_will_be_with_corrected_biases(
    taoq: Taoq, digits_words: Words, directory: Path
) -> None:
    budget = "quantize.accuracy={max_drop: 0.006, action: search, max_evaluations: 1}"
    options = [FEW_SAMPLES, 'analyze.groups=["*"]', "quantize.algorithm=entropy", "quantize.bias_correction=true"]
    options += ["quantize.calibration.num_samples=200", budget]
    code, _, err = taoq(*digits_words("quantize", "mobilenetv3_small", *STATIC, *options))
    assert code == 0, err
    report = read_json(directory / "quantization_report.json")
    (trial,) = report["search"]["evaluations"]
    assert trial["drop"] == report["accuracy"]["drop"]
    assert report["search"]["share"] == pytest.approx(report["macs_quantized"])
    assert report["macs_quantized"] < 1.0  # the classifier has a forward of its own
    assert report["command"].startswith("taoq classification_pyt quantize -e ")


def test_fields_of_a_search_have_no_effect_on_a_check(taoq: Taoq, digits_words: Words) -> None:
    budget = "quantize.accuracy={max_drop: 1, maximize: bytes, max_evaluations: 3}"
    code, _, err = taoq(*digits_words("quantize", "vit_tiny", *STATIC, budget))
    assert code == 0
    for name in ("maximize", "max_evaluations"):
        assert f"quantize.accuracy.{name}: has no effect: it is for action: search\n" in err
    assert "accuracy.dtypes" not in err
    assert "uncertainty" not in err


def test_a_search_writes_a_spec_that_quantize_runs_unchanged(
    taoq: Taoq, digits_words: Words, directory: Path, tmp_path: Path
) -> None:
    budget = "quantize.accuracy={max_drop: 0.01, action: search, max_evaluations: 3, dtypes: [int8, fp8_e4m3fn]}"
    code, out, err = taoq(*digits_words("quantize", "vit_tiny", *STATIC, *FEW, budget))
    assert code == 0, err
    report, manifest = read_json(directory / "quantization_report.json"), read_artifact(directory).manifest
    assert report["search"]["share"] == 1.0
    assert [trial["what"] for trial in report["search"]["evaluations"]] == ["everything"]
    assert report["accuracy"]["met"] is True
    assert manifest.accuracy == report["accuracy"]
    assert "plans were evaluated" in out
    assert "Trade-off" in check_page(directory / "quantization_report.html")
    tuned = yaml.safe_load((directory / "tuned.yaml").read_text(encoding="utf-8"))
    assert tuned["quantize"]["accuracy"]["action"] == "check"
    again = tmp_path / "again"
    words = ["classification_pyt", "quantize", "-e", str(directory / "tuned.yaml"), f"quantize.results_dir={again}"]
    code, _, err = taoq(*words)
    assert code == 0, err
    assert read_artifact(again).manifest.plan == manifest.plan
    assert read_artifact(again).manifest.sha256 == manifest.sha256


def test_an_artifact_that_loses_more_than_its_trial_is_searched_on(
    taoq: Taoq, digits_words: Words, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Measurements.metric

    def flattering(measurements: Measurements, items: Sequence[LayerPlan]) -> float:
        return honest(measurements, () if len(items) == ALL_LAYERS else items)

    monkeypatch.setattr(Measurements, "metric", flattering)
    code, _, err = taoq(*digits_words("quantize", "vit_tiny", *STATIC, *FEW, SMALL_SEARCH))
    assert code == 0, err
    assert "the artifact loses more than the trial of its plan did: searching on" in err
    report = read_json(directory / "quantization_report.json")
    first = report["search"]["evaluations"][0]
    assert (first["what"], first["within"]) == ("everything", False)
    assert first["drop"] > 0.0001
    assert report["layers_quantized"] < ALL_LAYERS
    assert report["accuracy"]["met"] is True
    # where no plan is left, what is there stays as it is
    before = {name: (directory / name).read_bytes() for name in ("manifest.json", "tuned.yaml", "experiment.yaml")}
    one_evaluation = SMALL_SEARCH.replace("max_evaluations: 3", "max_evaluations: 1")
    code, _, err = taoq(*digits_words("quantize", "vit_tiny", *STATIC, *FEW, one_evaluation))
    assert code == 4
    assert "the artifact loses more than the trial of its plan did: searching on" in err
    assert "no plan of 1 keeps val_acc_1 within 0.0001" in err
    assert {name: (directory / name).read_bytes() for name in before} == before


def test_an_interrupted_search_goes_on_where_it_was(
    taoq: Taoq, digits_words: Words, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = digits_words("quantize", "vit_tiny", *STATIC, *FEW, SMALL_SEARCH)
    measured: list[int] = []
    measure = Measurements.measure

    def interrupted(measurements: Measurements, items: Sequence[LayerPlan]) -> Metric:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(len(items))
        return measure(measurements, items)

    monkeypatch.setattr(Measurements, "measure", interrupted)
    assert taoq(*words)[0] == 130
    kept = stored_findings(directory)
    assert not (directory / "manifest.json").exists()
    measured.clear()
    measured.append(-1)  # one more than before
    assert taoq(*words)[0] == 130
    assert measured[1] not in (0, ALL_LAYERS)  # the float model and everything are known
    assert stored_findings(directory).items() > kept.items()
    monkeypatch.setattr(Measurements, "measure", measure)
    assert taoq(*words)[0] == 0
    assert len(read_json(directory / "quantization_report.json")["search"]["evaluations"]) <= 3


def stored_findings(directory: Path) -> dict[tuple[str, str, str], float]:
    """What an interrupted run had measured: by kind, figure and layers."""
    return {
        (kind, figure, layers): value
        for kind, by_figure in read_json(directory / "analysis.unfinished.json")["found"].items()
        for figure, by_layers in by_figure.items()
        for layers, value in by_layers.items()
    }


def test_a_search_that_finds_nothing_is_exit_code_4(
    taoq: Taoq, digits_words: Words, directory: Path, tmp_path: Path
) -> None:
    budget = "quantize.accuracy={max_drop: 0, action: search, max_evaluations: 1}"
    code, _, err = taoq(*digits_words("quantize", "vit_tiny", *STATIC, *FEW, budget))
    assert code == 4
    assert "quantize.accuracy.max_drop: no plan of 1 keeps val_acc_1 within 0 of 0.9849; the best found loses" in err
    assert not (directory / "manifest.json").exists()
    analysis = directory / "analysis.json"
    words = digits_words("quantize", "resnet_18", *STATIC)
    of_another_model = f"quantize.accuracy={{max_drop: 0.01, action: search, analysis: {analysis}}}"
    code, _, err = taoq(*words, of_another_model, f"quantize.results_dir={tmp_path / 'other'}")
    assert code == 2
    assert f"quantize.accuracy.analysis: {analysis} is of another model" in err


def test_a_drop_above_the_budget_keeps_and_marks_the_artifact(taoq: Taoq, digits_words: Words, directory: Path) -> None:
    code, _, err = taoq(*digits_words("quantize", "vit_tiny", *STATIC, "quantize.accuracy={max_drop: 0}"))
    assert code == 4
    assert "quantize.accuracy.max_drop: val_acc_1 falls from 0.9849 to " in err
    assert "hint: the artifact is kept and marked; accuracy.action: search looks for the layers to leave float" in err
    assert read_artifact(directory).manifest.accuracy["met"] is False
    assert "Accuracy budget not met" in check_page(directory / "quantization_report.html")


def test_a_budget_that_the_images_cannot_resolve_gets_a_warning(
    taoq: Taoq, digits_words: Words, directory: Path
) -> None:
    code, _, err = taoq(*digits_words("quantize", "vit_tiny", *STATIC, "quantize.accuracy={max_drop: 0.0001}"))
    report = read_json(directory / "quantization_report.json")
    (difference,) = report["evaluation"]["differences"]
    warning = (
        "quantize.accuracy.max_drop: 0.0001 is less than the uncertainty of the loss on 597 images,"
        f" which is {difference['value'] - difference['low']:.4f}: evaluate on more images"
    )
    assert code == (4 if difference["value"] < -0.0001 else 0)
    assert warning.removeprefix("quantize.accuracy.max_drop") in err
    assert report["warnings"][-1] == warning
    assert warning.replace("'", "&#39;") in check_page(directory / "quantization_report.html")


@pytest.mark.parametrize("figure", ["val_mAP", "val_acc_7"])
def test_a_figure_that_the_task_lacks_is_refused(taoq: Taoq, digits_words: Words, figure: str) -> None:
    budget = f"quantize.accuracy={{max_drop: 0.01, metric: {figure}}}"
    code, _, err = taoq(*digits_words("quantize", "vit_tiny", *STATIC, budget))
    assert code == 2
    assert f"quantize.accuracy.metric: classification_pyt measures no figure '{figure}'" in err


def test_evaluation_with_an_onnx_backend_measures_both_files(
    taoq: Taoq, digits_words: Words, resnet: Path, directory: Path
) -> None:
    options = ["quantize.backend=onnxruntime", f"quantize.model_path={resnet}", "quantize.evaluate=true"]
    code, _, err = taoq(*digits_words("quantize", "resnet_18", *STATIC, *options))
    assert code == 0, err
    report = read_json(directory / "quantization_report.json")
    assert report["evaluation"]["num_images"] == 597
    (difference,) = report["evaluation"]["differences"]
    assert difference["figure"] == "val_acc_1"
    assert difference["low"] <= difference["value"] <= difference["high"]
    assert all(row["outputs_sqnr"] > 20 and row["macs"] > 0 for row in report["layers"])
    check_page(directory / "quantization_report.html")
