# SPDX-License-Identifier: Apache-2.0
"""A network as its users see it: named input tensors in, named output tensors out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Inputs = Mapping[str, "Tensor"]
"""Tensors by input name; axis 0 is the batch. A torch network gets them by keyword if each name is a parameter of its
forward, else by position in this order."""

Outputs = Mapping[str, "Tensor"]
"""Tensors by output name."""


@dataclass(frozen=True)
class OutputSpec:
    """The shape of an output.

    Attributes:
        shape: A size for each axis; a name ("N", "queries") for an axis of any size. Axis 0 is the batch.
    """

    shape: tuple[int | str, ...]

    def accepts(self, shape: Sequence[int | None]) -> bool:
        """Whether a tensor of this shape may be the output; None stands for an unknown size."""
        return len(shape) == len(self.shape) and all(
            size is None or isinstance(expected, str) or size == expected
            for size, expected in zip(shape, self.shape, strict=True)
        )

    def __str__(self) -> str:
        return format_shape(self.shape)


def format_shape(shape: Sequence[int | str | None]) -> str:
    """`[N, 3, 32, 32]`; `?` for an unknown size."""
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"


def batch_size(inputs: Inputs) -> int:
    """Number of samples in a batch of inputs."""
    return len(next(iter(inputs.values())))


def first_samples(inputs: Inputs, count: int) -> Inputs:
    """The first `count` samples of a batch."""
    return inputs if batch_size(inputs) <= count else {name: tensor[:count] for name, tensor in inputs.items()}
