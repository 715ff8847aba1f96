# SPDX-License-Identifier: Apache-2.0
"""torchao: weight-only quantization of linear layers. No data, any device."""

from __future__ import annotations

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from taoq.errors import Fault, did_you_mean
from taoq.quantization.backends import torch_layers, torch_measures
from taoq.quantization.backends.base import NO_SHIFTS, Applied, Inputs, Scales, library_output
from taoq.quantization.backends.torch_layers import (
    ShiftedBiases,
    accept_biases,
    check_weights,
    list_layers,
    save_state,
    saved_size,
)
from taoq.quantization.plan import Layer, LayerPlan, QuantizationPlan, Support, TensorScheme
from taoq.quantization.ranges import RangeCache

with library_output():
    import torchao.quantization as ao

name = "torchao"
format: Literal["torch"] = "torch"
libraries = ("torch", "torchao")
payload = "quantized_model_torchao.pth"
support = Support(
    modes=("weight_only_ptq",),
    algorithms=(),
    weights=("int8", "fp8_e4m3fn", "fp8_e5m2"),
    activations=(),
    layer_types=("Linear",),
    devices=("cuda", "cpu"),
    weight_axes=False,
    target="smaller files and less memory; on a CPU in eager mode slower than float",
)

_DTYPES = {torch.int8: "int8", torch.float8_e4m3fn: "fp8_e4m3fn", torch.float8_e5m2: "fp8_e5m2"}
_OURS = ("model", "config", "filter_fn")  # arguments of quantize_ that the plan decides


def check_options(options: Mapping[str, Any], algorithm: str) -> list[Fault]:  # noqa: ARG001 (one face for all backends)
    """Faults of `backend_kwargs` against `torchao.quantization.quantize_`."""
    known = [key for key in inspect.signature(ao.quantize_).parameters if key not in _OURS]
    faults = []
    for key, value in options.items():
        where = f"quantize.backend_kwargs.{key}"
        if key in _OURS:
            faults.append(
                Fault(
                    where,
                    f"'{key}' of torchao's quantize_ is set by the plan",
                    "write rules in quantize.layers",
                )
            )
        elif key not in known:
            otherwise = "its arguments are " + ", ".join(known)
            faults.append(
                Fault(where, f"torchao's quantize_ has no argument '{key}'", did_you_mean(key, known, otherwise))
            )
        elif key == "device":
            try:
                device = torch.device(value)
                if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
                    hint = "leave it out: quantize.device says where to quantize"
                    faults.append(Fault(where, f"this machine has no device '{value}'", hint))
            except (RuntimeError, TypeError):
                faults.append(Fault(where, f"'{value}' is not a torch device", "write cpu, cuda or cuda:N"))
    return faults


def layers(model: nn.Module, options: Mapping[str, Any]) -> list[Layer]:  # noqa: ARG001 (no option bounds them)
    """All layers; torchao quantizes nn.Linear itself, not its subclasses with a forward of their own."""
    return list_layers(model, _obstacle)


float_size = saved_size


def calibrate(
    model: nn.Module,
    plan: QuantizationPlan,
    batches: Iterable[Inputs],  # noqa: ARG001 (weight-only opens no data)
    options: Mapping[str, Any],
    *,
    device: str,
    cache: RangeCache | None,  # noqa: ARG001
) -> Calibrated:
    """There is nothing to calibrate.

    Raises:
        TaoqError: A weight is not finite.
    """
    check_weights(model, plan)
    return Calibrated(model.to(device).eval().requires_grad_(False), options)


class Calibrated:
    """A model whose weights are quantized, one scale per output row, or put back."""

    def __init__(self, model: nn.Module, options: Mapping[str, Any]) -> None:
        self._model, self._options = model, options
        self._biases = ShiftedBiases(model)
        self._float: dict[str, tuple[LayerPlan, nn.Parameter]] = {}  # of the layers that are quantized now

    def left_out(self, plan: QuantizationPlan) -> Mapping[str, str]:  # noqa: ARG002 (one face for all backends)
        """Torchao leaves nothing out."""
        return {}

    def with_only(self, layers: Iterable[LayerPlan], shifts: Mapping[str, Any] = NO_SHIFTS) -> nn.Module:
        """The same model, with the weights of these layers quantized."""
        wanted = {item.layer.name: item for item in layers if item.weights}
        for name_, (item, weight) in list(self._float.items()):
            if wanted.get(name_) != item:
                self._model.get_submodule(name_).weight = weight
                del self._float[name_]
        new = [item for name_, item in wanted.items() if name_ not in self._float]
        for item in new:
            self._float[item.layer.name] = (item, cast(nn.Parameter, self._model.get_submodule(item.layer.name).weight))
        self._convert(new)
        self._biases.set(shifts)
        return self._model

    def quantize(self, plan: QuantizationPlan) -> tuple[nn.Module, Mapping[str, str]]:
        """The same model; its float weights are let go, one by one: all of them and the quantized ones are too much."""
        self.with_only(())
        self._convert([item for item in plan.quantized if item.weights])
        return self._model.to("cpu"), self.left_out(plan)

    def _convert(self, items: Sequence[LayerPlan]) -> None:
        configs = OrderedDict((item.layer.name, _config(cast(TensorScheme, item.weights))) for item in items)
        if configs:
            with library_output():
                # filter_fn=None: with its default, torchao refuses a config per name. Exact names only, as a name
                # that is no Linear would convert and fail later, in forward.
                ao.quantize_(self._model, ao.FqnToConfig(configs), filter_fn=None, **self._options)
        for name_ in configs:
            _clear_zero_rows(self._model.get_submodule(name_).weight)


def applied(model: nn.Module) -> Applied:
    """Quantized weights by layer, read from the tensors."""
    found = {}
    for name_, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, ao.Int8Tensor | ao.Float8Tensor):
            # a scale of shape [rows, 1] has one value per row, also where there is but one row
            axis = 0 if weight.scale.shape[0] == weight.shape[0] else None
            found[name_] = (TensorScheme(_DTYPES[weight.qdata.dtype], axis), None)
    return found


def save(model: nn.Module, path: Path, options: Mapping[str, Any]) -> None:  # noqa: ARG001 (one way to write)
    """Write the state dict; its quantized tensors are torchao's and load under weights_only."""
    save_state(model.state_dict(), path)


def load(path: Path, build_model: Callable[[], nn.Module]) -> nn.Module:
    """Put the quantized tensors in the place of a fresh model's weights."""
    model = build_model()
    stored = torch.load(path, map_location="cpu", weights_only=True)
    accept_biases(model, stored)
    model.load_state_dict(stored, assign=True)
    return model.eval().requires_grad_(False)  # assigned parameters come back with requires_grad


def dequantized(model: nn.Module) -> tuple[Mapping[str, Tensor], Mapping[str, Scales]]:
    """State dict with plain weights; weights alone have no scales that a graph could keep."""
    state = model.state_dict()
    return {**state, **{f"{name_}.weight": plain_weight(model.get_submodule(name_)) for name_ in applied(model)}}, {}


def plain_weight(layer: nn.Module) -> Tensor:
    """The weight of a quantized layer as floats."""
    return cast(Tensor, cast(Any, layer.weight).dequantize())


def ranges(model: nn.Module) -> dict[str, tuple[float, float]]:  # noqa: ARG001 (one face for all backends)
    """Inputs stay float."""
    return {}


bias_shifts, macs = torch_measures.bias_shifts, torch_measures.macs
add_to_biases = torch_layers.add_to_biases
layer_errors = functools.partial(torch_measures.layer_errors, plain_weight=plain_weight)


def _obstacle(module: nn.Module) -> str:
    if not isinstance(module, nn.Linear):
        return f"torchao does not quantize {type(module).__name__}"
    if type(module).forward is not nn.Linear.forward:
        return f"{type(module).__name__} has a forward of its own"
    return ""


def _config(scheme: TensorScheme) -> Any:
    if scheme.dtype == "int8":
        # version 2 is the tensor class that later releases of torchao load as well
        return ao.Int8WeightOnlyConfig(version=2)
    dtype = next(dtype for dtype, name_ in _DTYPES.items() if name_ == scheme.dtype)
    return ao.Float8WeightOnlyConfig(weight_dtype=dtype)


def _clear_zero_rows(weight: Any) -> None:
    """Make rows of zeros zero again: torchao's float8 divides them by their scale of 0 and stores NaN."""
    dead = weight.scale == 0
    if bool(dead.any()):
        weight.scale[dead] = 1.0
        weight.qdata.view(torch.uint8)[dead.flatten()] = 0
