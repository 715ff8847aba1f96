# SPDX-License-Identifier: Apache-2.0
"""What a backend is, and what all of them share."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol, TypeVar

from taoq.errors import Fault, TaoqError, some
from taoq.quantization.plan import Layer, LayerPlan, QuantizationPlan, Support, TensorScheme
from taoq.quantization.ranges import RangeCache

M = TypeVar("M")
"""The model of a backend: torch.nn.Module, or onnx.ModelProto."""
M_co = TypeVar("M_co", covariant=True)

Inputs = Mapping[str, Any]
"""Tensors by model input name."""

Applied = Mapping[str, tuple[TensorScheme | None, TensorScheme | None]]
"""Weights and activations of each quantized layer, read back from a model."""


@dataclass(frozen=True, kw_only=True)
class Scales:
    """The scales of a quantized layer, float32: a number, or one per index of the plan's axis; None if there are none.

    Attributes:
        weights: Of its weight.
        activations: Of its input.
        smoothing: What SmoothQuant multiplies its input by before it is quantized, one factor per channel.
    """

    weights: Any = None
    activations: Any = None
    smoothing: Any = None


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """What quantization does to a layer: signal-to-quantization-noise ratios in dB; None where it is not measured.

    Attributes:
        weights: Of its weight.
        outputs: Of its output, given the input that the float model gives it.
    """

    weights: float | None = None
    outputs: float | None = None


_library = logging.getLogger("taoq.library")


NO_SHIFTS: Mapping[str, Any] = MappingProxyType({})


class Calibrated(Protocol[M_co]):
    """A float model with the ranges of all layers of a plan: any part of it can be tried without calibrating again."""

    def left_out(self, plan: QuantizationPlan) -> Mapping[str, str]:
        """Why the library leaves layers of a plan float, by name."""

    def with_only(self, layers: Iterable[LayerPlan], shifts: Mapping[str, Any] = NO_SHIFTS) -> M_co:
        """The model with these layers quantized and all others float; with none, the float model.

        It may be the model of the last call, changed. A format may differ from that of the calibrated plan.
        `shifts` is added to the biases of layers, by name.
        """

    def quantize(self, plan: QuantizationPlan) -> tuple[M_co, Mapping[str, str]]:
        """Quantize as a plan says, for good: nothing can be tried any more.

        Returns:
            The model, on the CPU, and why the library left out layers of the plan, by name.
        """


class Backend(Protocol[M]):
    """A quantization library behind one face. A module of this package is a backend: it has these names."""

    name: str
    format: Literal["torch", "onnx"]
    libraries: tuple[str, ...]
    """Distributions whose versions go into the manifest."""
    support: Support
    payload: str
    """File name of the quantized model, as TAO calls it."""

    def check_options(self, options: Mapping[str, Any], algorithm: str) -> list[Fault]:
        """Faults of `backend_kwargs` against the signature of the library."""

    def layers(self, model: M, options: Mapping[str, Any]) -> list[Layer]:
        """All layers of a float model, quantizable or not under these options."""

    def float_size(self, model: M) -> int:
        """Bytes of the float model saved in this format, as float32."""

    def calibrate(
        self,
        model: M,
        plan: QuantizationPlan,
        batches: Iterable[Inputs],
        options: Mapping[str, Any],
        *,
        device: str,
        cache: RangeCache | None,
    ) -> Calibrated[M]:
        """Find the ranges that a plan needs, on a device that is there. The model is used up.

        `batches` is not touched unless the plan needs calibration; going through it again begins again.
        """

    def applied(self, model: M) -> Applied:
        """What is really quantized, read from the model itself."""

    def ranges(self, model: M) -> Mapping[str, tuple[float, float]]:
        """Smallest and largest input that the quantized layers represent, by name, read from the model itself."""

    def layer_errors(
        self, reference: M, model: M, names: Sequence[str], batches: Iterable[Inputs], *, device: str
    ) -> Mapping[str, LayerError]:
        """Errors of the quantized layers `names` of `model`, each on the inputs that the float model gives it."""

    def bias_shifts(
        self, reference: M, model: M, names: Sequence[str], batches: Iterable[Inputs], *, device: str
    ) -> Mapping[str, Any]:
        """What quantization shifts the mean output of the quantized layers `names` by, one number per channel.

        Each layer is given the input that the float model gives it, as in `layer_errors`: the shift of a layer does
        not depend on which others are quantized.
        """

    def add_to_biases(self, model: M, shifts: Mapping[str, Any]) -> M:
        """Add to the biases of layers, by name; a layer without a bias gets one. Returns the model, changed."""

    def macs(self, model: M, inputs: Inputs) -> Mapping[str, int]:
        """Multiply-accumulates of the layers of a float model, for one sample."""

    def save(self, model: M, path: Path, options: Mapping[str, Any]) -> None:
        """Write the quantized model to a file."""

    def load(self, path: Path, build_model: Callable[[], M]) -> M:
        """Read it back into a fresh float model. Never re-quantizes, never unpickles code."""


class TorchBackend(Backend[M], Protocol[M]):
    """A backend whose models export can write as ONNX."""

    def dequantized(self, model: M) -> tuple[Mapping[str, Any], Mapping[str, Scales]]:
        """The state dict of the float network with the values of the quantized weights, and scales by layer."""


def verify(plan: QuantizationPlan, applied: Applied) -> None:
    """Compare the plan with what a library really did.

    Raises:
        TaoqError: They differ.
    """
    faults: list[Fault] = []
    planned = {item.layer.name: (item.weights, item.activations) for item in plan.quantized}
    for name in sorted({*planned, *applied}):
        want, got = planned.get(name, (None, None)), applied.get(name, (None, None))
        for part, asked, real in zip(("weights", "activations"), want, got, strict=True):
            if _format(asked) != _format(real):
                what = f"{part} are {real or 'float'} after quantization, the plan says {asked or 'float'}"
                faults.append(Fault(name, what, f"put it into quantize.skip_names; this is a limit of {plan.backend}"))
    if faults:
        raise TaoqError(*faults)


def check_shifts(images: int, bad: Sequence[str]) -> None:
    """Refuse means of outputs that no bias can be corrected by.

    Args:
        images: How many there were.
        bad: Layers whose mean is not finite.

    Raises:
        TaoqError: There are no images, or there are such layers.
    """
    if not images:
        raise TaoqError(Fault("quantize.calibration", "there are no images", "give calibration images"))
    if bad:
        what = f"the mean output of {some(bad)} is not a finite number"
        hint = "look for NaN or infinite values in the calibration images or in the checkpoint"
        raise TaoqError(Fault("quantize.bias_correction", what, hint))


def _format(scheme: TensorScheme | None) -> tuple[str, int | None] | None:
    return None if scheme is None else (scheme.dtype, scheme.axis)


@contextlib.contextmanager
def library_output() -> Iterator[None]:
    """Send what a library prints and warns of to the log (level debug) instead of the user's screen."""
    printed = io.StringIO()
    root, kept = logging.getLogger(), _Kept()
    root.addHandler(kept)  # else a library that logs to the root makes logging print there from then on
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(printed):
        warnings.simplefilter("default")
        try:
            yield
        finally:
            root.removeHandler(kept)
            for line in printed.getvalue().splitlines():
                _library.debug(line)
            for warning in caught:
                _library.debug("%s: %s", warning.category.__name__, warning.message)


class _Kept(logging.Handler):
    """Takes what libraries log to the root logger into ours."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == "root":
            _library.debug(record.getMessage())
