"""Layers that images do not reach: the network reads their weights itself, or their input is a constant."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from support.networks import seeded
from taoq.quantization.formats.torch.reach import CONSTANT, NOT_CALLED, unreached


class Network(nn.Module):
    """As BEiT (which reads the weight of qkv), Swin V2 (an MLP of positions), and one that calls a layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 4, 4)
        self.qkv = nn.Linear(4, 4)
        self.positions = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 4))
        self.twice = nn.Linear(4, 4)
        self.spare = nn.Linear(4, 4)
        self.register_buffer("grid", torch.rand(16, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = functional.linear(x, self.qkv.weight, self.qkv.bias) + self.positions(self.grid)
        return self.twice(self.twice(x)).mean(1)


def test_layers_that_images_do_not_reach_are_named() -> None:
    network = seeded(Network)
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    assert unreached(network, {"input": torch.zeros(1, 3, 16, 16)}, names) == {
        "qkv": NOT_CALLED,
        "positions.0": CONSTANT,
        "positions.2": CONSTANT,
        "spare": NOT_CALLED,
    }


def test_whole_numbers_are_inputs_too() -> None:
    network = seeded(lambda: nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2)))
    for numbers in ([[1, 4]], [[2, 2]]):  # In another order, the second are the same: nothing can be said of them.
        assert unreached(network, {"input": torch.tensor(numbers)}, ["1"]) == {}
