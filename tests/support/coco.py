"""COCO data sets of the tests, specs of detectors that read them, and made-up outputs of a detector."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from taoq.spec.load import spec_from_dict
from taoq.tasks.rtdetr.data import Targets
from taoq.tasks.rtdetr.predict import detections
from taoq.tasks.rtdetr.spec import RtdetrSpec

Outputs = dict[str, Tensor]
CATEGORIES = ({"id": 3, "name": "traffic light"}, {"id": 7, "name": "car"})
QUERIES = 5
FAR_BELOW = -9.0
"""A logit whose detection counts nowhere."""
SIZES = {"a.jpg": (100, 60), "b.png": (64, 64), "c.JPEG": (50, 90)}
"""Width and height of the three images."""


def write_coco(
    folder: Path,
    images: Sequence[Mapping[str, Any]],
    annotations: Sequence[Mapping[str, Any]] = (),
    categories: Sequence[Mapping[str, Any]] = CATEGORIES,
) -> Path:
    """Write val.json; the images may be missing."""
    path = folder / "val.json"
    data = {"images": list(images), "annotations": list(annotations), "categories": list(categories)}
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def write_three_images(
    folder: Path, *, categories: Mapping[int, str] | None = None, annotations: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Write images/ with three red images of different sizes, with the ids 10, 20 and 30, and val.json."""
    (folder / "images").mkdir(exist_ok=True)
    for name, size in SIZES.items():
        Image.new("RGB", size, "red").save(folder / "images" / name)
    images = [
        {"id": 10 * number, "file_name": name, "width": size[0], "height": size[1]}
        for number, (name, size) in enumerate(SIZES.items(), start=1)
    ]
    names = {1: "a", 2: "b"} if categories is None else categories
    write_coco(
        folder,
        images,
        [{"id": number, **annotation} for number, annotation in enumerate(annotations)],
        [{"id": id_, "name": name} for id_, name in names.items()],
    )


def remove_images(folder: Path) -> None:
    """Leave a text file alone in a folder."""
    for image in folder.iterdir():
        image.unlink()
    (folder / "notes.txt").write_text("none here")


def detector_spec(
    folder: Path,
    *,
    classes: int = 2,
    queries: int = QUERIES,
    num_select: int | None = None,
    size: tuple[int, int] = (64, 96),
    **sections: Any,
) -> RtdetrSpec:
    """A spec whose data is val.json and images/ of a folder; `dataset` adds fields to that section."""
    images = str(folder / "images")
    dataset = {
        "num_classes": classes,
        "batch_size": 2,
        "workers": 0,
        "test_data_sources": {"image_dir": images, "json_file": str(folder / "val.json")},
        "quant_calibration_data_sources": {"image_dir": images},
        "infer_data_sources": {"image_dir": [images]},
        **sections.pop("dataset", {}),
    }
    dataset["augmentation"] = {"eval_spatial_size": list(size), **dataset.get("augmentation", {})}
    model = {"num_queries": queries, "num_select": queries if num_select is None else num_select}
    return spec_from_dict({"model": model, "dataset": dataset, **sections}, RtdetrSpec)


def detector_outputs(queries: Sequence[tuple[int, float, Sequence[float]]], classes: int = 2) -> Outputs:
    """Outputs for one image, from the class, the logit and the box (center, size in 0..1) of the first queries."""
    logits = torch.full((1, QUERIES, classes), FAR_BELOW)
    boxes = torch.full((1, QUERIES, 4), 0.5)
    for query, (label, logit, box) in enumerate(queries):
        logits[0, query, label] = logit
        boxes[0, query] = torch.tensor(box)
    return {"pred_logits": logits, "pred_boxes": boxes}


def coco_results(
    spec: RtdetrSpec, outputs: Outputs, targets: Targets, category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """All detections in one image, as pycocotools takes results; a category id below 0 is left out."""
    (image,) = detections(spec, outputs, targets, 0.0)
    return [
        {
            "image_id": targets.image_ids[0],
            "category_id": category_ids[label],
            "score": score,
            "bbox": [left, top, right - left, bottom - top],
        }
        for score, label, (left, top, right, bottom) in zip(
            image.scores.tolist(), image.labels.tolist(), image.boxes.tolist(), strict=True
        )
        if category_ids[label] >= 0
    ]
