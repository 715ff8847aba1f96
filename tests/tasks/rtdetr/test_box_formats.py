"""Boxes that are not [x, y, width, height] in pixels are told from the whole file; badly drawn ones are not refused."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from support.coco import detector_spec, write_coco
from taoq.errors import TaoqError
from taoq.tasks.rtdetr.data import Targets, evaluation_batches
from taoq.tasks.rtdetr.metric import CocoMetric

SIZES = [(640, 480), (480, 640), (500, 375)]
Box = Sequence[float]
Size = tuple[int, int]


def natural_boxes(count: int = 60, seed: int = 0) -> list[tuple[int, list[float]]]:
    """Image and box of objects of all sizes, anywhere in the images; a few reach a little over an edge."""
    draw = random.Random(seed)
    boxes = []
    for number in range(count):
        width, height = SIZES[number % len(SIZES)]
        w, h = width * draw.uniform(0.03, 0.5), height * draw.uniform(0.03, 0.5)
        x, y = draw.uniform(0, width - w), draw.uniform(0, height - h)
        boxes.append((number % len(SIZES), [x, y, w + (1.5 if number % 9 == 0 else 0), h]))
    return boxes


def write(
    folder: Path,
    boxes: Sequence[tuple[int, Box]],
    *,
    said: Callable[[Size], Size | None] = lambda size: size,
    files: Callable[[Size], Size] = lambda size: size,
    orientation: int = 1,
) -> None:
    """Write val.json with these boxes, and black images.

    Args:
        folder: Where to write.
        boxes: Image and box.
        said: Size that the json says of an image; None for no size.
        files: Size of the file.
        orientation: EXIF orientation of the files.
    """
    (folder / "images").mkdir(exist_ok=True)
    images = []
    for number, size in enumerate(SIZES):
        image = Image.new("L", files(size))
        exif = image.getexif()
        exif[0x0112] = orientation
        image.save(folder / "images" / f"{number}.png", exif=exif)
        sizes = dict(zip(("width", "height"), said(size) or (), strict=False))
        images.append({"id": number, "file_name": f"{number}.png", **sizes})
    annotations = [
        {"id": number, "image_id": image, "category_id": 3, "bbox": list(box), "area": 999}
        for number, (image, box) in enumerate(boxes)
    ]
    write_coco(folder, images, annotations)


def check(folder: Path) -> None:
    evaluation_batches(detector_spec(folder))


def fault(folder: Path) -> str:
    with pytest.raises(TaoqError) as error:
        check(folder)
    return str(error.value).removeprefix(str(folder / "val.json") + ": ")


HINT = "\nhint: write each bbox as [x, y, width, height], in pixels of the image file"
FORMATS: dict[str, Callable[[Box, Size], Box]] = {
    "[left, top, right, bottom]": lambda box, _: [box[0], box[1], box[0] + box[2], box[1] + box[3]],
    "[center x, center y, width, height]": lambda box, _: [box[0] + box[2] / 2, box[1] + box[3] / 2, *box[2:]],
    "[y, x, height, width]": lambda box, _: [box[1], box[0], box[3], box[2]],
    "[top, left, bottom, right]": lambda box, _: [box[1], box[0], box[1] + box[3], box[0] + box[2]],
}


@pytest.mark.parametrize("sizes_said", [True, False], ids=["sizes in the json", "sizes of the files"])
@pytest.mark.parametrize("name", FORMATS)
def test_other_formats_are_refused_with_the_count(tmp_path: Path, name: str, sizes_said: bool) -> None:
    boxes = [(image, FORMATS[name](box, SIZES[image])) for image, box in natural_boxes()]
    boxes[0] = (0, [1, 1, 9, 9])  # would fit in any format
    boxes[1] = (1, [470, 2, 9, 630])
    write(tmp_path, boxes, said=lambda size: size if sizes_said else None)
    text = fault(tmp_path)
    count, _, rest = text.partition(" of 60 boxes reach far outside of their images as [x, y, width, height], and ")
    assert 2 <= int(count) < 60
    fitting, _, rest = rest.partition(" of 60 boxes fit as ")
    assert 58 <= int(fitting) <= 60
    assert rest == name + HINT


@pytest.mark.parametrize(
    "write_box",
    [
        lambda box, size: [box[0] / size[0], box[1] / size[1], box[2] / size[0], box[3] / size[1]],
        lambda box, size: [
            (box[0] + box[2] / 2) / size[0], (box[1] + box[3] / 2) / size[1], box[2] / size[0], box[3] / size[1],
        ],
    ],
    ids=["left, top, width, height", "center, width, height"],
)  # fmt: skip
def test_fractions_of_the_image_are_refused(tmp_path: Path, write_box: Callable[[Box, Size], Box]) -> None:
    boxes = [(image, write_box(box, SIZES[image])) for image, box in natural_boxes()]
    boxes[:3] = [(0, [9, 9, 9, 9])] * 3
    write(tmp_path, boxes, said=lambda _: None)
    assert fault(tmp_path) == "57 of 60 boxes have no value above 1, so they are not in pixels" + HINT


def test_two_formats_in_one_file_are_refused(tmp_path: Path) -> None:
    corners = FORMATS["[left, top, right, bottom]"]
    boxes = [
        (image, corners(box, SIZES[image]) if number % 3 == 0 else box)
        for number, (image, box) in enumerate(natural_boxes(300))
    ]
    write(tmp_path, boxes)
    assert fault(tmp_path).endswith(" of 300 boxes fit as [left, top, right, bottom]" + HINT)


@pytest.mark.parametrize("factor", [1.9, 3])
def test_boxes_of_larger_images_are_refused(tmp_path: Path, factor: float) -> None:
    boxes = [(image, [factor * value for value in box]) for image, box in natural_boxes()]
    write(tmp_path, boxes, said=lambda _: None)
    count, _, rest = fault(tmp_path).partition(" of 60 boxes ")
    assert int(count) > 30
    assert rest == (
        "reach far outside of their images as [x, y, width, height]\n"
        "hint: give the images that it describes, or correct the boxes"
    )


def large_and_central() -> list[tuple[int, list[float]]]:
    """One object an image, in its middle: as corners, too, every box is one."""
    draw = random.Random(1)
    sizes = [(number % 3, SIZES[number % 3]) for number in range(60)]
    return [(image, [draw.uniform(9, 30), draw.uniform(9, 30), w * 0.85, h * 0.85]) for image, (w, h) in sizes]


def badly_drawn() -> list[tuple[int, list[float]]]:
    """Every twelfth object goes on beyond the edge, as in data sets of tracks."""
    draw = random.Random(2)
    boxes = natural_boxes(240)
    for number in range(0, len(boxes), 12):
        image = boxes[number][0]
        width, height = SIZES[image]
        side = draw.choice([(-40, 100), (width - 60, 100), (200, height - 30), (100, -25)])
        boxes[number] = (image, [*side, 100, 60])
    return boxes


def right_half() -> list[tuple[int, list[float]]]:
    """A camera that sees objects only at the lower right, and two of them beyond the edge."""
    draw = random.Random(3)
    boxes = [(0, [draw.uniform(300, 580), draw.uniform(250, 420), 50.0, 50.0]) for _ in range(200)]
    return [*boxes, (0, [600, 300, 60, 60]), (0, [610, 300, 60, 60])]


@pytest.mark.parametrize(
    ("boxes", "far"),
    [
        (natural_boxes(), 0),
        (natural_boxes(2000, seed=5), 0),
        (large_and_central(), 0),
        (badly_drawn(), 20),
        (right_half(), 2),
        ([(0, [600, 440, 80, 80])], 1),
        ([(0, [0, 0, 640, 480]), (1, [0, 0, 480, 640])], 0),
    ],
    ids=["natural", "many", "large and central", "badly drawn", "at the right only", "one box", "whole images"],
)
def test_boxes_in_pixels_are_accepted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, boxes: list[tuple[int, list[float]]], far: int
) -> None:
    write(tmp_path, boxes)
    with caplog.at_level(logging.WARNING, "taoq.tasks.rtdetr.boxes"):
        check(tmp_path)
    what = f"{far} of {len(boxes)} boxes reach over the edges of their images by more than a tenth of their size"
    assert [message for message in caplog.messages if "boxes reach" in message] == (
        [f"{tmp_path / 'val.json'}: {what}"] if far else []
    )


def test_boxes_of_smaller_images_and_single_fractions_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    boxes = [(image, [value / 4 for value in box]) for image, box in natural_boxes()]
    write(tmp_path, [*boxes, (0, [0.2, 0.2, 0.5, 0.5])])
    with caplog.at_level(logging.WARNING, "taoq.tasks.rtdetr.boxes"):
        check(tmp_path)
    place = f"{tmp_path / 'val.json'}: "
    assert caplog.messages[0] == f"{place}1 of 61 boxes have no value above 1, so they are not in pixels"
    assert caplog.messages[1].startswith(f"{place}no box reaches beyond 2")
    assert caplog.messages[1].endswith(" of the height of its image: are they in pixels of these files?")


def double(size: Size) -> Size:
    return 2 * size[0], 2 * size[1]


def half(size: Size) -> Size:
    return size[0] // 2, size[1] // 2


def swapped(size: Size) -> Size:
    return size[1], size[0]


@pytest.mark.parametrize(
    ("files", "orientation", "shape"),
    [(half, 1, "320 x 240"), (double, 1, "1280 x 960"), (lambda size: size, 6, "480 x 640")],
    ids=["smaller files", "larger files", "files to turn upright"],
)
def test_boxes_for_images_of_another_size_are_refused(
    tmp_path: Path, files: Callable[[Size], Size], orientation: int, shape: str
) -> None:
    write(tmp_path, natural_boxes(), files=files, orientation=orientation)
    assert fault(tmp_path) == (
        "3 of 3 images have another size than it says, and its boxes are for what it says:"
        f" 0.png is {shape}, not 640 x 480\n"
        "hint: give the images that it describes, or scale its boxes; images are turned upright (EXIF), as in TAO"
    )


@pytest.mark.parametrize("said", [swapped, half, lambda _: (1, 1)], ids=["swapped", "half", "placeholders"])
def test_wrong_sizes_in_the_json_do_no_harm(tmp_path: Path, said: Callable[[Size], Size]) -> None:
    write(tmp_path, natural_boxes(), said=said)
    check(tmp_path)


def test_a_box_outside_of_its_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [*natural_boxes(), (2, [501, 3, 9, 9])], said=lambda _: None)
    with pytest.raises(TaoqError) as error:
        check(tmp_path)
    assert str(error.value) == (
        f"{tmp_path / 'val.json'}: annotation 60: its bbox [501, 3, 9, 9] is outside of the image, 500 x 375\n"
        "hint: correct the json: a bbox is [x, y, width, height] in pixels"
    )


@pytest.mark.parametrize(
    ("label", "shift", "doubt"),
    [
        (0, 0, ""),
        (
            1,
            0,
            "detections find 60 of its boxes, but only 0 with its category:"
            " are the outputs those of dataset.category_ids?",
        ),
        (
            0,
            -1,
            "60 detections find 0 of its 60 boxes, of any category:"
            " are they [x, y, width, height] in pixels of these image files?",
        ),
    ],
    ids=["right", "another category", "elsewhere"],
)
def test_sure_detections_that_do_not_fit_cause_a_doubt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, label: int, shift: float, doubt: str
) -> None:
    write(tmp_path, natural_boxes())
    metric = CocoMetric(detector_spec(tmp_path, queries=20))
    for image, (width, height) in enumerate(SIZES):
        boxes = torch.tensor([box for number, box in natural_boxes() if number == image])
        boxes[:, :2] += boxes[:, 2:] / 2 + shift * width
        logits = torch.full((1, 20, 2), -9.0)
        logits[..., label] = 3.0
        size = torch.tensor([[float(width), float(height)]])
        metric.update({"pred_logits": logits, "pred_boxes": boxes[None] / size.repeat(1, 2)}, Targets((image,), size))
    with caplog.at_level(logging.WARNING, "taoq.tasks.rtdetr.metric"):
        metric.compute()
    assert [message for message in caplog.messages if "detections find" in message] == (
        [f"{tmp_path / 'val.json'}: {doubt}"] if doubt else []
    )
