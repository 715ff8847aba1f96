# SPDX-License-Identifier: Apache-2.0
"""Checks of measurements that do not depend on the format."""

from __future__ import annotations

from collections.abc import Sequence

from taoq.errors import Fault, TaoqError, abbreviated


def check_shifts(count: int, bad: Sequence[str]) -> None:
    """Refuse mean outputs that no bias can be corrected by.

    Args:
        count: Number of samples that the means are of.
        bad: Layers whose mean is not finite.

    Raises:
        TaoqError: There are no samples, or there are such layers.
    """
    if not count:
        raise TaoqError(Fault("quantize.calibration", "there are no images", "give calibration images"))
    if bad:
        what = f"the mean output of {abbreviated(bad)} is not a finite number"
        hint = "look for NaN or infinite values in the calibration images or in the checkpoint"
        raise TaoqError(Fault("quantize.bias_correction", what, hint))
