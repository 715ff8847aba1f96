# SPDX-License-Identifier: Apache-2.0
"""The table of numeric formats. Every other file looks formats up here, and an unknown format is an error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DType:
    """A numeric format of stored values.

    Attributes:
        name: Name in specs, plans and reports.
        bits: Bits per value.
        kind: Signed integer, unsigned integer, or floating point.
        largest: Value that a symmetric scale maps the largest magnitude to.
        onnx: Name of the element type in ONNX (`onnx.TensorProto.DataType`).
        torch: Name of the torch dtype.
    """

    name: str
    bits: int
    kind: Literal["int", "uint", "float"]
    largest: float
    onnx: str
    torch: str

    def __str__(self) -> str:
        return self.name


INT8 = DType("int8", 8, "int", 127.0, "INT8", "int8")
UINT8 = DType("uint8", 8, "uint", 255.0, "UINT8", "uint8")
FP8_E4M3FN = DType("fp8_e4m3fn", 8, "float", 448.0, "FLOAT8E4M3FN", "float8_e4m3fn")
FP8_E5M2 = DType("fp8_e5m2", 8, "float", 57344.0, "FLOAT8E5M2", "float8_e5m2")

DTYPES = {dtype.name: dtype for dtype in (INT8, UINT8, FP8_E4M3FN, FP8_E5M2)}
"""All formats, by name. For FP8, see the OCP 8-bit Floating Point Specification (2023)."""

NATIVE = "native"
"""The `dtype` of a rule for a tensor that stays float."""
IN_RULES = (INT8.name, FP8_E4M3FN.name, FP8_E5M2.name)
"""Formats that a rule may name."""
ALIASES = {
    "float8_e4m3fn": FP8_E4M3FN.name,
    "float8_e5m2": FP8_E5M2.name,
    **{name.upper(): name for name in (*IN_RULES, NATIVE)},
}
"""Alternative spellings accepted in a spec, as in TAO."""


def by_onnx(name: str) -> DType:
    """Return the format of an ONNX element type (`INT8`).

    Raises:
        ValueError: If no format is stored as this type.
    """
    return _lookup(name, {dtype.onnx: dtype for dtype in DTYPES.values()})


def by_torch(name: str) -> DType:
    """Return the format of a torch dtype, given its name (`int8` or `torch.int8`).

    Raises:
        ValueError: If no format is stored as this type.
    """
    return _lookup(name.removeprefix("torch."), {dtype.torch: dtype for dtype in DTYPES.values()})


def _lookup(name: str, table: dict[str, DType]) -> DType:
    if name not in table:
        raise ValueError(f"unknown numeric format {name}; known are {', '.join(table)}")
    return table[name]
