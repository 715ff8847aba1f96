# SPDX-License-Identifier: Apache-2.0
"""Entropy calibration with ModelOpt's histogram calibrator.

ModelOpt has no `entropy` algorithm, but its calibrator has (after TensorRT's: S. Migacz, "8-bit inference with
TensorRT", GTC 2017). It is pure Python: the stride bounds the number of ranges tried.
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

_MOST_BINS = 2**13
_RANGES = 256
"""Ranges tried at most, unless a spec gives a stride."""
_START_BIN = 128
"""ModelOpt's default."""


def calibrate_entropy(
    model: nn.Module, plan: QuantizationPlan, feed: Callable[[nn.Module], None], options: Mapping[str, int]
) -> None:
    """Find input ranges by the least KL divergence of the quantized histogram; weights by their maximum.

    Args:
        model: A network with ModelOpt's quantizers.
        plan: The plan that they are of.
        feed: Runs the network on calibration data.
        options: `stride` and `start_bin` of the calibrator.
    """
    mtq.calibrate(model, "max")  # without data: the weights
    layers = {item.layer.name: model.get_submodule(item.layer.name) for item in plan.quantized}
    inputs = [quantizer_of(layers[item.layer.name], "input") for item in plan.quantized if item.activations]
    weights = [quantizer_of(layers[item.layer.name], "weight") for item in plan.quantized if item.weights]
    if not inputs:
        return
    for quantizer in inputs:
        # on the instance: a calibrator named in the config would be named in the artifact, too
        quantizer._calibrator = Histogram()
        quantizer.enable_calib()
    for quantizer in (*inputs, *weights):  # ranges of the float network, whatever else is planned
        quantizer.disable_quant()
    feed(model)
    for quantizer in (*inputs, *weights):
        quantizer.enable_quant()
    for quantizer in inputs:
        quantizer.disable_calib()
        if quantizer._calibrator.seen:
            quantizer.load_calib_amax("entropy", **options)
        quantizer._calibrator = MaxCalibrator(num_bits=8, axis=None)


class Histogram(HistogramCalibrator):  # type: ignore[misc]
    """ModelOpt's histogram of absolute values, with a bound on its bins.

    ModelOpt adds bins of the first batch's width for larger values: after a first batch of small values there are
    millions of them, after one of zeros infinitely many. Here bins are merged in pairs before there are too many.
    """

    def __init__(self) -> None:
        super().__init__(num_bits=8, axis=None)
        self._counts = np.zeros(0, dtype=np.int64)
        self._width = 0.0
        self.seen = False

    def collect(self, x: Tensor) -> None:
        """Add the values of a tensor."""
        x = x.detach().abs().float()
        top = float(x.max())
        self.seen = True
        if top == 0:
            return  # the first bin, which entropy does not count
        self._width = self._width or top / self._num_bins
        while top > self._width * _MOST_BINS:
            self._counts = np.pad(self._counts, (0, len(self._counts) % 2)).reshape(-1, 2).sum(1)
            self._width *= 2
        bins = max(len(self._counts), math.ceil(top / self._width))
        self._counts = np.pad(self._counts, (0, bins - len(self._counts)))
        self._counts += torch.histc(x, bins, min=0, max=bins * self._width).cpu().numpy().astype(np.int64)

    def compute_amax(self, method: str, **options: int) -> Tensor:
        """The best range; 0 for an input that was always zero."""
        if self._width == 0:
            return torch.tensor(0.0)
        bins = len(self._counts)
        self._calib_hist, self._calib_bin_edges = self._counts, self._width * np.arange(bins + 1)
        start = options.get("start_bin", _START_BIN)
        stride = options.get("stride", max(8, math.ceil((bins - start) / _RANGES)))
        amax: Tensor = super().compute_amax(method, stride=stride, start_bin=start)
        return amax
