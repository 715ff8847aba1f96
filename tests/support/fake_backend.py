"""A backend without a library: it rounds the weights of linear layers, and stops or misbehaves where a test says so."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from taoq.errors import Fault
from taoq.network import Inputs, batch_size
from taoq.quantization.capability import Algorithm, Capability, TensorCapability
from taoq.quantization.dtypes import DTYPES, FP8_E4M3FN, INT8
from taoq.quantization.formats.torch.biases import accept_biases, add_to_biases
from taoq.quantization.formats.torch.layers import list_layers
from taoq.quantization.ranges import RangeCache
from taoq.quantization.spec import QuantizeSpec
from taoq.quantization.types import AppliedLayer, Layer, LayerPlan, PerAxis, PerTensor, QuantizationPlan, Scheme

Ranges = Mapping[str, tuple[float, float]]


@dataclass
class FakeBackend:
    """Satisfies `taoq.quantization.backends.base.Backend`.

    Attributes:
        leaves_float: Why it leaves layers float, by name.
        forgets: Layers that it leaves float without saying so.
        stops: The exception that it raises at a step: calibrate, quantize or save, after half of the file.
        steps: The steps that it took.
        samples: Number of samples that it calibrated on.
    """

    leaves_float: Mapping[str, str] = field(default_factory=dict)
    forgets: tuple[str, ...] = ()
    stops: Mapping[str, BaseException] = field(default_factory=dict)
    steps: list[str] = field(default_factory=list)
    samples: int = 0

    capability = Capability(
        name="fake",
        format="torch",
        payload="quantized_model_fake.pth",
        libraries=("torch",),
        modes=("static_ptq",),
        algorithms=(Algorithm(name="minmax", activations=(INT8, FP8_E4M3FN)),),
        weights=TensorCapability(dtypes=(INT8, FP8_E4M3FN)),
        activations=TensorCapability(dtypes=(INT8, FP8_E4M3FN), axes="none"),
        layer_types=("Linear",),
        devices=("cpu",),
        target="tests",
    )

    def step(self, name: str) -> None:
        self.steps.append(name)
        if name in self.stops:
            raise self.stops[name]

    def check(self, section: QuantizeSpec) -> list[Fault]:
        return []

    def layers(self, model: nn.Module, options: Mapping[str, Any]) -> list[Layer]:
        return list_layers(model, lambda module: "" if isinstance(module, nn.Linear) else "it is not linear")

    def calibrate(
        self,
        model: nn.Module,
        plan: QuantizationPlan,
        batches: Iterable[Inputs],
        options: Mapping[str, Any],
        *,
        device: str,
        cache: RangeCache | None,
    ) -> FakeCalibrated:
        self.step("calibrate")
        largest = 0.0  # one range is enough here
        for inputs in batches if plan.needs_calibration else ():
            self.samples += batch_size(inputs)
            largest = max(largest, *(float(tensor.abs().max()) for tensor in inputs.values()))
        return FakeCalibrated(self, model.eval(), (-largest, largest))

    def applied(self, model: nn.Module) -> dict[str, AppliedLayer]:
        return {name: module.applied for name, module in model.named_modules() if hasattr(module, "applied")}

    def weight(self, model: nn.Module, layer: str) -> Tensor:
        return model.get_parameter(f"{layer}.weight").detach()

    def save(self, model: nn.Module, path: Path, options: Mapping[str, Any]) -> None:
        path.write_bytes(b"half of a file")
        self.step("save")
        layers = {name: [_to_json(layer.weights), _to_json(layer.activations), layer.input_range]
                  for name, layer in self.applied(model).items()}  # fmt: skip
        torch.save({"state": model.state_dict(), "layers": layers}, path)

    def load(self, path: Path, build: Callable[[], nn.Module]) -> nn.Module:
        stored, model = torch.load(path, weights_only=True), build()
        accept_biases(model, stored["state"])
        model.load_state_dict(stored["state"])
        for name, (weights, activations, input_range) in stored["layers"].items():
            layer = AppliedLayer(_from_json(weights), _from_json(activations), input_range)
            model.get_submodule(name).applied = layer
        return model.eval()


@dataclass
class FakeCalibrated:
    """A float network with the one range of all its inputs."""

    backend: FakeBackend
    model: nn.Module
    input_range: tuple[float, float]

    def left_out(self, plan: QuantizationPlan) -> Mapping[str, str]:
        planned = {item.layer.name for item in plan.quantized}
        return {name: reason for name, reason in self.backend.leaves_float.items() if name in planned}

    def with_only(self, layers: Iterable[LayerPlan], shifts: Mapping[str, Any] | None = None) -> nn.Module:
        model = copy.deepcopy(self.model)
        for item in layers:
            if item.layer.name not in self.backend.forgets:
                layer = model.get_submodule(item.layer.name)
                layer.applied = AppliedLayer(
                    item.weights, item.activations, self.input_range if item.activations else None
                )
                if item.weights:
                    layer.weight.data = rounded(layer.weight.data, item.weights)
        add_to_biases(model, shifts or {})
        return model

    def quantize(self, plan: QuantizationPlan, shifts: Mapping[str, Any] | None = None) -> nn.Module:
        self.backend.step("quantize")
        return self.with_only(plan.quantized, shifts)


def rounded(weight: Tensor, scheme: Scheme) -> Tensor:
    """A weight with the precision of a scheme."""
    other_axes = [axis for axis in range(weight.ndim) if axis != scheme.axis]
    scale = weight.abs().amax(other_axes, keepdim=True) / scheme.dtype.largest
    numbers = (weight / scale).round() if scheme.dtype.kind == "int" else weight / scale
    return numbers.to(getattr(torch, scheme.dtype.torch)).float() * scale


def _to_json(scheme: Scheme | None) -> dict[str, Any] | None:
    return scheme.to_json() if scheme else None


def _from_json(data: Mapping[str, Any] | None) -> Scheme | None:
    if data is None:
        return None
    return Scheme(DTYPES[data["dtype"]], PerTensor() if data["axis"] is None else PerAxis(data["axis"]))


BACKEND = FakeBackend()
