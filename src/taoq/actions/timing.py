# SPDX-License-Identifier: Apache-2.0
"""How long models take, measured in turns."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from taoq.errors import Fault, SpecError
from taoq.runtime import Runtime
from taoq.tasks.base import Inputs
from taoq.tasks.sections import BenchmarkSpec

SPEEDUP = "speed-up: time of float32 over time of the model in the same turn, the median of all turns"
"""What the column says."""

log = logging.getLogger(__name__)


def check_batch_sizes(section: BenchmarkSpec) -> None:
    """Refuse what cannot be run.

    Raises:
        SpecError: There is no batch size, one is not above 0, or is named twice.
    """
    sizes = section.batch_sizes
    if not sizes or min(sizes) < 1 or len(set(sizes)) < len(sizes):
        what = "empty, not above 0, or has a size twice"
        raise SpecError(Fault("benchmark.batch_sizes", what, "write for example [1, 8]"))


def say_fixed_batches(models: Mapping[str, Runtime], batch: int) -> None:
    """Warn of models that run another number of images than asked."""
    for name, model in models.items():
        fixed = model.fixed_batch
        if fixed is not None and fixed != batch:
            runs = -(-batch // fixed)
            what = "benchmark.batch_sizes: %s takes %d images at once: for %d it runs %d time(s), on %d images"
            log.warning(what, name, fixed, batch, runs, runs * fixed)


def in_turns(models: Mapping[str, Runtime], inputs: Inputs, *, warmup: int, runs: int) -> dict[str, list[float]]:
    """Seconds of each run of each model, one after the other, the order turned round each time.

    A machine that is busy for a while is so for all of them.
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


def latency(name: str, batch: int, seconds: Sequence[float], reference: Sequence[float]) -> dict[str, Any]:
    """Latency in milliseconds; the speed-up is the median over the turns, each against float in the same turn."""
    cuts = statistics.quantiles(seconds, n=100, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 99
    return {
        "model": name,
        "batch": batch,
        "p50_ms": 1e3 * cuts[49],
        "p90_ms": 1e3 * cuts[89],
        "p99_ms": 1e3 * cuts[98],
        "images_per_second": batch / cuts[49],
        "speedup": statistics.median(base / mine for base, mine in zip(reference, seconds, strict=True)),
    }
