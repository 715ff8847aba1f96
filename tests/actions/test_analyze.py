"""`analyze` on the example networks, with the real libraries: ranking, confirmation, and what a later run reuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from support.commands import Taoq, Words, read_json, rules
from support.pages import check_page
from taoq.errors import SpecError
from taoq.pipeline.analyze import advice
from taoq.pipeline.findings import Finding, Findings, given_findings

STATIC = [
    "quantize.backend=modelopt.pytorch",
    "quantize.mode=static_ptq",
    rules("int8"),
    "quantize.device=cpu",
    "quantize.calibration.num_samples=16",
]
FEW_SAMPLES = "analyze.num_samples=4"
ONE_GROUP = 'analyze.groups=["*"]'
NO_CONFIRMATION = "analyze.confirm=0"
OTHER_EVALUATION = "is of another evaluation: everything except the ranking is measured again"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Where `analyze` writes."""
    return tmp_path / "results" / "analyze"


def test_analyze_ranks_confirms_and_resumes(taoq: Taoq, digits_words: Words, directory: Path) -> None:
    options = [FEW_SAMPLES, "analyze.confirm=1", 'analyze.groups=["blocks.*"]']
    words = digits_words("analyze", "vit_tiny", *STATIC, *options)
    code, out, err = taoq(*words)
    assert code == 0, err
    first = read_json(directory / "analysis.json")
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
    assert f"{directory / 'analysis.json'}: {number_of_findings(first)} measurements are taken from it" in err
    assert read_json(directory / "analysis.json")["units"] == first["units"]


def number_of_findings(analysis: dict) -> int:
    """Number of measurements that an analysis.json keeps."""
    return sum(len(by_layers) for by_figure in analysis["found"].values() for by_layers in by_figure.values())


def test_only_what_can_change_an_analysis_discards_it(
    taoq: Taoq, digits_words: Words, directory: Path, tmp_path: Path
) -> None:
    words = digits_words("analyze", "resnet_18", *STATIC, FEW_SAMPLES, ONE_GROUP, NO_CONFIRMATION)
    file = directory / "analysis.json"
    assert taoq(*words)[0] == 0
    first = read_json(file)
    irrelevant = [
        "dataset.workers=1",
        f"dataset.test_dataset.images_dir={tmp_path}",
        "evaluate.checkpoint=other.pth",
    ]
    code, _, err = taoq(*words, *irrelevant)
    assert code == 0
    assert f"{file}: {number_of_findings(first)} measurements are taken from it" in err
    assert "is of another" not in err
    code, _, err = taoq(*words, "model.head.topk=[1, 3]")
    assert f"{file}: {OTHER_EVALUATION}" in err
    classes = tmp_path / "classes.txt"  # in another order: the figures are others
    classes.write_text("\n".join(map(str, reversed(range(10)))), encoding="utf-8")
    code, _, err = taoq(*words, f"dataset.classes_file={classes}")
    assert code == 0, err
    assert f"{file}: {OTHER_EVALUATION}" in err
    assert read_json(file)["float"] < 0.5 < first["float"]
    code, _, err = taoq(*words)
    assert f"{file}: {OTHER_EVALUATION}" in err
    assert f"{file}: 1 measurements are taken from it" in err
    assert read_json(file)["float"] == first["float"]
    assert read_json(file)["key"] == first["key"]
    content = file.read_bytes()  # a run that fails leaves it alone
    (tmp_path / "bad" / "0").mkdir(parents=True)
    (tmp_path / "bad" / "0" / "a.png").write_bytes(b"nothing")
    for number in range(1, 10):
        (tmp_path / "bad" / str(number)).mkdir()
    bad = [f"dataset.val_dataset.images_dir={tmp_path / 'bad'}", "quantize.calibration.num_samples=8"]
    assert taoq(*words, *bad)[0] == 1
    assert file.read_bytes() == content


def test_layers_that_the_library_leaves_out_are_named(
    taoq: Taoq, digits_words: Words, resnet: Path, directory: Path
) -> None:
    options = ["quantize.backend=modelopt.onnx", f"quantize.model_path={resnet}", rules("fp8_e4m3fn")]
    words = digits_words("analyze", "resnet_18", *STATIC, *options, FEW_SAMPLES, NO_CONFIRMATION, ONE_GROUP)
    code, out, err = taoq(*words)
    assert code == 0, err
    assert "layer(s) stay float (" in err
    assert "ModelOpt leaves it out: TensorRT has no fast fp8 kernel for its shape" in err
    analysis = read_json(directory / "analysis.json")
    assert f"{analysis['layers']} of 22 quantizable layers are quantized" in out
    assert analysis["layers"] < 22


def test_groups_of_nodes_of_an_onnx_file(taoq: Taoq, digits_words: Words, resnet: Path, directory: Path) -> None:
    options = ["quantize.backend=onnxruntime", f"quantize.model_path={resnet}", FEW_SAMPLES, "analyze.confirm=1"]
    code, _, err = taoq(*digits_words("analyze", "resnet_18", *STATIC, *options, 'analyze.groups=["layer*"]'))
    assert code == 0, err
    assert len(read_json(directory / "analysis.json")["units"]) == 3


def test_a_group_that_matches_no_layer_is_refused(taoq: Taoq, digits_words: Words) -> None:
    code, _, err = taoq(*digits_words("analyze", "vit_tiny", *STATIC, 'analyze.groups=["block.*"]'))
    assert code == 2
    assert "analyze.groups[0]: 'block.*' matches no layer that is quantized\nhint: see the plan: --dry-run" in err


@pytest.mark.parametrize(
    ("left_out", "certain", "text"),
    [
        (0, False, "no layer has to be left out: no loss is certain"),
        (2, False, "without them the loss is not certain"),
        (2, True, "the best of what was tried: without them the loss is still certain"),
        (0, True, "the loss is certain, and leaving layers out did not make it smaller"),
    ],
)
def test_what_the_curve_advises(left_out: int, certain: bool, text: str) -> None:
    assert advice(left_out, certain=certain) == text


@pytest.fixture
def analysis(tmp_path: Path) -> Callable[[dict[str, str], dict[Finding, float]], Path]:
    """An analysis.json of a key and its findings."""

    def write(key: dict[str, str], values: dict[Finding, float]) -> Path:
        file = tmp_path / "analysis.json"
        Findings(file, key, values).finish({})
        return file

    return write


def test_an_analysis_of_other_evaluation_data_gives_its_ranking_alone(
    analysis: Callable[[dict[str, str], dict[Finding, float]], Path],
) -> None:
    ranking = {Finding("noise", "", "1 layers 0a"): 0.5}
    figures = {
        Finding("figure", "val_acc_1", "1 layers 0a"): 0.9,
        Finding("highest_difference", "val_acc_1", "1 layers 0a"): -0.01,
    }
    key = {"model": "m", "evaluation": "these images"}
    file = analysis(key, ranking | figures)
    assert given_findings(file, key, "quantize.accuracy.analysis") == ranking | figures
    other = key | {"evaluation": "other images"}
    assert given_findings(file, other, "quantize.accuracy.analysis") == ranking


def test_an_analysis_of_an_earlier_taoq_is_refused(tmp_path: Path) -> None:
    """Its findings had a text as their key, which nothing reads any more."""
    file, key = tmp_path / "analysis.json", {"model": "m"}
    file.write_text(json.dumps({"key": key, "found": {"noise, 1 layers 0a": 0.5}}), encoding="utf-8")
    with pytest.raises(SpecError) as error:
        given_findings(file, key, "quantize.accuracy.analysis")
    assert str(error.value) == (
        f"quantize.accuracy.analysis: {file} is not an analysis\n"
        "hint: name the analysis.json of taoq <task> analyze, or leave it out"
    )
