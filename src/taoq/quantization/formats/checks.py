# SPDX-License-Identifier: Apache-2.0
"""Checks and messages about calibration data that all formats share."""

from __future__ import annotations

from collections.abc import Sequence

from taoq.errors import Fault, TaoqError, abbreviated

NO_IMAGES = Fault("quantize.calibration", "there are no images", "give calibration images")
NON_FINITE_HINT = "look for NaN or infinite values in the calibration images or in the checkpoint"


def check_shifts(count: int, bad: Sequence[str]) -> None:
    """Refuse mean outputs that cannot correct a bias.

    Args:
        count: Number of samples that were averaged.
        bad: Names of the layers whose mean is not finite.

    Raises:
        TaoqError: If there are no samples, or `bad` is not empty.
    """
    if not count:
        raise TaoqError(NO_IMAGES)
    if bad:
        what = f"the mean output of {abbreviated(bad)} is not a finite number"
        raise TaoqError(Fault("quantize.bias_correction", what, NON_FINITE_HINT))
