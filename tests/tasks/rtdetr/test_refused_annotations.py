"""A detector's annotations that do not fit are refused in two lines, and nothing is left behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.coco import remove_images
from support.commands import Refusal, edit_json
from support.damage import Damage

JSON_FIELD = "spec.yaml:15: dataset.test_data_sources.json_file"
FOLDER_FIELD = "spec.yaml:14: dataset.test_data_sources.image_dir"


def edited(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Edits the content of val.json."""
    return lambda: edit_json(Path("val.json"), change)


def annotated(**values: Any) -> Damage:
    """Sets values of the first annotation."""
    return edited(lambda data: data["annotations"][0].update(values))


def replace_json_with_a_folder() -> None:
    Path("val.json").unlink()
    Path("val.json").mkdir()


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda: Path("val.json").unlink(), "val.json cannot be read: No such file or directory"),
        (replace_json_with_a_folder, "val.json cannot be read: Is a directory"),
        (lambda: Path("val.json").write_text("{no"), "val.json is not JSON"),
        (lambda: Path("val.json").write_bytes(b"\xff\xfe\x00"), "val.json is not JSON"),
        (lambda: Path("val.json").write_text("[" * 100_000), "val.json is not JSON"),
    ],
    ids=["no file", "a folder", "no JSON", "a binary file", "brackets without end"],
)
def test_a_file_that_is_not_json_is_refused(refusal: Refusal, damage: Damage, fault: str) -> None:
    damage()
    assert refusal("evaluate") == (1, [f"{JSON_FIELD}: {fault}", "hint: name a COCO json"])


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        pytest.param(
            lambda: Path("val.json").write_text("[]"),
            "it is not an object with images, annotations and categories",
            id="a list",
        ),
        pytest.param(edited(lambda data: data.pop("images")), "it has no list 'images'", id="no images"),
        pytest.param(
            edited(lambda data: data.update(images={"1": "a.jpg"})), "it has no list 'images'", id="images by name"
        ),
        pytest.param(
            edited(lambda data: data["images"][1].pop("file_name")),
            "images[1] has no 'file_name'",
            id="an image without a file",
        ),
        pytest.param(
            edited(lambda data: data["images"][1].update(id=1)),
            "the ids of 'images' are not unique whole numbers",
            id="two images with one id",
        ),
        pytest.param(
            edited(lambda data: data["images"][1].update(id="2")),
            "the ids of 'images' are not unique whole numbers",
            id="an id that is a text",
        ),
        pytest.param(edited(lambda data: data.pop("categories")), "it has no list 'categories'", id="no categories"),
        pytest.param(
            edited(lambda data: data["categories"][1].update(id=1)),
            "the ids of 'categories' are not unique whole numbers",
            id="two categories with one id",
        ),
        pytest.param(edited(lambda data: data.pop("annotations")), "it has no list 'annotations'", id="no annotations"),
        pytest.param(
            edited(lambda data: data["annotations"][0].pop("bbox")),
            "annotations[0] has no 'bbox'",
            id="an annotation without a box",
        ),
    ],
)
def test_json_of_another_format_is_refused(refusal: Refusal, damage: Damage, fault: str) -> None:
    damage()
    assert refusal("evaluate") == (
        1,
        [f"val.json: is not a COCO json: {fault}", "hint: see cocodataset.org/#format-data"],
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": []}, ["val.json: names no images", "hint: name a COCO json with images"]),
        (
            {"categories": [], "annotations": []},
            ["val.json: names no categories", "hint: name a COCO json with categories"],
        ),
    ],
    ids=["images", "categories"],
)
def test_json_that_names_nothing_is_refused(refusal: Refusal, change: dict[str, Any], message: list[str]) -> None:
    edited(lambda data: data.update(change))()
    assert refusal("evaluate") == (1, message)


CORRECT = "correct the json"
BOX_IN_PIXELS = "correct the json: a bbox is [x, y, width, height] in pixels"


@pytest.mark.parametrize(
    ("values", "fault", "hint"),
    [
        ({"category_id": 77}, "its category_id 77 is not in categories", CORRECT),
        ({"category_id": {"name": "3"}}, "its category_id {'name': '3'} is not in categories", CORRECT),
        ({"image_id": 77}, "its image_id 77 is not in images", CORRECT),
        ({"image_id": [1]}, "its image_id [1] is not in images", CORRECT),
        ({"bbox": None}, "its bbox is not [x, y, width, height]", CORRECT),
        ({"bbox": [1, 2, 3]}, "its bbox is not [x, y, width, height]", CORRECT),
        ({"bbox": ["1", "2", "3", "4"]}, "its bbox is not [x, y, width, height]", CORRECT),
        ({"bbox": [200, 0, 9, 9]}, "its bbox [200, 0, 9, 9] is outside of the image, 160 x 160", BOX_IN_PIXELS),
        ({"bbox": [-20, 5, 20, 9]}, "its bbox [-20, 5, 20, 9] is outside of the image, 160 x 160", BOX_IN_PIXELS),
    ],
    ids=[
        "unknown category",
        "category that is an object",
        "unknown image",
        "image that is a list",
        "no box",
        "box of three numbers",
        "box of texts",
        "box right of its image",
        "box left of its image",
    ],
)
def test_a_wrong_annotation_is_refused(refusal: Refusal, values: dict[str, Any], fault: str, hint: str) -> None:
    annotated(**values)()
    assert refusal("evaluate") == (1, [f"val.json: annotation 1: {fault}", f"hint: {hint}"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(
            lambda: shutil.rmtree("data"),
            [f"{FOLDER_FIELD}: there is no folder data", "hint: name a folder of images"],
            id="no folder",
        ),
        pytest.param(
            lambda: Path("data/0002.jpg").unlink(),
            [
                "data/0002.jpg: val.json names it, but there is no such image",
                "hint: image_dir is data; file names are relative to it",
            ],
            id="one image",
        ),
        pytest.param(
            lambda: remove_images(Path("data")),
            [
                "data/0001.jpg: val.json names it, but there is no such image; 3 of 3 are missing",
                "hint: image_dir is data; file names are relative to it",
            ],
            id="all images",
        ),
    ],
)
def test_annotated_images_that_are_missing_are_named(refusal: Refusal, damage: Damage, message: list[str]) -> None:
    damage()
    assert refusal("evaluate") == (1, message)
