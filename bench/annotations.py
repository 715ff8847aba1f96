# SPDX-License-Identifier: Apache-2.0
"""Time and memory of reading COCO annotations, against pycocotools on the same made-up file.

taoq also checks the annotations and the boxes, which pycocotools does not.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import measure

SECONDS, MEMORY = 1.25, 3.0
"""Limits: seconds relative to pycocotools; peak memory of taoq's process, with torch, relative to the largest file."""
CLASSES, PER_IMAGE = 80, 7


def main() -> int:
    """Measure a file as large as that of COCO val2017, and one of 1 GB."""
    options = measure.options(__doc__)
    rows = []
    with measure.workplace() as folder:
        for megabytes in (2, 20) if options.quick else (20, 1000):
            path = folder / f"{megabytes}.json"
            size = _write(path, megabytes)
            ours, other = functools.partial(_measured, _read, path), functools.partial(_measured, _pycocotools, path)
            pairs = measure.interleave(1 if megabytes > 20 else 5, ours, other)
            case = f"{size / measure.MB:.0f} MB"
            rows += [
                measure.Row(case=case, what="seconds", pairs=measure.column(pairs, "seconds"), target=SECONDS),
                measure.Row(case=case, what="peak, MB", pairs=measure.column(pairs, "peak", measure.MB)),
            ]
            peak = max(figures["peak"] for figures, _ in pairs)
    code = measure.report("COCO annotations", "taoq", "pycocotools", rows, gate=not options.no_gate)
    ratio = peak / size
    missed = not options.quick and ratio > MEMORY
    verdict = "MISSED" if missed else "met"
    print(f"peak of taoq / size of the file of {case}: {ratio:.2f} (<= {MEMORY:.0f}): {verdict}")
    return code or int(missed and not options.no_gate)


def _write(path: Path, megabytes: int) -> int:
    """Write annotations with outlines, like those of COCO, and return the size of the file in bytes."""
    draw = random.Random(0)
    outlines = [json.dumps([[round(draw.uniform(0, 640), 2) for _ in range(46)]]) for _ in range(100)]
    images = round(megabytes * 1e6 / (PER_IMAGE * 510 + 320))
    address = "http://images.example.org/val2017/"
    with path.open("w", encoding="utf-8") as file:
        file.write('{"info": {"description": "made up"}, "images": [')
        for number in range(images):
            separator = ", " if number else ""
            file.write(
                f'{separator}{{"license": 3, "file_name": "{number:012}.jpg", "coco_url": "{address}{number:012}.jpg",'
                f' "height": 427, "width": 640, "date_captured": "2013-11-14 17:02:52", "flickr_url":'
                f' "{address}{number:012}_z.jpg", "id": {number + 1}}}'
            )
        file.write('], "annotations": [')
        for number in range(PER_IMAGE * images):
            separator = ", " if number else ""
            x, y, width, height = (round(draw.uniform(5, 200), 2) for _ in range(4))
            file.write(
                f'{separator}{{"segmentation": {outlines[number % 100]}, "area": {width * height / 2:.4f},'
                f' "iscrowd": 0, "image_id": {number % images + 1}, "bbox": [{x}, {y}, {width}, {height}],'
                f' "category_id": {number % CLASSES + 1}, "id": {number + 1}}}'
            )
        categories = [{"id": number + 1, "name": str(number)} for number in range(CLASSES)]
        file.write(f'], "categories": {json.dumps(categories)}}}')
    return path.stat().st_size


def _measured(work: Callable[[Path], object], path: Path) -> measure.Figures:
    return measure.in_child(_in_child, work, path)


def _in_child(work: Callable[[Path], object], path: Path) -> measure.Figures:
    import taoq.tasks.rtdetr.metric  # noqa: F401 (imports pycocotools, and torch on both sides)

    return measure.measured(lambda: work(path))


def _read(path: Path) -> None:
    from taoq.spec.load import spec_from_dict
    from taoq.tasks.rtdetr.boxes import check_boxes
    from taoq.tasks.rtdetr.coco import read_coco
    from taoq.tasks.rtdetr.metric import CocoMetric
    from taoq.tasks.rtdetr.spec import RtdetrSpec

    source = {"json_file": str(path), "image_dir": str(path.parent)}
    spec = spec_from_dict({"dataset": {"test_data_sources": source}}, RtdetrSpec)
    coco = read_coco(str(path), "json_file", spec)
    check_boxes(coco, [path.parent / name for name in coco.images.files])  # There are no such files.
    CocoMetric(spec)


def _pycocotools(path: Path) -> None:
    from pycocotools.coco import COCO

    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        COCO(str(path))


if __name__ == "__main__":
    sys.exit(main())
