"""Metrics of torchmetrics and functions of one's own, with the interval of a difference where there can be one."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics import MeanSquaredError, Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassF1Score,
    MulticlassJaccardIndex,
)

from taoq.errors import TaoqError
from taoq.pipeline.intervals import difference
from taoq.tasks.metrics import metric_factory

COUNT = 90
LABELS = torch.randint(5, (COUNT,), generator=torch.Generator().manual_seed(0))


def scores(seed: int, strength: float) -> Tensor:
    """Scores that are the better the larger `strength` is."""
    noise = torch.randn(COUNT, 5, generator=torch.Generator().manual_seed(seed))
    noise[torch.arange(COUNT), LABELS] += strength
    return noise


def evaluated(metric: Any, outputs: Tensor, batch: int = 32) -> Any:
    result = metric_factory(metric)()
    for start in range(0, COUNT, batch):
        result.update({"logits": outputs[start : start + batch]}, LABELS[start : start + batch])
    return result


def share_right(outputs: Tensor, labels: Tensor) -> Tensor:
    return outputs.argmax(1) == labels


SUMS = [
    pytest.param(MulticlassAccuracy(5, average="micro"), id="accuracy"),
    pytest.param(MulticlassAccuracy(5), id="mean of class accuracies"),
    pytest.param(MulticlassJaccardIndex(5), id="IoU"),
    pytest.param(MetricCollection({"f1": MulticlassF1Score(5), "iou": MulticlassJaccardIndex(5)}), id="collection"),
    pytest.param(share_right, id="function"),
]


@pytest.mark.parametrize("metric", SUMS)
def test_a_resample_is_the_metric_of_the_drawn_samples(metric: Any) -> None:
    outputs = scores(1, 2.0)
    result = evaluated(metric, outputs)
    counts = np.random.default_rng(0).multinomial(COUNT, [1 / COUNT] * COUNT)
    drawn = np.repeat(np.arange(COUNT), counts)
    for figure in result.figures:
        own = metric
        if isinstance(metric, MetricCollection):
            own = metric[figure]
        whole, resample = (
            float(own(outputs[chosen], LABELS[chosen]).float().mean()) for chosen in (np.arange(COUNT), drawn)
        )
        assert result.compute()[figure] == pytest.approx(whole, abs=1e-6)
        assert result.resampled(figure, np.ones(COUNT, np.int64)) == pytest.approx(whole, abs=1e-6)
        assert result.resampled(figure, counts) == pytest.approx(resample, abs=1e-6)


@pytest.mark.parametrize("metric", SUMS)
def test_a_difference_has_an_interval(metric: Any) -> None:
    better, worse = evaluated(metric, scores(1, 2.0)), evaluated(metric, scores(1, 0.5))
    result = difference(better, worse, better.figures[0], resamples=200)
    assert result.low is not None
    assert result.high is not None
    assert result.low < result.value < result.high < 0


def test_the_given_metric_is_not_touched() -> None:
    metric = MulticlassAccuracy(5)
    metric.update(scores(1, 2.0), LABELS)
    before = {name: state.clone() for name, state in metric.metric_state.items()}
    evaluated(metric, scores(2, 0.0))
    assert all(torch.equal(state, before[name]) for name, state in metric.metric_state.items())


class MeanOfBatches(Metric):
    """Depends on how the samples are cut into batches, as MeanIoU of torchmetrics does."""

    higher_is_better = True

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), "sum")
        self.add_state("batches", torch.zeros(()), "sum")

    def update(self, outputs: Tensor, labels: Tensor) -> None:
        self.total += (outputs.argmax(1) == labels).float().mean()
        self.batches += 1

    def compute(self) -> Tensor:
        return self.total / self.batches


@pytest.mark.parametrize(
    ("metric", "why"),
    [
        (MulticlassAUROC(5), "a metric keeps lists, not sums"),
        (MeanOfBatches(), "the states of a batch are not the sum of those of its samples"),
    ],
    ids=["lists", "means of batches"],
)
def test_a_metric_that_cannot_be_resampled_has_no_interval(
    metric: Metric, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "taoq"):
        better, worse = evaluated(metric, scores(1, 2.0)), evaluated(metric, scores(1, 0.5))
    name = type(metric).__name__
    assert {str(record.msg) for record in caplog.records} == {f"metric {name}: differences get no interval: {why}"}
    result = difference(better, worse, name)
    assert (result.low, result.high, result.interval, result.verdict) == (None, None, "", "")
    assert result.value == pytest.approx(worse.compute()[name] - better.compute()[name])


def test_a_metric_of_several_figures_has_the_first_under_its_own_name() -> None:
    class Both(MulticlassAccuracy):
        def compute(self) -> dict[str, Tensor]:
            accuracy = super().compute()
            return {"right": accuracy, "wrong": 1 - accuracy, "vector": torch.zeros(3)}

    result = evaluated(Both(5, average="micro"), scores(1, 2.0)).compute()
    assert list(result) == ["Both", "right", "wrong"]
    assert result["Both"] == result["right"]


def test_a_metric_that_is_better_the_lower_it_is_has_no_figures_to_compare() -> None:
    assert metric_factory(MeanSquaredError())().figures == ()
    assert metric_factory(lambda outputs, _: outputs[:, 0])().figures == ("score",)


def test_a_metric_that_is_no_number_is_refused() -> None:
    result = evaluated(MulticlassAccuracy(5, average="none"), scores(1, 2.0))
    with pytest.raises(TaoqError) as error:
        result.compute()
    assert str(error.value) == (
        "metric MulticlassAccuracy: computes an array of shape [5]\nhint: choose an average that gives one number"
    )
