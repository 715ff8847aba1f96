"""Image files of a detector that are damaged or missing are refused, and nothing is left behind."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from support.coco import remove_images
from support.commands import Refusal, Taoq, read_json, unchanged
from support.damage import Damage

IMAGE_DIR = "dataset.quant_calibration_data_sources.image_dir"
JSON_FILE = "dataset.quant_calibration_data_sources.json_file"
NO_IMAGE = ["data/0002.jpg: cannot be read as an image: its content is not in a known image format"]
CUT_OFF = ["data/0002.jpg: cannot be read as an image: image file is truncated (21 bytes not processed)"]
REPLACE = ["hint: replace the file, or take it out of the folder"]


def list_image(name: str) -> None:
    """Write list.json, which names one image and nothing else."""
    Path("list.json").write_text(json.dumps({"images": [{"id": 1, "file_name": name}]}))


@pytest.mark.parametrize(
    ("damage", "overrides", "message"),
    [
        pytest.param(
            lambda: Path("data").rename("elsewhere"),
            (),
            [f"spec.yaml:12: {IMAGE_DIR}: there is no folder data", "hint: name a folder of images"],
            id="no folder",
        ),
        pytest.param(
            lambda: remove_images(Path("data")),
            (),
            [
                f"spec.yaml:12: {IMAGE_DIR}: data has no images",
                "hint: image files end in .jpg, .png, .webp, .tif or another suffix that Pillow reads",
            ],
            id="a folder without images",
        ),
        pytest.param(
            unchanged,
            (f"{JSON_FILE}=nowhere.json",),
            [
                f"override {JSON_FILE}=nowhere.json: {JSON_FILE}: nowhere.json cannot be read:"
                " No such file or directory",
                "hint: name a COCO json",
            ],
            id="no json",
        ),
        pytest.param(
            lambda: list_image("x/0001.jpg"),
            (f"{JSON_FILE}=list.json",),
            [
                "data/x/0001.jpg: list.json names it, but there is no such image",
                "hint: image_dir is data; file names are relative to it",
            ],
            id="a json of other paths",
        ),
    ],
)
def test_calibration_images_that_are_missing_are_refused(
    refusal: Refusal, damage: Damage, overrides: tuple[str, ...], message: list[str]
) -> None:
    damage()
    assert refusal("quantize", *overrides) == (1, message)


@pytest.mark.parametrize("action", ["quantize", "evaluate"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda: Path("data/0002.jpg").write_bytes(b"no picture"), NO_IMAGE + REPLACE),
        (lambda: os.truncate("data/0002.jpg", 900), CUT_OFF + REPLACE),
    ],
    ids=["no image", "cut off"],
)
def test_a_damaged_image_is_named(refusal: Refusal, action: str, damage: Damage, message: list[str]) -> None:
    damage()
    assert refusal(action) == (1, message)


@pytest.mark.parametrize("action", ["evaluate", "inference"])
def test_a_damaged_image_is_named_by_reader_processes_too(refusal: Refusal, action: str) -> None:
    os.truncate("data/0002.jpg", 0)
    assert refusal(action, "dataset.workers=2", "dataset.batch_size=1") == (1, NO_IMAGE + REPLACE)


@pytest.mark.usefixtures("detector_folder")
def test_calibration_needs_neither_annotations_nor_categories(taoq: Taoq) -> None:
    list_image("0001.jpg")
    code, _, err = taoq("rtdetr", "quantize", "-e", "spec.yaml", f"{JSON_FILE}=list.json")
    assert code == 0, err
    report = read_json(Path("results/quantize/quantization_report.json"))
    assert report["calibration"] == {"num_samples": 1, "seed": 0}


@pytest.mark.usefixtures("detector_folder")
def test_an_earlier_result_stays_when_a_later_run_is_refused(taoq: Taoq) -> None:
    words = ("rtdetr", "evaluate", "-e", "spec.yaml")
    assert taoq(*words)[0] == 0
    before = Path("results/evaluate/results.json").read_bytes()
    os.truncate("data/0003.jpg", 0)
    assert taoq(*words)[0] == 1
    assert Path("results/evaluate/results.json").read_bytes() == before
