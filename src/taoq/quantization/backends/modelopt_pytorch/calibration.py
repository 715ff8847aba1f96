# SPDX-License-Identifier: Apache-2.0
"""Calibrate a torch network with ModelOpt, and quantize any of its calibrated layers."""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from taoq.errors import Fault, SpecError, TaoqError, abbreviated
from taoq.network import Inputs
from taoq.plain import Options
from taoq.quantization.backends.base import NO_SHIFTS
from taoq.quantization.backends.modelopt_pytorch.entropy import calibrate_entropy
from taoq.quantization.backends.modelopt_pytorch.quantizers import BITS, quantizer_of, switch
from taoq.quantization.capability import Algorithm
from taoq.quantization.dtypes import FP8_E4M3FN, INT8
from taoq.quantization.formats.base import Shifts
from taoq.quantization.formats.checks import NON_FINITE_HINT
from taoq.quantization.formats.torch.biases import ShiftedBiases, add_to_biases
from taoq.quantization.formats.torch.call import call, call_every_layer
from taoq.quantization.formats.torch.state import check_weights, is_finite
from taoq.quantization.library import library_output
from taoq.quantization.plan import common_patterns
from taoq.quantization.ranges import LEAST_RANGE
from taoq.quantization.types import LayerPlan, QuantizationPlan, Scheme

with library_output():
    import modelopt.torch.quantization as mtq


def calibrate(
    model: nn.Module,
    plan: QuantizationPlan,
    batches: Iterable[Inputs],
    options: Options,
    *,
    device: str,
    algorithm: Algorithm | None,
) -> ModelOptCalibrated:
    """Insert quantizers into a network and calibrate them.

    Args:
        model: The float network. It is modified.
        plan: The plan.
        batches: Calibration data.
        options: `backend_kwargs`.
        device: Device to calibrate on.
        algorithm: The calibration algorithm of the plan.

    Raises:
        TaoqError: If a layer saw no calibration data, data or a weight is not finite, or a weight is parametrized.
        SpecError: If ModelOpt does not accept `options` for this network.
    """
    _refuse_parametrized(model)
    check_weights(model, plan)
    call_every_layer(model)
    model.to(device).eval()

    def forward_loop(network: nn.Module) -> None:
        with torch.no_grad(), _finite_inputs(network, plan):
            for inputs in batches:
                call(network, {name: tensor.to(device) for name, tensor in inputs.items()})

    entropy = plan.algorithm == "entropy"
    # ModelOpt applies SmoothQuant factors to the weights in place.
    unsmoothed = {
        item.layer.name: model.get_parameter(f"{item.layer.name}.weight").detach().clone()
        for item in plan.quantized
        if algorithm and algorithm.smooths_layer(item)
    }
    method = {"method": "smoothquant" if unsmoothed else "max", **options}
    config = {"quant_cfg": _rules(plan), "algorithm": None if entropy else method}
    with library_output():
        # Without a forward loop, ModelOpt calibrates only the weights.
        _quantize(
            model,
            config,
            forward_loop if plan.needs_calibration and not entropy else None,
            smooths=bool(unsmoothed),
            has_options=bool(options),
        )
        if entropy:
            calibrate_entropy(model, plan, forward_loop, options)
        _check_calibrated(model, plan)
        _replace_zero_ranges(model, plan)
    return ModelOptCalibrated(model, plan, unsmoothed)


def _quantize(
    model: nn.Module,
    config: Mapping[str, object],
    forward_loop: Callable[[nn.Module], None] | None,
    *,
    smooths: bool,
    has_options: bool,
) -> None:
    """Call ModelOpt's `quantize`, and convert the errors that a user can fix."""
    try:
        mtq.quantize(model, config, forward_loop)
    except ValueError as error:
        if not has_options:
            raise
        what = f"ModelOpt cannot calibrate with these arguments: {error}"
        hint = "take out those that this network does not allow"
        raise SpecError(Fault("quantize.backend_kwargs", what, hint)) from error
    except AssertionError as error:
        if not smooths:
            raise
        # It fails on layers with one input channel, and on channels whose input and weight are both zero.
        what = f"ModelOpt's SmoothQuant does not take this network: {str(error).removeprefix('Error: ')}"
        raise TaoqError(Fault("quantize.algorithm", what, "write algorithm: max")) from error


class ModelOptCalibrated:
    """A network whose calibrated quantizers are enabled and disabled as needed."""

    def __init__(self, model: nn.Module, plan: QuantizationPlan, unsmoothed: Mapping[str, Tensor]) -> None:
        self._model = model.eval().requires_grad_(False)
        self._names = [item.layer.name for item in plan.quantized]
        self._smoothed = frozenset(unsmoothed)
        # Plan and float weight of the layers that are quantized now.
        self._float: dict[str, tuple[LayerPlan, Tensor]] = {}
        self._biases = ShiftedBiases(self._model)
        for name, weight in unsmoothed.items():
            self._weight(name).copy_(self._smooth(name, weight, on=False))

    def left_out(self, plan: QuantizationPlan) -> Mapping[str, str]:
        """Return no layers: ModelOpt quantizes every planned layer in torch."""
        return {}

    def with_only(self, layers: Iterable[LayerPlan], shifts: Shifts = NO_SHIFTS) -> nn.Module:
        """Return the same network, with only these layers quantized.

        Weights are rounded here, bit for bit as `compress` does in `quantize`, and not by ModelOpt's weight quantizer:
        it multiplies by the inverse of the scale, so a few weights in a million would be off by one step.
        """
        planned = {item.layer.name: item for item in layers}
        for name in self._names:
            layer, item = self._model.get_submodule(name), planned.get(name)
            switch(layer, "input", item.activations if item else None)
            switch(layer, "weight", None)
            weight = self._weight(name)
            before, original = self._float.get(name, (None, weight))
            if before == item:
                continue
            if before:
                weight.copy_(original)
                del self._float[name]
            if item:
                self._float[name] = (item, weight.clone())
            values = self._smooth(name, weight, on=item is not None) if name in self._smoothed else weight
            if item and item.weights:
                values = _rounded(values, quantizer_of(layer, "weight").amax, item.weights)
            weight.copy_(values)
        self._biases.set(shifts)
        return self._model

    def quantize(self, plan: QuantizationPlan, shifts: Shifts = NO_SHIFTS) -> nn.Module:
        """Return the same network, with quantized weights stored."""
        model = self.with_only(())
        for item in plan.quantized:
            name = item.layer.name
            layer = model.get_submodule(name)
            switch(layer, "weight", item.weights)
            switch(layer, "input", item.activations)
            if name in self._smoothed:
                self._weight(name).copy_(self._smooth(name, self._weight(name), on=True))
        add_to_biases(model, shifts)
        with library_output():
            mtq.compress(model)
        # ModelOpt may set modules to train mode again.
        return model.to("cpu").eval().requires_grad_(False)

    def _weight(self, name: str) -> Tensor:
        """Return the data of a layer's weight."""
        return self._model.get_parameter(f"{name}.weight").data

    def _smooth(self, name: str, weight: Tensor, *, on: bool) -> Tensor:
        """Enable or disable SmoothQuant for a layer. Disabling the quantizer alone would still smooth its input.

        Args:
            name: Name of a layer with SmoothQuant factors.
            weight: Its weight without the factors.
            on: Whether to apply the factors.

        Returns:
            The weight that belongs to the new setting.
        """
        quantizer = quantizer_of(self._model.get_submodule(name), "input")
        quantizer._enable_pre_quant_scale = on
        return weight * (1.0 / quantizer.pre_quant_scale) if on else weight


def _rounded(weight: Tensor, amax: Tensor, scheme: Scheme) -> Tensor:
    """Return a weight rounded to the values that `compress` stores, as INT8QTensor and FP8QTensor of ModelOpt do."""
    scale = amax / scheme.dtype.largest
    match scheme.dtype:
        case dtype if dtype == INT8:
            return (weight / scale).round().clamp(-128, 127) * scale
        case dtype if dtype == FP8_E4M3FN:
            return (weight / scale).to(torch.float8_e4m3fn).to(weight.dtype) * scale
        case _:
            raise ValueError(f"ModelOpt stores no weights as {scheme}")


def _refuse_parametrized(model: nn.Module) -> None:
    faults = [
        Fault(
            name,
            "its weight is parametrized, and ModelOpt fails on a network with such a layer",
            "remove the parametrization before you save the checkpoint:"
            " torch.nn.utils.parametrize.remove_parametrizations",
        )
        for name, module in model.named_modules()
        if parametrize.is_parametrized(module)
    ]
    if faults:
        raise TaoqError(*faults)


def _rules(plan: QuantizationPlan) -> list[dict[str, object]]:
    """Convert the plan to ModelOpt's ordered rules. The first disables all quantizers, which are enabled by default."""
    rules: list[dict[str, object]] = [{"quantizer_name": "*", "enable": False}]
    for item in plan.quantized:
        name = glob.escape(item.layer.name)  # ModelOpt takes patterns.
        for part, scheme in (("weight", item.weights), ("input", item.activations)):
            if scheme is not None:
                config = {"num_bits": BITS[scheme.dtype], "axis": scheme.axis}
                rules.append({"quantizer_name": f"{name}.{part}_quantizer", "cfg": config})
    return rules


@contextlib.contextmanager
def _finite_inputs(model: nn.Module, plan: QuantizationPlan) -> Iterator[None]:
    """Refuse NaN and infinite inputs of the planned layers. ModelOpt refuses only a part of them."""

    def check(layer: str, tensor: Tensor) -> None:
        if not is_finite(tensor):
            raise TaoqError(Fault(layer, "its calibration range is not a finite number", NON_FINITE_HINT))

    def hook(layer: str) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor]], None]:
        return lambda _, inputs, named: check(layer, next(iter((*inputs, *named.values()))))

    names = [item.layer.name for item in plan.quantized if item.activations]
    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_calibrated(model: nn.Module, plan: QuantizationPlan) -> None:
    """Refuse layers whose input saw no data: ModelOpt would silently quantize them dynamically."""
    names = [
        item.layer.name
        for item in plan.quantized
        if item.activations and quantizer_of(model.get_submodule(item.layer.name), "input").amax is None
    ]
    if names:
        patterns = common_patterns(names, [item.layer.name for item in plan.layers])
        what = f"{len(names)} layer(s) saw no calibration data ({abbreviated(names)}): the model does not call them"
        raise TaoqError(Fault("quantize.layers", what, f"add to quantize.skip_names: {', '.join(patterns)}"))


def _replace_zero_ranges(model: nn.Module, plan: QuantizationPlan) -> None:
    """Set the range of weight channels of zeros to 1: divided by a scale of 0, they would become NaN in float8."""
    for item in plan.quantized:
        if item.weights:
            amax = quantizer_of(model.get_submodule(item.layer.name), "weight").amax
            amax[amax < LEAST_RANGE] = 1.0
