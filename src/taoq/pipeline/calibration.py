# SPDX-License-Identifier: Apache-2.0
"""Calibration: its data, the cache of ranges, and the correction of biases."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from taoq.files import sha256
from taoq.network import Inputs, batch_size, first_samples
from taoq.pipeline.artifacts import versions
from taoq.pipeline.prepare import Prepared
from taoq.quantization.backends.base import Calibrated, M
from taoq.quantization.formats.base import Shifts
from taoq.quantization.ranges import RangeCache
from taoq.quantization.types import QuantizationPlan
from taoq.status import track
from taoq.tasks.base import Batches


@dataclass(frozen=True)
class Feed:
    """The inputs of batches, with one batch in memory at a time. Can be iterated over more than once.

    Attributes:
        batches: The batches; None for no data.
        what: Label of the progress bar.
        limit: Maximum number of samples; None for all.
    """

    batches: Batches | None
    what: str = "calibrating"
    limit: int | None = None

    def __iter__(self) -> Iterator[Inputs]:
        if self.batches is None:
            return
        total = self.batches.num_samples
        remaining = total if self.limit is None else min(total, self.limit)
        for batch in track(self.batches, remaining, self.what, lambda batch: batch_size(batch.inputs)):
            yield first_samples(batch.inputs, remaining)
            remaining -= batch_size(batch.inputs)
            if remaining <= 0:
                return


def calibration_batches(prepared: Prepared[M]) -> Batches | None:
    """Return the calibration data; if the plan needs none, return None without opening any data."""
    needed = prepared.plan.needs_calibration or prepared.experiment.spec.quantize.bias_correction
    return prepared.experiment.calibration() if needed else None


def source_digest(prepared: Prepared[M]) -> Future[str]:
    """Compute the SHA-256 of the float checkpoint in a thread; hashlib releases the GIL.

    A model without a file is digested at once, because calibration consumes it.
    """
    path = prepared.experiment.spec.quantize.model_path
    if not path:
        done: Future[str] = Future()
        done.set_result(prepared.format.digest(prepared.model))
        return done
    pool = ThreadPoolExecutor(1)
    digest = pool.submit(sha256, Path(path))
    pool.shutdown(wait=False)
    return digest


def range_cache(prepared: Prepared[M], batches: Batches | None, source: Future[str]) -> RangeCache | None:
    """Return the range cache of a spec; None if the spec names no file, or if the ranges cannot be cached.

    Args:
        prepared: The float model and its plan.
        batches: Calibration data; None if there is nothing to calibrate.
        source: SHA-256 of the float model.
    """
    path = prepared.experiment.spec.quantize.calibration.cache
    if not path or batches is None or not batches.key:
        return None
    return RangeCache(Path(path), calibration_key(prepared, batches, source))


def calibration_key(prepared: Prepared[M], batches: Batches, source: Future[str]) -> dict[str, str]:
    """Return everything that calibration ranges depend on. The key is unique if the batches have no key."""
    section, capability = prepared.experiment.spec.quantize, prepared.backend.capability
    return {
        "model": source.result(),
        "images": batches.key or str(uuid.uuid4()),
        "backend": capability.name,
        "algorithm": section.algorithm,
        "options": json.dumps(section.backend_kwargs, sort_keys=True),
        "versions": json.dumps(versions(capability.libraries)),
    }


def bias_shifts(
    prepared: Prepared[M], reference: M, calibrated: Calibrated[M], plan: QuantizationPlan, batches: Batches | None
) -> Shifts:
    """Measure how much quantization shifts the mean output of each quantized layer, to correct the biases by it."""
    names = [item.layer.name for item in plan.quantized]
    model = calibrated.with_only(plan.quantized)
    feed = Feed(batches, "correcting biases")
    return prepared.format.bias_shifts(reference, model, names, feed, device=prepared.device)
