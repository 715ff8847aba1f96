"""Small real data and models for all tests."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from taoq.cli import main

ROOT = Path(__file__).parent.parent
DIGITS = ROOT / "examples" / "digits"
SCENES = ROOT / "examples" / "digit_scenes"


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real handwritten digits as an image folder: train/, calibration/, val/, classes.txt."""
    folder = tmp_path_factory.mktemp("digits") / "data"
    subprocess.run(
        [sys.executable, str(DIGITS / "make_data.py"), "--out", str(folder)], check=True, capture_output=True
    )
    return folder


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real digits on real photographs: calibration/, val/ and their COCO json; 24 scenes are evaluated."""
    folder = tmp_path_factory.mktemp("scenes") / "data"
    subprocess.run(
        [sys.executable, str(SCENES / "make_data.py"), "--out", str(folder)], check=True, capture_output=True
    )
    data = json.loads((folder / "val.json").read_text(encoding="utf-8"))
    data["images"] = data["images"][:24]
    kept = {image["id"] for image in data["images"]}
    data["annotations"] = [entry for entry in data["annotations"] if entry["image_id"] in kept]
    (folder / "val_24.json").write_text(json.dumps(data), encoding="utf-8")
    return folder


@pytest.fixture
def scenes_words(scenes: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Words of a command line on the example detector: (action, *overrides); results below tmp_path."""

    def words(action: str, *overrides: str) -> list[str]:
        return [
            "rtdetr",
            action,
            "-e",
            str(SCENES / "rtdetr.yaml"),
            f"results_dir={tmp_path / 'results'}",
            f"dataset.test_data_sources.image_dir={scenes / 'val'}",
            f"dataset.test_data_sources.json_file={scenes / 'val_24.json'}",
            f"dataset.quant_calibration_data_sources.image_dir={scenes / 'calibration'}",
            f"dataset.quant_calibration_data_sources.json_file={scenes / 'calibration.json'}",
            f"quantize.model_path={SCENES / 'checkpoints' / 'rtdetr_small'}",
            "quantize.calibration.num_samples=40",
            "evaluate.device=cpu",
            "inference.device=cpu",
            *overrides,
        ]

    return words


@pytest.fixture(scope="session")
def digits_words_into(digits: Path) -> Callable[[Path], Callable[..., list[str]]]:
    """Words of a command line on an example network: (action, network, *overrides); results in a folder."""

    def into(results: Path) -> Callable[..., list[str]]:
        def words(action: str, network: str = "vit_tiny", *overrides: str) -> list[str]:
            return [
                "classification_pyt",
                action,
                "-e",
                str(DIGITS / f"{network}.yaml"),
                f"results_dir={results}",
                f"dataset.root_dir={digits}",
                f"dataset.val_dataset.images_dir={digits / 'val'}",
                f"dataset.test_dataset.images_dir={digits / 'val'}",
                f"dataset.quant_calibration_dataset.images_dir={digits / 'calibration'}",
                f"quantize.model_path={DIGITS / 'checkpoints' / f'{network}.safetensors'}",
                "evaluate.device=cpu",
                "inference.device=cpu",
                *overrides,
            ]

        return words

    return into


@pytest.fixture
def digits_words(
    digits_words_into: Callable[[Path], Callable[..., list[str]]], tmp_path: Path
) -> Callable[..., list[str]]:
    """The same, with results below tmp_path."""
    return digits_words_into(tmp_path / "results")


@pytest.fixture
def taoq(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command line in this process; returns exit code, stdout, stderr."""

    def run(*words: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main(list(words))
        out, err = capfd.readouterr()
        return code, out, err

    return run


@pytest.fixture
def work(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: spec.yaml, weights.safetensors, and data/ with two images of each digit in each split."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(Path(__file__).parent / "good.yaml", "spec.yaml")
    shutil.copy(DIGITS / "checkpoints" / "resnet_18.safetensors", "weights.safetensors")
    for split, source in (("val", "val"), ("test", "val"), ("calibration", "calibration")):
        for digit in map(str, range(10)):
            folder = Path("data", split, digit)
            folder.mkdir(parents=True)
            for image in sorted((digits / source / digit).iterdir())[:2]:
                shutil.copy(image, folder)
    shutil.copy(digits / "classes.txt", "data")
    return tmp_path


@pytest.fixture
def edit(work: Path) -> Callable[[Mapping[str, str]], None]:
    """Replace parts of spec.yaml, each of which it has once."""

    def replace(changes: Mapping[str, str]) -> None:
        text = Path("spec.yaml").read_text(encoding="utf-8")
        for old, new in changes.items():
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        Path("spec.yaml").write_text(text, encoding="utf-8")

    return replace


@pytest.fixture
def refused(taoq: Callable[..., tuple[int, str, str]], work: Path) -> Callable[..., tuple[int, str]]:
    """Run an action that must fail, on spec.yaml; returns exit code and stderr.

    What was in the folder is there as before. New is nothing, or, where the run had started, log.txt and
    status.json that ends with FAILURE.
    """

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}

    def run(action: str, *words: str) -> tuple[int, str]:
        before = files()
        code, _, err = taoq("classification_pyt", action, "-e", "spec.yaml", *words)
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
