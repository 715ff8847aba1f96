# SPDX-License-Identifier: Apache-2.0
"""Find layers that images do not reach, which cannot or need not be quantized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from taoq.network import Inputs
from taoq.quantization.formats.torch.call import call
from taoq.quantization.formats.torch.measures import observed

NOT_CALLED = "the network does not call it: it uses the weight in another way, or not at all"
CONSTANT = "its input is the same for all images: what it computes is a constant"
_Input = tuple[tuple[int, ...], float, float]
"""Shape, weighted sum and norm of an input."""


def unreached(model: nn.Module, inputs: Inputs, names: Sequence[str]) -> dict[str, str]:
    """Return the layers that images do not reach, with the reason.

    The network runs on an example and on two others. A layer that is not called in any run has a weight that the
    network reads itself (`F.linear(x, self.qkv.weight, bias)`), or does not use. A layer whose input is the same in all
    runs computes a constant, such as a bias of positions.

    Args:
        model: The float network, on the CPU.
        inputs: One sample.
        names: Names of the layers.
    """
    others = [_noise(inputs), _blobs(inputs)]
    first = _inputs_of_layers(model, inputs, names)
    rest = [_inputs_of_layers(model, other, names) for other in others]
    reasons = {name: NOT_CALLED for name in names if not any(name in run for run in (first, *rest))}
    if all(not torch.equal(inputs[name], values) for other in others for name, values in other.items()):
        same = [name for name in first if all(run.get(name) == first[name] for run in rest)]
        # Only zeros are a sign of dead channels, which other images may bring to life.
        reasons |= {name: CONSTANT for name in same if any(norm for _, _, norm in first[name])}
    return reasons


def _inputs_of_layers(model: nn.Module, inputs: Inputs, names: Sequence[str]) -> dict[str, list[_Input]]:
    """Return what distinguishes the inputs of each call of a layer, for the layers that are called."""
    seen: dict[str, list[_Input]] = {}

    def note(name: str, args: tuple[Any, ...], kwargs: dict[str, Tensor], _: object) -> None:
        tensor = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if tensor is not None:
            values = tensor.detach().flatten().double()
            places = torch.linspace(1, 2, len(values), dtype=torch.float64)  # The order of the values counts, too.
            seen.setdefault(name, []).append((tuple(tensor.shape), float(places @ values), float(values.norm())))

    with torch.no_grad(), observed(model.eval(), names, note):
        call(model, inputs)
    return seen


def _noise(inputs: Inputs) -> Inputs:
    """Return inputs of the same shapes with other values: noise in 0..1, or numbers and flags in another order."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(tensor.shape, generator=generator).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor.flatten().roll(1).view(tensor.shape)
        for name, tensor in inputs.items()
    }


def _blobs(inputs: Inputs) -> Inputs:
    """Return inputs like `_noise`, where images have large areas of similar colours, as photographs have."""
    return {
        name: functional.interpolate(
            functional.adaptive_avg_pool2d(tensor, 8) * 4 - 1.5, tensor.shape[2:], mode="bicubic"
        )
        if tensor.ndim == 4 and tensor.is_floating_point()
        else tensor
        for name, tensor in _noise(inputs).items()
    }
