# SPDX-License-Identifier: Apache-2.0
"""Run torch networks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import cast

import torch
from torch import Tensor, nn

from taoq.errors import Fault, SpecError, TaoqError
from taoq.network import Inputs, Outputs, OutputSpec
from taoq.plain import Options
from taoq.quantization.formats.torch.call import call
from taoq.runtimes.base import RuntimeKind, torch_device


class TorchRuntime:
    """A torch network in eval mode."""

    fixed_batch: int | None = None

    def __init__(
        self, model: nn.Module, outputs: tuple[str, ...], device: str, dtype: torch.dtype = torch.float32
    ) -> None:
        self.device = device
        self._dtype = dtype
        self._model = model.to(device).eval()
        self._outputs = outputs

    def run(self, inputs: Inputs) -> Outputs:
        """Run the network. Return its outputs as float32 tensors on the CPU."""
        with torch.inference_mode():
            result = call(self._model, {name: self._moved(tensor) for name, tensor in inputs.items()})
        outputs = named_outputs(result, self._outputs)
        return {name: value.float().cpu() for name, value in outputs.items()}

    def compiled(self) -> TorchRuntime:
        """Return the network with torch.compile, which compiles at the first run."""
        return TorchRuntime(cast(nn.Module, torch.compile(self._model)), self._outputs, self.device)

    def half(self) -> TorchRuntime | None:
        """Return a copy in float16; None on the CPU, where float16 is slow."""
        if self.device == "cpu":
            return None
        return TorchRuntime(copy.deepcopy(self._model).half(), self._outputs, self.device, torch.float16)

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self._dtype) if tensor.is_floating_point() else tensor.to(self.device)


class TorchKind:
    """The runtime `torch`."""

    name = "torch"
    formats = ("torch",)
    libraries = ("torch",)
    options: Mapping[str, str] = MappingProxyType({})

    def device(self, requested: str, where: str) -> str:
        """Return the torch device that a network will run on.

        Raises:
            SpecError: If the device is trt, or if there are GPUs but not this one.
        """
        if requested == "trt":
            raise SpecError(Fault(where, "trt does not run torch models", "write cuda, cuda:N or cpu"))
        return torch_device(requested, where)

    def open(
        self,
        model: nn.Module,
        path: Path | None,
        example: Inputs,
        outputs: Mapping[str, OutputSpec],
        device: str,
        where: str,
        options: Options,
    ) -> TorchRuntime:
        """Move a network to a device."""
        return TorchRuntime(model, tuple(outputs), self.device(device, where))


RUNTIME: RuntimeKind = TorchKind()


def named_outputs(result: object, names: tuple[str, ...]) -> Outputs:
    """Return the outputs of a network by name.

    Args:
        result: What its forward method returned: a tensor, a tuple or list of tensors in order, or a mapping.
        names: The names of the outputs, in order. Other keys of a mapping are ignored.

    Raises:
        TaoqError: If the result has other outputs, or is of another type.
    """
    if isinstance(result, Mapping):
        missing = [name for name in names if not isinstance(result.get(name), Tensor)]
        if missing:
            what = f"its outputs are {', '.join(map(str, result))}: there is no tensor '{missing[0]}'"
            raise TaoqError(Fault("the network", what, "name the outputs as the network does"))
        return {name: result[name] for name in names}
    values = tuple(result) if isinstance(result, tuple | list) else (result,)
    if len(values) != len(names) or not all(isinstance(value, Tensor) for value in values):
        kinds = ", ".join(type(value).__name__ for value in values)
        what = f"its forward returns {kinds}, not {len(names)} tensor(s)"
        raise TaoqError(Fault("the network", what, "let its forward return a tensor, a tuple of them, or a mapping"))
    return dict(zip(names, values, strict=True))
