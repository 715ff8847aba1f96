"""Boxes of a detector's outputs, in the pixels of turned, stretched and padded images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from support.coco import FAR_BELOW, detector_outputs, detector_spec, write_coco
from taoq.tasks.rtdetr.data import INPUT, Targets, evaluation_batches
from taoq.tasks.rtdetr.predict import detections


def white_box(image: Tensor) -> list[float]:
    """Center and size, in 0..1 of the input, of what is white in it."""
    rows, columns = np.nonzero((image.mean(0) > 0.5).numpy())
    height, width = image.shape[1:]
    left, right = columns.min() / width, (columns.max() + 1) / width
    top, bottom = rows.min() / height, (rows.max() + 1) / height
    return [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]


def upright(orientation: int, box: Sequence[int], size: tuple[int, int]) -> list[int]:
    """A box of stored pixels in the image as it is seen: the table of the EXIF standard."""
    (left, top, right, bottom), (width, height) = box, size
    return {
        1: [left, top, right, bottom],
        2: [width - right, top, width - left, bottom],
        3: [width - right, height - bottom, width - left, height - top],
        4: [left, height - bottom, right, height - top],
        5: [top, left, bottom, right],
        6: [height - bottom, left, height - top, right],
        7: [height - bottom, width - right, height - top, width - left],
        8: [top, width - right, bottom, width - left],
    }[orientation]


@pytest.mark.parametrize("keep_shape", [False, True], ids=["stretched", "padded"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_box_seen_in_the_input_lands_on_the_upright_image(tmp_path: Path, orientation: int, keep_shape: bool) -> None:
    (tmp_path / "images").mkdir()
    image, box = Image.new("RGB", (480, 320)), [120, 40, 240, 160]
    image.paste("white", (box[0], box[1], box[2], box[3]))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "images" / "a.png", exif=exif)
    write_coco(tmp_path, [{"id": 1, "file_name": "a.png"}])
    augmentation = {"preserve_aspect_ratio": keep_shape}
    spec = detector_spec(tmp_path, size=(320, 416), dataset={"augmentation": augmentation})
    (batch,) = evaluation_batches(spec)
    assert batch.targets.sizes.tolist() == [[480, 320] if orientation < 5 else [320, 480]]
    outputs = detector_outputs([(1, 5.0, white_box(batch.inputs[INPUT][0]))])
    (detected,) = detections(spec, outputs, batch.targets, 0.5)
    assert detected.boxes[0].tolist() == pytest.approx(upright(orientation, box, (480, 320)), abs=1)


@pytest.mark.parametrize("size", [(50, 90), (333, 100), (97, 41), (640, 3), (64, 64)])
def test_the_edges_of_a_padded_image_are_the_edges_of_the_image(tmp_path: Path, size: tuple[int, int]) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", size, "white").save(tmp_path / "images" / "a.png")
    write_coco(tmp_path, [{"id": 1, "file_name": "a.png"}])
    spec = detector_spec(tmp_path, dataset={"augmentation": {"preserve_aspect_ratio": True}})
    (batch,) = evaluation_batches(spec)
    x, y, w, h = white_box(batch.inputs[INPUT][0])
    assert (x - w / 2, y - h / 2) == pytest.approx((0, 0))
    half = [x, y, w / 2, h / 2]  # of half the size, so that nothing is clipped
    (detected,) = detections(spec, detector_outputs([(0, 5.0, half)]), batch.targets, 0.5)
    width, height = size
    assert detected.boxes[0].tolist() == pytest.approx([width / 4, height / 4, 3 * width / 4, 3 * height / 4], rel=1e-4)


def test_boxes_of_a_padded_image_find_their_way_back(three_images: Path) -> None:
    spec = detector_spec(three_images, dataset={"augmentation": {"preserve_aspect_ratio": True}})
    _, batch = evaluation_batches(spec)
    tall = batch.inputs[INPUT][0]  # 50 x 90 becomes 36 x 64
    assert tall[0, :, :35].min() > 0.9
    assert tall[:, :, 37:].max() == 0
    logits = torch.full((1, 5, 2), FAR_BELOW)
    logits[0, 0, 1] = 9.0
    whole = torch.tensor([[36 / 96 / 2, 0.5, 36 / 96, 1.0]]).expand(1, 5, 4)
    (detected,) = detections(spec, {"pred_logits": logits, "pred_boxes": whole}, batch.targets, 0.5)
    assert torch.allclose(detected.boxes, torch.tensor([[0.0, 0.0, 50.0, 90.0]]), atol=1e-4)


def test_each_image_of_a_batch_has_its_own_size(tmp_path: Path) -> None:
    outputs = {
        name: value.repeat(2, 1, 1) for name, value in detector_outputs([(0, 5.0, [0.5, 0.5, 1.0, 1.0])]).items()
    }
    targets = Targets((1, 2), torch.tensor([[100.0, 60.0], [30.0, 90.0]]))
    boxes = [image.boxes[0].tolist() for image in detections(detector_spec(tmp_path), outputs, targets, 0.5)]
    assert boxes == [[0, 0, 100, 60], [0, 0, 30, 90]]


def test_the_best_pairs_of_query_and_class_are_the_detections(tmp_path: Path) -> None:
    logits = torch.tensor([[[2.0, 1.0], [-3.0, 3.0], [-4.0, -5.0], [0.0, -6.0], [-7.0, -8.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.1, 0.1, 0.4, 0.4], *[[0.9, 0.9, 0.1, 0.1]] * 3]])
    targets = Targets((10,), torch.tensor([[100.0, 60.0]]))
    outputs = {"pred_logits": logits, "pred_boxes": boxes}
    (best,) = detections(detector_spec(tmp_path, num_select=3), outputs, targets, 0.0)
    assert torch.allclose(best.scores, torch.tensor([3.0, 2.0, 1.0]).sigmoid())
    assert best.labels.tolist() == [1, 0, 1]  # one query twice: there is no NMS
    expected = torch.tensor([[0.0, 0.0, 30.0, 18.0], [40.0, 18.0, 60.0, 42.0], [40.0, 18.0, 60.0, 42.0]])
    assert torch.allclose(best.boxes, expected, atol=1e-4)  # the first reaches out of the image and is cut
    (certain,) = detections(detector_spec(tmp_path), outputs, targets, 0.9)
    assert certain.labels.tolist() == [1]
