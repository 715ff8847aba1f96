# SPDX-License-Identifier: Apache-2.0
"""Bias correction in torch networks: add to biases, restore them, and load biases that the correction created."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from taoq.quantization.formats.torch.layers import TYPES


def give_bias(layer: nn.Module) -> None:
    """Add a bias of zeros to a layer of `TYPES` that has no bias."""
    if layer.bias is None:
        channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        assert isinstance(channels, int)
        bias = torch.zeros(channels, device=next(layer.parameters()).device)
        layer.register_parameter("bias", nn.Parameter(bias, requires_grad=False))


def add_to_biases(model: nn.Module, shifts: Mapping[str, Tensor]) -> None:
    """Add to the biases of layers, in place. A layer without a bias gets one.

    Args:
        model: The network.
        shifts: Values to add, by layer name: one per output channel.
    """
    with torch.no_grad():
        for name, shift in shifts.items():
            layer = model.get_submodule(name)
            give_bias(layer)
            bias = layer.get_parameter("bias")
            bias.add_(shift.to(bias))


class ShiftedBiases:
    """Shifts the biases of a network, and restores the original ones."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        # Original biases of the layers that are shifted now; None for a layer that had no bias.
        self._original: dict[str, Tensor | None] = {}

    def set(self, shifts: Mapping[str, Tensor]) -> None:
        """Shift the biases of these layers, and restore the biases of all other layers."""
        for name, bias in self._original.items():
            layer = self._model.get_submodule(name)
            if bias is None:
                layer.register_parameter("bias", None)
            else:
                layer.get_parameter("bias").data.copy_(bias)
        biases = {name: getattr(self._model.get_submodule(name), "bias", None) for name in shifts}
        self._original = {name: bias if bias is None else bias.detach().clone() for name, bias in biases.items()}
        add_to_biases(self._model, shifts)


def accept_biases(model: nn.Module, stored: Iterable[str]) -> None:
    """Add the biases that a stored state has and a fresh network lacks: bias correction creates them.

    Args:
        model: A newly built network.
        stored: Keys of the stored state.
    """
    layers = dict(model.named_modules())
    for key in stored:
        name, _, parameter = key.rpartition(".")
        if parameter == "bias" and isinstance(layers.get(name), TYPES):
            give_bias(layers[name])
