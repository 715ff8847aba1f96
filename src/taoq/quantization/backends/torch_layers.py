# SPDX-License-Identifier: Apache-2.0
"""The layers of a torch model, and why some cannot be quantized whatever the library."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from taoq.errors import Fault, TaoqError
from taoq.quantization.plan import Layer, QuantizationPlan

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
TYPES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED, nn.Linear)
"""Layers that multiply their input with a weight, and may add a bias."""


def list_layers(model: nn.Module, obstacle: Callable[[nn.Module], str]) -> list[Layer]:
    """All leaf layers of a model, and its nn.MultiheadAttention, in model order.

    Args:
        model: A float model.
        obstacle: Why the library cannot quantize a layer that has a weight; empty if it can.
    """
    inside_attention = {
        id(child)
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
        for child in module.children()
    }
    owner: dict[int, str] = {}
    layers: list[Layer] = []
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        parametrized = parametrize.is_parametrized(module)
        if parametrized:
            inside = (*inside, f"{name}.")
        elif any(True for _ in module.children()) and not isinstance(module, nn.MultiheadAttention):
            continue
        # attention is no leaf, but its packed projection is a weight of its own
        weight = getattr(module, "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight", None)
        has_matrix = isinstance(weight, Tensor) and weight.ndim >= 2
        tied_to = owner.setdefault(id(weight), name) if has_matrix else name
        if parametrized:
            why = "its weight is parametrized; remove the parametrization first"
        elif not has_matrix:
            why = "it has no weight matrix or kernel"
        elif isinstance(module, nn.MultiheadAttention) or id(module) in inside_attention:
            why = "nn.MultiheadAttention computes with its weights itself, past any quantizer"
        elif tied_to != name:
            why = f"it shares its weight with '{tied_to}'"
        else:
            why = obstacle(module)
        layers.append(
            Layer(
                name=name,
                type=type(module).__name__,
                weight_shape=tuple(weight.shape) if has_matrix and weight is not None else (),
                channel_axis=1 if is_transposed(module) else 0,
                input_axis=-1 if isinstance(module, nn.Linear) else 1,
                obstacle=why,
            )
        )
    # the first owner of a shared weight must stay float too, or the others would no longer share it
    shared = {layer.obstacle.split("'")[1] for layer in layers if layer.obstacle.startswith("it shares its weight")}
    return [
        replace(layer, obstacle="it shares its weight with another layer") if layer.name in shared else layer
        for layer in layers
    ]


def is_transposed(module: nn.Module) -> bool:
    """Whether it is a transposed convolution, whose weight has its input channels first."""
    return isinstance(module, _TRANSPOSED)


def give_bias(layer: nn.Module) -> None:
    """Give a layer of `TYPES` a bias of zeros, where it has none."""
    if layer.bias is None:
        channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        weight = cast(Tensor, layer.weight)
        bias = torch.zeros(cast(int, channels), device=weight.device)
        layer.register_parameter("bias", nn.Parameter(bias, requires_grad=False))


def add_to_biases(model: nn.Module, shifts: Mapping[str, Tensor]) -> nn.Module:
    """Add to the biases of layers, in place; one without a bias gets one.

    Args:
        model: The network.
        shifts: One number per output channel, by layer.
    """
    with torch.no_grad():
        for name, shift in shifts.items():
            layer = model.get_submodule(name)
            give_bias(layer)
            bias = layer.get_parameter("bias")
            bias.add_(shift.to(bias))
    return model


class ShiftedBiases:
    """Biases of a network that are shifted, and put back."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._float: dict[str, Tensor] = {}  # of the layers that are shifted now

    def set(self, shifts: Mapping[str, Tensor]) -> None:
        """Shift the biases of these layers; all others are as they were."""
        for name, bias in self._float.items():
            self._model.get_submodule(name).get_parameter("bias").data.copy_(bias)
        for name in shifts:
            give_bias(self._model.get_submodule(name))
        self._float = {name: self._model.get_parameter(f"{name}.bias").detach().clone() for name in shifts}
        add_to_biases(self._model, shifts)


def accept_biases(model: nn.Module, stored: Iterable[str]) -> None:
    """Give layers of a fresh network the biases that a stored state has and they lack: bias correction added them.

    Args:
        model: The network as it is built.
        stored: Keys of the state.
    """
    layers = dict(model.named_modules())
    for key in stored:
        name, _, parameter = key.rpartition(".")
        if parameter == "bias" and isinstance(layers.get(name), TYPES):
            give_bias(layers[name])


def check_weights(model: nn.Module, plan: QuantizationPlan) -> None:
    """Refuse weights with NaN or infinite values: they would spoil the scale, and so the whole channel.

    Raises:
        TaoqError: Names every such layer.
    """
    faults = [
        Fault(item.layer.name, "its weight is not finite", "look for NaN or infinite values in the checkpoint")
        for item in plan.quantized
        if item.weights and not is_finite(model.get_parameter(f"{item.layer.name}.weight"))
    ]
    if faults:
        raise TaoqError(*faults)


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor has no NaN and no infinite value."""
    # the sum is one cheap pass; finite values may overflow it, so that is looked at again
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def save_state(state: object, path: Path) -> None:
    """torch.save, with an OSError where the disk is full: torch itself raises a RuntimeError that hides it.

    Raises:
        OSError: The file cannot be written.
    """
    with path.open("wb") as file:
        failing = _Remembering(file)
        try:
            torch.save(state, cast(IO[bytes], failing))
        except RuntimeError:
            if failing.error is not None:
                raise failing.error from None
            raise


class _Remembering:
    """A file that remembers its first error."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self._file.flush()


def saved_size(model: nn.Module) -> int:
    """Bytes of the state dict as torch.save writes it."""
    sink = _Counter()
    checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)  # of no use here, and half of the time
    try:
        torch.save(model.state_dict(), cast(IO[bytes], sink))
    finally:
        torch.serialization.set_crc32_options(checksums)
    return sink.size


class _Counter:
    """A file that only counts what is written to it."""

    size = 0

    def write(self, data: bytes) -> int:
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Nothing is held back."""
