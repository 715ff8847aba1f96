# SPDX-License-Identifier: Apache-2.0
"""Access the quantizers that ModelOpt adds to layers. ModelOpt has no type annotations, so mypy sees `Any`."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping

from torch import nn

from taoq.quantization.dtypes import FP8_E4M3FN, INT8, DType
from taoq.quantization.library import library_output
from taoq.quantization.types import Scheme

# It warns "No CUDA runtime is found" on a machine with a compiler and no GPU; taoq reports missing devices itself.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
# Repeated for each layer, and `target` of the backend says that quantization is simulated.
warnings.filterwarnings("ignore", message="RealQuantLinear: No real-quant GEMM found")

with library_output():
    from modelopt.torch.quantization.nn import TensorQuantizer

BITS: Mapping[DType, int | tuple[int, int]] = {INT8: 8, FP8_E4M3FN: (4, 3)}
"""`num_bits` of ModelOpt: bits of an integer, or bits of exponent and mantissa."""


def quantizer_of(layer: nn.Module, part: str) -> TensorQuantizer:
    """Return the quantizer of the `weight` or the `input` of a layer that ModelOpt converted."""
    return layer.get_submodule(f"{part}_quantizer")


def dtype_of(quantizer: nn.Module | None) -> DType | None:
    """Return the format of a quantizer; None for a missing or disabled quantizer.

    Raises:
        ValueError: If taoq does not know the format.
    """
    if not isinstance(quantizer, TensorQuantizer) or not quantizer.is_enabled:
        return None
    for dtype, bits in BITS.items():
        if bits == quantizer.num_bits:
            return dtype
    raise ValueError(f"unknown numeric format of ModelOpt: {quantizer.num_bits} bits")


def switch(layer: nn.Module, part: str, scheme: Scheme | None) -> None:
    """Enable a quantizer with the numeric format of a scheme; None disables it."""
    quantizer = quantizer_of(layer, part)
    if scheme is None:
        quantizer.disable()
    else:
        quantizer.num_bits = BITS[scheme.dtype]
        quantizer.enable()
