"""The segmentation task of examples/plugin_segmentation, installed: every backend quantizes its network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "plugin_segmentation"
PROGRAM = """
import json, sys
import taoq

spec, results = sys.argv[1:]
int8 = {"dtype": "int8"}


def rules(*types, **activations):
    return json.dumps([{"module_name": name, "weights": int8, **activations} for name in types])


def run(action, *overrides):
    return taoq.run("segmentation", action, spec, [f"results_dir={results}", *overrides])


exported = run("export", "export.checkpoint=${quantize.model_path}", "export.on_cpu=true")
onnx_rules = rules("Conv", "MatMul", activations=int8)
ways = {
    "torchao": ["quantize.mode=weight_only_ptq", f"quantize.layers={rules('Linear')}"],
    "modelopt.pytorch": ["quantize.mode=static_ptq", f"quantize.layers={rules('Conv2d', 'Linear', activations=int8)}"],
    "modelopt.onnx": [f"quantize.model_path={exported.onnx_file}", f"quantize.layers={onnx_rules}"],
    "onnxruntime": [f"quantize.model_path={exported.onnx_file}", f"quantize.layers={onnx_rules}"],
}
figures = {}
for backend, overrides in ways.items():
    folder = f"{results}/{backend}"
    overrides = [f"quantize.backend={backend}", *overrides]
    result = run("quantize", *overrides, f"quantize.results_dir={folder}")
    evaluated = run("evaluate", f"evaluate.checkpoint={folder}")
    assert evaluated.metrics == result.evaluation.quantized_figures
    analysis = run("analyze", *overrides, "analyze.confirm=1", "analyze.num_samples=4", f"analyze.results_dir={folder}")
    figures[backend] = {
        "float": result.evaluation.float_figures["mIoU"],
        "quantized": evaluated.metrics["mIoU"],
        "interval": result.evaluation.difference.interval,
        "layers": len(result.plan.quantized),
        "ranked": sum(len(unit.layers) for unit in analysis.units),
        "versions": result.manifest.versions,
    }
int8_file = run("export", f"export.checkpoint={results}/modelopt.pytorch", f"export.onnx_file={results}/int8.onnx",
                "export.on_cpu=true")
print(json.dumps({"figures": figures, "exported": int8_file.quantized_layers}))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that has the package, installed by pip from a copy of the example."""
    folder = tmp_path_factory.mktemp("segmentation")
    shutil.copytree(EXAMPLE, folder / "source", ignore=shutil.ignore_patterns("data"))
    words = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(folder / "site")]
    subprocess.run([sys.executable, "-m", "pip", *words, str(folder / "source")], check=True)
    return {**os.environ, "PYTHONPATH": str(folder / "site")}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("segmentation_data")
    subprocess.run([sys.executable, str(EXAMPLE / "scenes.py"), "--out", str(folder), "--few"], check=True)
    return folder


def test_the_package_is_small() -> None:
    lines = sum(len(file.read_text().splitlines()) for file in EXAMPLE.glob("src/**/*.py"))
    assert lines < 250


def test_the_command_line_has_the_task(installed: dict[str, str], tmp_path: Path) -> None:
    program = "import sys; from taoq.cli import main; sys.exit(main(sys.argv[1:]))"
    words = [sys.executable, "-c", program]
    text = subprocess.run([*words, "--help"], env=installed, check=True, capture_output=True, text=True).stdout
    assert "  segmentation         semantic segmentation with SegFormer (taoq-segmentation 1.0.0)\n" in text
    spec = str(EXAMPLE / "segmentation.yaml")
    process = subprocess.run(
        [*words, "segmentation", "inference", "-e", spec, f"results_dir={tmp_path}"],
        env=installed,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2
    assert process.stderr.endswith(
        "inference: task segmentation has no inference\nhint: use evaluate, or the Python API\n"
    )


@pytest.mark.soak
def test_every_backend_quantizes_it(installed: dict[str, str], data: Path, tmp_path: Path) -> None:
    spec = tmp_path / "segmentation.yaml"
    text = (EXAMPLE / "segmentation.yaml").read_text()
    text = text.replace("examples/plugin_segmentation/data", str(data))
    spec.write_text(text.replace("examples/plugin_segmentation/checkpoints", str(EXAMPLE / "checkpoints")))
    words = [sys.executable, "-c", PROGRAM, str(spec), str(tmp_path / "results")]
    process = subprocess.run(words, env=installed, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    figures = result["figures"]
    assert list(figures) == ["torchao", "modelopt.pytorch", "modelopt.onnx", "onnxruntime"]
    for backend, row in figures.items():
        assert row["float"] > 0.5, backend
        assert abs(row["float"] - row["quantized"]) < 0.05, backend
        assert row["interval"], backend
        assert row["layers"] == row["ranked"] > 10, backend
        assert row["versions"]["taoq-segmentation"] == "1.0.0"
    assert result["exported"] == figures["modelopt.pytorch"]["layers"]
