# SPDX-License-Identifier: Apache-2.0
"""The interface of a model format: reading its files, and measuring its models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from taoq.network import Inputs
from taoq.plain import JsonMapping
from taoq.quantization.types import LayerError

if TYPE_CHECKING:
    from torch import nn

M = TypeVar("M")
"""The model type of a format: `nn.Module` or `Graph`."""

Values = Any
"""The array type of a format: a torch tensor, or a numpy array for ONNX."""
Shifts = Mapping[str, Values]
"""Corrections to add to the biases of layers, by layer name: arrays of the format, one value per output channel."""


class ModelFormat(Protocol[M]):
    """A model format. Independent of tasks and backends."""

    name: str

    def read(self, path: str, build: Callable[[str | None], nn.Module]) -> M:
        """Read a model from a file.

        Args:
            path: The file; empty for a network that its task builds without a checkpoint.
            build: Builds the torch network and loads a checkpoint into it.

        Raises:
            TaoqError: If the file is damaged or does not fit the network.
        """

    def output_names(self, path: str) -> Sequence[str]:
        """Return the names of the outputs in a file; empty if it has none, or if it cannot be read."""

    def is_quantized(self, model: M) -> bool:
        """Return whether a model that was read from a file is quantized."""

    def properties(self, model: M, path: str) -> JsonMapping | None:
        """Return the metadata that taoq's export wrote into the file: task, source, spec, taoq; None if it has none.

        Raises:
            TaoqError: If the metadata is damaged.
        """

    def prepare(self, model: M, path: str) -> M:
        """Return the model in the form that backends expect. May modify it in place.

        Raises:
            TaoqError: If the model cannot be converted.
        """

    def size(self, model: M) -> int:
        """Return the size of a float32 model when saved in this format, bytes."""

    def digest(self, model: M) -> str:
        """Return the SHA-256 of a float model that has no file."""

    def unreached(self, model: M, inputs: Inputs, names: Sequence[str]) -> Mapping[str, str]:
        """Return the layers that images do not reach, with the reason: they stay float.

        Args:
            model: The float model.
            inputs: One sample.
            names: Names of the layers.
        """

    def macs(self, model: M, inputs: Inputs) -> Mapping[str, int]:
        """Return the multiply-accumulates of each layer of a float model, for one sample."""

    def layer_errors(
        self,
        reference: M,
        model: M,
        names: Sequence[str],
        batches: Iterable[Inputs],
        weight: Callable[[M, str], Values],
        *,
        device: str,
    ) -> Mapping[str, LayerError]:
        """Return the errors of quantized layers, with each layer's input taken from the float model.

        Args:
            reference: The float model.
            model: The quantized model.
            names: Names of its quantized layers.
            batches: Inputs; if empty, only weights are compared.
            weight: Returns the dequantized weight of a layer, such as `Backend.weight`.
            device: Device to run on.
        """

    def bias_shifts(
        self, reference: M, model: M, names: Sequence[str], batches: Iterable[Inputs], *, device: str
    ) -> Shifts:
        """Return the shift of each layer's mean output: float minus quantized, one value per output channel.

        As in `layer_errors`, each layer's input is taken from the float model, so the shift of a layer does not
        depend on which other layers are quantized. The arguments are those of `layer_errors`.
        """
