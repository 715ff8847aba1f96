# SPDX-License-Identifier: Apache-2.0
"""The interface of a backend: one quantization library."""

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
"""The model type of the backend's format: `nn.Module` or `Graph`."""
M_co = TypeVar("M_co", covariant=True)
M_contra = TypeVar("M_contra", contravariant=True)

NO_SHIFTS: Shifts = MappingProxyType({})


class Calibrated(Protocol[M_co]):
    """A calibrated float model, in which subsets of the plan's layers are quantized without calibrating again."""

    def left_out(self, plan: QuantizationPlan) -> Mapping[str, str]:
        """Return the planned layers that the library leaves float, with the reason, by layer name."""

    def with_only(self, layers: Iterable[LayerPlan], shifts: Shifts = NO_SHIFTS) -> M_co:
        """Return the model with only these layers quantized.

        May modify and return the model of the previous call.

        Args:
            layers: The layers to quantize; if empty, the result is the float model. Their numeric formats may differ
                from those of the calibrated plan.
            shifts: Values to add to the biases of layers, by layer name. A layer without a bias gets one.
        """

    def quantize(self, plan: QuantizationPlan, shifts: Shifts = NO_SHIFTS) -> M_co:
        """Quantize the model permanently. No other method may be called afterwards.

        The outputs of the model are bit-identical to those of `with_only` with the same layers and shifts, unless an
        option of the backend changes the precision of the float part.

        Args:
            plan: The calibrated plan, without the layers of `left_out`.
            shifts: Values to add to the biases of layers, by layer name. A layer without a bias gets one.

        Returns:
            The model, on the CPU.
        """


@runtime_checkable
class Backend(Protocol[M]):
    """A quantization library. Each row of `taoq.plugins.BACKENDS` names an object of this type."""

    @property
    def capability(self) -> Capability:
        """What the backend supports, and the name of its payload."""

    def check(self, section: QuantizeSpec) -> list[Fault]:
        """Return the faults of a spec that `capability` does not cover, mainly in `backend_kwargs`."""

    def layers(self, model: M, options: Options) -> list[Layer]:
        """List all layers of a float model, in model order. Those that cannot be quantized have an `obstacle`.

        Args:
            model: The float model.
            options: `backend_kwargs`.
        """

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
        """Calibrate the ranges that a plan needs. Consumes the model.

        Args:
            model: The float model.
            plan: The plan.
            batches: Calibration data. Read only if the plan needs calibration; can be iterated more than once.
            options: `backend_kwargs`.
            device: An available device: a value of `quantize.device`.
            cache: Cache of the ranges between runs; None for no cache.

        Raises:
            TaoqError: If a weight, an input or a range is not finite, or the library cannot calibrate the model.
        """

    def applied(self, model: M) -> Applied:
        """Return the layers that are quantized and their schemes, read from the model and not from the plan."""

    def weight(self, model: M, layer: str) -> Values:
        """Return the dequantized weight of a quantized layer, as an array of the format."""

    def save(self, model: M, path: Path, options: Options) -> None:
        """Write the quantized model to a file."""

    def load(self, path: Path, build: Callable[[], M]) -> M:
        """Load a quantized model from a file. Never quantizes again, and never unpickles code.

        Args:
            path: A file that `save` wrote.
            build: Builds the float model.
        """


AnyBackend = Backend[Any]
"""A backend of any format."""


@runtime_checkable
class Exportable(Protocol[M_contra]):
    """A torch backend whose quantized models `export` can write as ONNX."""

    def dequantized(self, model: M_contra) -> tuple[Mapping[str, Values], Mapping[str, Scales]]:
        """Return the state dict of the float network with dequantized weights, and the scales by layer name."""
