# SPDX-License-Identifier: Apache-2.0
"""Run a model: named tensors in, named tensors out, on a device."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from taoq.errors import Fault, SpecError

log = logging.getLogger(__name__)


class Runtime(Protocol):
    """What evaluation and inference need of a model, whatever runs it."""

    device: str
    fixed_batch: int | None
    """The number of images that it always runs; None takes any."""

    def run(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """One forward pass; the outputs are on the CPU."""


class TorchRuntime:
    """A torch model in eval mode."""

    fixed_batch: int | None = None

    def __init__(
        self, model: nn.Module, outputs: Iterable[str], device: str, dtype: torch.dtype = torch.float32
    ) -> None:
        self.device = device
        self._dtype = dtype
        self._model = model.to(device).eval()
        self._outputs = tuple(outputs)

    def run(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """One forward pass; the outputs are on the CPU, float32."""
        with torch.inference_mode():
            result = self._model(*(tensor.to(self.device, self._dtype) for tensor in inputs.values()))
        values = result if isinstance(result, tuple) else (result,)
        return {name: value.float().cpu() for name, value in zip(self._outputs, values, strict=True)}

    def compiled(self) -> TorchRuntime:
        """The same through torch.compile; compiles at the first run."""
        return TorchRuntime(cast(nn.Module, torch.compile(self._model)), self._outputs, self.device)

    def half(self) -> TorchRuntime:
        """A copy in float16."""
        return TorchRuntime(copy.deepcopy(self._model).half(), self._outputs, self.device, torch.float16)


def noise(example: Mapping[str, Tensor], batch: int, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of the shape of an example with `batch` samples, uniform in 0..1; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand((batch, *value.shape[1:]), generator=generator) for name, value in example.items()}


def torch_device(device: str, where: str) -> str:
    """The torch device of a spec's `device`: falls back to the CPU, and says so.

    Args:
        device: cuda, cuda:N or cpu.
        where: The field, for messages.

    Raises:
        SpecError: The machine has GPUs, but not that one.
    """
    if device == "cpu":
        return device
    if not torch.cuda.is_available():
        log.warning("%s: %s is not available on this machine; running on the CPU", where, device)
        return "cpu"
    index = int(device.partition(":")[2] or 0)
    count = torch.cuda.device_count()
    if index >= count:
        raise SpecError(
            Fault(
                where,
                f"there is no {device}: this machine has {count} GPU(s)",
                f"write cuda:0 to cuda:{count - 1}",
            )
        )
    return f"cuda:{index}"
