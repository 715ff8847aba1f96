# SPDX-License-Identifier: Apache-2.0
"""Top-k accuracy, accuracy per class, confusion matrix."""

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
from taoq.tasks.classification.data import class_names
from taoq.tasks.classification.spec import ClassificationSpec

_MAX_NAMED = 40  # classes that have room for a name and a number in the picture


class AccuracyMetric:
    """Keeps counts, and of each image a byte for each k."""

    def __init__(self, spec: ClassificationSpec) -> None:
        classes = spec.dataset.num_classes
        topk = spec.model.head.topk
        if not topk or not all(1 <= k <= classes for k in topk):
            what = f"{topk} does not fit {classes} classes"
            raise SpecError(Fault("model.head.topk", what, f"write numbers from 1 to {classes}"))
        data = spec.dataset.val_dataset.images_dir or spec.dataset.test_dataset.images_dir
        self._names = class_names(spec, Path(data))
        self._topk = {k: MulticlassAccuracy(classes, top_k=k, average="micro") for k in topk}
        self._right = {k: [torch.empty(0, dtype=torch.bool)] for k in topk}
        self._confusion = MulticlassConfusionMatrix(classes)

    @property
    def figures(self) -> Sequence[str]:
        """TAO's keys, in the order of model.head.topk."""
        return tuple(f"val_acc_{k}" for k in self._topk)

    @property
    def num_samples(self) -> int:
        """Number of images so far."""
        return sum(map(len, next(iter(self._right.values()))))

    @property
    def key(self) -> str:
        """Classes in their order, and the k."""
        return digest([self._names, list(self._topk)])

    def update(self, outputs: Outputs, targets: Tensor) -> None:
        """Add logits [N, classes] and class indices [N]."""
        logits = outputs["output"]
        for k, accuracy in self._topk.items():
            accuracy.update(logits, targets)
            # of equal logits, the ones that torchmetrics takes
            best = logits.argmax(1, keepdim=True) if k == 1 else logits.topk(k, 1).indices
            self._right[k].append((best == targets[:, None]).any(1))
        self._confusion.update(logits.argmax(1), targets)

    def compute(self) -> dict[str, float]:
        """TAO's keys, val_acc_<k>, in 0..1; none without images."""
        if not self.num_samples:
            return {}
        return {f"val_acc_{k}": float(accuracy.compute()) for k, accuracy in self._topk.items()}

    def resampled(self, figure: str, counts: NDArray[np.int64]) -> float:
        """An accuracy as if the images, in the order of `update`, were there `counts` times."""
        parts = self._right[int(figure.removeprefix("val_acc_"))]
        parts[:] = [torch.cat(parts)]
        right = counts[parts[0].numpy()].sum()
        return float(np.float32(right) / np.float32(counts.sum()))  # in the precision of torchmetrics

    def write(self, directory: Path) -> JsonMapping:
        """Write confusion_matrix.png; rows are true classes, columns predicted ones."""
        matrix = self._confusion.compute()
        counts = matrix.sum(1)
        _draw(matrix, self._names, directory / "confusion_matrix.png")
        per_class = {
            name: {"images": int(count), "accuracy": float(right / count) if count else None}
            for name, count, right in zip(self._names, counts, matrix.diag(), strict=True)
        }
        return {"classes": per_class, "confusion_matrix": matrix.tolist()}


def _draw(matrix: Tensor, names: list[str], path: Path) -> None:
    from matplotlib.figure import Figure

    named = len(names) <= _MAX_NAMED
    side = max(4.0, 0.5 * len(names)) if named else 10.0
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    share = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    picture = axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, label="share of the true class")
    axes.set(xlabel="predicted class", ylabel="true class", title=f"{int(matrix.sum())} images")
    if named:
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
        for row, counts in enumerate(matrix.tolist()):
            for column, count in enumerate(counts):
                if count:
                    color = "white" if share[row, column] > 0.5 else "black"
                    axes.text(column, row, str(count), ha="center", va="center", color=color, fontsize=8)
    figure.savefig(path, dpi=100)
