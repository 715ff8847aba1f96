"""The public API on a network and on an ONNX file of one's own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import taoq
from api.conftest import MODELOPT, ORT, TORCHAO, Data, TwoInputs, accuracy, int8

PUBLIC = [
    "AnalyzeResult",
    "BenchmarkResult",
    "CompareResult",
    "EvaluateResult",
    "ExportResult",
    "MissingDependency",
    "Notice",
    "QuantizeResult",
    "RequirementNotMet",
    "SpecError",
    "TaoqError",
    "analyze",
    "benchmark",
    "compare",
    "evaluate",
    "export",
    "load",
    "quantize",
    "run",
]
"""A name that leaves this list breaks somebody's notebook."""

RELOAD = """
import sys, torch, taoq
from api.conftest import TwoInputs
folder, images, numbers, output = sys.argv[1:]
network = taoq.load(folder, TwoInputs())
torch.save(network(torch.load(images), torch.load(numbers)), output)
"""


def test_the_public_names() -> None:
    assert taoq.__all__ == PUBLIC
    assert dir(taoq) == sorted([*PUBLIC, "__version__"])
    assert all(getattr(taoq, name) is not None for name in PUBLIC)
    with pytest.raises(AttributeError, match=r"^module 'taoq' has no attribute 'quantise'$"):
        _ = taoq.quantise


def test_importing_taoq_imports_no_library() -> None:
    program = "import sys, taoq; print(sorted({'torch', 'onnx', 'numpy', 'rich', 'omegaconf'} & set(sys.modules)))"
    process = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert process.stdout == "[]\n"


def test_a_result_says_what_was_done_and_what_it_cost(quantized: taoq.QuantizeResult) -> None:
    assert [layer.name for layer in quantized.layers] == ["stem", "image_head", "number_head"]
    assert all(layer.output_sqnr is not None and 25 < layer.output_sqnr < 60 for layer in quantized.layers)
    assert (quantized.section.mode, quantized.device) == ("static_ptq", "cpu")
    assert quantized.manifest.calibration == {"num_samples": 64, "seed": 0}
    assert quantized.evaluation is not None
    assert quantized.evaluation.num_images == 96
    assert quantized.evaluation.float_figures == {"MulticlassAccuracy": 1.0}
    difference = quantized.evaluation.difference
    assert difference.low is not None
    assert difference.low <= difference.value <= 0
    assert json.loads(json.dumps(quantized.to_json()))["layers_quantized"] == 3
    assert "modelopt.pytorch" in quantized._repr_html_()
    assert quantized.html().startswith("<!doctype html>")


def test_the_artifact_holds_the_reports(quantized: taoq.QuantizeResult) -> None:
    assert quantized.directory is not None
    assert sorted(path.name for path in quantized.directory.iterdir()) == [
        "experiment.yaml",
        "manifest.json",
        "quantization_report.html",
        "quantization_report.json",
        "quantized_model_modelopt.pytorch.pth",
    ]


def test_the_given_network_is_not_changed(network: TwoInputs, quantized: taoq.QuantizeResult, data: Data) -> None:
    assert network.training
    assert quantized.model is not network
    assert type(network.stem) is torch.nn.Conv2d
    with torch.inference_mode():
        assert torch.equal(network(data.images, data.numbers).argmax(1), data.labels)


def test_an_artifact_loads_in_another_process(quantized: taoq.QuantizeResult, data: Data, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("images", "numbers", "output")]
    for tensor, file in zip(data.example, files, strict=False):
        torch.save(tensor.clone(), file)
    words = [sys.executable, "-c", RELOAD, str(quantized.directory), *map(str, files)]
    subprocess.run(words, check=True, cwd=Path(__file__).parent.parent)
    assert torch.equal(torch.load(files[2]), quantized.model(*data.example))


def test_without_a_folder_nothing_is_kept(
    network: TwoInputs, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = taoq.quantize(network, TORCHAO, calibration=[data.example])
    assert (result.directory, result.payload, result.evaluation) == (None, None, None)
    assert [layer.name for layer in result.layers if layer.error] == ["image_head", "number_head"]
    assert result.section.mode == "weight_only_ptq"
    assert not list(tmp_path.iterdir())
    assert result.model(*data.example).shape == (5, 10)


def test_float_and_quantized_networks_are_evaluated(
    network: TwoInputs, quantized: taoq.QuantizeResult, data: Data, tmp_path: Path
) -> None:
    assert quantized.evaluation is not None
    loaded = taoq.load(quantized.directory or "", network)
    result = taoq.evaluate(loaded, data.evaluation, accuracy(), device="cpu", results_dir=tmp_path / "evaluate")
    assert result.metrics == quantized.evaluation.quantized_figures
    assert json.loads((tmp_path / "evaluate" / "results.json").read_text())["num_images"] == 96
    result = taoq.evaluate(network, data.evaluation, accuracy(), device="cpu")
    assert (result.metrics, result.checkpoint) == ({"MulticlassAccuracy": 1.0}, "TwoInputs")
    assert network.training


def test_a_budget_that_is_exceeded_is_an_error_with_the_result(network: TwoInputs, data: Data) -> None:
    def closeness(scores: torch.Tensor, float_scores: torch.Tensor) -> torch.Tensor:
        return -(scores - float_scores).abs().amax(1)

    with torch.inference_mode():
        float_scores = network(*data.example)
    config = {**MODELOPT, "layers": [int8("image_head")], "accuracy": {"max_drop": 0}}
    evaluation = [(*data.example, float_scores)]
    with pytest.raises(taoq.RequirementNotMet, match=r"^quantize\.accuracy\.max_drop: closeness falls from ") as error:
        taoq.quantize(network, config, calibration=data.calibration, evaluation=evaluation, metric=closeness)
    assert isinstance(error.value.result, taoq.QuantizeResult)
    assert error.value.exit_code == 4


def test_a_search_keeps_what_costs_too_much_float(network: TwoInputs, data: Data, tmp_path: Path) -> None:
    config = {**MODELOPT, "accuracy": {"max_drop": 0.05, "action": "search"}}
    result = taoq.quantize(
        network,
        config,
        calibration=data.calibration,
        evaluation=data.evaluation,
        metric=accuracy(),
        results_dir=tmp_path / "search",
    )
    assert result.search is not None
    assert result.accuracy is not None
    assert result.accuracy.met
    assert (tmp_path / "search" / "tuned.yaml").is_file()


def test_layers_are_ranked(network: TwoInputs, data: Data, tmp_path: Path) -> None:
    result = taoq.analyze(
        network,
        MODELOPT,
        evaluation=data.evaluation,
        metric=accuracy(),
        calibration=data.calibration,
        results_dir=tmp_path / "analyze",
        num_samples=16,
        confirm=1,
    )
    assert sorted(unit.name for unit in result.units) == ["image_head", "number_head", "stem"]
    assert (result.num_samples, result.float_figure) == (16, 1.0)
    assert [unit.metric is None for unit in result.units] == [False, True, True]
    assert (tmp_path / "analyze" / "analysis.html").is_file()


def test_a_network_is_exported_float_and_quantized(
    network: TwoInputs, quantized: taoq.QuantizeResult, data: Data, onnx_file: Path, tmp_path: Path
) -> None:
    assert json.loads(onnx_file.with_name("float_export.json").read_text())["proof"]["images"] == 8
    result = taoq.export(network, tmp_path / "int8.onnx", data.calibration, artifact=quantized.directory)
    assert (result.quantized_layers, result.proof.images) == (3, 8)
    assert list(map(str, result.inputs.values())) == ["[any, 3, 8, 8]", "[any, 4]"]
    again = taoq.export(network, tmp_path / "again.onnx", data.calibration, artifact=quantized)
    assert again.nodes == result.nodes


def test_an_onnx_file_is_quantized_evaluated_and_loaded(onnx_file: Path, data: Data, tmp_path: Path) -> None:
    result = taoq.quantize(
        onnx_file,
        ORT,
        calibration=data.calibration,
        evaluation=data.evaluation,
        metric=accuracy(),
        results_dir=tmp_path / "ort",
    )
    assert result.evaluation is not None
    assert result.payload == tmp_path / "ort" / "quantized_model.onnx"
    for model in (tmp_path / "ort", result.payload):
        evaluated = taoq.evaluate(model, data.evaluation, accuracy(), device="cpu")
        assert evaluated.metrics == result.evaluation.quantized_figures
    runtime = taoq.load(tmp_path / "ort", device="cpu")
    images, numbers = data.example
    outputs = runtime.run({"image": images, "numbers": numbers})
    assert list(outputs) == ["output"]
    assert outputs["output"].shape == (5, 10)
    timed = taoq.benchmark(tmp_path / "ort", onnx_file, data.calibration, device="cpu", runs=2, batch_sizes=[2])
    assert [(row.model, row.batch) for row in timed.rows] == [("float32", 2), ("quantized", 2)]
    assert [model.size for model in timed.models] == [onnx_file.stat().st_size, result.manifest.size]


def test_artifacts_are_compared(network: TwoInputs, quantized: taoq.QuantizeResult, data: Data, tmp_path: Path) -> None:
    weights = taoq.quantize(network, TORCHAO, calibration=[data.example], results_dir=tmp_path / "torchao")
    folders = [str(quantized.directory), str(weights.directory)]
    result = taoq.compare(
        folders,
        data.evaluation,
        accuracy(),
        model=network,
        device="cpu",
        results_dir=tmp_path / "compare",
        runs=2,
        batch_sizes=[1],
    )
    assert [row.backend for row in result.models] == ["float32", "modelopt.pytorch", "torchao"]
    assert result.models[0].model == "float32"
    assert (tmp_path / "compare" / "compare.html").is_file()


def test_a_torch_network_is_timed_beside_its_float_network(
    network: TwoInputs, quantized: taoq.QuantizeResult, data: Data
) -> None:
    result = taoq.benchmark(quantized.model, network, data.calibration, device="cpu", runs=2, batch_sizes=[1, 4])
    assert len(result.rows) == 4
    assert result.verdict.startswith("quantized / float32 in speed: ")
    assert network.training


class WithLoss(nn.Module):
    """Takes labels to compute a loss, like the networks of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(4, 10)

    def forward(self, numbers: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        assert labels is None, "taoq quantizes what inference computes"
        return {"logits": self.classifier(numbers)}


def test_labels_that_a_network_can_take_are_targets(data: Data) -> None:
    batches = [{"numbers": data.numbers, "labels": data.labels}]
    result = taoq.quantize(
        WithLoss(),
        {"backend": "modelopt.pytorch", "layers": [int8()], "device": "cpu"},
        calibration=batches,
        evaluation=batches,
        metric=lambda outputs, targets: (outputs.argmax(1) == targets).float(),
    )
    assert [layer.name for layer in result.layers] == ["classifier"]
    assert result.evaluation is not None
    assert result.evaluation.num_images == len(data.labels)


def test_an_artifact_of_a_task_loads_without_its_network() -> None:
    kept = Path(__file__).parent.parent / "schema_1"
    network = taoq.load(kept / "modelopt.pytorch")
    assert isinstance(network, torch.nn.Module)
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    outputs = taoq.load(kept / "onnxruntime", device="cpu").run({"input": torch.zeros(2, 3, 32, 32)})
    assert outputs["output"].shape == (2, 10)
