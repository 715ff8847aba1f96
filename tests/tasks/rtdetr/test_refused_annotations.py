"""A detector's annotations that do not fit are refused in two lines, and nothing is left behind."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.coco import remove_images
from support.commands import Refusal, edit_json, read_json
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
            edited(lambda data: data["images"][1].update(id="2")),
            "of the ids of 'images', some are numbers and some texts: 1, '2'",
            id="an id that is a text",
        ),
        pytest.param(
            edited(lambda data: data["images"][1].update(id=None)),
            "images[1] has the id None, which is not a number",
            id="no id",
        ),
        pytest.param(
            edited(lambda data: data["categories"][2].update(id=[1])),
            "categories[2] has the id [1], which is not a number",
            id="an id that is a list",
        ),
        pytest.param(edited(lambda data: data.pop("categories")), "it has no list 'categories'", id="no categories"),
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
    ("change", "what"),
    [
        (lambda data: data["images"][1].update(id=1), "its images '0001.jpg' and '0002.jpg' have the same id, 1"),
        (lambda data: data["categories"][1].update(id=1), "its categories '0' and '1' have the same id, 1"),
        (lambda data: data["images"][1].update(file_name=None), "its image 2 has the file_name None"),
    ],
    ids=["two images with one id", "two categories with one id", "an image without a file"],
)
def test_entries_that_contradict_each_other_are_refused(
    refusal: Refusal, change: Callable[[dict[str, Any]], object], what: str
) -> None:
    edited(change)()
    assert refusal("evaluate") == (1, [f"val.json: {what}", "hint: correct the json"])


def rewrite(change: Callable[[str], bytes]) -> Damage:
    """Writes the text of val.json in another way."""
    return lambda: Path("val.json").write_bytes(change(Path("val.json").read_text(encoding="utf-8")))


def accented(text: str) -> str:
    return text.replace('"name": "1"', '"name": "un \u00e9t\u00e9"')


@pytest.mark.parametrize(
    ("damage", "fault", "hint"),
    [
        (rewrite(lambda text: accented(text).encode("latin-1")), "is not UTF-8: byte {at} is 0xe9", "save it in UTF-8"),
        (rewrite(lambda text: gzip.compress(text.encode())), "is compressed (gzip)", "unpack it"),
        (
            rewrite(lambda text: f"{text}\n{text}".encode()),
            "has several JSON values, as in JSON Lines",
            "write one object, with all images",
        ),
        (rewrite(lambda text: f'{text[:-1]}, "images": []}}'.encode()), "has 'images' twice", "keep one of them"),
        (rewrite(lambda text: text[:-9].encode()), "is not JSON", "name a COCO json"),
        (rewrite(lambda text: text.replace('"images"', "'images'").encode()), "is not JSON", "name a COCO json"),
        (rewrite(lambda text: f"{text}]".encode()), "is not JSON", "name a COCO json"),
        (rewrite(lambda text: text[:-9].encode("utf-16")), "is not JSON", "name a COCO json"),
        (rewrite(lambda _: b""), "is not JSON", "name a COCO json"),
    ],
    ids=["latin-1", "gzip", "JSON lines", "a list twice", "cut off", "other quotes", "a bracket more", "cut off UTF-16",
         "empty"],
)  # fmt: skip
def test_text_of_another_kind_is_refused(refusal: Refusal, damage: Damage, fault: str, hint: str) -> None:
    damage()
    fault = fault.format(at=Path("val.json").read_bytes().find(b"\xe9"))
    assert refusal("evaluate") == (1, [f"{JSON_FIELD}: val.json {fault}", f"hint: {hint}"])


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
        ({"category_id": "1"}, "its category_id '1' is not in categories", CORRECT),
        ({"area": "big"}, "its area 'big' is not a number", CORRECT),
        ({"area": [1]}, "its area [1] is not a number", CORRECT),
        ({"iscrowd": "no"}, "its iscrowd 'no' is neither 0 nor 1", CORRECT),
        ({"bbox": {"x": 1, "y": 2, "w": 3, "h": 4}}, "its bbox is not [x, y, width, height]", CORRECT),
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
        "category that is a text",
        "area that is a word",
        "area that is a list",
        "crowd that is a word",
        "box by names",
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


@pytest.mark.parametrize(("key", "part", "other"), [("image_id", "images", str), ("category_id", "categories", float)])
def test_ids_of_another_kind_are_refused(refusal: Refusal, key: str, part: str, other: Callable[[int], object]) -> None:
    def change(data: dict[str, Any]) -> None:
        for entry in data["annotations"]:
            entry[key] = str(entry[key]) if other is str else entry[key]
        for entry in data[part] if other is not str else ():
            entry["id"] = str(entry["id"])

    edited(change)()
    first = read_json(Path("val.json"))["annotations"][0]
    kinds = ("a text", "numbers") if other is str else ("a number", "texts")
    what = f"its {key} {first[key]!r} is not in {part}: it is {kinds[0]}, the ids there are {kinds[1]}"
    assert refusal("evaluate") == (1, [f"val.json: annotation 1: {what}", f"hint: {CORRECT}"])


def make_crowds(data: dict[str, Any]) -> None:
    for entry in data["annotations"]:
        entry["iscrowd"] = 1


@pytest.mark.parametrize(
    ("change", "overrides", "what", "hint"),
    [
        pytest.param(
            lambda data: data.update(annotations=[]),
            (),
            "has no annotations with a box, so there is nothing to find",
            "name a COCO json with annotations",
            id="none",
        ),
        pytest.param(
            lambda data: [entry.update(bbox=[1, 2, 0, 0]) for entry in data["annotations"]],
            (),
            "has no annotations with a box, so there is nothing to find",
            "name a COCO json with annotations",
            id="points",
        ),
        pytest.param(
            make_crowds,
            (),
            "its {count} annotations are crowds, or have an area below 0: COCO looks for none of them",
            "name a COCO json with other annotations",
            id="crowds",
        ),
        pytest.param(
            lambda data: data.update(annotations=[entry for entry in data["annotations"] if entry["category_id"] != 4]),
            ("dataset.eval_class_ids=[4]",),
            "none of its {count} annotations is of a category that is evaluated: 3",
            "correct the json, dataset.category_ids or dataset.eval_class_ids",
            id="of other categories",
        ),
    ],
)
def test_annotations_with_nothing_to_find_are_refused(
    refusal: Refusal, change: Callable[[dict[str, Any]], object], overrides: tuple[str, ...], what: str, hint: str
) -> None:
    edited(change)()
    count = len(read_json(Path("val.json"))["annotations"])
    assert refusal("evaluate", *overrides) == (1, [f"val.json: {what.format(count=count)}", f"hint: {hint}"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(
            edited(lambda data: data["images"][1].update(file_name="http://images.example.org/0002.jpg")),
            [
                "http://images.example.org/0002.jpg: val.json names it, but there is no such image",
                "hint: taoq downloads nothing: file names must be those of files in image_dir",
            ],
            id="an address",
        ),
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
