# SPDX-License-Identifier: Apache-2.0
"""How sure a difference between two models is, over the images that both were evaluated on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from taoq.status import track
from taoq.tasks.base import Metric


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A difference of a figure between two models.

    Attributes:
        figure: Name of the figure.
        value: The model's figure minus the reference's, in -1..1.
        low: Lower end of its 95 % interval.
        high: Upper end.
        resamples: Number of resamples that the interval is of.
    """

    figure: str
    value: float
    low: float
    high: float
    resamples: int


def difference(reference: Metric, metric: Metric, figure: str, *, resamples: int = 1000, seed: int = 0) -> Difference:
    """The difference of a figure with its 95 % percentile interval, by the paired bootstrap over images.

    Images are drawn with replacement, the same ones for both models: what makes an image hard for both cancels
    (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).

    Args:
        reference: The reference's metric, computed.
        metric: The model's metric over the same data, computed.
        figure: One of their `figures`.
        resamples: Number of resamples. Those in which nothing defines the figure are left out of the interval, and of
            the number that is returned.
        seed: Of the draw.

    Raises:
        ValueError: The metrics are of different numbers of images, or the figure has no value, in all the images or in
            any resample.
    """
    images = metric.num_samples
    if reference.num_samples != images:
        raise ValueError(f"not the same images: {reference.num_samples} of the reference, {images} of the model")

    def minus(counts: NDArray[np.int64]) -> float:
        return metric.resampled(figure, counts) - reference.resampled(figure, counts)

    value = minus(np.ones(images, np.int64)) if images else math.nan
    if math.isnan(value):
        raise ValueError(f"{figure} has no value: nothing in {images} image(s) defines it")
    random = np.random.default_rng(seed)
    draws = (random.multinomial(images, [1 / images] * images) for _ in range(resamples))
    # `flat` has an entry per image
    drawn = np.array([minus(counts) for counts in track(draws, images * resamples, "resampling", "flat")])
    drawn = drawn[~np.isnan(drawn)]
    if not drawn.size:
        raise ValueError(f"{figure} has no value in any of {resamples} resample(s)")
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Difference(figure=figure, value=value, low=float(low), high=float(high), resamples=drawn.size)
