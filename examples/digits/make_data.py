# SPDX-License-Identifier: Apache-2.0
"""Write scikit-learn's handwritten digits as an image folder with three splits."""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

SPLITS = {"train": 1000, "calibration": 200, "val": 597}
SEED = 0
SIDE = 32
MAX_VALUE = 16.0  # the source pixels are counts from 0 to 16


def rank(index: int) -> str:
    """A pseudo-random sort key for an image.

    A hash and not a random generator: the committed checkpoints were trained on this very split,
    so it must not move with a version of NumPy, scikit-learn or Python.
    """
    return hashlib.sha256(f"{SEED}:{index}".encode()).hexdigest()


def split_indices(labels: np.ndarray) -> dict[str, list[int]]:
    """Cut the image indices into disjoint splits, each with about the same mix of classes.

    Every image gets its relative position within its own class. Sorting all images by that position
    interleaves the classes evenly, so each consecutive stretch of the list is stratified.
    """
    positions: list[tuple[float, str, int]] = []
    for label in np.unique(labels):
        members = sorted(np.flatnonzero(labels == label).tolist(), key=rank)
        for place, index in enumerate(members):
            positions.append(((place + 0.5) / len(members), rank(index), index))
    if len(positions) != sum(SPLITS.values()):
        raise ValueError(f"expected {sum(SPLITS.values())} images, found {len(positions)}")
    order = [index for _, _, index in sorted(positions)]
    splits: dict[str, list[int]] = {}
    start = 0
    for name, size in SPLITS.items():
        splits[name] = sorted(order[start : start + size])
        start += size
    return splits


def plan(labels: np.ndarray) -> dict[str, int]:
    """Map every image's path below the output folder to its index in the source."""
    return {
        f"{name}/{labels[index]}/{index:04d}.png": index
        for name, indices in split_indices(labels).items()
        for index in indices
    }


def is_complete(out: Path, paths: set[str]) -> bool:
    """Whether `out` holds the class list and exactly the planned images."""
    found = {path.relative_to(out).as_posix() for path in out.rglob("*.png")}
    return found == paths and (out / "classes.txt").is_file()


def write(folder: Path, images: np.ndarray, labels: np.ndarray, files: dict[str, int]) -> None:
    """Write the images and the class list into `folder`."""
    for path, index in files.items():
        pixels = np.rint(images[index] * (255.0 / MAX_VALUE)).astype(np.uint8)
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        image.convert("RGB").save(target)
    classes = "".join(f"{label}\n" for label in np.unique(labels))
    (folder / "classes.txt").write_text(classes, encoding="utf-8")


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

    digits = load_digits()
    labels = digits.target
    files = plan(labels)
    if out.is_dir() and is_complete(out, set(files)):
        print(f"{out}: already complete, {len(files)} images")
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
        write(folder, digits.images, labels, files)
        if out.exists():
            out.rmdir()
        folder.rename(out)
    counts = ", ".join(f"{size} {name}" for name, size in SPLITS.items())
    print(f"{out}: {counts}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
