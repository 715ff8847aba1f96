# SPDX-License-Identifier: Apache-2.0
"""How long models take, measured in turns."""

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
"""Caption of tables with speed-ups."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Latency:
    """How fast a model is at a batch size.

    Attributes:
        model: Name of the model.
        batch: Samples per run.
        p50_ms: Median time of a run, milliseconds.
        p90_ms: Time that 90 % of the runs do not exceed.
        p99_ms: Time that 99 % of the runs do not exceed.
        images_per_second: Throughput at the median time.
        speedup: Median over the turns of the reference's time over the model's time in the same turn.
    """

    model: str
    batch: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    images_per_second: float
    speedup: float

    def to_json(self) -> JsonObject:
        """A row of results.json."""
        return dict(vars(self))


def check_batch_sizes(sizes: Sequence[int]) -> None:
    """Refuse batch sizes that cannot be run.

    Raises:
        SpecError: There is none, one is not above 0, or is named twice.
    """
    if not sizes or min(sizes) < 1 or len(set(sizes)) < len(sizes):
        what = "empty, not above 0, or has a size twice"
        raise SpecError(Fault("benchmark.batch_sizes", what, "write for example [1, 8]"))


def note_fixed_batches(models: Mapping[str, Runtime], batch: int) -> None:
    """Warn about models that run another number of samples than asked."""
    for name, model in models.items():
        fixed = model.fixed_batch
        if fixed is not None and fixed != batch:
            runs = -(-batch // fixed)
            what = f"{name} takes {fixed} images at once: for {batch} it runs {runs} time(s), on {runs * fixed} images"
            log.warning(Notice("benchmark.batch_sizes", what))


def run_in_turns(models: Mapping[str, Runtime], inputs: Inputs, *, warmup: int, runs: int) -> dict[str, list[float]]:
    """Seconds of each run of each model, one model after the other, in reversed order each time.

    A machine that is busy for a while is busy for all of them.
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
    """The latency of a model.

    Args:
        name: Its name.
        batch: Samples per run.
        seconds: Of each run.
        reference: Of each run of the reference, in the same turns.
    """
    cuts = statistics.quantiles(seconds, n=100, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 99
    return Latency(
        model=name,
        batch=batch,
        p50_ms=1e3 * cuts[49],
        p90_ms=1e3 * cuts[89],
        p99_ms=1e3 * cuts[98],
        images_per_second=batch / cuts[49],
        speedup=statistics.median(base / mine for base, mine in zip(reference, seconds, strict=True)),
    )
