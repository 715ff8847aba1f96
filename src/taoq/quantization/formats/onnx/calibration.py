# SPDX-License-Identifier: Apache-2.0
"""What running a graph on calibration data needs, whichever library looks at its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import onnxruntime

from taoq.errors import Fault, TaoqError, abbreviated
from taoq.network import Inputs
from taoq.quantization.formats.onnx.inputs import Arrays, GraphInput, arrays_of, filled, fixed_batch, pieces
from taoq.quantization.ranges import Ranges

onnxruntime.set_default_logger_severity(4)  # what it prints of an error, it also raises

ENTROPY_BINS = 512
"""Of the histogram that entropy cuts. With onnxruntime's 128, for 128 steps, there is only one range to choose: all."""
_SessionOptions = onnxruntime.SessionOptions  # a backend may replace the name for a while
_AT_ONCE, _AT_ONCE_ENTROPY = 8, 2
"""Samples that a graph of any batch size gets at once; histograms need copies of all its activations."""


def feeds(wanted: Sequence[GraphInput], batches: Iterable[Inputs], *, entropy: bool = False) -> Iterator[Arrays]:
    """Batches of a graph's size, with few samples in memory at a time.

    Args:
        wanted: The inputs of the graph.
        batches: Calibration data.
        entropy: Whether histograms are made of it.

    Raises:
        TaoqError: There is no data, or it has NaN or infinite values: libraries would calibrate nonsense from them.
    """
    empty = True
    size, at_once = fixed_batch(wanted), _AT_ONCE_ENTROPY if entropy else _AT_ONCE
    for inputs in batches:
        arrays = arrays_of(inputs, wanted)
        if not all(np.isfinite(array).all() for array in arrays.values()):
            what = "the calibration images have values that are not finite"
            raise TaoqError(Fault("quantize.calibration", what, "look at the normalisation of the dataset section"))
        for piece in (piece for piece, _ in filled(arrays, size)) if size else pieces(arrays, at_once):
            empty = False
            yield piece
    if empty:
        raise TaoqError(Fault("quantize.calibration", "there are no images", "give calibration images"))


def check_ranges(ranges: Ranges) -> None:
    """Refuse ranges that no scale can be made of.

    Raises:
        TaoqError: One is not finite.
    """
    bad = [name for name, (low, high) in ranges.items() if not (np.isfinite(low) and np.isfinite(high))]
    if bad:
        hint = "look for NaN or infinite values in the calibration images or in the checkpoint"
        what = f"the calibration range of {abbreviated(bad)} is not a finite number"
        raise TaoqError(Fault("quantize.calibration", what, hint))


def lean_options() -> Any:
    """Session options that give memory back after a batch: onnxruntime would keep it, and plan a second block."""
    options = _SessionOptions()
    options.enable_mem_pattern = False
    options.enable_cpu_mem_arena = False
    return options
