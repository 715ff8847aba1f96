# SPDX-License-Identifier: Apache-2.0
"""Write predictions: result.csv, and below visualize/ the pictures with their class."""

from __future__ import annotations

import csv
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from taoq.network import Outputs
from taoq.tasks.base import Batch
from taoq.tasks.classification.data import known_classes
from taoq.tasks.classification.spec import ClassificationSpec
from taoq.tasks.images import read_image

_LEAST_SIDE = 224  # smaller images are enlarged, or the text would not fit


class ClassificationPredictions:
    """Writes as batches come; nothing is kept."""

    files = ("result.csv", "visualize")

    def __init__(self, spec: ClassificationSpec, directory: Path) -> None:
        self._names = known_classes(spec)
        self._images_dir = Path(spec.dataset.test_dataset.images_dir)
        self._every = spec.inference.vis_after_n_batches
        self._batches = 0
        self._pictures = directory / "visualize"
        self._file = (directory / "result.csv").open("w", newline="", encoding="utf-8")
        self._rows = csv.writer(self._file)
        self._rows.writerow(["image", "prediction", "score", "ground_truth", *self._names])

    def __enter__(self) -> ClassificationPredictions:
        """Leave it to close the table."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        """Close the table."""
        self._file.close()

    def write(self, outputs: Outputs, batch: Batch) -> None:
        """Add logits [N, classes]; a score is the softmax probability, in 0..1."""
        scores = outputs["output"].softmax(1)
        best = scores.max(1)
        draw = self._every > 0 and self._batches % self._every == 0
        self._batches += 1
        for row, path in enumerate(batch.paths):
            name, score = self._names[int(best.indices[row])], float(best.values[row])
            truth = int(batch.targets[row])
            label = self._names[truth] if truth >= 0 else ""
            relative = Path(path).relative_to(self._images_dir)
            self._rows.writerow([relative, name, f"{score:.6f}", label, *(f"{p:.6f}" for p in scores[row].tolist())])
            if draw:
                # another suffix stays in the name: a.jpg and a.png are two pictures
                target = self._pictures / relative.with_name(relative.name.removesuffix(".png") + ".png")
                target.parent.mkdir(parents=True, exist_ok=True)
                annotate(read_image(Path(path)), f"{name}  {100 * score:.1f} %", right=not label or label == name).save(
                    target
                )


def annotate(image: Image.Image, text: str, *, right: bool) -> Image.Image:
    """A copy of an image with a bar of text below it, green or, for a wrong class, red."""
    factor = max(1, -(-_LEAST_SIDE // max(image.size)))
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    points = max(14, image.width // 16)
    font = ImageFont.load_default(points)
    height = int(points * 1.6)
    result = Image.new("RGB", (image.width, image.height + height), (22, 101, 52) if right else (153, 27, 27))
    result.paste(image)
    ImageDraw.Draw(result).text((6, image.height + height // 2), text, fill="white", font=font, anchor="lm")
    return result
