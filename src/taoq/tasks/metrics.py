# SPDX-License-Identifier: Apache-2.0
"""Adapters that make torchmetrics metrics, and functions that score samples, into metrics of the pipeline."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torchmetrics
from numpy.typing import NDArray
from torch import Tensor

from taoq.errors import Fault, Notice, TaoqError
from taoq.network import Outputs
from taoq.tasks.base import Metric, Targets

log = logging.getLogger(__name__)

ScoreFunction = Callable[[Any, Any], Any]
"""Maps the outputs and targets of a batch to one score per sample, [N]; larger is better."""
AnyMetric = torchmetrics.Metric | torchmetrics.MetricCollection | ScoreFunction

_MAX_VALUES = 2**23
"""Limit on the state values that are kept for intervals, about 160 MB. Beyond it, differences get no interval."""


def metric_factory(metric: AnyMetric) -> Callable[[], Metric]:
    """Return a function that creates empty metrics for the pipeline.

    Args:
        metric: A torchmetrics metric or collection, or a function that scores samples. It receives the output tensor of
            a network with one output, and a dictionary of tensors by name otherwise. It is copied, not changed.
    """
    if isinstance(metric, torchmetrics.MetricCollection):
        metrics = {str(name): entry for name, entry in metric.items(keep_base=True, copy_state=False)}
        return lambda: TorchMetric(metrics)
    if isinstance(metric, torchmetrics.Metric):
        return lambda: TorchMetric({type(metric).__name__: metric})
    return lambda: MeanScore(metric)


class MeanScore:
    """The mean of the scores that a function gives to samples.

    Args:
        function: The function; the figure has its name.
    """

    def __init__(self, function: ScoreFunction) -> None:
        self._function = function
        self._scores: list[NDArray[np.float64]] = []
        name = getattr(function, "__name__", "score")
        self.figures = (name if name.isidentifier() else "score",)

    @property
    def num_samples(self) -> int:
        """Number of samples so far."""
        return sum(map(len, self._scores))

    def update(self, outputs: Outputs, targets: Targets) -> None:
        """Score a batch.

        Raises:
            TaoqError: If the function does not return one score per sample.
        """
        count = len(next(iter(outputs.values())))
        scores = np.asarray(self._function(_prediction(outputs), targets), np.float64)
        if scores.shape != (count,):
            what = f"gives an array of shape {list(scores.shape)} for {count} samples"
            raise TaoqError(Fault(f"metric {self.figures[0]}", what, f"let it give one score per sample: [{count}]"))
        self._scores.append(scores)

    def compute(self) -> dict[str, float]:
        """Return the mean; an empty dictionary if there are no samples."""
        return {self.figures[0]: float(np.concatenate(self._scores).mean())} if self._scores else {}

    def resampled(self, figure: str, counts: NDArray[np.int64]) -> float:  # noqa: ARG002 (it has one figure)
        """Compute the mean with each sample counted `counts` times, in the order of `update`."""
        return float(np.average(np.concatenate(self._scores), weights=counts))


class TorchMetric:
    """Metrics of torchmetrics, by name.

    Metrics can be resampled if their states are sums over samples. Then the states of each sample are kept, and the
    states of a resample are a weighted sum of them. Every batch is checked for this property.

    Args:
        metrics: The metrics by name, which are copied. Metrics for which lower is better are computed, but are not
            `figures`.
    """

    def __init__(self, metrics: Mapping[str, torchmetrics.Metric]) -> None:
        self._metrics = {name: _empty(metric) for name, metric in metrics.items()}
        self._scratch = {name: _empty(metric) for name, metric in metrics.items()}
        self.figures: Sequence[str] = tuple(
            name for name, metric in metrics.items() if metric.higher_is_better is not False
        )
        self._resampling_problem = ""  # why the metrics cannot be resampled; empty if they can
        self._samples: list[Tensor] = []  # for each batch the states of its samples, sparse [N, values]
        self._values = 0  # number of nonzero values in `_samples`

    @property
    def num_samples(self) -> int:
        """Number of samples that a resample draws from; 0 if the metrics cannot be resampled."""
        return sum(map(len, self._samples))

    def update(self, outputs: Outputs, targets: Targets) -> None:
        """Add a batch."""
        prediction, count = _prediction(outputs), len(next(iter(outputs.values())))
        for metric in self._metrics.values():
            metric.update(prediction, targets)
        if not self._resampling_problem:
            self._keep_states(prediction, targets, count)
            if self._resampling_problem:
                self._samples.clear()
                what = f"differences get no interval: {self._resampling_problem}"
                log.info(Notice(f"metric {', '.join(self._metrics)}", what))

    def compute(self) -> dict[str, float]:
        """Return the figures. If a metric computes several, the first of them is also returned as the metric's name."""
        values: dict[str, float] = {}
        for name, metric in self._metrics.items():
            values |= _figures(name, metric.compute())
        return values

    def resampled(self, figure: str, counts: NDArray[np.int64]) -> float:
        """Compute a figure with each sample counted `counts` times, in the order of `update`."""
        self._samples[:] = [torch.cat(self._samples)] if len(self._samples) > 1 else self._samples
        weights = torch.from_numpy(counts).to(torch.float64)
        values = iter(torch.mv(self._samples[0].t(), weights).tolist())
        for metric in self._scratch.values():
            for key, state in zip(metric.metric_state, _states(metric), strict=True):
                flat = torch.tensor([next(values) for _ in range(state.numel())], dtype=torch.float64)
                setattr(metric, key, flat.reshape(state.shape).to(state.dtype))
        return _figures(figure, self._scratch[figure].compute())[figure]

    def _keep_states(self, prediction: object, targets: Targets, count: int) -> None:
        """Keep the contribution of each sample of a batch to the states, or set why that is not possible."""
        if any(_has_inner_metrics(metric) or not metric.metric_state for metric in self._metrics.values()):
            self._resampling_problem = "a metric is computed from other metrics"
            return
        if any(isinstance(state, list) for metric in self._metrics.values() for state in metric.metric_state.values()):
            self._resampling_problem = "a metric keeps lists, not sums"
            return
        batch_states = self._states_of(prediction, targets)
        rows = torch.stack(
            [self._states_of(_sample(prediction, index), _sample(targets, index)) for index in range(count)]
        )
        if not torch.allclose(rows.sum(0), batch_states, rtol=1e-5, atol=1e-6):
            self._resampling_problem = "the states of a batch are not the sum of those of its samples"
            return
        self._samples.append(rows.to_sparse())
        self._values += int((rows != 0).sum())
        if self._values > _MAX_VALUES:
            self._resampling_problem = f"the states of {self.num_samples} samples take too much memory"

    def _states_of(self, prediction: object, targets: Targets) -> Tensor:
        """Update empty metrics with a batch and return their states as one vector."""
        for metric in self._scratch.values():
            metric.reset()
            metric.update(prediction, targets)
        states = [state for metric in self._scratch.values() for state in _states(metric)]
        return torch.cat([state.flatten().to(torch.float64) for state in states])


def _empty(metric: torchmetrics.Metric) -> torchmetrics.Metric:
    """Copy a metric to the CPU, where the outputs are, without the data that it has seen."""
    empty = copy.deepcopy(metric).cpu()
    empty.reset()
    empty.compute_with_cache = False  # `resampled` sets the states directly, which does not clear the cache
    return empty


def _has_inner_metrics(metric: torchmetrics.Metric) -> bool:
    """Return whether a metric wraps or combines others, whose states are not its own."""
    return any(isinstance(module, torchmetrics.Metric) for module in metric.modules() if module is not metric)


def _states(metric: torchmetrics.Metric) -> list[Tensor]:
    return [state for state in metric.metric_state.values() if isinstance(state, Tensor)]


def _prediction(outputs: Outputs) -> object:
    """Return the output of a network with one output, otherwise all outputs by name."""
    return next(iter(outputs.values())) if len(outputs) == 1 else dict(outputs)


def _sample(values: Targets, index: int) -> Targets:
    """Slice one sample out of a batch: a tensor, a list, or a dictionary or tuple of such."""
    if isinstance(values, Mapping):
        return {key: _sample(value, index) for key, value in values.items()}
    if isinstance(values, tuple):
        return tuple(_sample(value, index) for value in values)
    return values[index : index + 1]


def _figures(name: str, computed: object) -> dict[str, float]:
    """Return what a metric computed: a number by its name; of a mapping, its numbers, and the first by that name too.

    Raises:
        TaoqError: If it computed no single number.
    """
    if not isinstance(computed, Mapping):
        return {name: _number(name, computed)}
    figures = {str(key): float(value) for key, value in computed.items() if torch.as_tensor(value).numel() == 1}
    if not figures:
        raise TaoqError(Fault(f"metric {name}", "computes no single number", "choose an average that gives one number"))
    return {name: next(iter(figures.values())), **figures}


def _number(name: str, computed: object) -> float:
    """Convert a computed figure into a number.

    Raises:
        TaoqError: If it is not a single number.
    """
    value = torch.as_tensor(computed)
    if value.numel() != 1:
        what = f"computes an array of shape {list(value.shape)}"
        raise TaoqError(Fault(f"metric {name}", what, "choose an average that gives one number"))
    return float(value)
