# SPDX-License-Identifier: Apache-2.0
"""Calibration ranges of tensors, and the file that caches them between runs."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from taoq.errors import Fault, Notice, TaoqError
from taoq.files import failed_to_write, partial_of, replacing

log = logging.getLogger(__name__)

Ranges = Mapping[str, tuple[float, float]]
"""Calibrated minimum and maximum, by tensor name. Values outside of the range are clipped."""

LEAST_RANGE = 1e-30
"""Tensors with a smaller largest magnitude get a fixed scale: their own would underflow float32."""
_WHERE = "quantize.calibration.cache"


@dataclass(frozen=True)
class RangeCache:
    """A file of ranges, valid for one model, one set of images and one calibration method.

    Attributes:
        path: The file.
        key: Everything that the ranges depend on: model, images, settings, versions.
    """

    path: Path
    key: Mapping[str, str]


def cached_ranges(cache: RangeCache | None, tensors: Iterable[str], calibrate: Callable[[], Ranges]) -> Ranges:
    """Return the ranges of a cache if it is valid for this run; otherwise calibrate and write them to the cache.

    Args:
        cache: The cache; None always calibrates.
        tensors: Names of the tensors whose ranges are needed.
        calibrate: Computes the ranges.

    Raises:
        TaoqError: If the file is not a range cache or cannot be written.
    """
    if cache is None:
        return calibrate()
    cached = _read(cache.path)
    if cached is not None:
        key, ranges = cached
        changed = [name for name in {**key, **cache.key} if key.get(name) != cache.key.get(name)]
        if not changed and set(tensors) <= set(ranges):
            what = f"ranges of {len(ranges)} tensors taken from {cache.path}; nothing was calibrated"
            log.info(Notice(_WHERE, what))
            return ranges
        reason = f"differs in {', '.join(changed)}" if changed else "lacks ranges of planned layers"
        log.info(Notice(_WHERE, f"{cache.path} {reason}: calibrating again"))
    with _replacing(cache.path) as partial:
        ranges = calibrate()
        lists = {name: list(limits) for name, limits in ranges.items()}
        partial.write_text(json.dumps({"key": dict(cache.key), "ranges": lists}), encoding="utf-8")
    return ranges


def _read(path: Path) -> tuple[Mapping[str, str], Ranges] | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        key = {str(name): str(value) for name, value in data["key"].items()}
        ranges = {str(name): (float(low), float(high)) for name, (low, high) in data["ranges"].items()}
        if not all(math.isfinite(high - low) and low <= high for low, high in ranges.values()):
            raise ValueError
        return key, ranges
    except OSError:
        return None  # Missing, or unreadable: writing it after calibration reports the error.
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        what = f"{path} is not a file of calibration ranges"
        raise TaoqError(Fault(_WHERE, what, "delete it, or name another file")) from None


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    try:
        with replacing(path) as partial:
            yield partial
    except OSError as error:
        if not failed_to_write(error, partial_of(path)):
            raise  # Calibration also reads data.
        what = f"{path} cannot be written: {error.strerror}"
        raise TaoqError(Fault(_WHERE, what, "free some space, or name another file")) from error
