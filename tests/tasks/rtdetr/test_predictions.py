"""What inference writes of a detector: KITTI lines, a COCO json, and images with boxes."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pycocotools.coco import COCO

from support.coco import detector_outputs, detector_spec
from support.commands import read_json
from taoq.errors import SpecError, TaoqError
from taoq.tasks.images import save_picture
from taoq.tasks.rtdetr.data import inference_batches
from taoq.tasks.rtdetr.predict import DetectionPredictions


def infer(folder: Path, folders: Sequence[str], **inference: Any) -> Path:
    """Write predictions for the images of folders: in each image, a car with 0.98 and a traffic light with 0.27."""
    (folder / "names.txt").write_text("traffic light\ncar\n", encoding="utf-8")
    (folder / "out").mkdir()
    source = {"image_dir": [str(folder / name) for name in folders], "classmap": str(folder / "names.txt")}
    spec = detector_spec(folder, dataset={"infer_data_sources": source, "batch_size": 1}, inference=inference)
    outputs = detector_outputs([(1, 4.0, [0.5, 0.5, 0.5, 0.5]), (0, -1.0, [0.0, 0.0, 0.5, 0.5])])
    with DetectionPredictions(spec, folder / "out") as predictions:
        for batch in inference_batches(spec):
            predictions.write(outputs, batch)
    return folder / "out"


def write_images(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (80, 40)).save(folder / name)


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_inference_writes_whole_kitti_lines_and_a_json_that_coco_reads(tmp_path: Path) -> None:
    write_images(tmp_path, "first/a.png")
    out = infer(tmp_path, ["first"], conf_threshold=0.25)
    zeros = "0.00 0.00 0.00 0.00 0.00 0.00 0.00"
    assert (out / "labels" / "a.txt").read_text(encoding="utf-8").splitlines() == [
        f"car 0.00 0 0.00 20.00 10.00 60.00 30.00 {zeros} 0.9820",
        f"traffic_light 0.00 0 0.00 0.00 0.00 20.00 10.00 {zeros} 0.2689",
    ]
    car = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [20, 10, 40, 20], "area": 800, "iscrowd": 0}
    light = {"id": 2, "image_id": 1, "category_id": 0, "bbox": [0, 0, 20, 10], "area": 200, "iscrowd": 0}
    assert read_json(out / "detections.json") == {
        "images": [{"id": 1, "file_name": "a.png", "width": 80, "height": 40}],
        "annotations": [{**car, "score": 0.98201}, {**light, "score": 0.26894}],
        "categories": [{"id": 0, "name": "traffic light"}, {"id": 1, "name": "car"}],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        assert len(COCO(str(out / "detections.json")).getAnnIds(imgIds=[1], catIds=[1])) == 1


def test_an_empty_folder_name_is_not_the_current_folder(tmp_path: Path) -> None:
    write_images(tmp_path, "first/a.png")
    spec = detector_spec(tmp_path, dataset={"infer_data_sources": {"image_dir": [str(tmp_path / "first"), ""]}})
    with pytest.raises(TaoqError) as error:
        inference_batches(spec)
    assert str(error.value) == (
        "dataset.infer_data_sources.image_dir: one of the folders is empty text\nhint: name a folder of images"
    )


def test_what_scores_below_the_threshold_is_left_out(tmp_path: Path) -> None:
    write_images(tmp_path, "first/a.png")
    out = infer(tmp_path, ["first"], conf_threshold=0.99)
    assert (out / "labels" / "a.txt").read_text(encoding="utf-8") == ""
    assert read_json(out / "detections.json")["annotations"] == []


def test_files_of_two_folders_with_equal_names_do_not_collide(tmp_path: Path) -> None:
    write_images(tmp_path, "first/a.png", "first/a.jpg", "first/deep/a.png", "second/a.png")
    out = infer(tmp_path, ["first", "second"])
    assert files(out / "labels") == ["0/a.png.txt", "0/a.txt", "0/deep/a.txt", "1/a.txt"]
    assert files(out / "images_annotated") == ["0/a.jpg", "0/a.png", "0/deep/a.png", "1/a.png"]
    images = read_json(out / "detections.json")["images"]
    assert sorted(image["file_name"] for image in images) == ["0/a.jpg", "0/a.png", "0/deep/a.png", "1/a.png"]
    assert [image["id"] for image in images] == [1, 2, 3, 4]


@pytest.mark.parametrize(("every", "drawn"), [(0, []), (1, ["0.png", "1.png", "2.png"]), (2, ["0.png", "2.png"])])
def test_images_of_every_nth_batch_are_drawn(tmp_path: Path, every: int, drawn: list[str]) -> None:
    write_images(tmp_path, "first/0.png", "first/1.png", "first/2.png")
    out = infer(tmp_path, ["first"], vis_after_n_batches=every)
    assert files(out / "images_annotated") == drawn
    assert files(out / "labels") == ["0.txt", "1.txt", "2.txt"]


@pytest.mark.parametrize(
    ("color", "expected"), [("red", (255, 0, 0)), ("#00f", (0, 0, 255)), ("#0a0b0c", (10, 11, 12))]
)
def test_a_box_has_the_color_of_the_map(tmp_path: Path, color: str, expected: tuple[int, int, int]) -> None:
    write_images(tmp_path, "first/a.png")
    out = infer(tmp_path, ["first"], color_map={"car": color}, outline_width=2)
    with Image.open(out / "images_annotated" / "a.png") as picture:
        assert picture.size == (80, 40)
        assert picture.getpixel((60, 28)) == expected
        assert picture.getpixel((40, 25)) != expected


@pytest.mark.parametrize(
    ("colors", "message"),
    [
        (
            {"cat": "red", "car": "#00f"},
            "inference.color_map.cat: there is no class 'cat', its colour is not used; did you mean 'car'?",
        ),
        (
            {"7": "no colour either", "car": "#00f"},
            "inference.color_map.7: there is no class '7', its colour is not used; classes are traffic light, car",
        ),
    ],
    ids=["near class", "no class"],
)
def test_a_class_of_the_color_map_that_does_not_exist_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, colors: dict[str, str], message: str
) -> None:
    write_images(tmp_path, "first/a.png")
    out = infer(tmp_path, ["first"], color_map=colors, outline_width=2)
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [message]
    with Image.open(out / "images_annotated" / "a.png") as picture:
        assert picture.getpixel((60, 28)) == (0, 0, 255)


def test_an_unknown_color_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path, "first/a.png")
    with pytest.raises(SpecError) as error:
        infer(tmp_path, ["first"], color_map={"car": "rot"})
    assert str(error.value) == "inference.color_map.car: unknown colour 'rot'\nhint: write a name (red) or #rrggbb"


SUFFIXES = (
    ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tga", ".tif", ".tiff",
    ".webp",
)  # fmt: skip


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_picture_has_the_name_and_the_format_of_its_image(tmp_path: Path, suffix: str) -> None:
    write_images(tmp_path, f"first/a{suffix}", f"first/B{suffix.upper()}")
    out = infer(tmp_path, ["first"])
    assert files(out / "images_annotated") == [f"B{suffix.upper()}", f"a{suffix}"]
    for name in ("first/a", "out/images_annotated/a"):
        with Image.open(tmp_path / f"{name}{suffix}") as picture:
            assert (picture.format, picture.size) == (Image.registered_extensions()[suffix], (80, 40))
    assert files(out / "labels") == ["B.txt", "a.txt"]


def test_a_picture_that_its_format_cannot_hold_becomes_a_png(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_picture(Image.new("RGB", (16384, 8)), tmp_path / "deep" / "a.webp")
    assert files(tmp_path) == ["deep/a.webp.png"]
    assert caplog.messages == [
        "a.webp: its picture is a.webp.png, because its format cannot hold it: encoding error 5: Image size exceeds"
        " WebP limit of 16383 pixels"
    ]
