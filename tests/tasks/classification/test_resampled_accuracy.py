"""Accuracy of a resample, against the accuracy of a data set with copies of the drawn images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from taoq.spec.load import spec_from_dict
from taoq.tasks.classification.metric import AccuracyMetric
from taoq.tasks.classification.spec import ClassificationSpec

CLASSES = 7
IMAGES = 150


def metric_of(folder: Path, logits: Tensor, targets: Tensor, size: int = 40) -> AccuracyMetric:
    """The metric after batches of `size`, the last of them smaller."""
    for number in range(CLASSES):
        (folder / f"class_{number}").mkdir(exist_ok=True)
    dataset = {"num_classes": CLASSES, "val_dataset": {"images_dir": str(folder)}}
    model = {"head": {"topk": [1, 3, CLASSES, 2]}}
    metric = AccuracyMetric(spec_from_dict({"dataset": dataset, "model": model}, ClassificationSpec))
    for start in range(0, len(targets), size):
        metric.update({"output": logits[start : start + size]}, targets[start : start + size])
    return metric


def make_outputs(*, ties: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    targets = torch.randint(CLASSES, (IMAGES,), generator=generator)
    logits = torch.randn(IMAGES, CLASSES, generator=generator) + torch.nn.functional.one_hot(targets, CLASSES)
    return (logits.round() if ties else logits), targets


def test_figures_and_images_are_known(tmp_path: Path) -> None:
    logits, targets = make_outputs(ties=False)
    metric = metric_of(tmp_path, logits, targets)
    assert metric.figures == ("val_acc_1", "val_acc_3", f"val_acc_{CLASSES}", "val_acc_2")
    assert metric.num_samples == IMAGES
    empty = metric_of(tmp_path, logits[:0], targets[:0])
    assert (empty.figures, empty.num_samples) == (metric.figures, 0)


@pytest.mark.parametrize("ties", [False, True], ids=["no ties", "ties"])
def test_resampled_is_the_accuracy_of_repeated_images(tmp_path: Path, ties: bool) -> None:
    logits, targets = make_outputs(ties=ties)
    metric = metric_of(tmp_path, logits, targets)
    random = np.random.default_rng(0)
    for _ in range(5):
        counts = random.multinomial(IMAGES, [1 / IMAGES] * IMAGES)
        repeats = torch.from_numpy(counts)
        expected = metric_of(
            tmp_path, logits.repeat_interleave(repeats, 0), targets.repeat_interleave(repeats)
        ).compute()
        assert {figure: metric.resampled(figure, counts) for figure in metric.figures} == expected
    figures = metric.compute()
    assert 0.2 < figures["val_acc_1"] < figures["val_acc_2"] < figures["val_acc_3"] < figures[f"val_acc_{CLASSES}"] == 1
    assert {figure: metric.resampled(figure, np.ones(IMAGES, np.int64)) for figure in metric.figures} == figures


def test_images_may_follow_a_resample(tmp_path: Path) -> None:
    logits, targets = make_outputs(ties=False)
    metric = metric_of(tmp_path, logits, targets)
    metric.resampled("val_acc_1", np.ones(IMAGES, np.int64))
    wrong = torch.nn.functional.one_hot(torch.tensor([0, 0]), CLASSES).float()
    metric.update({"output": wrong}, torch.tensor([1, 1]))
    assert metric.num_samples == IMAGES + 2
    assert metric.resampled("val_acc_1", np.ones(IMAGES + 2, np.int64)) == metric.compute()["val_acc_1"]
    assert metric.resampled("val_acc_1", np.array([0] * IMAGES + [3, 1])) == 0
