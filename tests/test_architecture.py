"""Imports point one way, and each library is imported only in the file that owns it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src" / "taoq"

FORBIDDEN = {
    # package or file -> what it must not import
    "errors.py": ("taoq",),
    "spec.py": ("torch", "taoq.tasks", "taoq.quantization", "taoq.actions"),
    "quantization": ("taoq.tasks", "taoq.actions", "taoq.artifact", "taoq.runtime"),
    "quantization/plan.py": ("torch", "taoq.quantization.backends"),
    "quantization/spec.py": ("torch", "taoq.quantization.backends"),
    "tasks": ("taoq.quantization.backends", "taoq.quantization.plan", "taoq.actions", "torchao", "modelopt"),
    "actions": ("taoq.tasks.classification", "taoq.tasks.rtdetr", "torchao", "modelopt"),
    "cli.py": ("torch", "taoq.quantization", "taoq.artifact", "taoq.runtime"),
}
OWNERS = {
    "torchao": ("quantization/backends/torchao.py",),
    "modelopt": ("quantization/backends/modelopt_pytorch.py", "quantization/backends/modelopt_onnx.py"),
    "onnxruntime": (
        "onnx_runtime.py",
        "quantization/backends/modelopt_onnx.py",
        "quantization/backends/onnx_calibration.py",
        "quantization/backends/onnx_measures.py",
        "quantization/backends/onnxruntime_static.py",
    ),
    "onnx_graphsurgeon": ("onnx_export.py", "quantization/backends/modelopt_onnx.py"),
    "torchmetrics": ("tasks/classification/metric.py",),
    "timm": ("tasks/classification/model.py",),
    "transformers": ("tasks/rtdetr/model.py", "tasks/rtdetr/network.py"),
    "pycocotools": ("tasks/rtdetr/metric.py",),
}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


def files() -> list[Path]:
    found = sorted(SRC.rglob("*.py"))
    assert len(found) > 30
    return found


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(SRC)))
def test_imports_point_one_way(path: Path) -> None:
    name = path.relative_to(SRC).as_posix()
    for place, forbidden in FORBIDDEN.items():
        if name == place or name.startswith(f"{place}/"):
            for module in imports(path):
                assert not any(module == word or module.startswith(f"{word}.") for word in forbidden), module
    for library, owners in OWNERS.items():
        if name not in owners:
            assert not any(module.partition(".")[0] == library for module in imports(path)), library


def test_the_command_line_imports_no_heavy_library() -> None:
    code = (
        "import sys; from taoq.cli import main; main(['--help']); main(['classification_pyt', '--help']);"
        "main(['nothing']); main(['classification_pyt', 'nothing']); main(['rtdetr', 'quantize']);"
        "heavy = {'torch', 'torchvision', 'timm', 'transformers', 'modelopt', 'torchao', 'onnx', 'numpy', 'rich'};"
        "heavy &= set(sys.modules);"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_core_plans_without_torch() -> None:
    code = "import sys; import taoq.quantization.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
