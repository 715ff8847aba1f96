# SPDX-License-Identifier: Apache-2.0
"""Entropy calibration with ModelOpt's histogram calibrator.

`mtq.quantize` has no algorithm `entropy`, but ModelOpt's histogram calibrator implements TensorRT's (S. Migacz, "8-bit
inference with TensorRT", GTC 2017). It is pure Python and slow; the stride limits the number of ranges to try.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from taoq.quantization.backends.modelopt_pytorch.quantizers import quantizer_of
from taoq.quantization.library import library_output
from taoq.quantization.types import QuantizationPlan

with library_output():
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.calib import HistogramCalibrator, MaxCalibrator

_MAX_BINS = 2**13
_MAX_RANGES = 256
"""Largest number of ranges to try if a spec sets no stride."""
_START_BIN = 128
"""Default of `HistogramCalibrator.compute_amax`."""


def calibrate_entropy(
    model: nn.Module, plan: QuantizationPlan, forward_loop: Callable[[nn.Module], None], options: Mapping[str, int]
) -> None:
    """Choose the input ranges that minimize the KL divergence of the quantized histogram; weights use their maximum.

    Args:
        model: A network with ModelOpt's quantizers.
        plan: The plan; the quantizers are configured for it.
        forward_loop: Runs the network on calibration data.
        options: `stride` and `start_bin` of the calibrator.
    """
    mtq.calibrate(model, "max")  # Without data, this calibrates only the weights.
    layers = {item.layer.name: model.get_submodule(item.layer.name) for item in plan.quantized}
    inputs = [quantizer_of(layers[item.layer.name], "input") for item in plan.quantized if item.activations]
    weights = [quantizer_of(layers[item.layer.name], "weight") for item in plan.quantized if item.weights]
    if not inputs:
        return
    for quantizer in inputs:
        # Not through the config, which would store the name of this class in the artifact.
        quantizer._calibrator = Histogram()
        quantizer.enable_calib()
    for quantizer in (*inputs, *weights):  # Calibrate on the float network, whichever layers are planned.
        quantizer.disable_quant()
    forward_loop(model)
    for quantizer in (*inputs, *weights):
        quantizer.enable_quant()
    for quantizer in inputs:
        quantizer.disable_calib()
        if quantizer._calibrator.seen:
            quantizer.load_calib_amax("entropy", **options)
        quantizer._calibrator = MaxCalibrator(num_bits=8, axis=None)


class Histogram(HistogramCalibrator):  # type: ignore[misc]
    """ModelOpt's histogram of absolute values, with a limited number of bins.

    ModelOpt keeps the bin width of the first batch and adds bins for larger values: millions after a first batch of
    small values, infinitely many after a batch of zeros. This class merges bins in pairs instead.
    """

    def __init__(self) -> None:
        super().__init__(num_bits=8, axis=None)
        self._counts = np.zeros(0, dtype=np.int64)
        self._width = 0.0
        self.seen = False

    def collect(self, x: Tensor) -> None:
        """Add the values of a tensor to the histogram."""
        x = x.detach().abs().float()
        largest = float(x.max())
        self.seen = True
        if largest == 0:
            return  # Entropy calibration ignores the first bin, which holds the zeros.
        self._width = self._width or largest / self._num_bins
        while largest > self._width * _MAX_BINS:
            self._counts = np.pad(self._counts, (0, len(self._counts) % 2)).reshape(-1, 2).sum(1)
            self._width *= 2
        bins = max(len(self._counts), math.ceil(largest / self._width))
        self._counts = np.pad(self._counts, (0, bins - len(self._counts)))
        self._counts += torch.histc(x, bins, min=0, max=bins * self._width).cpu().numpy().astype(np.int64)

    def compute_amax(self, method: str, **options: int) -> Tensor:
        """Return the range with the least KL divergence; 0 for an input that was always zero."""
        if self._width == 0:
            return torch.tensor(0.0)
        bins = len(self._counts)
        self._calib_hist, self._calib_bin_edges = self._counts, self._width * np.arange(bins + 1)
        start = options.get("start_bin", _START_BIN)
        stride = options.get("stride", max(8, math.ceil((bins - start) / _MAX_RANGES)))
        amax: Tensor = super().compute_amax(method, stride=stride, start_bin=start)
        return amax
