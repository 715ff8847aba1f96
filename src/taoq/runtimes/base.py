# SPDX-License-Identifier: Apache-2.0
"""The interface of runtimes: libraries that run models on a device, with named tensors as inputs and outputs."""

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
    """The batch size that the model requires; None for any size."""

    def run(self, inputs: Inputs) -> Outputs:
        """Run the model. Return its outputs as float32 tensors on the CPU."""

    def compiled(self) -> Runtime | None:
        """Return the model with a compiler, which runs at the first `run`; None if the runtime has no compiler."""

    def half(self) -> Runtime | None:
        """Return a copy in float16; None if the runtime does not support it on this device."""


@runtime_checkable
class RuntimeKind(Protocol):
    """A library that runs models. `taoq.plugins.RUNTIMES` lists the objects of this type."""

    @property
    def name(self) -> str:
        """Name in the field `runtime`."""

    @property
    def formats(self) -> tuple[str, ...]:
        """Names of the formats whose models it runs: torch, onnx."""

    @property
    def libraries(self) -> tuple[str, ...]:
        """Distributions whose versions are written into reports."""

    @property
    def options(self) -> Mapping[str, str]:
        """The keys that it accepts in `runtime_kwargs`, with their descriptions."""

    def device(self, requested: str, where: str) -> str:
        """Return the device that a model will run on: the requested one, or the CPU if it is not available.

        Using the CPU instead is logged as a warning.

        Args:
            requested: The `device` of the spec: cpu, cuda, cuda:N or trt.
            where: The field that names it, for messages.

        Raises:
            SpecError: If the runtime does not support the device, or if there are GPUs but not this one.
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
        """Load a model onto a device.

        Args:
            model: The model, in the type of its format. It may be modified.
            path: The file of the model; None if it has none.
            example: Inputs of one sample.
            outputs: The specs of the outputs by name, in order.
            device: The `device` of the spec.
            where: The field that names the device, for messages.
            options: The `runtime_kwargs` of the spec. Their keys have been checked.

        Raises:
            SpecError: If the runtime does not support the device, or if there are GPUs but not this one.
            TaoqError: If the library cannot run the model, or if its inputs or outputs do not fit.
        """


def torch_device(device: str, where: str) -> str:
    """Return the torch device of a spec's `device`; the CPU, with a warning, if no GPU is available.

    Args:
        device: The `device` of the spec: cuda, cuda:N or cpu.
        where: The field that names it, for messages.

    Raises:
        SpecError: If there are GPUs, but not this one.
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
    """Return random inputs for timing and comparing models.

    Floating-point inputs are uniform in 0..1; other inputs repeat the first sample of the example.

    Args:
        example: Example inputs, which give names, shapes and types.
        batch: Number of samples.
        seed: Seed of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand((batch, *value.shape[1:]), generator=generator, dtype=torch.float32)
        if value.is_floating_point()
        else value[:1].expand(batch, *value.shape[1:]).clone()
        for name, value in example.items()
    }
