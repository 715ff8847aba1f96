"""Fixtures of the tests of detectors: small data, and a folder for runs that must fail."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from support.coco import write_three_images
from support.commands import Taoq, read_json

SCENES = Path(__file__).parents[3] / "examples" / "digit_scenes"


@pytest.fixture
def three_images(tmp_path: Path) -> Path:
    """A folder with images/ and val.json: three images, the categories 1: a and 2: b, no annotations."""
    write_three_images(tmp_path)
    return tmp_path


@pytest.fixture
def detector_folder(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: spec.yaml, model/, val.json and data/ with three scenes, which every action reads."""
    monkeypatch.chdir(tmp_path)
    data = read_json(scenes / "val.json")
    data["images"] = data["images"][:3]
    data["annotations"] = [entry for entry in data["annotations"] if entry["image_id"] <= 3]
    Path("val.json").write_text(json.dumps(data), encoding="utf-8")
    Path("data").mkdir()
    for image in data["images"]:
        shutil.copy(scenes / "val" / image["file_name"], "data")
    shutil.copytree(SCENES / "checkpoints" / "rtdetr_small", "model")
    spec = yaml.safe_load((SCENES / "rtdetr.yaml").read_text(encoding="utf-8"))
    spec["results_dir"] = "results"
    spec["dataset"]["test_data_sources"] = {"image_dir": "data", "json_file": "val.json"}
    spec["dataset"]["quant_calibration_data_sources"] = {"image_dir": "data"}
    spec["dataset"]["infer_data_sources"] = {"image_dir": ["data"]}
    spec["quantize"]["model_path"] = "model"
    spec["quantize"]["results_dir"] = "results/quantize"
    for action in ("evaluate", "inference"):
        spec[action] = {"checkpoint": "model", "device": "cpu"}
    Path("spec.yaml").write_text(yaml.safe_dump(spec), encoding="utf-8")
    return tmp_path


@pytest.fixture
def refusal(taoq: Taoq, detector_folder: Path) -> Callable[..., tuple[int, list[str]]]:
    """Run an action that must fail, on spec.yaml; returns the exit code and the faults on stderr.

    Nothing else is written than log.txt and status.json, which ends with FAILURE.
    """

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in detector_folder.rglob("*") if path.is_file()}

    def run(action: str, *overrides: str) -> tuple[int, list[str]]:
        before = files()
        code, _, err = taoq("rtdetr", action, "-e", "spec.yaml", *overrides)
        after = files()
        assert before.keys() <= after.keys()
        written = {path: data for path, data in after.items() if before.get(path) != data}
        assert {path.name for path in written} <= {"status.json", "log.txt"}
        for path, data in written.items():
            if path.name == "status.json":
                assert json.loads(data.splitlines()[-1])["status"] == "FAILURE"
        lines = err.splitlines()
        first_hint = next((number for number, line in enumerate(lines) if "hint: " in line), 1)
        return code, lines[first_hint - 1 :]

    return run
