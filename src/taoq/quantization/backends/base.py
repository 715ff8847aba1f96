# SPDX-License-Identifier: Apache-2.0
"""What a backend is: a quantization library behind one face."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, TypeVar, runtime_checkable

from taoq.errors import Fault
from taoq.network import Inputs
from taoq.plain import Options
from taoq.quantization.capability import Capability
from taoq.quantization.formats.base import Shifts, Values
from taoq.quantization.ranges import RangeCache
from taoq.quantization.spec import QuantizeSpec
from taoq.quantization.types import Applied, Layer, LayerPlan, QuantizationPlan, Scales

M = TypeVar("M")
"""The model of a backend's format."""
M_co = TypeVar("M_co", covariant=True)
M_contra = TypeVar("M_contra", contravariant=True)

NO_SHIFTS: Shifts = MappingProxyType({})


class Calibrated(Protocol[M_co]):
    """A float model with the ranges of all layers of a plan: parts of it can be tried without calibrating again."""

    def left_out(self, plan: QuantizationPlan) -> Mapping[str, str]:
        """Why the library leaves layers of a plan float, by name."""

    def with_only(self, layers: Iterable[LayerPlan], shifts: Shifts = NO_SHIFTS) -> M_co:
        """The model with these layers quantized and all others float; without any, the float model.

        May change and return the model of the previous call. A format may differ from that of the calibrated plan.
        `shifts` is added to the biases of layers, by name; a layer without a bias gets one.
        """

    def quantize(self, plan: QuantizationPlan, shifts: Shifts = NO_SHIFTS) -> M_co:
        """Quantize as a plan says, for good: nothing can be tried any more.

        Computes what `with_only` of the same layers and shifts computes, bit for bit, unless an option of the backend
        gives the artifact another float precision.

        Returns:
            The model, on the CPU.
        """


@runtime_checkable
class Backend(Protocol[M]):
    """A quantization library. A backend is a value of this type, named by a row of `taoq.plugins.BACKENDS`."""

    @property
    def capability(self) -> Capability:
        """What it can do, and what its files are called."""

    def check(self, section: QuantizeSpec) -> list[Fault]:
        """Faults that only this backend knows, of `backend_kwargs` above all."""

    def layers(self, model: M, options: Options) -> list[Layer]:
        """All layers of a float model, quantizable or not under these `backend_kwargs`."""

    def calibrate(
        self,
        model: M,
        plan: QuantizationPlan,
        batches: Iterable[Inputs],
        options: Options,
        *,
        device: str,
        cache: RangeCache | None,
    ) -> Calibrated[M]:
        """Find the ranges that a plan needs. Consumes the model.

        Args:
            model: The float model.
            plan: The plan.
            batches: Calibration data; not touched unless the plan needs calibration. Iterating again starts again.
            options: `backend_kwargs`.
            device: A device of this machine.
            cache: Where ranges are kept between runs; None keeps none.
        """

    def applied(self, model: M) -> Applied:
        """What is really quantized, read from the model itself."""

    def weight(self, model: M, layer: str) -> Values:
        """Values of a quantized layer's weight as floats, an array of the format."""

    def save(self, model: M, path: Path, options: Options) -> None:
        """Write the quantized model to a file."""

    def load(self, path: Path, build: Callable[[], M]) -> M:
        """Read it back into a fresh float model. Never re-quantizes, never unpickles code."""


AnyBackend = Backend[Any]
"""A backend whose format only it knows."""


@runtime_checkable
class Exportable(Protocol[M_contra]):
    """A backend whose torch models `export` can write as ONNX."""

    def dequantized(self, model: M_contra) -> tuple[Mapping[str, Values], Mapping[str, Scales]]:
        """The state of the float network with the values of the quantized weights, and scales by layer."""
