"""Small real data and models for all tests."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from taoq.cli import main

ROOT = Path(__file__).parent.parent
DIGITS = ROOT / "examples" / "digits"
SCENES = ROOT / "examples" / "digit_scenes"


@pytest.fixture(autouse=True)
def seed() -> None:
    """Random weights are the same in every order of the tests."""
    torch.manual_seed(0)


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
