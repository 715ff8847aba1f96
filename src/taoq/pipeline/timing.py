# SPDX-License-Identifier: Apache-2.0
"""Measure the latency of several models in turns."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from taoq.errors import Fault, Notice, SpecError
from taoq.network import Inputs
from taoq.plain import JsonObject
from taoq.runtimes.base import Runtime

SPEEDUP = "speed-up: time of float32 over time of the model in the same turn, the median of all turns"
"""Caption of a table with speed-ups."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Latency:
    """The latency of a model at a batch size.

    Attributes:
        model: Name of the model.
        batch: Samples per run.
        p50_ms: Median time of a run in milliseconds.
        p90_ms: 90th percentile of the time of a run in milliseconds.
        p99_ms: 99th percentile of the time of a run in milliseconds.
        images_per_second: Throughput at the median time.
        speedup: The reference's time divided by the model's time in the same turn; the median over all turns.
    """

    model: str
    batch: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    images_per_second: float
    speedup: float

    def to_json(self) -> JsonObject:
        """Return the row of results.json."""
        return dict(vars(self))


def check_batch_sizes(sizes: Sequence[int]) -> None:
    """Check `benchmark.batch_sizes`.

    Raises:
        SpecError: If the list is empty, or a size is below 1 or is listed twice.
    """
    if not sizes or min(sizes) < 1 or len(set(sizes)) < len(sizes):
        what = "empty, not above 0, or has a size twice"
        raise SpecError(Fault("benchmark.batch_sizes", what, "write for example [1, 8]"))


def note_fixed_batches(models: Mapping[str, Runtime], batch: int) -> None:
    """Warn about models whose fixed batch size differs from `batch`."""
    for name, model in models.items():
        fixed = model.fixed_batch
        if fixed is not None and fixed != batch:
            runs = -(-batch // fixed)
            what = f"{name} takes {fixed} images at once: for {batch} it runs {runs} time(s), on {runs * fixed} images"
            log.warning(Notice("benchmark.batch_sizes", what))


def run_in_turns(models: Mapping[str, Runtime], inputs: Inputs, *, warmup: int, runs: int) -> dict[str, list[float]]:
    """Run the models in turns and return the seconds of each run, by model.

    Each turn runs every model once, and every other turn in reversed order, so that a machine that is busy for a while
    slows all models down alike.
    """
    for model in models.values():
        for _ in range(warmup):
            model.run(inputs)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(runs):
        for name in sorted(models, reverse=bool(number % 2)):
            started = time.perf_counter()
            models[name].run(inputs)
            seconds[name].append(time.perf_counter() - started)
    return seconds


def latency(name: str, batch: int, seconds: Sequence[float], reference: Sequence[float]) -> Latency:
    """Summarize the runs of a model.

    Args:
        name: Name of the model.
        batch: Samples per run.
        seconds: Seconds of each run.
        reference: Seconds of each run of the reference, in the same turns.
    """
    cuts = statistics.quantiles(seconds, n=100, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 99
    return Latency(
        model=name,
        batch=batch,
        p50_ms=1e3 * cuts[49],
        p90_ms=1e3 * cuts[89],
        p99_ms=1e3 * cuts[98],
        images_per_second=batch / cuts[49],
        speedup=statistics.median(base / own for base, own in zip(reference, seconds, strict=True)),
    )
