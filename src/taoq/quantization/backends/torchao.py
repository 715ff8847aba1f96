# SPDX-License-Identifier: Apache-2.0
"""torchao: weight-only quantization of linear layers, without calibration data."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from taoq.errors import Fault, did_you_mean
from taoq.network import Inputs
from taoq.plain import Options, Plain
from taoq.quantization.backends.base import NO_SHIFTS, Backend
from taoq.quantization.capability import Capability, TensorCapability
from taoq.quantization.dtypes import FP8_E4M3FN, FP8_E5M2, INT8, by_torch
from taoq.quantization.formats.base import Shifts
from taoq.quantization.formats.torch.biases import ShiftedBiases, accept_biases, add_to_biases
from taoq.quantization.formats.torch.layers import list_layers
from taoq.quantization.formats.torch.state import check_weights, save_state
from taoq.quantization.library import library_output
from taoq.quantization.ranges import RangeCache
from taoq.quantization.spec import QuantizeSpec
from taoq.quantization.types import (
    Applied,
    AppliedLayer,
    Layer,
    LayerPlan,
    PerAxis,
    PerTensor,
    QuantizationPlan,
    Scales,
    Scheme,
)

with library_output():
    import torchao.quantization as ao

_SET_BY_THE_PLAN = ("model", "config", "filter_fn")
"""Arguments of `quantize_` that a spec may not set."""


class TorchaoBackend:
    """Weights of linear layers as int8 or float8, with one scale per output channel. Computes in float."""

    capability = Capability(
        name="torchao",
        format="torch",
        payload="quantized_model_torchao.pth",
        libraries=("torch", "torchao"),
        modes=("weight_only_ptq",),
        weights=TensorCapability(dtypes=(INT8, FP8_E4M3FN, FP8_E5M2), axes="channels"),
        layer_types=("Linear",),
        devices=("cuda", "cpu"),
        options={"device": "Device to quantize on: cpu, cuda or cuda:N; default: quantize.device"},
        target="smaller files and less memory; on a CPU in eager mode slower than float",
    )

    def check(self, section: QuantizeSpec) -> list[Fault]:
        """Check `backend_kwargs` against the arguments of `torchao.quantization.quantize_`."""
        allowed = [key for key in inspect.signature(ao.quantize_).parameters if key not in _SET_BY_THE_PLAN]
        faults = []
        for key, value in section.backend_kwargs.items():
            where = f"quantize.backend_kwargs.{key}"
            if key in _SET_BY_THE_PLAN:
                what = f"'{key}' of torchao's quantize_ is set by the plan"
                faults.append(Fault(where, what, "write rules in quantize.layers"))
            elif key not in allowed:
                hint = did_you_mean(key, allowed, "its arguments are " + ", ".join(allowed))
                faults.append(Fault(where, f"torchao's quantize_ has no argument '{key}'", hint))
            elif key == "device":
                faults += _check_device(where, value)
        return faults

    def layers(self, model: nn.Module, options: Options) -> list[Layer]:
        """List all layers. Quantizable are nn.Linear and its subclasses that do not override forward."""
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
    ) -> TorchaoCalibrated:
        """Check the weights: weight-only quantization needs no calibration.

        Raises:
            TaoqError: If a weight is not finite.
        """
        check_weights(model, plan)
        return TorchaoCalibrated(model.to(device).eval().requires_grad_(False), options)

    def applied(self, model: nn.Module) -> Applied:
        """Return the quantized layers and their schemes, read from the weight tensors."""
        applied = {}
        for name, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, ao.Int8Tensor | ao.Float8Tensor):
                # Scales per channel have the shape [rows, 1]. A weight with one row counts as quantized per channel.
                per_row = weight.scale.shape[0] == weight.shape[0]
                scheme = Scheme(by_torch(str(weight.qdata.dtype)), PerAxis(0) if per_row else PerTensor())
                applied[name] = AppliedLayer(scheme, None)
        return applied

    def weight(self, model: nn.Module, layer: str) -> Tensor:
        """Return the dequantized weight of a quantized layer."""
        stored: ao.Int8Tensor | ao.Float8Tensor = model.get_submodule(layer).weight
        values: Tensor = stored.dequantize()
        return values

    def save(self, model: nn.Module, path: Path, options: Options) -> None:
        """Write the state dict. Its quantized tensors are torchao's classes, which `weights_only` loading allows."""
        save_state(model.state_dict(), path)

    def load(self, path: Path, build: Callable[[], nn.Module]) -> nn.Module:
        """Build the network and assign the quantized tensors to it."""
        model = build()
        stored = torch.load(path, map_location="cpu", weights_only=True)
        accept_biases(model, stored)
        model.load_state_dict(stored, assign=True)
        return model.eval().requires_grad_(False)  # Assigned parameters have requires_grad set.

    def dequantized(self, model: nn.Module) -> tuple[Mapping[str, Tensor], Mapping[str, Scales]]:
        """Return the state dict with dequantized weights, and no scales: a graph needs none for float weights."""
        weights = {f"{name}.weight": self.weight(model, name) for name in self.applied(model)}
        return {**model.state_dict(), **weights}, {}


class TorchaoCalibrated:
    """A network whose weights are quantized and restored as needed."""

    def __init__(self, model: nn.Module, options: Options) -> None:
        self._model, self._options = model, options
        self._biases = ShiftedBiases(model)
        # Plan and float weight of the layers that are quantized now.
        self._float: dict[str, tuple[LayerPlan, nn.Parameter]] = {}

    def left_out(self, plan: QuantizationPlan) -> Mapping[str, str]:
        """Return no layers: torchao quantizes every planned layer."""
        return {}

    def with_only(self, layers: Iterable[LayerPlan], shifts: Shifts = NO_SHIFTS) -> nn.Module:
        """Return the same network, with only the weights of these layers quantized."""
        planned = {item.layer.name: item for item in layers if item.weights}
        for name, (item, weight) in list(self._float.items()):
            if planned.get(name) != item:
                self._model.get_submodule(name).weight = weight
                del self._float[name]
        new = [item for name, item in planned.items() if name not in self._float]
        for item in new:
            name = item.layer.name
            self._float[name] = (item, self._model.get_parameter(f"{name}.weight"))
        self._convert(new)
        self._biases.set(shifts)
        return self._model

    def quantize(self, plan: QuantizationPlan, shifts: Shifts = NO_SHIFTS) -> nn.Module:
        """Return the same network, quantized. Its float weights are not kept, which would double the memory."""
        self.with_only(())
        self._convert([item for item in plan.quantized if item.weights])
        add_to_biases(self._model, shifts)
        return self._model.to("cpu")

    def _convert(self, items: Sequence[LayerPlan]) -> None:
        configs = OrderedDict((item.layer.name, _config(item.weights)) for item in items if item.weights)
        if configs:
            with library_output():
                # torchao refuses a config per layer name with its default filter_fn. Names are exact, not patterns:
                # it would also convert matching layers of other types, which then fail in forward.
                ao.quantize_(self._model, ao.FqnToConfig(configs), filter_fn=None, **self._options)
        for name in configs:
            _clear_zero_rows(self._model.get_submodule(name).weight)


BACKEND: Backend[nn.Module] = TorchaoBackend()


def _check_device(where: str, value: Plain) -> list[Fault]:
    try:
        device = torch.device(value)
    except (RuntimeError, TypeError):
        return [Fault(where, f"'{value}' is not a torch device", "write cpu, cuda or cuda:N")]
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        hint = "leave it out: quantize.device says where to quantize"
        return [Fault(where, f"this machine has no device '{value}'", hint)]
    return []


def _obstacle(module: nn.Module) -> str:
    if not isinstance(module, nn.Linear):
        return f"torchao does not quantize {type(module).__name__}"
    if type(module).forward is not nn.Linear.forward:
        return f"{type(module).__name__} has a forward of its own"
    return ""


def _config(scheme: Scheme) -> ao.Int8WeightOnlyConfig | ao.Float8WeightOnlyConfig:
    if scheme.dtype == INT8:
        # Version 2 is the tensor class that later releases of torchao can still load.
        return ao.Int8WeightOnlyConfig(version=2)
    if scheme.dtype in (FP8_E4M3FN, FP8_E5M2):
        return ao.Float8WeightOnlyConfig(weight_dtype=getattr(torch, scheme.dtype.torch))
    raise ValueError(f"torchao stores no weights as {scheme}")


def _clear_zero_rows(weight: ao.Int8Tensor | ao.Float8Tensor) -> None:
    """Set rows of zeros to zero: torchao's float8 divides them by their scale of 0 and stores NaN."""
    zero_rows = weight.scale == 0
    if bool(zero_rows.any()):
        weight.scale[zero_rows] = 1.0
        weight.qdata.view(torch.uint8)[zero_rows.flatten()] = 0
