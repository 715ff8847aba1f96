# SPDX-License-Identifier: Apache-2.0
"""NVIDIA ModelOpt on torch models: static quantization of weights and activations, weights stored quantized."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import pydantic
import torch
from torch import nn

from taoq.errors import Fault, TaoqError, did_you_mean
from taoq.quantization.backends.base import Applied, Inputs, library_output
from taoq.quantization.backends.torch_layers import list_layers, saved_size
from taoq.quantization.plan import Layer, QuantizationPlan, Support, TensorScheme

# "No CUDA runtime is found" where a compiler is, and no GPU: quantize.device has said so
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
# once a layer: that the arithmetic is simulated is what `support.target` says
warnings.filterwarnings("ignore", message="RealQuantLinear: No real-quant GEMM found")

with library_output():
    import modelopt.torch.opt as mto
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.calib import HistogramCalibrator
    from modelopt.torch.quantization.config import MaxCalibConfig
    from modelopt.torch.quantization.model_calib import enable_stats_collection
    from modelopt.torch.quantization.nn import QuantModuleRegistry, TensorQuantizer

name = "modelopt.pytorch"
format: Literal["torch"] = "torch"
libraries = ("torch", "nvidia-modelopt")
payload = "quantized_model_modelopt.pytorch.pth"
support = Support(
    modes=("static_ptq",),
    algorithms=("minmax", "max", "entropy"),
    weights=("int8", "fp8_e4m3fn"),
    activations=("int8", "fp8_e4m3fn"),
    entropy_activations=("int8",),
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
_TYPES = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)
_ENTROPY_CANDIDATES = 256


def check_options(options: Mapping[str, Any], algorithm: str) -> list[Fault]:
    """Faults of `backend_kwargs` against ModelOpt's calibration: MaxCalibConfig, or entropy's compute_amax."""
    if algorithm == "entropy":
        parameters = inspect.signature(HistogramCalibrator.compute_amax).parameters
        known = [key for key in parameters if key in ("stride", "start_bin")]
        what = "HistogramCalibrator.compute_amax"
    else:
        known = [key for key in MaxCalibConfig.model_fields if key != "method"]
        what = "MaxCalibConfig"
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
        else:
            try:
                MaxCalibConfig(**{key: value})
            except pydantic.ValidationError as error:
                hint = "see ModelOpt's MaxCalibConfig"
                faults.append(Fault(where, error.errors()[0]["msg"].lower(), hint))
    return faults


def layers(model: nn.Module) -> list[Layer]:
    """All layers; ModelOpt converts the registered classes, and subclasses that keep their forward."""
    return list_layers(model, _obstacle)


float_size = saved_size


def quantize(
    model: nn.Module, plan: QuantizationPlan, batches: Iterable[Inputs], options: Mapping[str, Any]
) -> nn.Module:
    """Calibrate, quantize and compress in place.

    Raises:
        TaoqError: A layer saw no calibration data, or its range is not a finite number.
    """
    _calls_every_layer()
    model.eval()

    def feed(fed: nn.Module) -> None:
        with torch.no_grad():
            for inputs in batches:
                fed(*inputs.values())

    entropy = plan.algorithm == "entropy"
    config = {
        "quant_cfg": _rules(plan, histogram=entropy),
        "algorithm": None if entropy else {"method": "max", **options},
    }
    with library_output():
        # without a forward loop ModelOpt calibrates the weights alone, and opens no data
        mtq.quantize(model, config, feed if plan.needs_calibration and not entropy else None)
        if entropy:
            _calibrate_entropy(model, feed if plan.needs_calibration else None, options)
        _check_ranges(model, plan)
        mtq.compress(model)
    # ModelOpt restores train mode from the root, which would un-freeze frozen parts; nothing here trains
    return model.eval().requires_grad_(False)


def applied(model: nn.Module) -> Applied:
    """Enabled weight and input quantizers by layer, with the dtype in which the weight is stored."""
    found: dict[str, tuple[TensorScheme | None, TensorScheme | None]] = {}
    for name_, module in model.named_modules():
        weights = _read(getattr(module, "weight_quantizer", None))
        activations = _read(getattr(module, "input_quantizer", None))
        if weights or activations:
            found[name_] = (weights, activations)
    return found


def save(model: nn.Module, path: Path) -> None:
    """Write ModelOpt's state and the state dict, as `mto.save` does (and TAO's artifact has it)."""
    with library_output():
        mto.save(model, path)


def load(path: Path, build_model: Callable[[], nn.Module]) -> nn.Module:
    """Rebuild the quantizers from ModelOpt's state, then load the stored weights and scales."""
    _calls_every_layer()
    model = build_model().eval()
    # not mto.restore: an environment variable can turn off its weights_only
    stored = torch.load(path, map_location="cpu", weights_only=True)
    with library_output():
        mto.restore_from_modelopt_state(model, stored["modelopt_state"])
        model.load_state_dict(stored["model_state_dict"])
    return model.eval().requires_grad_(False)


def _obstacle(module: nn.Module) -> str:
    if not isinstance(module, _TYPES):
        return f"modelopt.pytorch does not quantize the weight of {type(module).__name__}"
    if type(module) not in QuantModuleRegistry:
        return f"{type(module).__name__} has a forward of its own, which ModelOpt does not convert"
    return ""


def _calls_every_layer() -> None:
    """Turn off the fused inference path of nn.TransformerEncoderLayer: it would go past the quantizers."""
    torch.backends.mha.set_fastpath_enabled(False)


def _rules(plan: QuantizationPlan, *, histogram: bool) -> list[dict[str, Any]]:
    """The plan as ModelOpt's ordered rules. The first turns everything off: ModelOpt's default quantizes."""
    rules: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for item in plan.quantized:
        for quantizer, scheme in (("weight_quantizer", item.weights), ("input_quantizer", item.activations)):
            if scheme is None:
                continue
            cfg = {"num_bits": _BITS[scheme.dtype], "axis": scheme.axis}
            if histogram and quantizer == "input_quantizer":
                cfg["calibrator"] = "histogram"
            rules.append({"quantizer_name": f"{item.layer.name}.{quantizer}", "cfg": cfg})
    return rules


def _calibrate_entropy(model: nn.Module, feed: Callable[[nn.Module], None] | None, options: Mapping[str, Any]) -> None:
    """Find input ranges by the least KL divergence of the quantized histogram; weights by their maximum.

    ModelOpt has no `entropy` algorithm, but its calibrator has (after TensorRT's, S. Migacz, "8-bit inference
    with TensorRT", GTC 2017). It is pure Python, and an outlier makes the histogram long: the stride bounds
    the number of ranges tried.
    """
    quantizers = {
        name_: module
        for name_, module in model.named_modules()
        if isinstance(module, TensorQuantizer) and module.is_enabled
    }
    enable_stats_collection(model)
    if feed is not None:
        feed(model)
    for name_, quantizer in quantizers.items():
        if name_.endswith("weight_quantizer"):
            weight = model.get_submodule(name_.rpartition(".")[0]).weight
            quantizer(weight)  # an unfed calibrator reads the weight here
            quantizer.load_calib_amax()
        elif quantizer._calibrator._calib_hist is not None:
            start = options.get("start_bin", 128)
            bins = len(quantizer._calibrator._calib_hist)
            stride = options.get("stride", max(8, -(-(bins - start) // _ENTROPY_CANDIDATES)))
            quantizer.load_calib_amax("entropy", stride=stride, start_bin=start)
        quantizer.enable_quant()
        quantizer.disable_calib()


def _check_ranges(model: nn.Module, plan: QuantizationPlan) -> None:
    """Refuse what ModelOpt accepts in silence: a range that was never found (then dynamic), or is NaN."""
    faults = []
    for item in plan.quantized:
        if item.activations is None:
            continue
        amax = model.get_submodule(f"{item.layer.name}.input_quantizer").amax
        if amax is None:
            hint = "the model does not call this layer: put it into quantize.skip_names"
            faults.append(Fault(item.layer.name, "saw no calibration data", hint))
        elif not bool(torch.isfinite(cast(torch.Tensor, amax)).all()):
            hint = "look for NaN or infinite values in the calibration images or in the checkpoint"
            faults.append(Fault(item.layer.name, "its calibration range is not a finite number", hint))
    if faults:
        raise TaoqError(*faults)


def _read(quantizer: Any) -> TensorScheme | None:
    if not isinstance(quantizer, TensorQuantizer) or not quantizer.is_enabled:
        return None
    dtype = next((dtype for dtype, bits in _BITS.items() if bits == quantizer.num_bits), f"{quantizer.num_bits} bits")
    return TensorScheme(dtype, quantizer.axis)
