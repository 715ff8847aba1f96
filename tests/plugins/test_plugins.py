"""Backends, runtimes and tasks of other packages, found by their entry points; broken ones stop nobody else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Words = Callable[..., list[str]]

ACME = """
import dataclasses
from types import SimpleNamespace

from taoq.quantization.backends.torchao import TorchaoBackend
from taoq.runtimes.torch import TorchKind


class AcmeBackend(TorchaoBackend):
    capability = dataclasses.replace(
        TorchaoBackend.capability, name="acme", payload="acme.pth", options={"flavour": "How it tastes"}
    )

    def check(self, section):
        return []

    def calibrate(self, model, plan, batches, options, **more):
        return super().calibrate(model, plan, batches, {}, **more)


class AcmeRuntime(TorchKind):
    name = "acme-run"
    options = {"threads": "Number of threads"}

    def open(self, *arguments):
        print("acme-run opens with", arguments[-1])
        return super().open(*arguments)


BACKEND, RUNTIME, NO_BACKEND = AcmeBackend(), AcmeRuntime(), SimpleNamespace(capability=None)
"""
POINTS = {
    "acme-1.2": {
        "taoq.backends": {"acme": "acme:BACKEND", "half": "acme:NO_BACKEND"},
        "taoq.runtimes": {"acme-run": "acme:RUNTIME"},
    },
    "broken-0.1": {
        "taoq.tasks": {"rtdetr": "broken:TASK", "broken": "broken:TASK", "absent": "absent:TASK"},
        "taoq.backends": {"broken": "broken:BACKEND"},
    },
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of installed packages: one with a backend and a runtime, and one that cannot be imported."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "acme.py").write_text(ACME)
    (folder / "broken.py").write_text("raise RuntimeError('no licence\\nsecond line')\n")
    for name, groups in POINTS.items():
        information = folder / f"{name}.dist-info"
        information.mkdir()
        project, version = name.split("-")
        summary = f"Summary: the summary of {project}\n"
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n{summary}")
        lines = [
            f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in points.items())
            for group, points in groups.items()
        ]
        (information / "entry_points.txt").write_text("".join(lines))
    return folder


@pytest.fixture
def run(site: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command line in a new process that has the packages; returns code, stdout, stderr."""

    def command(*words: str) -> subprocess.CompletedProcess[str]:
        program = "import sys; from taoq.cli import main; sys.exit(main(sys.argv[1:]))"
        environment = {**os.environ, "PYTHONPATH": str(site)}
        return subprocess.run(
            [sys.executable, "-c", program, *words], env=environment, cwd=tmp_path, capture_output=True, text=True
        )

    return command


def test_help_names_each_package(run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    process = run("--help")
    lines = process.stdout.splitlines()
    for line in (
        "  broken               the summary of broken (broken 0.1)",
        "  acme                 the summary of acme (acme 1.2)",
        "  acme-run             the summary of acme (acme 1.2)",
    ):
        assert line in lines
    assert (process.returncode, process.stderr) == (
        0,
        "warning: task rtdetr: of the package broken is ignored: taoq has a task of this name\n",
    )
    options = run("classification_pyt", "quantize", "--options", "acme").stdout
    assert options == "options of acme, in quantize.backend_kwargs:\n  flavour  How it tastes\n"


def test_specs_take_them_with_their_options(
    run: Callable[..., subprocess.CompletedProcess[str]], digits_words: Words, tmp_path: Path
) -> None:
    quantize = digits_words(
        "quantize",
        "resnet_18",
        "quantize.backend=acme",
        "quantize.mode=weight_only_ptq",
        'quantize.layers=[{"module_name":"Linear","weights":{"dtype":"int8"}}]',
    )
    process = run(*quantize, "quantize.backend_kwargs={flavor: salt, x: 1}")
    assert process.returncode == 2
    assert process.stderr.splitlines()[-4:] == [
        "override quantize.backend_kwargs={flavor: salt, x: 1}: quantize.backend_kwargs.flavor: backend acme has no"
        " option 'flavor'",
        "hint: did you mean 'flavour'?",
        "override quantize.backend_kwargs={flavor: salt, x: 1}: quantize.backend_kwargs.x: backend acme has no option"
        " 'x'",
        "hint: its options are flavour",
    ]
    process = run(*quantize, "quantize.backend_kwargs={flavour: salt}")
    assert process.returncode == 0, process.stderr
    artifact = tmp_path / "results" / "quantize"
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert (manifest["backend"], manifest["payload"], manifest["versions"]["acme"]) == ("acme", "acme.pth", "1.2")
    evaluate = digits_words("evaluate", "resnet_18", f"evaluate.checkpoint={artifact}", "evaluate.runtime=acme-run")
    process = run(*evaluate, "evaluate.runtime_kwargs={threads: 2}")
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("acme-run opens with {'threads': 2}\n")


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (["broken", "default_specs"], "the task: task broken"),
        (["rtdetr", "quantize", "--options", "broken"], "quantize.backend: backend broken"),
    ],
    ids=["task", "backend"],
)
def test_a_broken_package_names_itself(
    run: Callable[..., subprocess.CompletedProcess[str]], words: list[str], where: str
) -> None:
    process = run(*words)
    assert (process.returncode, process.stderr.splitlines()[-2:]) == (
        1,
        [
            f"{where} of broken 0.1 cannot be imported: RuntimeError: no licence",
            "hint: repair broken, or uninstall it",
        ],
    )


def test_a_broken_package_stops_nothing_else(run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    process = run("rtdetr", "default_specs")
    assert process.returncode == 0
    assert "torchao, modelopt.pytorch, modelopt.onnx, onnxruntime, acme, half, broken" in process.stdout
    process = run("absent", "default_specs")
    assert process.stderr.splitlines()[-2:] == [
        "the task: task absent of broken 0.1 cannot be imported: ModuleNotFoundError: No module named 'absent'",
        "hint: repair broken, or uninstall it",
    ]
    process = run("rtdetr", "quantize", "--options", "half")
    assert process.stderr.splitlines()[-2:] == [
        "quantize.backend: backend half (acme 1.2) lacks methods of a backend",
        "hint: see taoq.quantization.backends.base.Backend",
    ]
