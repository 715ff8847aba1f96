# SPDX-License-Identifier: Apache-2.0
"""Top-k accuracy, accuracy per class, and the confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from taoq.errors import Fault, SpecError
from taoq.files import digest
from taoq.network import Outputs
from taoq.plain import JsonMapping
from taoq.tasks.classification.classes import class_names, refuse_one_class
from taoq.tasks.classification.spec import ClassificationSpec
from taoq.tasks.fonts import drawn_names

_MAX_NAMED = 40
"""With more classes, the picture of the confusion matrix has no room for their names and for numbers."""


class AccuracyMetric:
    """Top-k accuracies. Keeps counts, and for each image and each k whether it is correct."""

    def __init__(self, spec: ClassificationSpec) -> None:
        classes = spec.dataset.num_classes
        topk = spec.model.head.topk
        refuse_one_class(spec)
        if not topk or not all(1 <= k <= classes for k in topk):
            what = f"{topk} does not fit {classes} classes"
            raise SpecError(Fault("model.head.topk", what, f"write numbers from 1 to {classes}"))
        self._names = class_names(spec)
        self._topk = {k: MulticlassAccuracy(classes, top_k=k, average="micro") for k in topk}
        self._correct = {k: [torch.empty(0, dtype=torch.bool)] for k in topk}
        self._confusion = MulticlassConfusionMatrix(classes)

    @property
    def figures(self) -> Sequence[str]:
        """The names that TAO gives them, `val_acc_<k>`, in the order of model.head.topk."""
        return tuple(f"val_acc_{k}" for k in self._topk)

    @property
    def num_samples(self) -> int:
        """Number of images so far."""
        return sum(map(len, next(iter(self._correct.values()))))

    @property
    def key(self) -> str:
        """Digest of the class names and the values of k, in their order."""
        return digest([self._names, list(self._topk)])

    def update(self, outputs: Outputs, targets: Tensor) -> None:
        """Add logits [N, classes] and class indices [N]."""
        logits = outputs["output"]
        for k, accuracy in self._topk.items():
            accuracy.update(logits, targets)
            # As in torchmetrics, which uses argmax for k = 1: among equal logits, argmax and topk choose differently.
            best = logits.argmax(1, keepdim=True) if k == 1 else logits.topk(k, 1).indices
            self._correct[k].append((best == targets[:, None]).any(1))
        self._confusion.update(logits.argmax(1), targets)

    def compute(self) -> dict[str, float]:
        """Return the accuracies, in 0..1, by `val_acc_<k>`; an empty dictionary if there are no images."""
        if not self.num_samples:
            return {}
        return {f"val_acc_{k}": float(accuracy.compute()) for k, accuracy in self._topk.items()}

    def resampled(self, figure: str, counts: NDArray[np.int64]) -> float:
        """Compute an accuracy with each image counted `counts` times, in the order of `update`."""
        parts = self._correct[int(figure.removeprefix("val_acc_"))]
        parts[:] = [torch.cat(parts)]  # joined once, because this is called for every resample
        correct = counts[parts[0].numpy()].sum()
        return float(np.float32(correct) / np.float32(counts.sum()))  # in float32, like torchmetrics

    def write(self, directory: Path) -> JsonMapping:
        """Write confusion_matrix.png. Return the matrix (rows are true classes) and the accuracy of each class."""
        matrix = self._confusion.compute()
        counts = matrix.sum(1)
        _draw(matrix, self._names, directory / "confusion_matrix.png")
        per_class = {
            name: {"images": int(count), "accuracy": float(correct / count) if count else None}
            for name, count, correct in zip(self._names, counts, matrix.diag(), strict=True)
        }
        return {"classes": per_class, "confusion_matrix": matrix.tolist()}


def _draw(matrix: Tensor, names: list[str], path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties

    with_names = len(names) <= _MAX_NAMED
    side = max(4.0, 0.5 * len(names)) if with_names else 10.0
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    share = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    picture = axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, label="share of the true class")
    axes.set(xlabel="predicted class", ylabel="true class", title=f"{int(matrix.sum())} images")
    if with_names:
        drawn = drawn_names(names, "dataset.classes_file")
        font = FontProperties(fname=drawn.file) if drawn.file else None
        axes.set_xticks(range(len(names)), drawn.names, rotation=90, fontproperties=font, parse_math=False)
        axes.set_yticks(range(len(names)), drawn.names, fontproperties=font, parse_math=False)
        for row, counts in enumerate(matrix.tolist()):
            for column, count in enumerate(counts):
                if count:
                    color = "white" if share[row, column] > 0.5 else "black"
                    axes.text(column, row, str(count), ha="center", va="center", color=color, fontsize=8)
    figure.savefig(path, dpi=100)
