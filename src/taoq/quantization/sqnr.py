# SPDX-License-Identifier: Apache-2.0
"""The signal-to-quantization-noise ratio, in decibels."""

from __future__ import annotations

import math

EXACT = 200.0
"""What is said of no noise at all; float32 itself has about 150 dB."""


def sqnr(signal: float, noise: float) -> float | None:
    """10 log10(signal / noise).

    Args:
        signal: Sum of the squares of the float values.
        noise: Sum of the squares of the differences.

    Returns:
        At most `EXACT`; None where there is no signal.
    """
    if signal <= 0 or not math.isfinite(signal + noise):
        return None
    return EXACT if noise <= 0 else min(EXACT, 10 * math.log10(signal / noise))
