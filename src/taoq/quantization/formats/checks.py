# SPDX-License-Identifier: Apache-2.0
"""Checks of measurements that all formats share."""

from __future__ import annotations

from collections.abc import Sequence

from taoq.errors import Fault, TaoqError, abbreviated


def check_shifts(count: int, bad: Sequence[str]) -> None:
    """Refuse mean outputs that cannot correct a bias.

    Args:
        count: Number of samples that were averaged.
        bad: Names of the layers whose mean is not finite.

    Raises:
        TaoqError: If there are no samples, or `bad` is not empty.
    """
    if not count:
        raise TaoqError(Fault("quantize.calibration", "there are no images", "give calibration images"))
    if bad:
        what = f"the mean output of {abbreviated(bad)} is not a finite number"
        hint = "look for NaN or infinite values in the calibration images or in the checkpoint"
        raise TaoqError(Fault("quantize.bias_correction", what, hint))
