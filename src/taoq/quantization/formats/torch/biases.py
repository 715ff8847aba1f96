# SPDX-License-Identifier: Apache-2.0
"""Biases of the layers of a torch network: shifted, put back, and accepted from a stored state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from taoq.quantization.formats.torch.layers import TYPES


def give_bias(layer: nn.Module) -> None:
    """Give a layer of `TYPES` a bias of zeros, if it has none."""
    if layer.bias is None:
        channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        assert isinstance(channels, int)
        bias = torch.zeros(channels, device=next(layer.parameters()).device)
        layer.register_parameter("bias", nn.Parameter(bias, requires_grad=False))


def add_to_biases(model: nn.Module, shifts: Mapping[str, Tensor]) -> None:
    """Add to the biases of layers, in place; a layer without a bias gets one.

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


class ShiftedBiases:
    """Biases of a network that are shifted and put back."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._float: dict[str, Tensor | None] = {}  # of the layers that are shifted now; None: it has no bias

    def set(self, shifts: Mapping[str, Tensor]) -> None:
        """Shift the biases of these layers; all others are as they were at first."""
        for name, bias in self._float.items():
            layer = self._model.get_submodule(name)
            if bias is None:
                layer.register_parameter("bias", None)
            else:
                layer.get_parameter("bias").data.copy_(bias)
        biases = {name: getattr(self._model.get_submodule(name), "bias", None) for name in shifts}
        self._float = {name: bias if bias is None else bias.detach().clone() for name, bias in biases.items()}
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
