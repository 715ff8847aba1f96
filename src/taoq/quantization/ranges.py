# SPDX-License-Identifier: Apache-2.0
"""Ranges of tensors found by calibration, and the file that keeps them for the next run."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from taoq.errors import Fault, TaoqError

log = logging.getLogger(__name__)

Ranges = Mapping[str, tuple[float, float]]
"""Smallest and largest value that counts, by tensor."""

_WHERE = "quantize.calibration.cache"


@dataclass(frozen=True)
class RangeCache:
    """A file of ranges that is good for one model, one set of images and one way of calibrating.

    Attributes:
        path: The file.
        key: What the ranges depend on: model, images, settings, versions.
    """

    path: Path
    key: Mapping[str, str]


def calibrated(cache: RangeCache | None, tensors: Iterable[str], calibrate: Callable[[], Ranges]) -> Ranges:
    """The ranges of a cache where it is good for this run, else those of a calibration, which it then keeps.

    Args:
        cache: Where to look and to keep; None does neither.
        tensors: Tensors whose ranges are needed.
        calibrate: Finds the ranges.

    Raises:
        TaoqError: The file is no such cache, or cannot be written.
    """
    if cache is None:
        return calibrate()
    if cache.path.is_file():
        key, found = _read(cache.path)
        changed = [name for name in {**key, **cache.key} if key.get(name) != cache.key.get(name)]
        if not changed and set(tensors) <= set(found):
            log.info("%s: ranges of %d tensors taken from %s; nothing was calibrated", _WHERE, len(found), cache.path)
            return found
        why = f"another {', '.join(changed)}" if changed else "other layers"
        log.info("%s: %s is of %s: calibrating again", _WHERE, cache.path, why)
    ranges = calibrate()
    _write(cache, ranges)
    return ranges


def _read(path: Path) -> tuple[Mapping[str, str], Ranges]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        key = {str(name): str(value) for name, value in data["key"].items()}
        return key, {str(name): (float(low), float(high)) for name, (low, high) in data["ranges"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        what = f"{path} is not a file of calibration ranges"
        raise TaoqError(Fault(_WHERE, what, "delete it, or name another file")) from None


def _write(cache: RangeCache, ranges: Ranges) -> None:
    partial = cache.path.with_name(f".{cache.path.name}.partial")
    try:
        cache.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"key": dict(cache.key), "ranges": {name: list(range_) for name, range_ in ranges.items()}})
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, cache.path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        what = f"{cache.path} cannot be written: {error.strerror}"
        raise TaoqError(Fault(_WHERE, what, "free some space, or name another file")) from error
