# SPDX-License-Identifier: Apache-2.0
"""Find layers that images do not reach, which cannot or need not be quantized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from taoq.network import Inputs
from taoq.quantization.formats.torch.call import call
from taoq.quantization.formats.torch.measures import observed

NOT_CALLED = "the network does not call it: it uses the weight in another way, or not at all"
CONSTANT = "its input is the same for all images: what it computes is a constant"
_Input = tuple[tuple[int, ...], float, float]
"""Shape, sum and norm of an input."""


def unreached(model: nn.Module, inputs: Inputs, names: Sequence[str]) -> dict[str, str]:
    """Return the layers that images do not reach, with the reason.

    The network runs twice, on an example and on noise. A layer that is not called in either run has a weight that the
    network reads itself (`F.linear(x, self.qkv.weight, bias)`), or does not use. A layer whose input is the same in
    both runs computes a constant, such as a bias of positions.

    Args:
        model: The float network, on the CPU.
        inputs: One sample.
        names: Names of the layers.
    """
    runs = [_inputs_of_layers(model, inputs, names), _inputs_of_layers(model, _noise(inputs), names)]
    reasons = {}
    for name in names:
        seen = [run[name] for run in runs if name in run]
        if not seen:
            reasons[name] = NOT_CALLED
        elif len(seen) == len(runs) and seen[0] == seen[1]:
            reasons[name] = CONSTANT
    return reasons


def _inputs_of_layers(model: nn.Module, inputs: Inputs, names: Sequence[str]) -> dict[str, list[_Input]]:
    """Return what distinguishes the inputs of each call of a layer, for the layers that are called."""
    seen: dict[str, list[_Input]] = {}

    def note(name: str, args: tuple[Any, ...], kwargs: dict[str, Tensor], _: object) -> None:
        tensor = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if tensor is not None:
            values = tensor.detach().double()
            seen.setdefault(name, []).append((tuple(tensor.shape), float(values.sum()), float(values.norm())))

    with torch.no_grad(), observed(model.eval(), names, note):
        call(model, inputs)
    return seen


def _noise(inputs: Inputs) -> Inputs:
    """Return inputs of the same shapes, with other values where these are floating point."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in inputs.items()
    }
