# SPDX-License-Identifier: Apache-2.0
"""Write scenes of real handwritten digits on real photographs, with their boxes as COCO json."""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

SEED = 0
SIDE = 160  # pixels; a multiple of the detector's largest stride, 32
SMALLEST, LARGEST = 24, 72  # the longer side of a digit
MOST = 5  # digits in a scene
DIGITS = {"train": 1000, "calibration": 200, "val": 597}  # source digits of each split
SCENES = {"calibration": 200, "val": 300}  # train.py makes its own scenes as it goes
JPEG_QUALITY = 95

MAX_VALUE = 16.0  # the source pixels are counts from 0 to 16
MARGIN = 2  # source pixels around a digit, so that a turned stroke is not cut off
ENLARGED = 120  # pixels of the padded source image before it is cut out: above LARGEST, so that it only shrinks
MAX_TURN = 10.0  # degrees
STROKE = 40  # of 255: a mask value that is part of the digit
MAX_OVERLAP = 0.05  # of the smaller of two boxes
MIN_CONTRAST = 90.0  # of 255, between the stroke and what is behind it
CROP = (100, 400)  # pixels of a photograph that fill a scene


@dataclass(frozen=True)
class Box:
    """A digit in a scene, in pixels."""

    label: int
    x: int
    y: int
    width: int
    height: int

    def overlap(self, other: Box) -> float:
        """The shared area, as a part of the smaller box."""
        width = min(self.x + self.width, other.x + other.width) - max(self.x, other.x)
        height = min(self.y + self.height, other.y + other.height) - max(self.y, other.y)
        smaller = min(self.width * self.height, other.width * other.height)
        return max(0, width) * max(0, height) / smaller


@dataclass(frozen=True)
class Source:
    """What scenes are made of: the masks of one split's digits, their labels, the photographs."""

    masks: list[Image.Image]
    labels: list[int]
    photographs: list[Image.Image]


def split_digits() -> dict[str, list[int]]:
    """Cut the source digits into disjoint splits.

    By a hash and not by a random generator: the committed checkpoint was trained on this very split,
    so it must not move with a version of a library.
    """
    count = sum(DIGITS.values())
    order = sorted(range(count), key=lambda index: hashlib.sha256(f"{SEED}:{index}".encode()).hexdigest())
    splits: dict[str, list[int]] = {}
    for name, size in DIGITS.items():
        splits[name], order = sorted(order[:size]), order[size:]
    return splits


def load_source(split: str) -> Source:
    """The digits of a split, enlarged smoothly and with clear edges."""
    digits = load_digits()
    masks = []
    members = split_digits()[split]
    for index in members:
        pixels = np.pad(digits.images[index] * (255.0 / MAX_VALUE), MARGIN).astype(np.float32)
        large = np.asarray(Image.fromarray(pixels).resize((ENLARGED, ENLARGED), Image.Resampling.BICUBIC))
        # Eight pixels enlarged to seventy are a blur. A steep ramp around the middle grey is the edge of a stroke,
        # and makes its box well defined.
        mask = np.clip((large - 90.0) * (255.0 / 80.0), 0, 255)
        masks.append(Image.fromarray(np.rint(mask).astype(np.uint8)))
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    return Source(masks, [int(digits.target[index]) for index in members], photographs)


class Chance:
    """Random numbers from `random.Random.random` alone, the one method whose values Python promises to keep."""

    def __init__(self, name: str) -> None:
        digest = hashlib.sha256(f"{SEED}:{name}".encode()).digest()
        self._random = random.Random(int.from_bytes(digest[:8], "big"))

    def uniform(self, low: float, high: float) -> float:
        """A number from low up to high."""
        return low + (high - low) * self._random.random()

    def integer(self, low: int, high: int) -> int:
        """A whole number from low up to high, both included."""
        return low + int((high - low + 1) * self._random.random())


def background(source: Source, chance: Chance) -> NDArray[np.float32]:
    """A random square of a photograph, perhaps mirrored, brighter or darker."""
    photograph = source.photographs[chance.integer(0, len(source.photographs) - 1)]
    side = chance.integer(*CROP)
    left, top = chance.integer(0, photograph.width - side), chance.integer(0, photograph.height - side)
    crop = photograph.resize((SIDE, SIDE), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
    pixels = np.asarray(crop, dtype=np.float32)
    if chance.integer(0, 1):
        pixels = pixels[:, ::-1]
    return np.clip(pixels * chance.uniform(0.6, 1.2), 0, 255).astype(np.float32)


def digit_mask(mask: Image.Image, longer: int, turn: float) -> NDArray[np.float32]:
    """A digit's mask in 0..1, turned, cut to its strokes and scaled to the length of its longer side."""
    turned = mask.rotate(turn, Image.Resampling.BILINEAR)
    box = turned.point([0] * STROKE + [255] * (256 - STROKE)).getbbox()
    if box is None:
        raise ValueError("a digit without strokes")
    width, height = box[2] - box[0], box[3] - box[1]
    scale = longer / max(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(turned.resize(size, Image.Resampling.BICUBIC, box), dtype=np.float32) / np.float32(255)


def stroke_color(behind: NDArray[np.float32], chance: Chance) -> NDArray[np.float32]:
    """A tinted bright or dark color that stands out from the pixels behind the digit."""
    tint = [chance.uniform(0, 80) for _ in range(3)]
    color = np.array(tint, dtype=np.float32)
    bright = 255 - color
    first, second = (color, bright) if chance.integer(0, 2) == 0 else (bright, color)
    return first if abs(float(first.mean() - behind.mean())) >= MIN_CONTRAST else second


@dataclass(frozen=True)
class Scene:
    """One to five digits on a photograph.

    Attributes:
        pixels: Height, width, RGB.
        boxes: Where the digits are.
        classes: Height, width: of a pixel in a stroke 1 + its digit, 0 behind them.
    """

    pixels: NDArray[np.uint8]
    boxes: list[Box]
    classes: NDArray[np.uint8]


def make_scene(source: Source, chance: Chance) -> Scene:
    """A scene by chance."""
    pixels = background(source, chance)
    classes = np.zeros((SIDE, SIDE), np.uint8)
    boxes: list[Box] = []
    for _ in range(chance.integer(1, MOST)):
        index = chance.integer(0, len(source.masks) - 1)
        mask = digit_mask(source.masks[index], chance.integer(SMALLEST, LARGEST), chance.uniform(-MAX_TURN, MAX_TURN))
        height, width = mask.shape
        for _ in range(20):  # a digit for which there is no room is left out
            x, y = chance.integer(0, SIDE - width), chance.integer(0, SIDE - height)
            box = Box(source.labels[index], x, y, width, height)
            if all(box.overlap(other) <= MAX_OVERLAP for other in boxes):
                break
        else:
            continue
        behind = pixels[y : y + height, x : x + width]
        strength = mask[:, :, None] * chance.uniform(0.85, 1.0)
        behind += (stroke_color(behind, chance) - behind) * strength
        classes[y : y + height, x : x + width][mask * 255 >= STROKE] = 1 + box.label
        boxes.append(box)
    return Scene(np.rint(np.clip(pixels, 0, 255)).astype(np.uint8), boxes, classes)


def write_split(folder: Path, split: str, scenes: int) -> int:
    """Write the images and the COCO json of a split; the number of its boxes."""
    source = load_source(split)
    (folder / split).mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(1, scenes + 1):
        scene = make_scene(source, Chance(f"{split}:{number}"))
        name = f"{number:04d}.jpg"
        Image.fromarray(scene.pixels).save(folder / split / name, quality=JPEG_QUALITY, subsampling=0)
        images.append({"id": number, "file_name": name, "width": SIDE, "height": SIDE})
        for box in scene.boxes:
            annotations.append({
                "id": len(annotations) + 1, "image_id": number, "category_id": box.label + 1,
                "bbox": [box.x, box.y, box.width, box.height], "area": box.width * box.height, "iscrowd": 0,
            })  # fmt: skip
    categories = [{"id": digit + 1, "name": str(digit)} for digit in range(10)]
    coco = {"images": images, "annotations": annotations, "categories": categories}
    (folder / f"{split}.json").write_text(json.dumps(coco) + "\n", encoding="utf-8")
    return len(annotations)


def is_complete(out: Path) -> bool:
    """Whether `out` holds the images and the json of every split."""
    return all(
        (out / f"{split}.json").is_file() and len(list((out / split).glob("*.jpg"))) == scenes
        for split, scenes in SCENES.items()
    )


def main() -> int:
    """Build the folder, unless it is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).resolve().parent / "data",
        help="folder to write (default: data/ next to this script)",
    )
    out: Path = parser.parse_args().out

    if out.is_dir() and is_complete(out):
        print(f"{out}: already complete, {sum(SCENES.values())} scenes")
        return 0
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        # Not ours to delete: it may hold something else than a broken copy of this data.
        print(f"{out}: exists but is not the complete data set; remove it first", file=sys.stderr)
        return 1

    out.parent.mkdir(parents=True, exist_ok=True)
    # Work beside the target, so that the rename stays on one file system and a run that is cut
    # short leaves no half-written data set. The subfolder has the usual permissions, which the
    # temporary folder has not.
    with tempfile.TemporaryDirectory(prefix=".make_data-", dir=out.parent) as scratch:
        folder = Path(scratch) / "data"
        folder.mkdir()
        counts = {split: write_split(folder, split, scenes) for split, scenes in SCENES.items()}
        if out.exists():
            out.rmdir()
        folder.rename(out)
    print(
        f"{out}: " + ", ".join(f"{SCENES[split]} {split} scenes with {count} digits" for split, count in counts.items())
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
