# SPDX-License-Identifier: Apache-2.0
"""Run a graph on calibration data: batches, session options and checks that all ONNX backends share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import onnxruntime

from taoq.errors import Fault, TaoqError, abbreviated
from taoq.network import Inputs
from taoq.quantization.formats.checks import NO_IMAGES, NON_FINITE_HINT
from taoq.quantization.formats.onnx.inputs import Arrays, GraphInput, arrays_of, filled, fixed_batch, pieces
from taoq.quantization.ranges import Ranges

ENTROPY_BINS = 512
"""Bins of the histogram of entropy calibration. onnxruntime's default of 128 bins equals the number of quantization
steps, which leaves only the full range to choose."""
_SessionOptions = onnxruntime.SessionOptions  # modelopt.onnx replaces `onnxruntime.SessionOptions` by `lean_options`.
_MAX_BATCH, _MAX_BATCH_ENTROPY = 8, 2
"""Largest batch for a graph of any batch size. Histograms need copies of all activations."""


def feeds(inputs: Sequence[GraphInput], batches: Iterable[Inputs], *, entropy: bool = False) -> Iterator[Arrays]:
    """Yield calibration data in batches of the size that a graph takes, or in small batches if it takes any size.

    Args:
        inputs: The inputs of the graph.
        batches: Calibration data.
        entropy: Whether histograms are computed from the activations.

    Raises:
        TaoqError: If there is no data, or it has NaN or infinite values, with which libraries compute useless ranges.
    """
    empty = True
    size, largest = fixed_batch(inputs), _MAX_BATCH_ENTROPY if entropy else _MAX_BATCH
    for batch in batches:
        arrays = arrays_of(batch, inputs)
        if not all(np.isfinite(array).all() for array in arrays.values()):
            what = "the calibration images have values that are not finite"
            raise TaoqError(Fault("quantize.calibration", what, "look at the normalisation of the dataset section"))
        for piece in (piece for piece, _ in filled(arrays, size)) if size else pieces(arrays, largest):
            empty = False
            yield piece
    if empty:
        raise TaoqError(NO_IMAGES)


def check_ranges(ranges: Ranges) -> None:
    """Refuse ranges that are not finite.

    Raises:
        TaoqError: If a range is not finite.
    """
    bad = [name for name, (low, high) in ranges.items() if not (np.isfinite(low) and np.isfinite(high))]
    if bad:
        what = f"the calibration range of {abbreviated(bad)} is not a finite number"
        raise TaoqError(Fault("quantize.calibration", what, NON_FINITE_HINT))


def lean_options() -> Any:
    """Return session options that free memory after each batch instead of keeping it in an arena."""
    options = _SessionOptions()
    options.enable_mem_pattern = False
    options.enable_cpu_mem_arena = False
    return options
