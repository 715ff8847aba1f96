# SPDX-License-Identifier: Apache-2.0
"""The signal-to-quantization-noise ratio, in decibels."""

from __future__ import annotations

import math

EXACT = 200.0
"""Value reported for zero noise, dB. Rounding to float32 itself gives about 150 dB."""


def sqnr(signal: float, noise: float) -> float | None:
    """Return 10 log10(signal / noise), in dB.

    Args:
        signal: Sum of squares of the float values.
        noise: Sum of squares of the quantization errors.

    Returns:
        The ratio, at most `EXACT`; None if the signal is zero or a sum is not finite.
    """
    if signal <= 0 or not math.isfinite(signal + noise):
        return None
    return EXACT if noise <= 0 else min(EXACT, 10 * math.log10(signal / noise))
