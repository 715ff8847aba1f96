# SPDX-License-Identifier: Apache-2.0
"""ModelOpt's quantizers of a layer. ModelOpt has no types: what comes from it is `Any` to mypy."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping

from torch import nn

from taoq.quantization.dtypes import FP8_E4M3FN, INT8, DType
from taoq.quantization.library import library_output
from taoq.quantization.types import Scheme

# "No CUDA runtime is found" on a machine with a compiler and no GPU: quantize.device has said so
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
# once a layer; that the arithmetic is simulated is in the backend's target
warnings.filterwarnings("ignore", message="RealQuantLinear: No real-quant GEMM found")

with library_output():
    from modelopt.torch.quantization.nn import TensorQuantizer

BITS: Mapping[DType, int | tuple[int, int]] = {INT8: 8, FP8_E4M3FN: (4, 3)}
"""ModelOpt's `num_bits`: bits of an integer, or of exponent and mantissa."""


def quantizer_of(layer: nn.Module, part: str) -> TensorQuantizer:
    """The quantizer of the `weight` or the `input` of a layer that ModelOpt converted."""
    return layer.get_submodule(f"{part}_quantizer")


def dtype_of(quantizer: nn.Module | None) -> DType | None:
    """The format of a quantizer; None if there is none, or it is off.

    Raises:
        ValueError: taoq has no name for its format.
    """
    if not isinstance(quantizer, TensorQuantizer) or not quantizer.is_enabled:
        return None
    for dtype, bits in BITS.items():
        if bits == quantizer.num_bits:
            return dtype
    raise ValueError(f"unknown numeric format of ModelOpt: {quantizer.num_bits} bits")


def switch(layer: nn.Module, part: str, scheme: Scheme | None) -> None:
    """Turn a quantizer on in a scheme, or off for None."""
    quantizer = quantizer_of(layer, part)
    if scheme is None:
        quantizer.disable()
    else:
        quantizer.num_bits = BITS[scheme.dtype]
        quantizer.enable()
