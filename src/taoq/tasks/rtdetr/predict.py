# SPDX-License-Identifier: Apache-2.0
"""Boxes from the network's outputs; inference writes them as pictures, KITTI labels and one COCO json."""

from __future__ import annotations

import colorsys
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor

from taoq.errors import Fault, SpecError, did_you_mean
from taoq.network import Outputs
from taoq.plain import JsonObject
from taoq.tasks.base import Batch
from taoq.tasks.images import read_image
from taoq.tasks.rtdetr.data import Targets, class_names, fit
from taoq.tasks.rtdetr.model import input_size
from taoq.tasks.rtdetr.spec import RtdetrSpec

_KITTI = "{name} 0.00 0 0.00 {box[0]:.2f} {box[1]:.2f} {box[2]:.2f} {box[3]:.2f} 0.00 0.00 0.00 0.00 0.00 0.00 0.00"
"""A line of a KITTI label with its fifteen columns, of which a detector fills name and box; the score comes last."""


@dataclass(frozen=True)
class Detections:
    """What was found in one image, best first.

    Attributes:
        scores: In 0..1, [n].
        labels: Class indices, [n].
        boxes: Left, top, right, bottom in pixels of the original image, [n, 4].
    """

    scores: Tensor
    labels: Tensor
    boxes: Tensor


def detections(spec: RtdetrSpec, outputs: Outputs, targets: Targets, threshold: float) -> Iterator[Detections]:
    """The best `num_select` pairs of query and class of each image; a DETR needs no NMS.

    Args:
        spec: The spec.
        outputs: pred_logits [N, queries, classes], pred_boxes [N, queries, 4] as center and size in 0..1.
        targets: Sizes of the images.
        threshold: Detections with a lower score are left out.
    """
    scores = outputs["pred_logits"].sigmoid()
    classes = scores.shape[-1]
    best = scores.flatten(1).topk(min(spec.model.num_select, scores[0].numel()), dim=1)
    center, size = outputs["pred_boxes"].chunk(2, dim=-1)
    corners = torch.cat([center - size / 2, center + size / 2], -1)
    height, width = input_size(spec)
    for row, (w, h) in enumerate(targets.sizes.tolist()):
        scale = torch.tensor([w, h])
        if spec.dataset.augmentation.preserve_aspect_ratio:
            inside = fit((height, width), (w, h))
            scale *= torch.tensor([width / inside[0], height / inside[1]])
        boxes = corners[row][best.indices[row] // classes] * scale.repeat(2)
        boxes = boxes.clamp(min=0).minimum(torch.tensor([w, h, w, h]))
        there = best.values[row] >= threshold
        yield Detections(best.values[row][there], (best.indices[row] % classes)[there], boxes[there])


class DetectionPredictions:
    """Writes as batches come; only what is found is kept, for the json."""

    files = ("detections.json", "labels", "images_annotated")

    def __init__(self, spec: RtdetrSpec, directory: Path) -> None:
        self._spec = spec
        self._names = class_names(spec)
        self._colors = _colors(spec, self._names)
        self._every = spec.inference.vis_after_n_batches
        self._batches = 0
        self._written: set[Path] = set()
        self._directory = directory
        self._images: list[JsonObject] = []
        self._found: list[JsonObject] = []
        for name in self.files[1:]:
            (directory / name).mkdir()

    def __enter__(self) -> DetectionPredictions:
        """Leave it to write the json."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        """Write the json: images, categories (ids are class indices) and annotations with their scores."""
        if kind is None:
            categories = [{"id": index, "name": name} for index, name in enumerate(self._names)]
            data = {"images": self._images, "annotations": self._found, "categories": categories}
            (self._directory / "detections.json").write_text(json.dumps(data) + "\n", encoding="utf-8")

    def write(self, outputs: Outputs, batch: Batch) -> None:
        """Add logits [N, queries, classes] and boxes [N, queries, 4]."""
        draw = self._every > 0 and self._batches % self._every == 0
        self._batches += 1
        found = detections(self._spec, outputs, batch.targets, self._spec.inference.conf_threshold)
        for name, image_id, (width, height), items in zip(
            batch.paths, batch.targets.image_ids, batch.targets.sizes.int().tolist(), found, strict=True
        ):
            path = self._relative(Path(name))
            self._images.append({"id": image_id, "file_name": str(path), "width": width, "height": height})
            lines = []
            for score, label, box in zip(
                items.scores.tolist(), items.labels.tolist(), items.boxes.tolist(), strict=True
            ):
                x, y, w, h = box[0], box[1], box[2] - box[0], box[3] - box[1]
                self._found.append(
                    {
                        "id": len(self._found) + 1,
                        "image_id": image_id,
                        "category_id": label,
                        "bbox": [round(value, 2) for value in (x, y, w, h)],
                        "area": round(w * h, 2),
                        "iscrowd": 0,
                        "score": round(score, 5),
                    }
                )
                lines.append(_KITTI.format(name=self._names[label].replace(" ", "_"), box=box) + f" {score:.4f}\n")
            stem = self._fresh(path)
            label_file = self._directory / "labels" / f"{stem}.txt"
            label_file.parent.mkdir(parents=True, exist_ok=True)
            label_file.write_text("".join(lines), encoding="utf-8")
            if draw:
                picture = self._directory / "images_annotated" / f"{stem}.png"
                picture.parent.mkdir(parents=True, exist_ok=True)
                self._draw(read_image(Path(name)), items).save(picture)

    def _fresh(self, path: Path) -> Path:
        """What the results of an image are called before their suffix: `a` for a.jpg, `a.png` for one beside it."""
        stem = path.with_suffix("")
        if stem in self._written:
            stem = path
        self._written.add(stem)
        return stem

    def _relative(self, path: Path) -> Path:
        """A name below the results that no two images share."""
        folders = self._spec.dataset.infer_data_sources.image_dir
        number = next(index for index, folder in enumerate(folders) if path.is_relative_to(folder))
        relative = path.relative_to(folders[number])
        return relative if len(folders) == 1 else Path(str(number), relative)

    def _draw(self, image: Image.Image, items: Detections) -> Image.Image:
        """A copy with boxes, names and scores; the best is drawn last, on top."""
        width = self._spec.inference.outline_width
        points = max(10, min(image.size) // 24)
        font = ImageFont.load_default(points)
        drawing = ImageDraw.Draw(image)
        for score, label, box in reversed(
            list(zip(items.scores.tolist(), items.labels.tolist(), items.boxes.tolist(), strict=True))
        ):
            color = self._colors[label]
            drawing.rectangle(box, outline=color, width=width)
            text = f"{self._names[label]}: {100 * score:.0f} %"
            left, top, right, bottom = drawing.textbbox((0, 0), text, font=font)
            x = max(0.0, min(box[0], image.width - (right - left) - 4))
            y = box[1] - (bottom - top) - 5 if box[1] > bottom - top + 5 else box[1]  # above, else inside
            drawing.rectangle((x, y, x + right - left + 4, y + bottom - top + 5), fill=color)
            drawing.text((x + 2 - left, y + 2 - top), text, fill=_readable_on(color), font=font)
        return image


def _colors(spec: RtdetrSpec, names: tuple[str, ...]) -> list[tuple[int, ...]]:
    """The colour of each class: of the color_map, else far apart in hue.

    Raises:
        SpecError: The map has an unknown class or colour.
    """
    given = spec.inference.color_map or {}
    colors = []
    for index in range(len(names)):
        hue = index * 0.618034 % 1  # the golden ratio keeps neighbours apart
        colors.append(tuple(round(255 * value) for value in colorsys.hsv_to_rgb(hue, 0.85, 0.9)))
    for name, color in given.items():
        where = f"inference.color_map.{name}"
        if name not in names:
            hint = did_you_mean(name, names, "classes are " + ", ".join(names[:20]))
            raise SpecError(Fault(where, f"there is no class '{name}'", hint))
        try:
            colors[names.index(name)] = ImageColor.getrgb(color)[:3]
        except ValueError:
            raise SpecError(Fault(where, f"unknown colour '{color}'", "write a name (red) or #rrggbb")) from None
    return colors


def _readable_on(color: tuple[int, ...]) -> str:
    """Black on light colours, white on dark ones, by their luma (ITU-R BT.601)."""
    red, green, blue = color[:3]
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"
