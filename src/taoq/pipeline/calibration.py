# SPDX-License-Identifier: Apache-2.0
"""Calibration data: batches as inputs, and what ranges found on them depend on."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from taoq.network import Inputs, batch_size, first_samples
from taoq.pipeline.artifacts import versions
from taoq.pipeline.prepare import Checked
from taoq.quantization.ranges import RangeCache
from taoq.status import track
from taoq.tasks.base import Batches


@dataclass(frozen=True)
class Feed:
    """The inputs of batches, one batch in memory at a time. Can be iterated over again.

    Attributes:
        batches: The batches; None for no data.
        what: What is going on, for the progress bar.
        limit: Number of samples at most; None takes all.
    """

    batches: Batches | None
    what: str = "calibrating"
    limit: int | None = None

    def __iter__(self) -> Iterator[Inputs]:
        if self.batches is None:
            return
        total = self.batches.num_samples
        rest = total if self.limit is None else min(total, self.limit)
        for batch in track(self.batches, rest, self.what, lambda batch: batch_size(batch.inputs)):
            yield first_samples(batch.inputs, rest)
            rest -= batch_size(batch.inputs)
            if rest <= 0:
                return


def range_cache(checked: Checked, batches: Batches | None, source_sha256: str) -> RangeCache | None:
    """The range cache of a spec; None if it names none, or nothing can be cached.

    Args:
        checked: The experiment.
        batches: Calibration data; None if there is nothing to calibrate.
        source_sha256: Digest of the float model.
    """
    path = checked.experiment.spec.quantize.calibration.cache
    if not path or batches is None or not batches.key:
        return None
    return RangeCache(Path(path), calibration_key(checked, batches, source_sha256))


def calibration_key(checked: Checked, batches: Batches, source_sha256: str) -> dict[str, str]:
    """What calibration ranges depend on; a new key each time if the batches do not say what they depend on."""
    section = checked.experiment.spec.quantize
    return {
        "model": source_sha256,
        "images": batches.key or str(uuid.uuid4()),
        "backend": checked.backend.capability.name,
        "algorithm": section.algorithm,
        "options": json.dumps(section.backend_kwargs, sort_keys=True),
        "versions": json.dumps(versions(checked.backend.capability.libraries)),
    }
