# SPDX-License-Identifier: Apache-2.0
"""Write scenes of handwritten digits on photographs, with a mask for each scene, to data/<split>/."""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "digit_scenes"))
from make_data import Chance, Scene, load_source, make_scene  # noqa: E402

SPLITS = {"calibration": 64, "val": 60}
cached_source = functools.cache(load_source)


def scenes(split: str, count: int, name: str = "") -> list[Scene]:
    """Make scenes of a split. `name` seeds the random numbers: the same name gives the same scenes."""
    return [make_scene(cached_source(split), Chance(f"{split}:{name}{number}")) for number in range(1, count + 1)]


def main() -> None:
    """Write the images and masks of each split."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "data", help="folder to write")
    parser.add_argument("--few", action="store_true", help="write only 16 scenes of each split")
    arguments = parser.parse_args()
    out: Path = arguments.out
    splits = dict.fromkeys(SPLITS, 16) if arguments.few else SPLITS
    for split, count in splits.items():
        for kind in ("images", "masks"):
            (out / split / kind).mkdir(parents=True, exist_ok=True)
        for number, scene in enumerate(scenes(split, count), 1):
            Image.fromarray(scene.pixels).save(out / split / "images" / f"{number:04d}.png")
            Image.fromarray(scene.classes).save(out / split / "masks" / f"{number:04d}.png")
    print(f"{out}: " + ", ".join(f"{count} {split} scenes" for split, count in splits.items()))


if __name__ == "__main__":
    main()
