# SPDX-License-Identifier: Apache-2.0
"""What a runtime is: named tensors in, named tensors out, on a device."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from taoq.errors import Fault, Notice, SpecError
from taoq.network import Inputs, Outputs, OutputSpec
from taoq.plain import Options

log = logging.getLogger(__name__)


class Runtime(Protocol):
    """A model that is ready to run."""

    device: str
    fixed_batch: int | None
    """The number of samples that it always runs; None for any number."""

    def run(self, inputs: Inputs) -> Outputs:
        """One forward pass; the outputs are float32 tensors on the CPU."""

    def compiled(self) -> Runtime | None:
        """The same model compiled, at its first run; None if this runtime has no compiler."""

    def half(self) -> Runtime | None:
        """A copy in float16; None if this runtime has none on this device."""


@runtime_checkable
class RuntimeKind(Protocol):
    """A library that runs models. A runtime is a value of this type, named by a row of `taoq.plugins.RUNTIMES`."""

    @property
    def name(self) -> str:
        """Value of the field `runtime`."""

    @property
    def formats(self) -> tuple[str, ...]:
        """Names of the formats whose models it runs."""

    @property
    def libraries(self) -> tuple[str, ...]:
        """Distributions whose versions go into reports."""

    @property
    def options(self) -> Mapping[str, str]:
        """Keys that it takes in `runtime_kwargs`, with what they do."""

    def device(self, requested: str, where: str) -> str:
        """The device of this machine for the `device` of a spec; the CPU, with a notice, if it is not there.

        Args:
            requested: cpu, cuda, cuda:N or trt.
            where: The field, for messages.

        Raises:
            SpecError: This runtime has no such device.
        """

    def open(
        self,
        model: Any,
        path: Path | None,
        example: Inputs,
        outputs: Mapping[str, OutputSpec],
        device: str,
        where: str,
        options: Options,
    ) -> Runtime:
        """Make a model ready to run.

        Args:
            model: The model in its format; may be moved to the device.
            path: Its file; None for a model that has none.
            example: Inputs of one sample, as the data has them.
            outputs: What the outputs must be, in order.
            device: As in a spec.
            where: The field that names the device, for messages.
            options: `runtime_kwargs`, with known keys.

        Raises:
            TaoqError: The model does not run, or does not take these inputs, or has not these outputs.
        """


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
        log.warning(Notice(where, f"{device} is not available on this machine; running on the CPU"))
        return "cpu"
    index = int(device.partition(":")[2] or 0)
    count = torch.cuda.device_count()
    if index >= count:
        what = f"there is no {device}: this machine has {count} GPU(s)"
        raise SpecError(Fault(where, what, f"write cuda:0 to cuda:{count - 1}"))
    return f"cuda:{index}"


def noise(example: Inputs, batch: int, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of the shape of an example with `batch` samples; the same for the same seed.

    Floating-point inputs are uniform in 0..1; others are the example's first sample, repeated.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand((batch, *value.shape[1:]), generator=generator, dtype=torch.float32)
        if value.is_floating_point()
        else value[:1].expand(batch, *value.shape[1:]).clone()
        for name, value in example.items()
    }
