# SPDX-License-Identifier: Apache-2.0
"""Write scenes of real handwritten digits on real photographs, with their boxes as COCO JSON."""

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
SIDE = 160  # Width and height of a scene, pixels; a multiple of the largest stride of the detector, 32.
SMALLEST, LARGEST = 24, 72  # Longer side of a digit, pixels.
MAX_DIGITS = 5  # Digits in a scene.
DIGITS = {"train": 1000, "calibration": 200, "val": 597}  # Source digits of each split.
SCENES = {"calibration": 200, "val": 300}  # train.py makes its own scenes.
JPEG_QUALITY = 95

MAX_VALUE = 16.0  # Largest value of a source pixel.
MARGIN = 2  # Source pixels around a digit, so that rotation does not cut off strokes.
ENLARGED = 120  # Size of an enlarged, padded source image, pixels. Above LARGEST, so that digits are only downscaled.
MAX_TURN = 10.0  # Degrees.
STROKE = 40  # Smallest mask value of 255 that belongs to a stroke.
MAX_OVERLAP = 0.05  # Fraction of the smaller of two boxes.
MIN_CONTRAST = 90.0  # Of 255, between a stroke and its background.
CROP = (100, 400)  # Size of the part of a photograph that is scaled to a scene, pixels.


@dataclass(frozen=True)
class Box:
    """Bounding box and class of a digit in a scene; pixels."""

    label: int
    x: int
    y: int
    width: int
    height: int

    def overlap(self, other: Box) -> float:
        """Return the area of the intersection, as a fraction of the smaller box."""
        width = min(self.x + self.width, other.x + other.width) - max(self.x, other.x)
        height = min(self.y + self.height, other.y + other.height) - max(self.y, other.y)
        smaller = min(self.width * self.height, other.width * other.height)
        return max(0, width) * max(0, height) / smaller


@dataclass(frozen=True)
class Source:
    """Material of the scenes: masks and labels of the digits of a split, and photographs."""

    masks: list[Image.Image]
    labels: list[int]
    photographs: list[Image.Image]


def split_digits() -> dict[str, list[int]]:
    """Divide the source digits into disjoint splits.

    A hash gives the same split with every version of the libraries. The committed checkpoint was trained on this split.
    """
    count = sum(DIGITS.values())
    order = sorted(range(count), key=lambda index: hashlib.sha256(f"{SEED}:{index}".encode()).hexdigest())
    splits: dict[str, list[int]] = {}
    for name, size in DIGITS.items():
        splits[name], order = sorted(order[:size]), order[size:]
    return splits


def load_source(split: str) -> Source:
    """Load the digits of a split, enlarged and with sharp edges, and the photographs."""
    digits = load_digits()
    masks = []
    members = split_digits()[split]
    for index in members:
        pixels = np.pad(digits.images[index] * (255.0 / MAX_VALUE), MARGIN).astype(np.float32)
        large = np.asarray(Image.fromarray(pixels).resize((ENLARGED, ENLARGED), Image.Resampling.BICUBIC))
        # Eight pixels enlarged to seventy are blurred. A steep ramp around the middle gray sharpens the edges of the
        # strokes, so that their boxes are well defined.
        mask = np.clip((large - 90.0) * (255.0 / 80.0), 0, 255)
        masks.append(Image.fromarray(np.rint(mask).astype(np.uint8)))
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    return Source(masks, [int(digits.target[index]) for index in members], photographs)


class Chance:
    """Random numbers from `random.Random.random` only: Python guarantees the same sequence in all versions."""

    def __init__(self, name: str) -> None:
        digest = hashlib.sha256(f"{SEED}:{name}".encode()).digest()
        self._random = random.Random(int.from_bytes(digest[:8], "big"))

    def uniform(self, low: float, high: float) -> float:
        """Return a number from `low` to `high`."""
        return low + (high - low) * self._random.random()

    def integer(self, low: int, high: int) -> int:
        """Return an integer from `low` to `high`, inclusive."""
        return low + int((high - low + 1) * self._random.random())


def background(source: Source, chance: Chance) -> NDArray[np.float32]:
    """Return a random square of a photograph, possibly mirrored, with random brightness."""
    photograph = source.photographs[chance.integer(0, len(source.photographs) - 1)]
    side = chance.integer(*CROP)
    left, top = chance.integer(0, photograph.width - side), chance.integer(0, photograph.height - side)
    crop = photograph.resize((SIDE, SIDE), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
    pixels = np.asarray(crop, dtype=np.float32)
    if chance.integer(0, 1):
        pixels = pixels[:, ::-1]
    return np.clip(pixels * chance.uniform(0.6, 1.2), 0, 255).astype(np.float32)


def digit_mask(mask: Image.Image, longer: int, turn: float) -> NDArray[np.float32]:
    """Rotate a mask, crop it to the strokes and scale its longer side to `longer` pixels. Values are 0..1."""
    turned = mask.rotate(turn, Image.Resampling.BILINEAR)
    box = turned.point([0] * STROKE + [255] * (256 - STROKE)).getbbox()
    if box is None:
        raise ValueError("a digit without strokes")
    width, height = box[2] - box[0], box[3] - box[1]
    scale = longer / max(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(turned.resize(size, Image.Resampling.BICUBIC, box), dtype=np.float32) / np.float32(255)


def stroke_color(behind: NDArray[np.float32], chance: Chance) -> NDArray[np.float32]:
    """Return a tinted bright or dark color that contrasts with the pixels behind the digit."""
    tint = [chance.uniform(0, 80) for _ in range(3)]
    color = np.array(tint, dtype=np.float32)
    bright = 255 - color
    first, second = (color, bright) if chance.integer(0, 2) == 0 else (bright, color)
    return first if abs(float(first.mean() - behind.mean())) >= MIN_CONTRAST else second


@dataclass(frozen=True)
class Scene:
    """One to five digits on a photograph.

    Attributes:
        pixels: RGB image [H, W, 3].
        boxes: Boxes of the digits.
        classes: Class of each pixel [H, W]: 0 for the background, 1 + digit for a stroke.
    """

    pixels: NDArray[np.uint8]
    boxes: list[Box]
    classes: NDArray[np.uint8]


def make_scene(source: Source, chance: Chance) -> Scene:
    """Make a random scene."""
    pixels = background(source, chance)
    classes = np.zeros((SIDE, SIDE), np.uint8)
    boxes: list[Box] = []
    for _ in range(chance.integer(1, MAX_DIGITS)):
        index = chance.integer(0, len(source.masks) - 1)
        mask = digit_mask(source.masks[index], chance.integer(SMALLEST, LARGEST), chance.uniform(-MAX_TURN, MAX_TURN))
        height, width = mask.shape
        for _ in range(20):  # Digits without enough space are left out.
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
    """Write the images and the COCO JSON of a split. Return the number of boxes."""
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
    """Return whether `out` has the images and the JSON of every split."""
    return all(
        (out / f"{split}.json").is_file() and len(list((out / split).glob("*.jpg"))) == scenes
        for split, scenes in SCENES.items()
    )


def main() -> int:
    """Write the data set, unless it is already complete."""
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
        # Do not delete it: it may hold data of the user.
        print(f"{out}: exists but is not the complete data set; remove it first", file=sys.stderr)
        return 1

    out.parent.mkdir(parents=True, exist_ok=True)
    # Write to a temporary folder and rename it, so that an interrupted run leaves no incomplete data set. It is next to
    # the target, on the same file system. The subfolder is needed for its default permissions; the temporary folder is
    # accessible only to its owner.
    with tempfile.TemporaryDirectory(prefix=".make_data-", dir=out.parent) as temporary:
        folder = Path(temporary) / "data"
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
