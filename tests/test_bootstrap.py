"""The paired bootstrap, on metrics of real data."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from taoq.pipeline.intervals import Difference, difference
from taoq.spec.load import spec_from_dict
from taoq.tasks.classification.metric import AccuracyMetric
from taoq.tasks.classification.spec import ClassificationSpec
from taoq.tasks.rtdetr.data import Targets
from taoq.tasks.rtdetr.metric import CocoMetric
from taoq.tasks.rtdetr.spec import RtdetrSpec

Accuracy = Callable[[NDArray[np.bool_]], AccuracyMetric]


@pytest.fixture
def accuracy(tmp_path: Path) -> Accuracy:
    """A metric of a network that is right on some images."""
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
        said = torch.where(torch.from_numpy(right), targets, 1 - targets)
        if len(right):
            metric.update({"output": torch.nn.functional.one_hot(said, 2).float()}, targets)
        return metric

    return of


def two(images: int = 400) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Right on 300 of 400 images, and on 280: 10 of them are others."""
    first = np.arange(images) < 300
    second = first.copy()
    second[:30] = False
    second[300:310] = True
    return first, second


def test_a_model_does_not_differ_from_itself(accuracy: Accuracy) -> None:
    first, _ = two()
    found = difference(accuracy(first), accuracy(first), "val_acc_1", resamples=50)
    assert found == Difference(figure="val_acc_1", value=0, low=0, high=0, resamples=50)


def test_the_interval_is_around_the_difference_of_the_figures(accuracy: Accuracy) -> None:
    reference, metric = map(accuracy, two())
    found = difference(reference, metric, "val_acc_1")
    assert found.value == pytest.approx(-0.05, abs=1e-6)
    assert found.value == metric.compute()["val_acc_1"] - reference.compute()["val_acc_1"]
    assert found.low < found.value < found.high < 0  # 30 against 10 images is no accident
    assert (found.figure, found.resamples) == ("val_acc_1", 1000)


def test_a_seed_decides_the_draw(accuracy: Accuracy) -> None:
    reference, metric = map(accuracy, two())
    first, again, other = (difference(reference, metric, "val_acc_1", resamples=200, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert (first.low, first.high) != (other.low, other.high)


def test_width_of_one_share(accuracy: Accuracy) -> None:
    """Against a reference that is always right, the difference is a binomial share."""
    right = np.arange(400) < 320
    found = difference(accuracy(np.ones(400, bool)), accuracy(right), "val_acc_1", resamples=2000)
    assert found.value == pytest.approx(-0.2, abs=1e-6)
    assert found.high - found.low == pytest.approx(2 * 1.96 * math.sqrt(0.8 * 0.2 / 400), rel=0.15)


def test_width_of_a_pair(accuracy: Accuracy) -> None:
    """Images that both are right or wrong on do not widen it: McNemar's variance."""
    reference, metric = map(accuracy, two())
    found = difference(reference, metric, "val_acc_1", resamples=2000)
    deviation = math.sqrt((30 + 10) / 400 - 0.05**2) / math.sqrt(400)
    assert found.high - found.low == pytest.approx(2 * 1.96 * deviation, rel=0.15)


def test_other_images_are_refused(accuracy: Accuracy) -> None:
    first, _ = two()
    with pytest.raises(ValueError, match=r"^not the same images: 400 of the reference, 399 of the model$"):
        difference(accuracy(first), accuracy(first[1:]), "val_acc_1")


def test_no_images_are_refused(accuracy: Accuracy) -> None:
    nothing = np.zeros(0, bool)
    with pytest.raises(ValueError, match=r"^val_acc_1 has no value: nothing in 0 image\(s\) defines it$"):
        difference(accuracy(nothing), accuracy(nothing), "val_acc_1")


def detector(folder: Path, annotated: list[int], shift: float) -> CocoMetric:
    """Finds the one box of each annotated image of six, some pixels beside it."""
    data = {
        "images": [{"id": id_, "file_name": f"{id_}.png"} for id_ in range(1, 7)],
        "annotations": [
            {"id": id_, "image_id": id_, "category_id": 1, "bbox": [20, 20, 60, 60], "iscrowd": 0} for id_ in annotated
        ],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (folder / "val.json").write_text(json.dumps(data), encoding="utf-8")
    dataset = {"num_classes": 1, "test_data_sources": {"json_file": str(folder / "val.json")}}
    job = spec_from_dict({"model": {"num_queries": 1, "num_select": 1}, "dataset": dataset}, RtdetrSpec)
    metric = CocoMetric(job)
    for image in range(1, 7):
        outputs = {
            "pred_logits": torch.full((1, 1, 1), 2.0),
            "pred_boxes": torch.tensor([[[(50 + shift * image) / 100, 0.5, 0.6, 0.6]]]),
        }
        metric.update(outputs, Targets((image,), torch.tensor([[100.0, 100.0]])))
    metric.compute()
    return metric


def test_detectors(tmp_path: Path) -> None:
    exact, shifted = (detector(tmp_path, [1, 2, 3, 4, 5, 6], shift) for shift in (0.0, 3.0))
    found = difference(exact, shifted, "val_mAP", resamples=200)
    assert found.value == pytest.approx(shifted.compute()["val_mAP"] - exact.compute()["val_mAP"], abs=1e-12)
    assert -1 < found.low < found.value < found.high < 0
    assert difference(exact, exact, "AP75", resamples=20) == Difference(
        figure="AP75", value=0, low=0, high=0, resamples=20
    )


def test_resamples_without_the_figure_are_left_out_and_said(tmp_path: Path) -> None:
    """One of six images is annotated: a third of the resamples, (5/6)^6, have nothing to find."""
    exact, shifted = (detector(tmp_path, [3], shift) for shift in (0.0, 3.0))
    found = difference(exact, shifted, "val_mAP", resamples=500)
    assert found.low <= found.value <= found.high < 0
    assert found.resamples == pytest.approx(500 * (1 - (5 / 6) ** 6), rel=0.1)
    seed = next(seed for seed in range(99) if not np.random.default_rng(seed).multinomial(6, [1 / 6] * 6)[2])
    with pytest.raises(ValueError, match=r"^val_mAP has no value in any of 1 resample\(s\)$"):
        difference(exact, shifted, "val_mAP", resamples=1, seed=seed)


def test_a_figure_without_a_value_is_refused(tmp_path: Path) -> None:
    metric = detector(tmp_path, [], 0.0)
    with pytest.raises(ValueError, match=r"^val_mAP has no value: nothing in 6 image\(s\) defines it$"):
        difference(metric, metric, "val_mAP")
