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
MAX_VALUE = 16.0  # Largest value of a source pixel.


def rank(index: int) -> str:
    """Return a pseudo-random sort key for an image.

    A hash gives the same split with every version of NumPy, scikit-learn and Python. The committed checkpoints were
    trained on this split.
    """
    return hashlib.sha256(f"{SEED}:{index}".encode()).hexdigest()


def split_indices(labels: np.ndarray) -> dict[str, list[int]]:
    """Divide the image indices into disjoint splits with about the same class distribution.

    Images are sorted by their relative position within their class. This interleaves the classes evenly, so consecutive
    parts of the list are stratified.
    """
    positions: list[tuple[float, str, int]] = []
    for label in np.unique(labels):
        members = sorted(np.flatnonzero(labels == label).tolist(), key=rank)
        for position, index in enumerate(members):
            positions.append(((position + 0.5) / len(members), rank(index), index))
    if len(positions) != sum(SPLITS.values()):
        raise ValueError(f"expected {sum(SPLITS.values())} images, found {len(positions)}")
    order = [index for _, _, index in sorted(positions)]
    splits: dict[str, list[int]] = {}
    start = 0
    for name, size in SPLITS.items():
        splits[name] = sorted(order[start : start + size])
        start += size
    return splits


def image_paths(labels: np.ndarray) -> dict[str, int]:
    """Map the path of each image, relative to the output folder, to its index in the source."""
    return {
        f"{name}/{labels[index]}/{index:04d}.png": index
        for name, indices in split_indices(labels).items()
        for index in indices
    }


def is_complete(out: Path, paths: set[str]) -> bool:
    """Return whether `out` has the class list and exactly these images."""
    images = {path.relative_to(out).as_posix() for path in out.rglob("*.png")}
    return images == paths and (out / "classes.txt").is_file()


def write(folder: Path, images: np.ndarray, labels: np.ndarray, files: dict[str, int]) -> None:
    """Write the images and the class list to a folder."""
    for path, index in files.items():
        pixels = np.rint(images[index] * (255.0 / MAX_VALUE)).astype(np.uint8)
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        image.convert("RGB").save(target)
    classes = "".join(f"{label}\n" for label in np.unique(labels))
    (folder / "classes.txt").write_text(classes, encoding="utf-8")


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

    digits = load_digits()
    labels = digits.target
    files = image_paths(labels)
    if out.is_dir() and is_complete(out, set(files)):
        print(f"{out}: already complete, {len(files)} images")
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
        write(folder, digits.images, labels, files)
        if out.exists():
            out.rmdir()
        folder.rename(out)
    counts = ", ".join(f"{size} {name}" for name, size in SPLITS.items())
    print(f"{out}: {counts}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
