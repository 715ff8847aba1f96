"""`compare` on artifacts of real backends: torch and ONNX, of one checkpoint."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from support.commands import Taoq, Words, read_json, rules
from support.pages import check_page
from taoq.cli import main
from taoq.pipeline.artifacts import read_artifact

SAMPLES = "quantize.calibration.num_samples=16"
STATIC = ["quantize.backend=modelopt.pytorch", rules("int8", "Linear"), SAMPLES, "quantize.device=cpu"]
WEIGHTS = [
    "quantize.backend=torchao",
    "quantize.mode=weight_only_ptq",
    rules("int8", "Linear", activations=False),
    'quantize.skip_names=["head"]',
]
FEW = ["benchmark.device=cpu", "benchmark.batch_sizes=[1, 2]", "benchmark.runs=2", "benchmark.warmup=1"]


@pytest.fixture(scope="module")
def artifacts(
    digits_words_into: Callable[[Path], Words],
    classifier_file: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Artifacts of the example ViT: static; weight-only, which has the checkpoint by another path; an ONNX file."""
    folder = tmp_path_factory.mktemp("artifacts")
    words = digits_words_into(folder / "results")
    source = next(word for word in words("quantize") if word.startswith("quantize.model_path="))
    same_source = source.replace("/checkpoints/", "/checkpoints/../checkpoints/")
    file = classifier_file("vit_tiny")
    graph = ["quantize.backend=onnxruntime", rules(), f"quantize.model_path={file}", SAMPLES]
    for name, overrides in (("static", STATIC), ("weights", [*WEIGHTS, same_source]), ("graph", graph)):
        assert main(words("quantize", "vit_tiny", *overrides, f"quantize.results_dir={folder / name}")) == 0
    return folder


@pytest.fixture
def pair(artifacts: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Copies of the first two."""
    static, weights = (shutil.copytree(artifacts / name, tmp_path / name) for name in ("static", "weights"))
    return static, weights


@pytest.fixture
def compare(taoq: Taoq, tmp_path: Path) -> Taoq:
    """`taoq compare` in few runs, into tmp_path/results."""
    return functools.partial(taoq, "compare", *FEW, f"results_dir={tmp_path / 'results'}")


def test_two_artifacts_beside_their_float_model(
    taoq: Taoq, compare: Taoq, digits_words: Words, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    code, out, err = compare(*map(str, pair))
    assert code == 0, err
    directory = tmp_path / "results" / "compare"
    results = read_json(directory / "results.json")
    manifests = [read_artifact(folder).manifest for folder in pair]
    source = manifests[0].source["path"]
    float_row, *rows = results["models"]
    assert [row["path"] for row in results["models"]] == [source, *map(str, pair)]
    assert [row["model"] for row in results["models"]] == ["vit_tiny.safetensors", "static", "weights"]
    assert [row["size"] for row in rows] == [manifest.size for manifest in manifests]
    assert [row["layers"] for row in rows] == [25, 24]
    assert float_row["size"] == manifests[0].float_size
    assert all(speed["speedup"] == 1.0 for speed in float_row["speeds"])
    assert all([speed["batch"] for speed in row["speeds"]] == [1, 2] for row in results["models"])
    for row, folder in zip(rows, pair, strict=True):
        assert taoq(*digits_words("evaluate", "vit_tiny", f"evaluate.checkpoint={folder}"))[0] == 0
        assert read_json(tmp_path / "results" / "evaluate" / "results.json")["metrics"] == row["figures"]
        change = row["figures"]["val_acc_1"] - float_row["figures"]["val_acc_1"]
        difference = row["difference"]
        assert difference["value"] == pytest.approx(change)
        assert difference["low"] <= difference["value"] <= difference["high"]
    change = rows[1]["figures"]["val_acc_1"] - rows[0]["figures"]["val_acc_1"]
    assert rows[1]["difference_to_first"]["value"] == pytest.approx(change)
    assert results["settings"]["quantize.backend"] == {"static": "modelopt.pytorch", "weights": "torchao"}
    assert "quantize.results_dir" not in results["settings"]
    layers = {layer: list(formats.values()) for layer, formats in results["layers"].items()}
    assert layers["head"] == ["int8 / int8", "float"]
    assert layers["blocks.0.attn.qkv"] == ["int8 / int8", "int8 / float"]
    assert "patch_embed.proj" not in layers  # float in both
    page = check_page(directory / "compare.html")
    for words in ("2 artifacts and 1 float model<", "blocks.0.attn.qkv", "quantize.mode", "val_acc_5"):
        assert words in page
    assert "weights against static: val_acc_1 " in out
    assert "5 more layers are in compare.html" in out
    assert f"report: {directory / 'compare.html'}" in out
    assert "warning" not in err


def test_torch_and_onnx_artifacts_are_each_compared_with_their_own_float_model(
    taoq: Taoq, artifacts: Path, tmp_path: Path
) -> None:
    folders = [artifacts / "static", artifacts / "graph"]
    where = f"results_dir={tmp_path / 'results'}"
    code, _, err = taoq("classification_pyt", "compare", *map(str, folders), *FEW, where)
    assert code == 0
    results = read_json(tmp_path / "results" / "compare" / "results.json")
    sources = [read_artifact(folder).manifest.source["path"] for folder in folders]
    assert [row["path"] for row in results["models"]] == [*sources, *map(str, folders)]
    assert "warning" not in err  # the file is an export of the checkpoint
    layers = {layer: list(formats.values()) for layer, formats in results["layers"].items()}
    assert layers["patch_embed.proj"] == ["float", "int8 / int8"]  # one layer, though the file calls it a Conv node
    assert "blocks.0.attn.qkv" not in layers  # equal in both
    assert "2 artifacts and 2 float models<" in check_page(tmp_path / "results" / "compare" / "compare.html")


def test_artifacts_of_different_checkpoints_get_a_warning(
    taoq: Taoq, compare: Taoq, digits_words: Words, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    source = Path(read_artifact(pair[0]).manifest.source["path"])
    state = load_file(source)
    state["head.bias"] += 1.0
    save_file(state, tmp_path / "other.safetensors")
    words = [*WEIGHTS, f"quantize.model_path={tmp_path / 'other.safetensors'}", f"quantize.results_dir={pair[1]}"]
    assert taoq(*digits_words("quantize", "vit_tiny", *words))[0] == 0
    code, _, err = compare(*map(str, pair))
    assert code == 0
    message = f"{source} and {tmp_path / 'other.safetensors'}: each is compared with its own\n"
    assert f"warning: the artifacts were made from different float models, {message}" in err


def test_one_artifact_is_compared_with_float_alone(compare: Taoq, pair: tuple[Path, Path], tmp_path: Path) -> None:
    code, out, _ = compare(str(pair[1]))
    assert code == 0
    assert "differ" not in out.replace("difference", "")
    results = read_json(tmp_path / "results" / "compare" / "results.json")
    assert (results["settings"], results["layers"]) == ({}, {})
    check_page(tmp_path / "results" / "compare" / "compare.html")


def test_folders_of_a_sweep_one_in_the_other_and_options_without_effect(
    compare: Taoq, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    outer = pair[0].rename(tmp_path / "lr=0.1")
    inner = shutil.copytree(pair[1], outer / "inner")
    code, _, err = compare(str(outer), str(inner), "benchmark.min_speedup=100", "benchmark.compile=true")
    assert code == 0, err
    assert "benchmark.min_speedup: has no effect on compare\n" in err
    assert "benchmark.compile: has no effect on compare\n" in err
    models = read_json(tmp_path / "results" / "compare" / "results.json")["models"]
    assert [model["model"] for model in models[1:]] == ["lr=0.1", "lr=0.1/inner"]


NO_ARTIFACT = "is not an artifact\nhint: name a folder that taoq <task> quantize wrote\n"
BAD_SIZES = "benchmark.batch_sizes: empty, not above 0, or has a size twice\nhint: write for example [1, 8]\n"
BAD_ARGUMENTS = {
    "nothing": (
        [],
        "compare: no artifact is given\nhint: name the folders of artifacts: taoq compare results/a results/b\n",
    ),
    "a folder that is not there": (["{tmp_path}/nothing"], "{tmp_path}/nothing: " + NO_ARTIFACT),
    "a file of an artifact": (["{static}", "{static}/manifest.json"], "{static}/manifest.json: " + NO_ARTIFACT),
    "an artifact twice": (["{static}", "{static}/"], "{static}/: is named twice\nhint: name each artifact once\n"),
    "a batch of nothing": (["{static}", "benchmark.batch_sizes=[0]"], BAD_SIZES),
    "a batch size twice": (["{static}", "benchmark.batch_sizes=[2, 2]"], BAD_SIZES),
}
"""Arguments, and the end of what is message about them."""


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_refused(compare: Taoq, artifacts: Path, tmp_path: Path, case: str) -> None:
    paths = {"tmp_path": tmp_path, "static": artifacts / "static"}
    arguments, message = BAD_ARGUMENTS[case]
    code, _, err = compare(*(word.format(**paths) for word in arguments))
    assert code != 0
    assert err.endswith(message.format(**paths))
    assert not (tmp_path / "results" / "compare").exists()


def test_a_spec_that_is_gone_and_one_that_is_given(compare: Taoq, pair: tuple[Path, Path], tmp_path: Path) -> None:
    spec = pair[0] / "experiment.yaml"
    kept = tmp_path / "kept.yaml"
    spec.rename(kept)
    code, _, err = compare(str(pair[0]))
    message = f"{spec}: the spec of this artifact is gone\nhint: give a spec with the evaluation data: -e spec.yaml\n"
    assert (code, err) == (1, message)
    assert compare(str(pair[0]), "-e", str(kept))[0] == 0


def test_a_float_model_that_changed_is_refused(compare: Taoq, pair: tuple[Path, Path]) -> None:
    manifest = read_json(pair[1] / "manifest.json")
    manifest["source"]["sha256"] = "0" * 64
    (pair[1] / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    code, _, err = compare(*map(str, pair))
    message = (
        f"{pair[1]}: the float model that it was made from, {manifest['source']['path']}, is missing or has changed\n"
        "hint: compare in the folder in which it was quantized, with that file in place\n"
    )
    assert (code, err[-len(message) :]) == (1, message)


def test_an_artifact_of_another_task_is_refused(compare: Taoq, pair: tuple[Path, Path]) -> None:
    manifest = read_json(pair[1] / "manifest.json")
    manifest["task"] = "rtdetr"
    (pair[1] / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    code, _, err = compare(*map(str, pair))
    message = f"{pair[1]}: is an artifact of rtdetr\nhint: run it with: taoq rtdetr ...\n"
    assert (code, err[-len(message) :]) == (1, message)


def test_a_marked_artifact_is_named(
    compare: Taoq, digits_words: Words, pair: tuple[Path, Path], taoq: Taoq, tmp_path: Path
) -> None:
    manifest = read_json(pair[1] / "manifest.json")
    manifest["accuracy"] = {
        "metric": "val_acc_1", "float": 0.98, "quantized": 0.95, "drop": 0.03, "max_drop": 0.01, "met": False,
    }  # fmt: skip
    (pair[1] / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    message = f"warning: {pair[1]}: does not meet its accuracy budget: val_acc_1 fell by 0.0300, 0.01 was accepted\n"
    assert message in taoq(*digits_words("evaluate", "vit_tiny", f"evaluate.checkpoint={pair[1]}"))[2]
    code, _, err = compare(*map(str, pair))
    assert code == 0
    assert message in err
    page = check_page(tmp_path / "results" / "compare" / "compare.html")
    assert "weights does not meet its accuracy budget: val_acc_1 fell by 3.00 points, 1.00 were accepted" in page


def test_help(taoq: Taoq) -> None:
    code, out, _ = taoq("compare", "--help")
    assert code == 0
    assert out.startswith("usage: taoq compare [-h] [-e SPEC] [ARTIFACT|key=value")
