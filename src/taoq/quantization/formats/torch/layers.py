# SPDX-License-Identifier: Apache-2.0
"""The layers of a torch network, and the obstacles to quantizing them that do not depend on the library."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.utils import parametrize

from taoq.quantization.types import Layer

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
TYPES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED, nn.Linear)
"""Layers that multiply their input by a weight, and may add a bias."""


def list_layers(model: nn.Module, obstacle: Callable[[nn.Module], str]) -> list[Layer]:
    """List all leaf modules and nn.MultiheadAttention modules of a network, in model order.

    Args:
        model: A float network.
        obstacle: Returns why the library cannot quantize a layer with a weight; empty if it can.
    """
    inside_attention = {
        id(child)
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
        for child in module.children()
    }
    leaves = [(name, module, _matrix(module)) for name, module in _leaves(model)]
    owners: dict[int, str] = {}
    sharers = Counter(id(weight) for _, _, weight in leaves)
    layers: list[Layer] = []
    for name, module, weight in leaves:
        owner = owners.setdefault(id(weight), name)
        if parametrize.is_parametrized(module):
            reason = "its weight is parametrized; remove the parametrization first"
        elif weight is None:
            reason = "it has no weight matrix or kernel"
        elif isinstance(module, nn.MultiheadAttention) or id(module) in inside_attention:
            reason = "nn.MultiheadAttention computes with its weights itself, past any quantizer"
        elif owner != name:
            reason = f"it shares its weight with '{owner}'"
        elif sharers[id(weight)] > 1:  # Quantizing it would break the sharing.
            reason = "it shares its weight with another layer"
        else:
            reason = obstacle(module)
        layers.append(
            Layer(
                name=name,
                type=type(module).__name__,
                weight_shape=() if weight is None else tuple(weight.shape),
                channel_axis=1 if isinstance(module, TRANSPOSED) else 0,
                input_axis=-1 if isinstance(module, nn.Linear) else 1,
                obstacle=reason,
            )
        )
    return layers


def _leaves(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """List leaf modules, attention modules, and parametrized modules without their children."""
    leaves: list[tuple[str, nn.Module]] = []
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        if parametrize.is_parametrized(module):
            inside = (*inside, f"{name}.")
        elif any(True for _ in module.children()) and not isinstance(module, nn.MultiheadAttention):
            continue
        leaves.append((name, module))
    return leaves


def _matrix(module: nn.Module) -> Tensor | None:
    """Return the weight of a module if it is a matrix or kernel; for attention, the packed input projection."""
    name = "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"
    weight = getattr(module, name, None)
    return weight if isinstance(weight, Tensor) and weight.ndim >= 2 else None
