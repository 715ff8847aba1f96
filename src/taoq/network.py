# SPDX-License-Identifier: Apache-2.0
"""The interface of a network: named input tensors in, named output tensors out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Inputs = Mapping[str, "Tensor"]
"""Tensors by input name; axis 0 is the batch. They are passed to a torch network as keyword arguments if every name is
a parameter of its `forward`, otherwise as positional arguments in this order."""

Outputs = Mapping[str, "Tensor"]
"""Tensors by output name."""


@dataclass(frozen=True)
class OutputSpec:
    """The shape of an output.

    Attributes:
        shape: For each axis its size, or a name ("N", "queries") if it may have any size. Axis 0 is the batch.
        exact: Whether values are numbers of classes: they are equal or not, and their difference has no meaning.
    """

    shape: tuple[int | str, ...]
    exact: bool = False

    def accepts(self, shape: Sequence[int | None]) -> bool:
        """Return whether a tensor of this shape can be the output; None is an unknown size."""
        return len(shape) == len(self.shape) and all(
            size is None or isinstance(expected, str) or size == expected
            for size, expected in zip(shape, self.shape, strict=True)
        )

    def __str__(self) -> str:
        return format_shape(self.shape)


def format_shape(shape: Sequence[int | str | None]) -> str:
    """Format a shape as `[N, 3, 32, 32]`, with `?` for an unknown size."""
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"


def batch_size(inputs: Inputs) -> int:
    """Return the number of samples in a batch of inputs."""
    return len(next(iter(inputs.values())))


def first_samples(inputs: Inputs, count: int) -> Inputs:
    """Return the first `count` samples of a batch; all of them if it has fewer."""
    return inputs if batch_size(inputs) <= count else {name: tensor[:count] for name, tensor in inputs.items()}
