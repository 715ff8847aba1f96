# SPDX-License-Identifier: Apache-2.0
"""Write the predictions of `inference` and `evaluate`: result.csv, and in visualize/ the images with their class."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from PIL import Image, ImageDraw

from taoq.network import Outputs
from taoq.tasks.base import Batch
from taoq.tasks.classification.classes import class_names, class_names_or_numbers, refuse_one_class
from taoq.tasks.classification.spec import ClassificationSpec
from taoq.tasks.fonts import Font, drawn_names
from taoq.tasks.images import save_picture
from taoq.tasks.pixels import read_image

_MIN_SIDE = 224
"""Pixels; images whose longer side is shorter are enlarged, so that the text fits."""
_MAX_TEXT_WIDTH, _MARGIN = 2048, 6
"""Pixels: width of an image beyond which the text does not become larger, and what is free on its left and right."""


def _create_table(directory: Path) -> TextIO:
    """Create result.csv; names of files that are not UTF-8 are written as they are."""
    return (directory / "result.csv").open("w", newline="", encoding="utf-8", errors="surrogateescape")


class ClassificationPredictions:
    """Writer of predictions. Each batch is written at once; none is kept in memory."""

    files = ("result.csv", "visualize")

    def __init__(self, spec: ClassificationSpec, directory: Path) -> None:
        refuse_one_class(spec)
        self._names = class_names_or_numbers(spec)
        self._drawn = drawn_names(self._names, "dataset.classes_file")
        self._images_dir = Path(spec.dataset.test_dataset.images_dir)
        self._every = spec.inference.vis_after_n_batches
        self._batches = 0
        self._pictures = directory / "visualize"
        self._file = _create_table(directory)
        self._rows = csv.writer(self._file)
        self._rows.writerow(["image", "prediction", "score", "ground_truth", *self._names])

    def __enter__(self) -> ClassificationPredictions:
        """Enter the context; leaving it closes the table."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        """Close the table."""
        self._file.close()

    def write(self, outputs: Outputs, batch: Batch) -> None:
        """Add logits [N, classes]. The scores are softmax probabilities, in 0..1."""
        scores = outputs["output"].softmax(1)
        best = scores.max(1)
        draw = self._every > 0 and self._batches % self._every == 0
        self._batches += 1
        for row, path in enumerate(batch.paths):
            index, score = int(best.indices[row]), float(best.values[row])
            name = self._names[index]
            truth = int(batch.targets[row])
            label = self._names[truth] if truth >= 0 else ""
            relative = Path(path).relative_to(self._images_dir)
            self._rows.writerow([relative, name, f"{score:.6f}", label, *(f"{p:.6f}" for p in scores[row].tolist())])
            if draw:
                text, correct = f"{self._drawn.names[index]}  {100 * score:.1f} %", not label or label == name
                picture = annotate(read_image(Path(path)), text, self._drawn.font, correct=correct)
                save_picture(picture, self._pictures / relative)


class EvaluationTable:
    """Writer of the result.csv of `evaluate`, which has TAO's columns. Each batch is written at once."""

    files = ("result.csv",)

    def __init__(self, spec: ClassificationSpec, directory: Path) -> None:
        self._names = class_names(spec)
        self._file = _create_table(directory)
        self._rows = csv.writer(self._file)
        self._rows.writerow(["img_name", *self._names, "pred_label", "pred_score", "gt_label"])

    def __enter__(self) -> EvaluationTable:
        """Enter the context; leaving it closes the table."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        """Close the table."""
        self._file.close()

    def write(self, outputs: Outputs, batch: Batch) -> None:
        """Add logits [N, classes]. The scores are softmax probabilities, in 0..1."""
        logits = outputs["output"]
        rows = zip(
            batch.paths, logits.softmax(1).tolist(), logits.argmax(1).tolist(), batch.targets.tolist(), strict=True
        )
        for path, scores, best, truth in rows:
            columns = [f"{score:.6f}" for score in scores]
            image = Path(path).absolute()
            self._rows.writerow([image, *columns, self._names[best], columns[best], self._names[truth]])


def annotate(image: Image.Image, text: str, font_of: Callable[[int], Font], *, correct: bool) -> Image.Image:
    """Return a copy of an image with a bar of text below it: green, or red for a wrong prediction.

    Args:
        image: The image.
        text: The text.
        font_of: Returns the font of a size in pixels.
        correct: Whether the prediction is right.
    """
    factor = max(1, -(-_MIN_SIDE // max(image.size)))
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    points = max(14, min(image.width, 2 * image.height, _MAX_TEXT_WIDTH) // 16)
    font = font_of(points)
    text = _shortened(text, font, image.width - 2 * _MARGIN)
    height = int(points * 1.6)
    result = Image.new("RGB", (image.width, image.height + height), (22, 101, 52) if correct else (153, 27, 27))
    result.paste(image)
    ImageDraw.Draw(result).text((_MARGIN, image.height + height // 2), text, fill="white", font=font, anchor="lm")
    return result


def _shortened(text: str, font: Font, width: int) -> str:
    """Return a text without as much of its middle as needed to fit a width, pixels; the score at its end is kept."""
    shown, kept = text, len(text)
    while kept > 0 and font.getlength(shown) > width:
        kept -= 1
        shown = _without_middle(text, kept)
    return shown


def _without_middle(text: str, kept: int) -> str:
    end = min(kept // 2, len("100.0 %"))
    return f"{text[: kept - end]}...{text[len(text) - end :]}"
