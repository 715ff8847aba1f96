"""`benchmark` on a real ONNX artifact and a real torch artifact; its order of turns without any model."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from support.commands import Taoq, Words, export_words, read_json, rules
from taoq.cli import main
from taoq.pipeline.artifacts import read_artifact
from taoq.pipeline.timing import run_in_turns

FEW = ["benchmark.device=cpu", "benchmark.batch_sizes=[1, 2]", "benchmark.runs=3", "benchmark.warmup=1"]


class NamedRuntime:
    """A model that writes its name down when it runs."""

    device, fixed_batch = "cpu", None

    def __init__(self, name: str, log: list[str]) -> None:
        self._name, self._log = name, log

    def run(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        self._log.append(self._name)
        return inputs

    def compiled(self) -> None:
        return None

    def half(self) -> None:
        return None


def test_models_run_in_turns_and_the_order_is_reversed_each_time() -> None:
    log: list[str] = []
    models = {name: NamedRuntime(name, log) for name in ("a", "b")}
    seconds = run_in_turns(models, {"x": torch.zeros(1)}, warmup=1, runs=3)
    assert log == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


@pytest.fixture(scope="module")
def onnx_artifact(
    digits_words_into: Callable[[Path], Words],
    classifier_file: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """An artifact of the ONNX file `float.onnx` beside it."""
    folder = tmp_path_factory.mktemp("artifact")
    words, file = digits_words_into(folder / "results"), folder / "float.onnx"
    shutil.copy(classifier_file("resnet_18"), file)
    quantize = [
        "quantize.backend=onnxruntime",
        rules(),
        f"quantize.model_path={file}",
        f"quantize.results_dir={folder / 'q'}",
        "quantize.calibration.num_samples=8",
    ]
    assert main(words("quantize", "resnet_18", *quantize)) == 0
    return folder / "q"


def test_an_onnx_artifact_is_measured_against_what_it_was_made_from(
    taoq: Taoq, digits_words: Words, onnx_artifact: Path, tmp_path: Path
) -> None:
    code, out, _ = taoq(*digits_words("benchmark", "resnet_18", f"benchmark.checkpoint={onnx_artifact}", *FEW))
    assert code == 0
    results = read_json(tmp_path / "results" / "benchmark" / "results.json")
    assert [(row["model"], row["batch"]) for row in results["rows"]] == [
        ("float32", 1),
        ("quantized", 1),
        ("float32", 2),
        ("quantized", 2),
    ]
    assert all(0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"] for row in results["rows"])
    assert all(row["speedup"] == 1.0 for row in results["rows"] if row["model"] == "float32")
    small, large = (model["size"] for model in reversed(results["models"]))
    assert small < 0.30 * large
    assert all(model["peak_memory"] > 0 for model in results["models"])
    assert "quantized / float32 in speed: " in out


def test_a_speed_that_is_not_reached_is_exit_code_4(taoq: Taoq, digits_words: Words, onnx_artifact: Path) -> None:
    words = [f"benchmark.checkpoint={onnx_artifact}", *FEW, "benchmark.min_speedup=1000"]
    code, _, err = taoq(*digits_words("benchmark", "resnet_18", *words))
    assert code == 4
    assert " times as fast as float32, 1000 is asked\nhint: quantized / float32 in speed: " in err


def test_a_batch_size_in_the_wrong_field_is_refused(taoq: Taoq, digits_words: Words, onnx_artifact: Path) -> None:
    words = [f"benchmark.checkpoint={onnx_artifact}", "benchmark.batch_size=4"]
    code, _, err = taoq(*digits_words("benchmark", "resnet_18", *words))
    assert (code, err) == (
        2,
        "override benchmark.batch_size=4: benchmark.batch_size: has no meaning here: a benchmark takes a list\n"
        "hint: write benchmark.batch_sizes: [4]\n",
    )


def test_a_contradiction_of_the_flag_is_refused(taoq: Taoq, digits_words: Words, onnx_artifact: Path) -> None:
    words = [f"benchmark.checkpoint={onnx_artifact}", *FEW, "benchmark.is_quantized=false"]
    code, _, err = taoq(*digits_words("benchmark", "resnet_18", *words))
    assert code == 2
    assert f"benchmark.is_quantized: is false, but {onnx_artifact} is a quantized artifact\n" in err


def test_a_file_with_a_fixed_batch_says_what_it_runs(taoq: Taoq, digits_words: Words, tmp_path: Path) -> None:
    file = tmp_path / "fixed.onnx"
    assert taoq(*export_words(digits_words, "resnet_18", file, "export.batch_size=2"))[0] == 0
    quantize = ["quantize.backend=onnxruntime", rules(), f"quantize.model_path={file}"]
    quantize += [f"quantize.results_dir={tmp_path / 'q'}", "quantize.calibration.num_samples=8"]
    assert taoq(*digits_words("quantize", "resnet_18", *quantize))[0] == 0
    words = [f"benchmark.checkpoint={tmp_path / 'q'}", *FEW, "benchmark.batch_sizes=[2, 3]", "benchmark.compile=true"]
    code, _, err = taoq(*digits_words("benchmark", "resnet_18", *words))
    assert code == 0
    assert "benchmark.batch_sizes: float32 takes 2 images at once: for 3 it runs 2 time(s), on 4 images\n" in err
    assert "for 2 it runs" not in err
    assert "benchmark.compile: has no effect on ONNX files\n" in err


def test_a_float_checkpoint_and_a_quantized_baseline_are_refused(
    taoq: Taoq, digits_words: Words, onnx_artifact: Path
) -> None:
    source, payload = onnx_artifact.parent / "float.onnx", onnx_artifact / "quantized_model.onnx"
    name_quantized, name_float = "name an artifact, or a quantized ONNX file", "name the float checkpoint or ONNX file"
    for checkpoint, baseline, message in (
        (
            source,
            source,
            f"checkpoint: {source} is not quantized: its speed is that of its float model\n{name_quantized}",
        ),
        ("nothing", source, f"checkpoint: there is no nothing\n{name_quantized}"),
        (onnx_artifact, onnx_artifact, f"baseline: {onnx_artifact} is quantized\n{name_float}"),
        (payload, payload, f"baseline: {payload} is quantized\n{name_float}"),
    ):
        words = [f"benchmark.checkpoint={checkpoint}", f"benchmark.baseline={baseline}"]
        code, _, err = taoq(*digits_words("benchmark", "resnet_18", *words))
        assert code == 2
        assert err.replace("hint: ", "").endswith(f": benchmark.{message}\n")


def test_a_float_model_that_is_gone_is_refused(taoq: Taoq, digits_words: Words, onnx_artifact: Path) -> None:
    source = onnx_artifact.parent / "float.onnx"
    moved = source.rename(onnx_artifact.parent / "moved.onnx")
    try:
        code, _, err = taoq(*digits_words("benchmark", "resnet_18", f"benchmark.checkpoint={onnx_artifact}", *FEW))
    finally:
        moved.rename(source)  # for the other tests
    assert (code, err.splitlines()[-2:]) == (
        2,
        [
            f"benchmark.baseline: missing: {source} is missing or has changed",
            "hint: name the float checkpoint or ONNX file",
        ],
    )


def test_a_torch_artifact_is_measured_too(taoq: Taoq, digits_words: Words, tmp_path: Path) -> None:
    layers = rules("int8", "Linear", activations=False)
    kind = ["quantize.backend=torchao", "quantize.mode=weight_only_ptq", f"quantize.results_dir={tmp_path / 'q'}"]
    assert taoq(*digits_words("quantize", "vit_tiny", layers, *kind))[0] == 0
    words = [f"benchmark.checkpoint={tmp_path / 'q'}", "benchmark.device=cpu", "benchmark.runs=2"]
    words += ["benchmark.compile=true", "benchmark.warmup=0"]
    code, out, err = taoq(*digits_words("benchmark", "vit_tiny", *words, "benchmark.batch_sizes=[1]"))
    assert code == 0, err
    results = read_json(tmp_path / "results" / "benchmark" / "results.json")
    rows = {row["model"]: row for row in results["rows"]}
    assert list(rows) == ["float32", "quantized", "float32, compiled", "quantized, compiled"]
    assert rows["float32, compiled"]["speedup"] == 1.0
    eager, compiled = (rows[name]["speedup"] for name in ("quantized", "quantized, compiled"))
    assert f"quantized / float32 in speed: {eager:.2f} at batch 1; compiled: {compiled:.2f} at batch 1" in out
    assert results["command"].startswith("taoq classification_pyt benchmark -e ")
    manifest = read_artifact(tmp_path / "q").manifest
    assert [model["size"] for model in results["models"]] == [manifest.float_size, manifest.size]


@pytest.mark.soak
def test_a_model_that_torch_compile_fails_on_is_measured_without_it(
    taoq: Taoq, digits_words: Words, tmp_path: Path
) -> None:
    """ModelOpt's modules are such; every backend's own kind of failure is a RuntimeError of torch."""
    kind = ["quantize.backend=modelopt.pytorch", rules(), f"quantize.results_dir={tmp_path / 'q'}"]
    kind += ["quantize.calibration.num_samples=8"]
    assert taoq(*digits_words("quantize", "vit_tiny", *kind))[0] == 0
    words = [f"benchmark.checkpoint={tmp_path / 'q'}", *FEW, "benchmark.compile=true", "benchmark.batch_sizes=[1]"]
    code, out, err = taoq(*digits_words("benchmark", "vit_tiny", *words))
    assert code == 0, err
    assert "benchmark.compile: torch.compile fails on the quantized model, which is measured without it: " in err
    results = read_json(tmp_path / "results" / "benchmark" / "results.json")
    assert [row["model"] for row in results["rows"]] == ["float32", "quantized", "float32, compiled"]
    assert "; compiled: " not in out
