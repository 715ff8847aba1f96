# SPDX-License-Identifier: Apache-2.0
"""NVIDIA ModelOpt on torch networks: static quantization of weights and activations, with quantized weights stored."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import pydantic
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from taoq.errors import Fault, did_you_mean
from taoq.network import Inputs
from taoq.plain import Options, Plain
from taoq.quantization.backends.base import Backend
from taoq.quantization.backends.modelopt_pytorch.calibration import ModelOptCalibrated, calibrate
from taoq.quantization.backends.modelopt_pytorch.quantizers import dtype_of, quantizer_of
from taoq.quantization.capability import Algorithm, Capability, TensorCapability
from taoq.quantization.dtypes import FP8_E4M3FN, FP8_E5M2, INT8
from taoq.quantization.formats.torch.biases import accept_biases
from taoq.quantization.formats.torch.call import call_every_layer
from taoq.quantization.formats.torch.layers import TYPES, list_layers
from taoq.quantization.formats.torch.state import save_state
from taoq.quantization.library import library_output
from taoq.quantization.ranges import RangeCache
from taoq.quantization.spec import QuantizeSpec
from taoq.quantization.types import (
    Applied,
    AppliedLayer,
    Layer,
    PerAxis,
    PerTensor,
    QuantizationPlan,
    Scales,
    Scheme,
)

with library_output():
    import modelopt.torch.opt as mto
    from modelopt.torch.quantization.calib import HistogramCalibrator
    from modelopt.torch.quantization.config import MaxCalibConfig, SmoothQuantCalibConfig
    from modelopt.torch.quantization.nn import QuantModuleRegistry, TensorQuantizer

_CONFIGS: Mapping[str, type[pydantic.BaseModel]] = {
    "minmax": MaxCalibConfig,
    "max": MaxCalibConfig,
    "smoothquant": SmoothQuantCalibConfig,
}
"""ModelOpt's config of each algorithm except entropy, which has none."""
_ENTROPY_OPTIONS = {
    "stride": "entropy: distance between the ranges to try, in bins",
    "start_bin": "entropy: smallest range to try, in bins",
}
"""Arguments of `HistogramCalibrator.compute_amax` that a spec may set."""


def _options() -> dict[str, str]:
    """Return the fields of ModelOpt's configs with their algorithms and titles, and the options of entropy."""
    options: dict[str, str] = {}
    for config in _CONFIGS.values():
        for key in _config_fields(config):
            algorithms = ", ".join(name for name, other in _CONFIGS.items() if key in other.model_fields)
            title = config.model_fields[key].title or ""
            options[key] = f"{algorithms}: {title.rstrip('.')}"
    return options | _ENTROPY_OPTIONS


def _config_fields(config: type[pydantic.BaseModel]) -> list[str]:
    return [key for key in config.model_fields if key != "method"]  # quantize.algorithm is the method.


class ModelOptTorchBackend:
    """INT8 and FP8, simulated in float: shows the loss of accuracy, but is not faster."""

    capability = Capability(
        name="modelopt.pytorch",
        format="torch",
        payload="quantized_model_modelopt.pytorch.pth",
        libraries=("torch", "nvidia-modelopt"),
        modes=("static_ptq",),
        algorithms=(
            Algorithm(name="minmax", activations=(INT8, FP8_E4M3FN)),
            Algorithm(name="max", activations=(INT8, FP8_E4M3FN)),
            Algorithm(name="entropy", activations=(INT8,), per_tensor=True),
            Algorithm(name="smoothquant", activations=(INT8,), weights=(INT8,), per_tensor=True, smooths=True),
        ),
        weights=TensorCapability(dtypes=(INT8, FP8_E4M3FN)),
        activations=TensorCapability(dtypes=(INT8, FP8_E4M3FN), axes="channels"),
        layer_types=tuple(sorted(kind.__name__ for kind in TYPES)),
        devices=("cuda", "cpu"),
        realised={FP8_E5M2: FP8_E4M3FN},  # ModelOpt refuses E5M2 with static scales; TensorRT has only E4M3.
        options=_options(),
        target="accuracy studies in torch (quantization is simulated, it brings no speed) and smaller files",
    )

    def check(self, section: QuantizeSpec) -> list[Fault]:
        """Check `backend_kwargs` against ModelOpt's config of the algorithm, or its entropy calibrator's arguments."""
        if section.algorithm == "entropy":
            return _check_entropy_options(section.backend_kwargs)
        config = _CONFIGS[section.algorithm]
        allowed = _config_fields(config)
        faults = []
        for key, value in section.backend_kwargs.items():
            where = f"quantize.backend_kwargs.{key}"
            if key not in allowed:
                faults.append(_unknown_argument(where, config.__name__, key, allowed))
            elif key == "alpha" and value is None:  # ModelOpt's config accepts it, but its calibration fails.
                faults.append(Fault(where, "'None' is not a number from 0 to 1", "write for example 0.5"))
            else:
                try:
                    config(**{key: value})
                except pydantic.ValidationError as error:
                    faults.append(Fault(where, error.errors()[0]["msg"].lower(), f"see ModelOpt's {config.__name__}"))
        return faults

    def layers(self, model: nn.Module, options: Options) -> list[Layer]:
        """List all layers. ModelOpt quantizes its registered classes and subclasses that do not override forward."""
        return list_layers(model, _obstacle)

    def calibrate(
        self,
        model: nn.Module,
        plan: QuantizationPlan,
        batches: Iterable[Inputs],
        options: Options,
        *,
        device: str,
        cache: RangeCache | None,
    ) -> ModelOptCalibrated:
        """Insert quantizers into the network and calibrate them.

        Raises:
            TaoqError: If a layer saw no calibration data, data or a weight is not finite, or a weight is parametrized.
            SpecError: If ModelOpt does not accept `options` for this network.
        """
        algorithm = self.capability.algorithm(plan.algorithm)
        return calibrate(model, plan, batches, options, device=device, algorithm=algorithm)

    def applied(self, model: nn.Module) -> Applied:
        """Return the layers with enabled quantizers and their schemes."""
        applied = {}
        for name, module in model.named_modules():
            weights = _scheme(getattr(module, "weight_quantizer", None))
            activations = _scheme(getattr(module, "input_quantizer", None))
            if weights or activations:
                largest = _largest_input(module) if activations else None
                applied[name] = AppliedLayer(weights, activations, None if largest is None else (-largest, largest))
        return applied

    def weight(self, model: nn.Module, layer: str) -> Tensor:
        """Return the dequantized weight of a quantized layer, without SmoothQuant factors."""
        module = model.get_submodule(layer)
        weight: Tensor = quantizer_of(module, "weight")(module.weight).detach()
        smoothing = quantizer_of(module, "input").pre_quant_scale
        return weight.clone() if smoothing is None else weight * smoothing

    def save(self, model: nn.Module, path: Path, options: Options) -> None:
        """Write ModelOpt's state and the state dict in the layout of `mto.save`, which TAO uses as well."""
        with library_output():
            state = _sorted_state(mto.modelopt_state(model))
            save_state({"modelopt_state": state, "model_state_dict": model.state_dict()}, path)

    def load(self, path: Path, build: Callable[[], nn.Module]) -> nn.Module:
        """Restore the quantizers from ModelOpt's state, then load the stored weights and scales."""
        model = build().eval()
        # Not mto.restore: an environment variable can disable its weights_only.
        stored = torch.load(path, map_location="cpu", weights_only=True)
        accept_biases(model, stored["model_state_dict"])
        with library_output():
            mto.restore_from_modelopt_state(model, stored["modelopt_state"])
            model.load_state_dict(stored["model_state_dict"])
        call_every_layer(model)
        return model.eval().requires_grad_(False)

    def dequantized(self, model: nn.Module) -> tuple[Mapping[str, Tensor], Mapping[str, Scales]]:
        """Return the state dict with dequantized weights, without SmoothQuant factors, and the scales of the layers."""
        quantizers = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, TensorQuantizer))
        state = {key: value for key, value in model.state_dict().items() if not key.startswith(quantizers)}
        scales: dict[str, Scales] = {}
        for name, layer in self.applied(model).items():
            module = model.get_submodule(name)
            state[f"{name}.weight"] = self.weight(model, name)
            smoothing = quantizer_of(module, "input").pre_quant_scale
            scales[name] = Scales(
                weights=_scale(module, "weight") if layer.weights else None,
                activations=_scale(module, "input") if layer.activations else None,
                smoothing=None if smoothing is None else smoothing.numpy(),
            )
        return state, scales


BACKEND: Backend[nn.Module] = ModelOptTorchBackend()


def _check_entropy_options(options: Options) -> list[Fault]:
    parameters = inspect.signature(HistogramCalibrator.compute_amax).parameters
    allowed = [key for key in parameters if key in _ENTROPY_OPTIONS]
    faults = []
    for key, value in options.items():
        where = f"quantize.backend_kwargs.{key}"
        if key not in allowed:
            faults.append(_unknown_argument(where, "HistogramCalibrator.compute_amax", key, allowed))
        elif not isinstance(value, int) or isinstance(value, bool) or value < 1:
            faults.append(Fault(where, f"'{value}' is not a whole number above 0", "write for example 8"))
    return faults


def _unknown_argument(where: str, function: str, key: str, allowed: list[str]) -> Fault:
    hint = did_you_mean(key, allowed, "its arguments are " + ", ".join(allowed))
    return Fault(where, f"ModelOpt's {function} has no argument '{key}'", hint)


def _obstacle(module: nn.Module) -> str:
    if not isinstance(module, TYPES):
        return f"modelopt.pytorch does not quantize the weight of {type(module).__name__}"
    if type(module) not in QuantModuleRegistry:
        return f"{type(module).__name__} has a forward of its own, which ModelOpt does not convert"
    return ""


def _scheme(quantizer: nn.Module | None) -> Scheme | None:
    dtype = dtype_of(quantizer)
    if dtype is None or quantizer is None:
        return None
    axis = getattr(quantizer, "axis", None)
    return Scheme(dtype, PerTensor() if axis is None else PerAxis(int(axis)))


def _largest_input(module: nn.Module) -> float:
    """Return the largest representable magnitude of a layer's input, the largest of all channels."""
    quantizer = quantizer_of(module, "input")
    smoothing = 1.0 if quantizer.pre_quant_scale is None else quantizer.pre_quant_scale
    return float((quantizer.amax / smoothing).max())


def _scale(module: nn.Module, part: str) -> float | NDArray[np.float32]:
    """Return the scale or the scales per channel of a quantizer: range divided by largest value of the format."""
    quantizer = quantizer_of(module, part)
    scales = quantizer.amax.float() / quantizer.maxbound
    if scales.numel() == 1 and quantizer.axis is None:
        return float(scales.numpy().item())
    per_channel: NDArray[np.float32] = scales.flatten().numpy()
    return per_channel


def _sorted_state(state: Plain) -> Plain:
    """Sort the keys of ModelOpt's state: some come from a set, whose order differs between processes."""
    if isinstance(state, dict):
        return {key: _sorted_state(state[key]) for key in sorted(state)}
    return type(state)(map(_sorted_state, state)) if type(state) in (list, tuple) else state
