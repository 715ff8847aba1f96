# SPDX-License-Identifier: Apache-2.0
"""What a format of models is: how its files are read, and what can be measured on its models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from taoq.network import Inputs
from taoq.plain import JsonMapping
from taoq.quantization.types import LayerError

if TYPE_CHECKING:
    from torch import nn

M = TypeVar("M")
"""The model of a format: a torch network, or a graph."""

Values = Any
"""An array of a format: a torch tensor, or of ONNX a numpy array."""
Shifts = Mapping[str, Values]
"""What is added to the outputs of layers, by name: one number per channel, an array of the format."""


class ModelFormat(Protocol[M]):
    """A format of models. Its functions know no task and no backend."""

    name: str

    def read(self, path: str, build: Callable[[str | None], nn.Module]) -> M:
        """Read a model from a file.

        Args:
            path: The file; empty for a network that its task builds without one.
            build: The torch network of a checkpoint.

        Raises:
            TaoqError: The file is damaged, or does not fit.
        """

    def is_quantized(self, model: M) -> bool:
        """Whether a model that was read from a file is quantized."""

    def properties(self, model: M, path: str) -> JsonMapping | None:
        """What taoq's export wrote into the file: task, source, spec, taoq. None in any other file.

        Raises:
            TaoqError: It is damaged.
        """

    def prepare(self, model: M, path: str) -> M:
        """The model in the form that backends quantize; may change it in place.

        Raises:
            TaoqError: It has no such form.
        """

    def size(self, model: M) -> int:
        """Size of a float model saved in this format as float32, bytes."""

    def digest(self, model: M) -> str:
        """SHA-256 of a float model that has no file."""

    def macs(self, model: M, inputs: Inputs) -> Mapping[str, int]:
        """Multiply-accumulates of the layers of a float model, for one sample."""

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
        """Errors of the quantized layers `names` of `model`, each on the inputs that the float model gives it.

        `weight` gives the weight of a quantized layer as floats.
        """

    def bias_shifts(
        self, reference: M, model: M, names: Sequence[str], batches: Iterable[Inputs], *, device: str
    ) -> Shifts:
        """How much quantization shifts the mean output of the quantized layers `names`, one number per channel.

        Each layer gets the input that the float model gives it, as in `layer_errors`: the shift of a layer does
        not depend on which others are quantized.
        """
