"""Fixtures of the tests of bad input: a folder for runs that must fail, with a network, its data and an artifact."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from support.commands import Taoq
from support.small_spec import ONNX_EDITS, Edit, Quantize, Refused, RefusedByAll, replace_parts
from taoq.cli import main

GOOD_SPEC = Path(__file__).with_name("good.yaml")
CHECKPOINT = Path(__file__).parents[2] / "examples" / "digits" / "checkpoints" / "resnet_18.safetensors"


@pytest.fixture(scope="session")
def good_folder(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """spec.yaml, weights.safetensors, and data/ with two images of each digit in each split."""
    folder = tmp_path_factory.mktemp("good")
    shutil.copy(GOOD_SPEC, folder / "spec.yaml")
    shutil.copy(CHECKPOINT, folder / "weights.safetensors")
    for split, source in (("val", "val"), ("test", "val"), ("calibration", "calibration")):
        for digit in map(str, range(10)):
            images = folder / "data" / split / digit
            images.mkdir(parents=True)
            for image in sorted((digits / source / digit).iterdir())[:2]:
                shutil.copy(image, images)
    shutil.copy(digits / "classes.txt", folder / "data")
    return folder


@pytest.fixture(scope="session")
def good_artifact(good_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `quantize` makes in the good folder."""
    return quantize_copy(good_folder, tmp_path_factory.mktemp("quantized"))


@pytest.fixture(scope="session")
def exported(good_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network as an ONNX file."""
    folder = tmp_path_factory.mktemp("exported")
    words = [f"results_dir={folder}", f"export.onnx_file={folder / 'float.onnx'}", "export.on_cpu=true"]
    words += [f"export.checkpoint={CHECKPOINT}"]
    words += [f"dataset.quant_calibration_dataset.images_dir={good_folder / 'data' / 'calibration'}"]
    assert main(["classification_pyt", "export", "-e", str(GOOD_SPEC), *words]) == 0
    return folder / "float.onnx"


@pytest.fixture(scope="session")
def good_onnx_artifact(good_folder: Path, exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `quantize` makes of the ONNX file with onnxruntime."""
    return quantize_copy(good_folder, tmp_path_factory.mktemp("quantized"), exported)


def quantize_copy(source: Path, folder: Path, onnx_file: Path | None = None) -> Path:
    """Quantize in a copy of a folder, which stays as it is; returns the artifact."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    if onnx_file:
        shutil.copy(onnx_file, folder)
        edit_spec(folder / "spec.yaml", ONNX_EDITS)
    with contextlib.chdir(folder):
        assert main(["classification_pyt", "quantize", "-e", "spec.yaml"]) == 0
    return folder / "results" / "quantize"


def edit_spec(path: Path, changes: Mapping[str, str]) -> None:
    path.write_text(replace_parts(path.read_text(encoding="utf-8"), changes), encoding="utf-8")


@pytest.fixture
def work(good_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: spec.yaml, weights.safetensors, and data/ with two images of each digit in each split."""
    shutil.copytree(good_folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def edit(work: Path) -> Edit:
    """Replace parts of spec.yaml, each of which it has once."""
    return lambda changes: edit_spec(Path("spec.yaml"), changes)


@pytest.fixture
def quantize(taoq: Taoq, work: Path) -> Quantize:
    """Quantize as spec.yaml says; returns exit code and stderr."""

    def run(*overrides: str) -> tuple[int, str]:
        code, _, err = taoq("classification_pyt", "quantize", "-e", "spec.yaml", *overrides)
        return code, err

    return run


@pytest.fixture
def refused(taoq: Taoq, work: Path) -> Refused:
    """Run an action that must fail, on spec.yaml; returns exit code and stderr.

    What was in the folder is there as before. New is nothing, or, where the run had started, log.txt and
    status.json that ends with FAILURE.
    """

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}

    def run(action: str, *overrides: str) -> tuple[int, str]:
        before = files()
        code, _, err = taoq("classification_pyt", action, "-e", "spec.yaml", *overrides)
        after = files()
        started = [path for path in after if path.name == "status.json" and after[path] != before.get(path)]
        logs = {folder / name for folder in {path.parent for path in started} for name in ("status.json", "log.txt")}
        assert {path: data for path, data in after.items() if path not in logs} == {
            path: data for path, data in before.items() if path not in logs
        }
        for path in started:
            last = json.loads(after[path].splitlines()[-1])
            assert (last["status"], last["verbosity"]) == ("FAILURE", "ERROR")
        return code, err

    return run


@pytest.fixture
def artifact(good_artifact: Path, work: Path) -> Path:
    """A good artifact, results/quantize."""
    return Path(shutil.copytree(good_artifact, Path("results/quantize")))


@pytest.fixture
def onnx_file(exported: Path, edit: Edit, monkeypatch: pytest.MonkeyPatch) -> Path:
    """float.onnx, a spec that quantizes it statically, and a folder for temporary files that `refused` looks into."""
    edit(ONNX_EDITS)
    Path("temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", "temporary")
    shutil.copy(exported, "float.onnx")
    return Path("float.onnx")


@pytest.fixture
def onnx_artifact(good_onnx_artifact: Path, onnx_file: Path) -> Path:
    """A good artifact of float.onnx, quantized by onnxruntime: results/quantize."""
    return Path(shutil.copytree(good_onnx_artifact, Path("results/quantize")))


@pytest.fixture
def refused_by_all(refused: Refused, onnx_file: Path) -> RefusedByAll:
    """Run actions that read float.onnx, which must all say the same: (actions); returns exit code and stderr."""

    def run(*, actions: tuple[str, ...] = ("quantize", "inference")) -> tuple[int, str]:
        answers = {action: refused(action) for action in actions}
        assert len(set(answers.values())) == 1, answers
        return answers[actions[0]]

    return run
