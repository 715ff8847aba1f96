"""Small real data and models for all tests."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from taoq.cli import main

ROOT = Path(__file__).parent.parent
DIGITS = ROOT / "examples" / "digits"


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real handwritten digits as an image folder: train/, calibration/, val/, classes.txt."""
    folder = tmp_path_factory.mktemp("digits") / "data"
    subprocess.run(
        [sys.executable, str(DIGITS / "make_data.py"), "--out", str(folder)], check=True, capture_output=True
    )
    return folder


@pytest.fixture
def digits_words(digits: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Words of a command line on an example network: (action, network, *overrides); results below tmp_path."""

    def words(action: str, network: str = "vit_tiny", *overrides: str) -> list[str]:
        return [
            "classification_pyt",
            action,
            "-e",
            str(DIGITS / f"{network}.yaml"),
            f"results_dir={tmp_path / 'results'}",
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


@pytest.fixture
def taoq(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command line in this process; returns exit code, stdout, stderr."""

    def run(*words: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main(list(words))
        out, err = capfd.readouterr()
        return code, out, err

    return run
