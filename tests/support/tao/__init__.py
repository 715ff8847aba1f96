"""A second implementation of TAO's networks, which taoq's reading of TAO's checkpoints is compared with.

Written after the papers and the names in TAO's checkpoints, without timm and without what taoq builds.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn


def named(**modules: nn.Module) -> nn.Sequential:
    """Modules that are called one after the other, with names."""
    result = nn.Sequential()
    for name, module in modules.items():
        result.add_module(name, module)
    return result


def scale(width: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(width))


class Residual(nn.Module):
    def __init__(self, main: nn.Module, skip: bool = True):
        super().__init__()
        self.main = main
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.main(x)
        return x + y if self.skip else y


class FirstNorm(nn.LayerNorm):
    """A layer norm over the channels of maps [N, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = ((x - mean) ** 2).mean(1, keepdim=True)
        shape = (1, -1, 1, 1)
        return (x - mean) / (variance + self.eps).sqrt() * self.weight.view(shape) + self.bias.view(shape)


def shuffled(network: nn.Module, *, faint: bool = False, seed: int = 0) -> nn.Module:
    """Fill all weights with random values, none of which is a default that a mistake could leave in place.

    Args:
        network: The network.
        faint: Whether all norms get inputs with a variance near their epsilon, so that the epsilon matters.
        seed: Seed of the values.
    """
    generator = torch.Generator().manual_seed(seed)
    small = 3e-3 if faint else 1.0
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if not tensor.is_floating_point():
                continue
            values = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                values = (0.5 + values.abs()) * small**2
            elif "gamma" in name or name.endswith("temperature"):
                values = 1 + 0.2 * values
            elif re.search(r"token$|tokens$|pos_embed$|_embedding$", name):
                values *= 0.5 * small
            elif tensor.ndim <= 1 or name.endswith("beta"):
                one = 0 if name.endswith(("bias", "beta", "mean")) else 1
                values = (one + 0.2 * values) * small
            else:
                values *= (2 / max(1, tensor[0].numel())) ** 0.5
                from_input = (tensor.ndim == 4 and tensor.shape[1] == 3) or "token_projection" in name
                values *= small if from_input else 1
            tensor.copy_(values)
    return network.eval()


def lightning(network: nn.Module) -> dict[str, Any]:
    """The checkpoint that TAO's training writes: the network is `model` of a Lightning module."""
    return {
        "epoch": 9, "global_step": 90, "pytorch-lightning_version": "2.4.0", "loops": {}, "optimizer_states": [],
        "state_dict": {f"model.{name}": value for name, value in network.state_dict().items()},
        "tao_model": "classification",
    }  # fmt: skip
