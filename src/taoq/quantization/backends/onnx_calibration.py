# SPDX-License-Identifier: Apache-2.0
"""What calibrating an ONNX graph needs, whichever library looks at the tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime

from taoq.errors import Fault, TaoqError, some
from taoq.onnx_file import GraphInput, fixed_batches
from taoq.quantization.backends.base import Inputs
from taoq.quantization.ranges import Ranges

onnxruntime.set_default_logger_severity(4)  # what it prints of an error, it also raises


ENTROPY_BINS = 512
"""Of the histogram that entropy cuts. With onnxruntime's 128, for 128 steps, there is but one range to choose: all."""
_AT_ONCE, _AT_ONCE_ENTROPY = 8, 2
"""Images that a graph of any batch gets at once; histograms need copies of all its activations."""


def feeds(
    graph_input: GraphInput, batches: Iterable[Inputs], size: int | None, *, entropy: bool
) -> Iterator[dict[str, Any]]:
    """Inputs of a graph, few images in memory at a time.

    Args:
        graph_input: Its input.
        batches: Images.
        size: Images that the graph takes at once; None takes any number.
        entropy: Whether histograms are made of them.

    Raises:
        TaoqError: There is no image, or one has NaN or infinite values: libraries would calibrate nonsense from them.
    """
    empty = True
    few = _AT_ONCE_ENTROPY if entropy else _AT_ONCE
    for inputs in batches:
        (images,) = (tensor.numpy().astype(graph_input.dtype, copy=False) for tensor in inputs.values())
        if not np.isfinite(images).all():
            what = "the calibration images have values that are not finite"
            raise TaoqError(Fault("quantize.calibration", what, "look at the normalisation of the dataset section"))
        pieces = [images[start : start + few] for start in range(0, len(images), few)]
        for fed in (fed for fed, _ in fixed_batches(images, size)) if size else pieces:
            empty = False
            yield {graph_input.name: fed}
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
        what = f"the calibration range of {some(bad)} is not a finite number"
        raise TaoqError(Fault("quantize.calibration", what, hint))


@contextlib.contextmanager
def lean_sessions() -> Iterator[None]:
    """Let sessions give memory back after a batch: onnxruntime would keep it, and plan a second block beside it."""
    make = onnxruntime.SessionOptions

    def options() -> Any:
        made = make()
        made.enable_mem_pattern = False
        made.enable_cpu_mem_arena = False
        return made

    with mock.patch.object(onnxruntime, "SessionOptions", options):
        yield
