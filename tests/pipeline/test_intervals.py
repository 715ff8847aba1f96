"""The paired bootstrap: a difference between two models with its interval, on metrics of real data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from support.coco import detector_spec, write_coco
from taoq.pipeline.intervals import Difference, difference
from taoq.spec.load import spec_from_dict
from taoq.tasks.classification.metric import AccuracyMetric
from taoq.tasks.classification.spec import ClassificationSpec
from taoq.tasks.rtdetr.data import Targets
from taoq.tasks.rtdetr.metric import CocoMetric

AccuracyOf = Callable[[NDArray[np.bool_]], AccuracyMetric]


@pytest.fixture
def accuracy(tmp_path: Path) -> AccuracyOf:
    """The metric of a network that is right on the given images."""
    for name in ("no", "yes"):
        (tmp_path / name).mkdir()
    data = {
        "dataset": {"num_classes": 2, "val_dataset": {"images_dir": str(tmp_path)}},
        "model": {"head": {"topk": [1]}},
    }
    spec = spec_from_dict(data, ClassificationSpec)

    def of(right: NDArray[np.bool_]) -> AccuracyMetric:
        metric = AccuracyMetric(spec)
        targets = torch.arange(len(right)) % 2
        predicted = torch.where(torch.from_numpy(right), targets, 1 - targets)
        if len(right):
            metric.update({"output": torch.nn.functional.one_hot(predicted, 2).float()}, targets)
        return metric

    return of


def right_images(count: int = 400) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Right on 300 of 400 images, and on 280, of which 10 are others."""
    reference = np.arange(count) < 300
    model = reference.copy()
    model[:30] = False
    model[300:310] = True
    return reference, model


def test_a_model_does_not_differ_from_itself(accuracy: AccuracyOf) -> None:
    right, _ = right_images()
    result = difference(accuracy(right), accuracy(right), "val_acc_1", resamples=50)
    assert result == Difference(figure="val_acc_1", value=0, low=0, high=0, resamples=50)


def test_the_interval_is_around_the_difference_of_the_figures(accuracy: AccuracyOf) -> None:
    reference, metric = map(accuracy, right_images())
    result = difference(reference, metric, "val_acc_1")
    assert result.value == pytest.approx(-0.05, abs=1e-6)
    assert result.value == metric.compute()["val_acc_1"] - reference.compute()["val_acc_1"]
    assert result.low < result.value < result.high < 0  # 30 against 10 images is no accident
    assert (result.figure, result.resamples) == ("val_acc_1", 1000)


def test_a_seed_decides_the_draw(accuracy: AccuracyOf) -> None:
    reference, metric = map(accuracy, right_images())
    first, again, other = (difference(reference, metric, "val_acc_1", resamples=200, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert (first.low, first.high) != (other.low, other.high)


def test_width_of_one_share(accuracy: AccuracyOf) -> None:
    """Against a reference that is always right, the difference is a binomial share."""
    right = np.arange(400) < 320
    result = difference(accuracy(np.ones(400, bool)), accuracy(right), "val_acc_1", resamples=2000)
    assert result.value == pytest.approx(-0.2, abs=1e-6)
    assert result.high - result.low == pytest.approx(2 * 1.96 * math.sqrt(0.8 * 0.2 / 400), rel=0.15)


def test_width_of_a_pair(accuracy: AccuracyOf) -> None:
    """Images that both are right or wrong on do not widen it: McNemar's variance."""
    reference, metric = map(accuracy, right_images())
    result = difference(reference, metric, "val_acc_1", resamples=2000)
    deviation = math.sqrt((30 + 10) / 400 - 0.05**2) / math.sqrt(400)
    assert result.high - result.low == pytest.approx(2 * 1.96 * deviation, rel=0.15)


def test_other_images_are_refused(accuracy: AccuracyOf) -> None:
    right, _ = right_images()
    with pytest.raises(ValueError, match=r"^not the same images: 400 of the reference, 399 of the model$"):
        difference(accuracy(right), accuracy(right[1:]), "val_acc_1")


def test_no_images_are_refused(accuracy: AccuracyOf) -> None:
    no_image = np.zeros(0, bool)
    with pytest.raises(ValueError, match=r"^val_acc_1 has no value: nothing in 0 image\(s\) defines it$"):
        difference(accuracy(no_image), accuracy(no_image), "val_acc_1")


class FixedMetric:
    """A metric that cannot be resampled."""

    figures = ("error",)

    def __init__(self, value: float) -> None:
        self.value = value

    def update(self, outputs: Any, targets: Any) -> None:  # noqa: ARG002 (as in every metric)
        raise AssertionError("it is computed")

    def compute(self) -> Mapping[str, float]:
        return {"error": self.value}


def test_a_metric_that_cannot_be_resampled_has_a_difference_without_an_interval() -> None:
    result = difference(FixedMetric(0.25), FixedMetric(0.75), "error")
    assert result == Difference(figure="error", value=0.5, low=None, high=None, resamples=0)


@pytest.mark.parametrize(
    ("value", "low", "high", "verdict", "interval", "highest"),
    [
        (-0.05, -0.08, -0.02, "worse", "-0.0800 .. -0.0200", -0.02),
        (-0.05, -0.12, 0.02, "not distinguishable", "-0.1200 .. +0.0200", 0.02),
        (0.05, 0.02, 0.08, "better", "+0.0200 .. +0.0800", 0.08),
        (0.0, 0.0, 0.0, "not distinguishable", "+0.0000 .. +0.0000", 0.0),
        (-0.05, None, None, "", "", -0.05),
        (0.05, None, None, "", "", 0.05),
    ],
)
def test_a_verdict_is_what_the_interval_allows(
    value: float, low: float | None, high: float | None, verdict: str, interval: str, highest: float
) -> None:
    result = Difference(figure="val_acc_1", value=value, low=low, high=high, resamples=10)
    assert (result.verdict, result.interval, result.highest) == (verdict, interval, highest)


def detector(folder: Path, annotated: list[int], shift: float) -> CocoMetric:
    """The metric of a detector that finds the one box of each annotated image of six, some pixels beside it."""
    images = [{"id": number, "file_name": f"{number}.png"} for number in range(1, 7)]
    annotations = [
        {"id": number, "image_id": number, "category_id": 1, "bbox": [20, 20, 60, 60], "iscrowd": 0}
        for number in annotated
    ]
    write_coco(folder, images, annotations, [{"id": 1, "name": "thing"}])
    metric = CocoMetric(detector_spec(folder, classes=1, queries=1))
    for number in range(1, 7):
        outputs = {
            "pred_logits": torch.full((1, 1, 1), 2.0),
            "pred_boxes": torch.tensor([[[(50 + shift * number) / 100, 0.5, 0.6, 0.6]]]),
        }
        metric.update(outputs, Targets((number,), torch.tensor([[100.0, 100.0]])))
    metric.compute()
    return metric


def test_detectors(tmp_path: Path) -> None:
    exact, shifted = (detector(tmp_path, [1, 2, 3, 4, 5, 6], shift) for shift in (0.0, 3.0))
    result = difference(exact, shifted, "val_mAP", resamples=200)
    assert result.value == pytest.approx(shifted.compute()["val_mAP"] - exact.compute()["val_mAP"], abs=1e-12)
    assert -1 < result.low < result.value < result.high < 0
    assert difference(exact, exact, "AP75", resamples=20) == Difference(
        figure="AP75", value=0, low=0, high=0, resamples=20
    )


def test_resamples_without_the_figure_are_left_out_and_counted(tmp_path: Path) -> None:
    """One of six images is annotated: a third of the resamples, (5/6)^6, have nothing to find."""
    exact, shifted = (detector(tmp_path, [3], shift) for shift in (0.0, 3.0))
    result = difference(exact, shifted, "val_mAP", resamples=500)
    assert result.low <= result.value <= result.high < 0
    assert result.resamples == pytest.approx(500 * (1 - (5 / 6) ** 6), rel=0.1)
    seed = next(seed for seed in range(99) if not np.random.default_rng(seed).multinomial(6, [1 / 6] * 6)[2])
    with pytest.raises(ValueError, match=r"^val_mAP has no value in any of 1 resample\(s\)$"):
        difference(exact, shifted, "val_mAP", resamples=1, seed=seed)
