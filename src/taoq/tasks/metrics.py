# SPDX-License-Identifier: Apache-2.0
"""Metrics of torchmetrics, and functions that score samples, as metrics of the pipeline."""

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
"""From outputs and targets of a batch to one score per sample, [N], larger is better."""
AnyMetric = torchmetrics.Metric | torchmetrics.MetricCollection | ScoreFunction

_MOST_VALUES = 2**23
"""Values of states that are kept for intervals, about 160 MB; more samples than that get none."""


def metric_factory(metric: AnyMetric) -> Callable[[], Metric]:
    """What makes empty metrics for the pipeline.

    Args:
        metric: A metric or a collection of torchmetrics, or a function that scores samples. Of a network with one
            output it gets that tensor; of others, a dictionary of them by name. It itself is not changed.
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
        function: The function; its name is that of the figure.
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
            TaoqError: The function does not give one score per sample.
        """
        count = len(next(iter(outputs.values())))
        scores = np.asarray(self._function(_prediction(outputs), targets), np.float64)
        if scores.shape != (count,):
            what = f"gives an array of shape {list(scores.shape)} for {count} samples"
            raise TaoqError(Fault(f"metric {self.figures[0]}", what, f"let it give one score per sample: [{count}]"))
        self._scores.append(scores)

    def compute(self) -> dict[str, float]:
        """The mean; nothing without samples."""
        return {self.figures[0]: float(np.concatenate(self._scores).mean())} if self._scores else {}

    def resampled(self, figure: str, counts: NDArray[np.int64]) -> float:  # noqa: ARG002 (it has one figure)
        """The mean as if the samples, in the order of `update`, were there `counts` times."""
        return float(np.average(np.concatenate(self._scores), weights=counts))


class TorchMetric:
    """Metrics of torchmetrics under the names of their figures.

    A metric can be resampled if its states are sums over samples: then the states of each sample are kept, and a
    resample is another sum of them. Whether they are is tried on every batch.

    Args:
        metrics: The metrics, which are copied. Those that are better the lower they are cannot be compared, and are no
            `figures`.
    """

    def __init__(self, metrics: Mapping[str, torchmetrics.Metric]) -> None:
        self._metrics = {name: _empty(metric) for name, metric in metrics.items()}
        self._scratch = {name: _empty(metric) for name, metric in metrics.items()}
        self.figures: Sequence[str] = tuple(
            name for name, metric in metrics.items() if metric.higher_is_better is not False
        )
        self._why_not = ""
        self._samples: list[Tensor] = []  # of each batch, the states of its samples: sparse, [N, values]
        self._values = 0

    @property
    def num_samples(self) -> int:
        """Number of samples that a resample draws from; 0 if the metrics cannot be resampled."""
        return sum(map(len, self._samples))

    def update(self, outputs: Outputs, targets: Targets) -> None:
        """Add a batch."""
        prediction, count = _prediction(outputs), len(next(iter(outputs.values())))
        for metric in self._metrics.values():
            metric.update(prediction, targets)
        if not self._why_not:
            self._keep_states(prediction, targets, count)
            if self._why_not:
                self._samples.clear()
                log.info(Notice(f"metric {', '.join(self._metrics)}", f"differences get no interval: {self._why_not}"))

    def compute(self) -> dict[str, float]:
        """The figures. Of a metric that computes several, the first has the metric's name as well."""
        values: dict[str, float] = {}
        for name, metric in self._metrics.items():
            computed = metric.compute()
            if isinstance(computed, Mapping):
                figures = {key: float(value) for key, value in computed.items() if torch.as_tensor(value).numel() == 1}
                values |= {name: next(iter(figures.values())), **figures}
            else:
                values[name] = _number(name, computed)
        return values

    def resampled(self, figure: str, counts: NDArray[np.int64]) -> float:
        """A figure as if the samples, in the order of `update`, were there `counts` times."""
        self._samples[:] = [torch.cat(self._samples)] if len(self._samples) > 1 else self._samples
        weights = torch.from_numpy(counts).to(torch.float64)
        values = iter(torch.mv(self._samples[0].t(), weights).tolist())
        for metric in self._scratch.values():
            for key, state in zip(metric.metric_state, _states(metric), strict=True):
                own = [next(values) for _ in range(state.numel())]
                setattr(metric, key, torch.tensor(own, dtype=torch.float64).reshape(state.shape).to(state.dtype))
        return _number(figure, self._scratch[figure].compute())

    def _keep_states(self, prediction: object, targets: Targets, count: int) -> None:
        """Keep what each sample of a batch adds to the states."""
        if any(isinstance(state, list) for metric in self._metrics.values() for state in metric.metric_state.values()):
            self._why_not = "a metric keeps lists, not sums"
            return
        whole = self._states_of(prediction, targets)
        rows = torch.stack(
            [self._states_of(_sample(prediction, index), _sample(targets, index)) for index in range(count)]
        )
        if not torch.allclose(rows.sum(0), whole, rtol=1e-5, atol=1e-6):
            self._why_not = "the states of a batch are not the sum of those of its samples"
            return
        self._samples.append(rows.to_sparse())
        self._values += int((rows != 0).sum())
        if self._values > _MOST_VALUES:
            self._why_not = f"the states of {self.num_samples} samples take too much memory"

    def _states_of(self, prediction: object, targets: Targets) -> Tensor:
        """States after an update of empty metrics, as one vector."""
        for metric in self._scratch.values():
            metric.reset()
            metric.update(prediction, targets)
        states = [state for metric in self._scratch.values() for state in _states(metric)]
        return torch.cat([state.flatten().to(torch.float64) for state in states])


def _empty(metric: torchmetrics.Metric) -> torchmetrics.Metric:
    empty = copy.deepcopy(metric)
    empty.reset()
    empty.compute_with_cache = False  # a resample sets the states without an update
    return empty


def _states(metric: torchmetrics.Metric) -> list[Tensor]:
    return [state for state in metric.metric_state.values() if isinstance(state, Tensor)]


def _prediction(outputs: Outputs) -> object:
    """The only output, or all of them by name."""
    return next(iter(outputs.values())) if len(outputs) == 1 else dict(outputs)


def _sample(values: Targets, index: int) -> Targets:
    """One sample of a batch: of a tensor or a list, of each value of a dictionary or a tuple."""
    if isinstance(values, Mapping):
        return {key: _sample(value, index) for key, value in values.items()}
    if isinstance(values, tuple):
        return tuple(_sample(value, index) for value in values)
    return values[index : index + 1]


def _number(name: str, computed: object) -> float:
    """A computed figure as a number.

    Raises:
        TaoqError: It is not one number.
    """
    value = torch.as_tensor(computed)
    if value.numel() != 1:
        what = f"computes an array of shape {list(value.shape)}"
        raise TaoqError(Fault(f"metric {name}", what, "choose an average that gives one number"))
    return float(value)
