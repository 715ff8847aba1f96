# SPDX-License-Identifier: Apache-2.0
"""NVIDIA ModelOpt on torch models: static quantization of weights and activations, weights stored quantized."""

from __future__ import annotations

import contextlib
import functools
import glob
import inspect
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pydantic
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from taoq.errors import Fault, SpecError, TaoqError, did_you_mean
from taoq.quantization.backends import torch_layers, torch_measures
from taoq.quantization.backends.base import NO_SHIFTS, Applied, Inputs, Scales, library_output
from taoq.quantization.backends.torch_layers import (
    TYPES,
    ShiftedBiases,
    accept_biases,
    check_weights,
    is_finite,
    list_layers,
    save_state,
    saved_size,
)
from taoq.quantization.plan import Layer, LayerPlan, QuantizationPlan, Support, TensorScheme, is_smoothed
from taoq.quantization.ranges import RangeCache

# "No CUDA runtime is found" where a compiler is, and no GPU: quantize.device has said so
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
# once a layer: that the arithmetic is simulated is what `support.target` says
warnings.filterwarnings("ignore", message="RealQuantLinear: No real-quant GEMM found")

with library_output():
    import modelopt.torch.opt as mto
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.calib import HistogramCalibrator, MaxCalibrator
    from modelopt.torch.quantization.config import MaxCalibConfig, SmoothQuantCalibConfig
    from modelopt.torch.quantization.nn import QuantModuleRegistry, TensorQuantizer

name = "modelopt.pytorch"
format: Literal["torch"] = "torch"
libraries = ("torch", "nvidia-modelopt")
payload = "quantized_model_modelopt.pytorch.pth"
support = Support(
    modes=("static_ptq",),
    algorithms=("minmax", "max", "entropy", "smoothquant"),
    weights=("int8", "fp8_e4m3fn"),
    activations=("int8", "fp8_e4m3fn"),
    entropy_activations=("int8",),
    smoothquant=("int8",),
    layer_types=(
        "Conv1d",
        "Conv2d",
        "Conv3d",
        "ConvTranspose1d",
        "ConvTranspose2d",
        "ConvTranspose3d",
        "Linear",
    ),
    devices=("cuda", "cpu"),
    realised={"fp8_e5m2": "fp8_e4m3fn"},  # ModelOpt refuses (5, 2) with static scales; TensorRT has only E4M3
    target="accuracy studies in torch (quantization is simulated, it brings no speed) and smaller files",
)

_BITS: dict[str, Any] = {"int8": 8, "fp8_e4m3fn": (4, 3)}
_MOST_BINS = 2**13
_ENTROPY_RANGES = 256
_LEAST_RANGE = 1e-30  # below it, a scale underflows float32


def check_options(options: Mapping[str, Any], algorithm: str) -> list[Fault]:
    """Faults of `backend_kwargs` against ModelOpt's calibration: the algorithm's config, or entropy's compute_amax."""
    config = SmoothQuantCalibConfig if algorithm == "smoothquant" else MaxCalibConfig
    if algorithm == "entropy":
        parameters = inspect.signature(HistogramCalibrator.compute_amax).parameters
        known = [key for key in parameters if key in ("stride", "start_bin")]
        what = "HistogramCalibrator.compute_amax"
    else:
        known = [key for key in config.model_fields if key != "method"]
        what = config.__name__
    faults = []
    for key, value in options.items():
        where = f"quantize.backend_kwargs.{key}"
        if key not in known:
            otherwise = "its arguments are " + ", ".join(known)
            faults.append(
                Fault(where, f"ModelOpt's {what} has no argument '{key}'", did_you_mean(key, known, otherwise))
            )
        elif algorithm == "entropy":
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                faults.append(Fault(where, f"'{value}' is not a whole number above 0", "write for example 8"))
        elif key == "alpha" and value is None:  # which ModelOpt's config takes, and its arithmetic does not
            faults.append(Fault(where, "'None' is not a number from 0 to 1", "write for example 0.5"))
        else:
            try:
                config(**{key: value})
            except pydantic.ValidationError as error:
                hint = f"see ModelOpt's {what}"
                faults.append(Fault(where, error.errors()[0]["msg"].lower(), hint))
    return faults


def layers(model: nn.Module, options: Mapping[str, Any]) -> list[Layer]:  # noqa: ARG001 (no option bounds them)
    """All layers; ModelOpt converts the registered classes, and subclasses that keep their forward."""
    return list_layers(model, _obstacle)


float_size = saved_size


def calibrate(
    model: nn.Module,
    plan: QuantizationPlan,
    batches: Iterable[Inputs],
    options: Mapping[str, Any],
    *,
    device: str,
    cache: RangeCache | None,  # noqa: ARG001 (support has none)
) -> Calibrated:
    """Put quantizers into the model, and find their ranges.

    Raises:
        TaoqError: A layer saw no calibration data, data or a weight is not finite, a weight is parametrized.
        SpecError: ModelOpt does not take `options` for this network.
    """
    _refuse_parametrized(model)
    check_weights(model, plan)
    _calls_every_layer()
    model.to(device).eval()

    def feed(fed: nn.Module) -> None:
        with torch.no_grad(), _finite_inputs(fed, plan):
            for inputs in batches:
                fed(*(tensor.to(device) for tensor in inputs.values()))

    entropy, smooth = plan.algorithm == "entropy", plan.algorithm == "smoothquant"
    method = {"method": "smoothquant" if smooth else "max", **options}
    config = {"quant_cfg": _rules(plan), "algorithm": None if entropy else method}
    # ModelOpt scales weights in place
    unsmoothed = {
        item.layer.name: model.get_parameter(f"{item.layer.name}.weight").detach().clone()
        for item in plan.quantized
        if smooth and is_smoothed(item)
    }
    with library_output():
        # without a forward loop ModelOpt calibrates the weights alone, and opens no data
        try:
            mtq.quantize(model, config, feed if plan.needs_calibration and not entropy else None)
        except ValueError as error:
            if not options:
                raise
            what = f"ModelOpt cannot calibrate with these arguments: {error}"
            hint = "take out those that this network does not allow"
            raise SpecError(Fault("quantize.backend_kwargs", what, hint)) from error
        except AssertionError as error:
            if not smooth:
                raise
            # a layer with one input channel; or one whose input and weight are both zero for a channel
            what = f"ModelOpt's SmoothQuant does not take this network: {str(error).removeprefix('Error: ')}"
            raise TaoqError(Fault("quantize.algorithm", what, "write algorithm: max")) from error
        if entropy:
            _calibrate_entropy(model, plan, feed, options)
        _check_calibrated(model, plan)
        _give_zeros_a_scale(model, plan)
    return Calibrated(model, plan, unsmoothed)


class Calibrated:
    """A model with quantizers that are switched on and off."""

    def __init__(self, model: nn.Module, plan: QuantizationPlan, unsmoothed: Mapping[str, Tensor]) -> None:
        self._model = model.eval().requires_grad_(False)
        self._names = [item.layer.name for item in plan.quantized]
        self._smoothed = frozenset(unsmoothed)
        self._float: dict[str, tuple[LayerPlan, Tensor]] = {}  # of the layers that are on: the weight as it was
        self._biases = ShiftedBiases(self._model)
        for name_, weight in unsmoothed.items():
            layer = cast(Any, self._model.get_submodule(name_))
            layer.weight.data.copy_(_smooth(layer, weight, on=False))

    def left_out(self, plan: QuantizationPlan) -> Mapping[str, str]:  # noqa: ARG002 (one face for all backends)
        """ModelOpt leaves nothing out in torch."""
        return {}

    def with_only(self, layers: Iterable[LayerPlan], shifts: Mapping[str, Any] = NO_SHIFTS) -> nn.Module:
        """The same model, with these layers as `quantize` makes them.

        Their weights are rounded here. ModelOpt's quantizer multiplies by what `compress` divides by: a few of a
        million weights come out one step apart, and the roundings behind them are other ones from there on.
        """
        on = {item.layer.name: item for item in layers}
        for name_ in self._names:
            layer, item = cast(Any, self._model.get_submodule(name_)), on.get(name_)
            _switch(layer.input_quantizer, item.activations if item else None)
            layer.weight_quantizer.disable()
            before, weight = self._float.get(name_, (None, layer.weight))
            if before == item:
                continue
            if before:
                layer.weight.data.copy_(weight)
                del self._float[name_]
            if item:
                self._float[name_] = (item, layer.weight.detach().clone())
            changed = _smooth(layer, layer.weight, on=item is not None) if name_ in self._smoothed else layer.weight
            if item and item.weights:
                changed = _rounded(changed, layer.weight_quantizer.amax, item.weights.dtype)
            layer.weight.data.copy_(changed)
        self._biases.set(shifts)
        return self._model

    def quantize(self, plan: QuantizationPlan) -> tuple[nn.Module, Mapping[str, str]]:
        """The same model, with its weights stored quantized."""
        model = self.with_only(())
        for item in plan.quantized:
            layer = cast(Any, model.get_submodule(item.layer.name))
            _switch(layer.weight_quantizer, item.weights)
            _switch(layer.input_quantizer, item.activations)
            if item.layer.name in self._smoothed:
                layer.weight.data.copy_(_smooth(layer, layer.weight, on=True))
        with library_output():
            mtq.compress(model)
        # ModelOpt restores train mode from the root, which would un-freeze frozen parts; nothing here trains
        return model.to("cpu").eval().requires_grad_(False), self.left_out(plan)


def _smooth(layer: Any, weight: Tensor, *, on: bool) -> Tensor:
    """Switch SmoothQuant: a quantizer that is off scales its input all the same.

    Args:
        layer: A layer that is smoothed.
        weight: What its weight was before.
        on: Whether it is smoothed.

    Returns:
        What its weight is then.
    """
    layer.input_quantizer._enable_pre_quant_scale = on
    return weight * (1.0 / layer.input_quantizer.pre_quant_scale) if on else weight


def _rounded(weight: Tensor, amax: Tensor, dtype: str) -> Tensor:
    """A weight with the values that `compress` stores, as ModelOpt's INT8QTensor and FP8QTensor compute them."""
    if dtype == "int8":
        scale = amax / 127.0
        return (weight / scale).round().clamp(-128, 127) * scale
    scale = amax / 448.0
    return (weight / scale).to(torch.float8_e4m3fn).to(weight.dtype) * scale


def _switch(quantizer: Any, scheme: TensorScheme | None) -> None:
    if scheme is None:
        quantizer.disable()
    else:
        quantizer.num_bits = _BITS[scheme.dtype]
        quantizer.enable()


def applied(model: nn.Module) -> Applied:
    """Enabled weight and input quantizers by layer, with the dtype in which the weight is stored."""
    found: dict[str, tuple[TensorScheme | None, TensorScheme | None]] = {}
    for name_, module in model.named_modules():
        weights = _read(getattr(module, "weight_quantizer", None))
        activations = _read(getattr(module, "input_quantizer", None))
        if weights or activations:
            found[name_] = (weights, activations)
    return found


def save(model: nn.Module, path: Path, options: Mapping[str, Any]) -> None:  # noqa: ARG001 (one way to write)
    """Write ModelOpt's state and the state dict, as `mto.save` does (and TAO's artifact has it)."""
    with library_output():
        state = _in_order(mto.modelopt_state(model))
        save_state({"modelopt_state": state, "model_state_dict": model.state_dict()}, path)


def _in_order(state: Any) -> Any:
    """ModelOpt's state with its keys sorted: some come from a set, in another order in each process."""
    if isinstance(state, dict):
        return {key: _in_order(state[key]) for key in sorted(state)}
    return type(state)(map(_in_order, state)) if type(state) in (list, tuple) else state


def load(path: Path, build_model: Callable[[], nn.Module]) -> nn.Module:
    """Rebuild the quantizers from ModelOpt's state, then load the stored weights and scales."""
    _calls_every_layer()
    model = build_model().eval()
    # not mto.restore: an environment variable can turn off its weights_only
    stored = torch.load(path, map_location="cpu", weights_only=True)
    accept_biases(model, stored["model_state_dict"])
    with library_output():
        mto.restore_from_modelopt_state(model, stored["modelopt_state"])
        model.load_state_dict(stored["model_state_dict"])
    return model.eval().requires_grad_(False)


def ranges(model: nn.Module) -> dict[str, tuple[float, float]]:
    """Ranges of the inputs; of an input with one scale per channel, or one factor of SmoothQuant, the widest."""
    found = {}
    for name_, (_, activations) in applied(model).items():
        if activations:
            quantizer = cast(Any, model.get_submodule(f"{name_}.input_quantizer"))
            smoothing = 1.0 if quantizer.pre_quant_scale is None else quantizer.pre_quant_scale
            largest = float((quantizer.amax / smoothing).max())
            found[name_] = (-largest, largest)
    return found


def dequantized(model: nn.Module) -> tuple[Mapping[str, Tensor], Mapping[str, Scales]]:
    """State dict and scales: stored numbers times scale are the weights, without the factors of SmoothQuant."""
    state = {key: value for key, value in model.state_dict().items() if "_quantizer." not in key}
    scales: dict[str, Scales] = {}
    for name_, (weights, activations) in applied(model).items():
        layer = cast(Any, model.get_submodule(name_))
        state[f"{name_}.weight"] = plain_weight(layer)
        smoothing = layer.input_quantizer.pre_quant_scale
        scales[name_] = Scales(
            weights=_scale(layer.weight_quantizer) if weights else None,
            activations=_scale(layer.input_quantizer) if activations else None,
            smoothing=None if smoothing is None else smoothing.numpy(),
        )
    return state, scales


def plain_weight(layer: Any) -> Tensor:
    """The weight of a quantized layer as floats, without the factors of SmoothQuant."""
    weight: Tensor = layer.weight_quantizer(layer.weight).detach()
    smoothing = layer.input_quantizer.pre_quant_scale
    return weight.clone() if smoothing is None else weight * smoothing


bias_shifts, macs = torch_measures.bias_shifts, torch_measures.macs
add_to_biases = torch_layers.add_to_biases
layer_errors = functools.partial(torch_measures.layer_errors, plain_weight=plain_weight)


def _scale(quantizer: Any) -> Any:
    """One number, or one per channel: the largest magnitude over the largest of the format."""
    amax = quantizer.amax.float() / quantizer.maxbound
    return amax.numpy().item() if amax.numel() == 1 and quantizer.axis is None else amax.flatten().numpy()


def _obstacle(module: nn.Module) -> str:
    if not isinstance(module, TYPES):
        return f"modelopt.pytorch does not quantize the weight of {type(module).__name__}"
    if type(module) not in QuantModuleRegistry:
        return f"{type(module).__name__} has a forward of its own, which ModelOpt does not convert"
    return ""


def _calls_every_layer() -> None:
    """Turn off the fused inference path of nn.TransformerEncoderLayer: it would go past the quantizers."""
    torch.backends.mha.set_fastpath_enabled(False)


def _refuse_parametrized(model: nn.Module) -> None:
    faults = [
        Fault(
            name_,
            "its weight is parametrized, and ModelOpt fails on a network with such a layer",
            "remove the parametrization before you save the checkpoint:"
            " torch.nn.utils.parametrize.remove_parametrizations",
        )
        for name_, module in model.named_modules()
        if parametrize.is_parametrized(module)
    ]
    if faults:
        raise TaoqError(*faults)


def _rules(plan: QuantizationPlan) -> list[dict[str, Any]]:
    """The plan as ModelOpt's ordered rules. The first turns everything off: ModelOpt's default quantizes."""
    rules: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for item in plan.quantized:
        name_ = glob.escape(item.layer.name)  # ModelOpt reads it as a pattern
        for quantizer, scheme in (("weight_quantizer", item.weights), ("input_quantizer", item.activations)):
            if scheme is not None:
                cfg = {"num_bits": _BITS[scheme.dtype], "axis": scheme.axis}
                rules.append({"quantizer_name": f"{name_}.{quantizer}", "cfg": cfg})
    return rules


@contextlib.contextmanager
def _finite_inputs(model: nn.Module, plan: QuantizationPlan) -> Iterator[None]:
    """Refuse NaN and infinite inputs of the planned layers: ModelOpt fails on some, and calibrates on others."""

    def check(layer: str, inputs: tuple[Any, ...]) -> None:
        if not is_finite(inputs[0]):
            hint = "look for NaN or infinite values in the calibration images or in the checkpoint"
            raise TaoqError(Fault(layer, "its calibration range is not a finite number", hint))

    def hook(layer: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, inputs: check(layer, inputs)

    names = [item.layer.name for item in plan.quantized if item.activations]
    handles = [model.get_submodule(name_).register_forward_pre_hook(hook(name_)) for name_ in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Histogram(HistogramCalibrator):  # type: ignore[misc]
    """ModelOpt's histogram of absolute values, with a bound on its bins.

    ModelOpt adds bins of the first batch's width for larger values: after a first batch of small values there are
    millions of them, after one of zeros infinitely many. Here two bins become one where they would be too many.
    """

    def __init__(self) -> None:
        super().__init__(num_bits=8, axis=None)
        self._counts = np.zeros(0, dtype=np.int64)
        self._width = 0.0
        self.seen = False

    def collect(self, x: torch.Tensor) -> None:
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

    def compute_amax(self, method: str, **options: int) -> torch.Tensor:
        """The best range; 0 for an input that was always zero."""
        if self._width == 0:
            return torch.tensor(0.0)
        bins = len(self._counts)
        self._calib_hist, self._calib_bin_edges = self._counts, self._width * np.arange(bins + 1)
        start = options.get("start_bin", 128)
        stride = options.get("stride", max(8, math.ceil((bins - start) / _ENTROPY_RANGES)))
        found: torch.Tensor = super().compute_amax(method, stride=stride, start_bin=start)
        return found


def _calibrate_entropy(
    model: nn.Module, plan: QuantizationPlan, feed: Callable[[nn.Module], None], options: Mapping[str, Any]
) -> None:
    """Find input ranges by the least KL divergence of the quantized histogram; weights by their maximum.

    ModelOpt has no `entropy` algorithm, but its calibrator has (after TensorRT's: S. Migacz, "8-bit inference
    with TensorRT", GTC 2017). It is pure Python: the stride bounds the number of ranges tried.
    """
    mtq.calibrate(model, "max")  # without data: the weights
    quantizers = {
        item.layer.name: cast(Any, model.get_submodule(f"{item.layer.name}.input_quantizer"))
        for item in plan.quantized
        if item.activations
    }
    if not quantizers:
        return
    weights = [
        cast(Any, model.get_submodule(f"{item.layer.name}.weight_quantizer")) for item in plan.quantized if item.weights
    ]
    for quantizer in quantizers.values():
        # on the instance: a calibrator named in the config would be named in the artifact, too
        quantizer._calibrator = _Histogram()
        quantizer.enable_calib()
    for quantizer in (*quantizers.values(), *weights):  # ranges of the float network, whatever else is planned
        quantizer.disable_quant()
    feed(model)
    for quantizer in (*quantizers.values(), *weights):
        quantizer.enable_quant()
    for quantizer in quantizers.values():
        quantizer.disable_calib()
        if quantizer._calibrator.seen:
            quantizer.load_calib_amax("entropy", **options)
        quantizer._calibrator = MaxCalibrator(num_bits=8, axis=None)


def _check_calibrated(model: nn.Module, plan: QuantizationPlan) -> None:
    """Refuse an input that saw no data: ModelOpt would quantize it dynamically, and not say so."""
    faults = [
        Fault(
            item.layer.name,
            "saw no calibration data",
            "the model does not call this layer: put it into quantize.skip_names",
        )
        for item in plan.quantized
        if item.activations and model.get_submodule(f"{item.layer.name}.input_quantizer").amax is None
    ]
    if faults:
        raise TaoqError(*faults)


def _give_zeros_a_scale(model: nn.Module, plan: QuantizationPlan) -> None:
    """Give channels of zeros the range 1: divided by a scale of 0, float8 zeros would become NaN."""
    for item in plan.quantized:
        if item.weights:
            amax = cast(torch.Tensor, model.get_submodule(f"{item.layer.name}.weight_quantizer").amax)
            amax[amax < _LEAST_RANGE] = 1.0


def _read(quantizer: Any) -> TensorScheme | None:
    if not isinstance(quantizer, TensorQuantizer) or not quantizer.is_enabled:
        return None
    dtype = next((dtype for dtype, bits in _BITS.items() if bits == quantizer.num_bits), f"{quantizer.num_bits} bits")
    return TensorScheme(dtype, quantizer.axis)
