# SPDX-License-Identifier: Apache-2.0
"""Confidence intervals of the difference between two models that were evaluated on the same samples."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from taoq.plain import JsonObject
from taoq.status import track
from taoq.tasks.base import Metric, Resampling


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The difference of a figure between a model and a reference.

    Attributes:
        figure: Name of the figure.
        value: The model's figure minus the reference's.
        low: Lower end of the 95 % interval; None if the metric cannot be resampled.
        high: Upper end of the interval; None if the metric cannot be resampled.
        resamples: Number of resamples that the interval is computed from.
    """

    figure: str
    value: float
    low: float | None
    high: float | None
    resamples: int

    @property
    def highest(self) -> float:
        """Upper end of the interval; without an interval, the value."""
        return self.value if self.high is None else self.high

    @property
    def verdict(self) -> str:
        """`better`, `worse`, or `not distinguishable`; empty without an interval."""
        if self.low is None or self.high is None:
            return ""
        return "not distinguishable" if self.low <= 0 <= self.high else "better" if self.low > 0 else "worse"

    @property
    def interval(self) -> str:
        """The interval as text, like `-0.0049 .. +0.0006`; empty without an interval."""
        return "" if self.low is None or self.high is None else f"{self.low:+.4f} .. {self.high:+.4f}"

    def to_json(self) -> JsonObject:
        """Return the entry of a report."""
        return dataclasses.asdict(self)


def difference(reference: Metric, metric: Metric, figure: str, *, resamples: int = 1000, seed: int = 0) -> Difference:
    """Compute the difference of a figure with its 95 % percentile interval, by the paired bootstrap over samples.

    Each resample draws the same samples, with replacement, for both models, so that samples which are hard for both do
    not widen the interval (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).

    Args:
        reference: The reference's metric, after `compute`.
        metric: The model's metric over the same data, after `compute`.
        figure: Name of a figure of both metrics.
        resamples: Number of resamples. A resample in which the figure is undefined is not counted.
        seed: Seed of the draws.

    Returns:
        The difference; without an interval if a metric is not `Resampling`, or has no samples to draw from.

    Raises:
        ValueError: If the metrics have different numbers of samples, or if the figure is undefined on all samples
            together or on every resample.
    """
    if not (isinstance(reference, Resampling) and isinstance(metric, Resampling)):
        return _without_interval(reference, metric, figure)
    if not (reference.num_samples and metric.num_samples) and figure in metric.compute():
        return _without_interval(reference, metric, figure)
    count = metric.num_samples
    if reference.num_samples != count:
        raise ValueError(f"not the same images: {reference.num_samples} of the reference, {count} of the model")

    def resampled(counts: NDArray[np.int64]) -> float:
        return metric.resampled(figure, counts) - reference.resampled(figure, counts)

    value = resampled(np.ones(count, np.int64)) if count else math.nan
    if math.isnan(value):
        raise ValueError(f"{figure} has no value: nothing in {count} image(s) defines it")
    random = np.random.default_rng(seed)
    draws = (random.multinomial(count, [1 / count] * count) for _ in range(resamples))
    values = np.array([resampled(counts) for counts in track(draws, resamples, "resampling")])
    values = values[~np.isnan(values)]
    if not values.size:
        raise ValueError(f"{figure} has no value in any of {resamples} resample(s)")
    low, high = np.percentile(values, [2.5, 97.5])
    return Difference(figure=figure, value=value, low=float(low), high=float(high), resamples=values.size)


def _without_interval(reference: Metric, metric: Metric, figure: str) -> Difference:
    value = metric.compute()[figure] - reference.compute()[figure]
    return Difference(figure=figure, value=value, low=None, high=None, resamples=0)
