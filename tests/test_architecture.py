"""Imports point one way, and each library is imported only in the files that own it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src" / "taoq"

MAY_IMPORT = {
    # room -> the rooms of taoq that it may import, besides itself and the base
    "__main__.py": ("cli.py",),
    "cli.py": ("actions", "spec", "tasks", "pipeline", "quantization", "runtimes", "views"),
    "actions": ("pipeline", "views", "tasks", "quantization", "spec"),
    "api": ("actions", "pipeline", "tasks", "runtimes", "quantization", "spec"),
    "views/tables.py": ("pipeline", "views", "quantization"),
    "views": (),
    "pipeline": ("tasks", "runtimes", "quantization", "spec", "views/pages.py"),
    "tasks": ("quantization/spec.py", "spec"),
    "runtimes": ("quantization/formats",),
    "quantization/backends": ("quantization", "spec"),
    "quantization/formats": ("quantization",),
    "quantization": ("spec",),
    "spec": (),
    "checkpoint.py": (),
    "containers.py": (),
    "plugins.py": (),
    "status.py": (),
    "files.py": (),
    "network.py": (),
    "plain.py": (),
    "errors.py": (),
}
"""The first room that a file is in counts."""
BASE = (
    "errors.py", "plain.py", "files.py", "network.py", "status.py", "plugins.py", "checkpoint.py", "containers.py",
    "__init__.py",
)  # fmt: skip
"""What every room may import; it imports no room."""
FORBIDDEN = {
    # file or room -> what it must not import all the same
    "quantization/plan.py": ("torch", "taoq.quantization.backends", "taoq.quantization.formats"),
    "quantization/spec.py": ("torch",),
    "quantization/types.py": ("torch",),
    "quantization/dtypes.py": ("torch", "numpy", "onnx"),
    "quantization/capability.py": ("torch", "taoq.quantization.backends"),
    "quantization/formats": ("taoq.quantization.backends", "taoq.quantization.plan"),
    "pipeline": ("taoq.views.tables", "rich", "torchao", "modelopt"),
    "actions": ("taoq.tasks.classification", "taoq.tasks.rtdetr"),
    "tasks/backbones": ("taoq.tasks.classification", "taoq.tasks.rtdetr", "taoq.spec"),
    "tasks/backbones/tao_names.py": ("torch", "timm"),
    "cli.py": ("torch", "omegaconf"),
}
OWNERS = {
    "torchao": ("quantization/backends/torchao.py",),
    "modelopt": ("quantization/backends/modelopt_pytorch", "quantization/backends/modelopt_onnx"),
    "onnxruntime": (
        "runtimes/onnxruntime.py",
        "quantization/backends/modelopt_onnx",
        "quantization/backends/onnxruntime_static.py",
        "quantization/formats/onnx",
    ),
    "onnx_graphsurgeon": (
        "quantization/formats/onnx/export.py",
        "quantization/formats/onnx/sizes.py",
        "quantization/backends/modelopt_onnx",
    ),
    "torchmetrics": ("tasks/metrics.py", "tasks/classification/metric.py"),
    "timm": ("tasks/backbones", "tasks/classification", "tasks/rtdetr/backbones.py"),
    "transformers": (
        "tasks/rtdetr/config.py",
        "tasks/rtdetr/network.py",
        "tasks/rtdetr/backbones.py",
        "tasks/image_processor.py",
    ),
    "pycocotools": ("tasks/rtdetr/metric.py", "tasks/rtdetr/matches.py"),
    "rich": ("views/tables.py", "status.py", "actions/base.py"),
    "jinja2": ("views/pages.py",),
}
HEAVY = {"torch", "torchvision", "timm", "transformers", "modelopt", "torchao", "onnx", "numpy", "rich"}


def imports(path: Path) -> Iterator[str]:
    """Modules that a file imports; `from taoq.tasks import base` imports taoq.tasks.base."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            inner = [f"{module}.{alias.name}" for alias in node.names if file_of(f"{module}.{alias.name}")]
            yield from inner or [module]


def file_of(module: str) -> str:
    """`tasks/base.py` of `taoq.tasks.base`; empty for a module that is not of taoq."""
    if module.partition(".")[0] != "taoq":
        return ""
    place = SRC.joinpath(*module.split(".")[1:])
    for file in (place.with_suffix(".py"), place / "__init__.py"):
        if file.is_file() and place != SRC:
            return file.relative_to(SRC).as_posix()
    return "__init__.py" if module == "taoq" else ""


def inside(file: str, place: str) -> bool:
    return file == place or file.startswith(f"{place}/")


def below(module: str, name: str) -> bool:
    return module == name or module.startswith(f"{name}.")


def files() -> list[Path]:
    paths = sorted(SRC.rglob("*.py"))
    assert len(paths) > 100
    return paths


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(SRC)))
def test_imports_point_one_way(path: Path) -> None:
    file = path.relative_to(SRC).as_posix()
    if file == "__init__.py":
        return  # it names the public API
    room = next(room for room in MAY_IMPORT if inside(file, room))
    for module in imports(path):
        imported = file_of(module)
        allowed = (room, *MAY_IMPORT[room], *BASE)
        assert not imported or any(inside(imported, place) for place in allowed), module
        for place, forbidden in FORBIDDEN.items():
            if inside(file, place):
                assert not any(below(module, name) for name in forbidden), module
        for library, owners in OWNERS.items():
            if below(module, library):
                assert any(inside(file, owner) for owner in owners), module


@pytest.mark.parametrize(
    "program",
    [
        "main(['--help'])",
        "main(['classification_pyt', '--help'])",
        "main(['rtdetr', 'quantize', '--help'])",
        "main(['nothing'])",
        "main(['classification_pyt', 'nothing'])",
        "main(['rtdetr', 'quantize'])",
        "import taoq; taoq.TaoqError; dir(taoq)",
        "import taoq.quantization.plan, taoq.quantization.capability",
    ],
)
def test_no_heavy_library_is_imported(program: str) -> None:
    code = (
        f"import sys; from taoq.cli import main; {program};"
        f"heavy = {HEAVY} & set(sys.modules); sys.exit(f'imported: {{heavy}}' if heavy else 0)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
