# SPDX-License-Identifier: Apache-2.0
"""Turn network outputs into detections, and write those of inference: a COCO json, KITTI labels and pictures."""

from __future__ import annotations

import colorsys
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageColor, ImageDraw
from torch import Tensor

from taoq.errors import Fault, Notice, SpecError, did_you_mean
from taoq.network import Outputs
from taoq.plain import JsonObject
from taoq.tasks.base import Batch
from taoq.tasks.fonts import drawn_names
from taoq.tasks.images import save_picture
from taoq.tasks.pixels import read_image
from taoq.tasks.preprocessing import fit
from taoq.tasks.rtdetr.data import Targets, class_names
from taoq.tasks.rtdetr.model import input_size
from taoq.tasks.rtdetr.spec import RtdetrSpec

log = logging.getLogger(__name__)

_KITTI = "{name} 0.00 0 0.00 {box[0]:.2f} {box[1]:.2f} {box[2]:.2f} {box[3]:.2f} 0.00 0.00 0.00 0.00 0.00 0.00 0.00"
"""The fifteen columns of a line of KITTI labels. A detector knows only name and box. The score is appended."""


@dataclass(frozen=True)
class Detections:
    """The detections of one image, by descending score.

    Attributes:
        scores: Scores in 0..1, [n].
        labels: Class indices, [n].
        boxes: Left, top, right, bottom, in pixels of the original image, [n, 4].
    """

    scores: Tensor
    labels: Tensor
    boxes: Tensor


def detections(spec: RtdetrSpec, outputs: Outputs, targets: Targets, threshold: float) -> Iterator[Detections]:
    """Yield the detections of each image: the `num_select` best pairs of query and class, without NMS.

    Args:
        spec: The spec.
        outputs: pred_logits [N, queries, classes]; pred_boxes [N, queries, 4], as center and size in 0..1. Or labels,
            boxes and scores of a file with post-processing, which are the detections.
        targets: The sizes of the images.
        threshold: Smallest score of a detection.
    """
    if "scores" in outputs:
        for row, image_scores in enumerate(outputs["scores"]):
            keep = image_scores >= threshold
            yield Detections(image_scores[keep], outputs["labels"][row][keep].long(), outputs["boxes"][row][keep])
        return
    num_classes = outputs["pred_logits"].shape[-1]
    center, size = outputs["pred_boxes"].chunk(2, dim=-1)
    corners = torch.cat([center - size / 2, center + size / 2], -1)
    height, width = input_size(spec)
    for row, (w, h) in enumerate(targets.sizes.tolist()):
        logits = outputs["pred_logits"][row].flatten()
        best = _highest(logits, spec.model.num_select)
        scores = logits[best].sigmoid()
        scale = torch.tensor([w, h])
        if spec.dataset.augmentation.preserve_aspect_ratio:
            fit_width, fit_height = fit((height, width), (w, h))
            scale *= torch.tensor([width / fit_width, height / fit_height])
        boxes = corners[row][best // num_classes] * scale.repeat(2)
        boxes = boxes.clamp(min=0).minimum(torch.tensor([w, h, w, h]))
        keep = scores >= threshold
        yield Detections(scores[keep], (best % num_classes)[keep], boxes[keep])


def _highest(values: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` highest values, by descending value; of equal ones the first, as ONNX does."""
    lowest = values.topk(min(count, len(values))).values[-1]
    candidates = (values >= lowest).nonzero().squeeze(1)  # More than `count` if others are equal to the last one.
    return candidates[values[candidates].sort(descending=True, stable=True).indices[:count]]


class DetectionPredictions:
    """Writer of detections. Labels and pictures are written for each batch, the json when the context is left."""

    files = ("detections.json", "labels", "images_annotated")

    def __init__(self, spec: RtdetrSpec, directory: Path) -> None:
        self._spec = spec
        self._names = class_names(spec)
        self._drawn = drawn_names(self._names, "dataset.infer_data_sources.classmap")
        self._colors = _colors(spec, self._names)
        self._every = spec.inference.vis_after_n_batches
        self._batches = 0
        self._stems: set[Path] = set()
        self._directory = directory
        self._images: list[JsonObject] = []
        self._annotations: list[JsonObject] = []
        for name in self.files[1:]:
            (directory / name).mkdir()

    def __enter__(self) -> DetectionPredictions:
        """Enter the context; leaving it writes the json."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        """Write detections.json: images, annotations with scores, and categories, whose ids are class indices."""
        if kind is None:
            categories = [{"id": index, "name": name} for index, name in enumerate(self._names)]
            data = {"images": self._images, "annotations": self._annotations, "categories": categories}
            (self._directory / "detections.json").write_text(json.dumps(data) + "\n", encoding="utf-8")

    def write(self, outputs: Outputs, batch: Batch) -> None:
        """Add logits [N, queries, classes] and boxes [N, queries, 4]."""
        draw = self._every > 0 and self._batches % self._every == 0
        self._batches += 1
        per_image = detections(self._spec, outputs, batch.targets, self._spec.inference.conf_threshold)
        for name, image_id, (width, height), image_detections in zip(
            batch.paths, batch.targets.image_ids, batch.targets.sizes.int().tolist(), per_image, strict=True
        ):
            path = self._relative(Path(name))
            self._images.append({"id": image_id, "file_name": str(path), "width": width, "height": height})
            lines = []
            for score, label, box in _entries(image_detections):
                x, y, w, h = box[0], box[1], box[2] - box[0], box[3] - box[1]
                self._annotations.append(
                    {
                        "id": len(self._annotations) + 1,
                        "image_id": image_id,
                        "category_id": label,
                        "bbox": [round(value, 2) for value in (x, y, w, h)],
                        "area": round(w * h, 2),
                        "iscrowd": 0,
                        "score": round(score, 5),
                    }
                )
                lines.append(_KITTI.format(name=self._names[label].replace(" ", "_"), box=box) + f" {score:.4f}\n")
            label_file = self._directory / "labels" / f"{self._new_stem(path)}.txt"
            label_file.parent.mkdir(parents=True, exist_ok=True)
            label_file.write_text("".join(lines), encoding="utf-8")
            if draw:
                picture = self._draw(read_image(Path(name)), image_detections)
                save_picture(picture, self._directory / "images_annotated" / path)

    def _new_stem(self, path: Path) -> Path:
        """Return a path for an image's labels, without their suffix: `a` for a.jpg, `a.png` for a.png next to it."""
        stem = path.with_suffix("")
        if stem in self._stems:
            stem = path
        self._stems.add(stem)
        return stem

    def _relative(self, path: Path) -> Path:
        """Return the path of an image relative to its folder, prefixed with its index if there are several folders."""
        folders = self._spec.dataset.infer_data_sources.image_dir
        number = next(index for index, folder in enumerate(folders) if path.is_relative_to(folder))
        relative = path.relative_to(folders[number])
        return relative if len(folders) == 1 else Path(str(number), relative)

    def _draw(self, image: Image.Image, image_detections: Detections) -> Image.Image:
        """Draw boxes, names and scores into an image, the best detection last, on top. Return the image."""
        width = self._spec.inference.outline_width
        points = max(10, min(image.size) // 24)
        font = self._drawn.font(points)
        drawing = ImageDraw.Draw(image)
        for score, label, box in reversed(_entries(image_detections)):
            color = self._colors[label]
            drawing.rectangle(box, outline=color, width=width)
            text = f"{self._drawn.names[label]}: {100 * score:.0f} %"
            left, top, right, bottom = drawing.textbbox((0, 0), text, font=font)
            x = max(0.0, min(box[0], image.width - (right - left) - 4))
            # Above the box if there is room, otherwise inside it.
            y = box[1] - (bottom - top) - 5 if box[1] > bottom - top + 5 else box[1]
            drawing.rectangle((x, y, x + right - left + 4, y + bottom - top + 5), fill=color)
            drawing.text((x + 2 - left, y + 2 - top), text, fill=_text_color(color), font=font)
        return image


def _entries(image_detections: Detections) -> list[tuple[float, int, list[float]]]:
    """Return score, class index and box of each detection."""
    tensors = (image_detections.scores, image_detections.labels, image_detections.boxes)
    return list(zip(*(tensor.tolist() for tensor in tensors), strict=True))


def _colors(spec: RtdetrSpec, names: tuple[str, ...]) -> list[tuple[int, ...]]:
    """Return the colour of each class: that in color_map, or one of well separated hues.

    A class of color_map that does not exist causes a warning, because TAO ignores it.

    Raises:
        SpecError: If color_map has an unknown colour.
    """
    colors = []
    for index in range(len(names)):
        hue = index * 0.618034 % 1  # Steps of the golden ratio keep the hues of successive classes apart.
        colors.append(tuple(round(255 * value) for value in colorsys.hsv_to_rgb(hue, 0.85, 0.9)))
    for name, color in (spec.inference.color_map or {}).items():
        where = f"inference.color_map.{name}"
        if name not in names:
            hint = did_you_mean(name, names, "classes are " + ", ".join(names[:20]))
            log.warning(Notice(where, f"there is no class '{name}', its colour is not used; {hint}"))
            continue
        try:
            colors[names.index(name)] = ImageColor.getrgb(color)[:3]
        except ValueError:
            raise SpecError(Fault(where, f"unknown colour '{color}'", "write a name (red) or #rrggbb")) from None
    return colors


def _text_color(background: tuple[int, ...]) -> str:
    """Return black for light backgrounds and white for dark ones, by their luma (ITU-R BT.601)."""
    red, green, blue = background[:3]
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"
