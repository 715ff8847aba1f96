# SPDX-License-Identifier: Apache-2.0
"""torchao: weight-only quantization of linear layers. Needs no data; runs on any device."""

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
"""Arguments of `quantize_` that a spec may not give."""


class TorchaoBackend:
    """Stores the weights of linear layers as int8 or float8, one scale per output row; computes in float."""

    capability = Capability(
        name="torchao",
        format="torch",
        payload="quantized_model_torchao.pth",
        libraries=("torch", "torchao"),
        modes=("weight_only_ptq",),
        weights=TensorCapability(dtypes=(INT8, FP8_E4M3FN, FP8_E5M2), axes="channels"),
        layer_types=("Linear",),
        devices=("cuda", "cpu"),
        options={"device": "Where torchao quantizes: cpu, cuda or cuda:N; without it quantize.device"},
        target="smaller files and less memory; on a CPU in eager mode slower than float",
    )

    def check(self, section: QuantizeSpec) -> list[Fault]:
        """Faults of `backend_kwargs` against `torchao.quantization.quantize_`."""
        known = [key for key in inspect.signature(ao.quantize_).parameters if key not in _SET_BY_THE_PLAN]
        faults = []
        for key, value in section.backend_kwargs.items():
            where = f"quantize.backend_kwargs.{key}"
            if key in _SET_BY_THE_PLAN:
                what = f"'{key}' of torchao's quantize_ is set by the plan"
                faults.append(Fault(where, what, "write rules in quantize.layers"))
            elif key not in known:
                hint = did_you_mean(key, known, "its arguments are " + ", ".join(known))
                faults.append(Fault(where, f"torchao's quantize_ has no argument '{key}'", hint))
            elif key == "device":
                faults += _check_device(where, value)
        return faults

    def layers(self, model: nn.Module, options: Options) -> list[Layer]:
        """All layers; torchao quantizes nn.Linear itself, not its subclasses with a forward of their own."""
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
        """There is nothing to calibrate.

        Raises:
            TaoqError: A weight is not finite.
        """
        check_weights(model, plan)
        return TorchaoCalibrated(model.to(device).eval().requires_grad_(False), options)

    def applied(self, model: nn.Module) -> Applied:
        """Quantized weights by layer, read from the tensors."""
        applied = {}
        for name, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, ao.Int8Tensor | ao.Float8Tensor):
                # a scale of shape [rows, 1] has one value per row, also where there is only one row
                per_row = weight.scale.shape[0] == weight.shape[0]
                scheme = Scheme(by_torch(str(weight.qdata.dtype)), PerAxis(0) if per_row else PerTensor())
                applied[name] = AppliedLayer(scheme, None)
        return applied

    def weight(self, model: nn.Module, layer: str) -> Tensor:
        """Values of a quantized layer's weight as floats."""
        stored: ao.Int8Tensor | ao.Float8Tensor = model.get_submodule(layer).weight
        values: Tensor = stored.dequantize()
        return values

    def save(self, model: nn.Module, path: Path, options: Options) -> None:
        """Write the state dict; its quantized tensors are torchao's and load under weights_only."""
        save_state(model.state_dict(), path)

    def load(self, path: Path, build: Callable[[], nn.Module]) -> nn.Module:
        """Replace the weights of a fresh network by the quantized tensors."""
        model = build()
        stored = torch.load(path, map_location="cpu", weights_only=True)
        accept_biases(model, stored)
        model.load_state_dict(stored, assign=True)
        return model.eval().requires_grad_(False)  # assigned parameters come back with requires_grad

    def dequantized(self, model: nn.Module) -> tuple[Mapping[str, Tensor], Mapping[str, Scales]]:
        """State dict with plain weights; weights alone have no scales that a graph could keep."""
        plain = {f"{name}.weight": self.weight(model, name) for name in self.applied(model)}
        return {**model.state_dict(), **plain}, {}


class TorchaoCalibrated:
    """A network whose weights are quantized, one scale per output row, or put back."""

    def __init__(self, model: nn.Module, options: Options) -> None:
        self._model, self._options = model, options
        self._biases = ShiftedBiases(model)
        self._float: dict[str, tuple[LayerPlan, nn.Parameter]] = {}  # of the layers that are quantized now

    def left_out(self, plan: QuantizationPlan) -> Mapping[str, str]:
        """Torchao leaves nothing out."""
        return {}

    def with_only(self, layers: Iterable[LayerPlan], shifts: Shifts = NO_SHIFTS) -> nn.Module:
        """The same network, with the weights of these layers quantized."""
        wanted = {item.layer.name: item for item in layers if item.weights}
        for name, (item, weight) in list(self._float.items()):
            if wanted.get(name) != item:
                self._model.get_submodule(name).weight = weight
                del self._float[name]
        new = [item for name, item in wanted.items() if name not in self._float]
        for item in new:
            name = item.layer.name
            self._float[name] = (item, self._model.get_parameter(f"{name}.weight"))
        self._convert(new)
        self._biases.set(shifts)
        return self._model

    def quantize(self, plan: QuantizationPlan, shifts: Shifts = NO_SHIFTS) -> nn.Module:
        """The same network; its float weights are freed one by one, as all of them would double the memory."""
        self.with_only(())
        self._convert([item for item in plan.quantized if item.weights])
        add_to_biases(self._model, shifts)
        return self._model.to("cpu")

    def _convert(self, items: Sequence[LayerPlan]) -> None:
        configs = OrderedDict((item.layer.name, _config(item.weights)) for item in items if item.weights)
        if configs:
            with library_output():
                # filter_fn=None: with its default, torchao refuses a config per name. Exact names only, as a name
                # that is no Linear would convert and fail later, in forward.
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
        # version 2 is the tensor class that later releases of torchao load as well
        return ao.Int8WeightOnlyConfig(version=2)
    if scheme.dtype in (FP8_E4M3FN, FP8_E5M2):
        return ao.Float8WeightOnlyConfig(weight_dtype=getattr(torch, scheme.dtype.torch))
    raise ValueError(f"torchao stores no weights as {scheme}")


def _clear_zero_rows(weight: ao.Int8Tensor | ao.Float8Tensor) -> None:
    """Make rows of zeros zero again: torchao's float8 divides them by their scale of 0 and stores NaN."""
    dead = weight.scale == 0
    if bool(dead.any()):
        weight.scale[dead] = 1.0
        weight.qdata.view(torch.uint8)[dead.flatten()] = 0
