# SPDX-License-Identifier: Apache-2.0
"""The state of a torch network as a file: written, measured, checked."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import IO, cast

import torch
from torch import Tensor, nn

from taoq.errors import Fault, TaoqError
from taoq.quantization.types import QuantizationPlan


def save_state(state: object, path: Path) -> None:
    """torch.save, but with an OSError if the disk is full: torch itself raises a RuntimeError that hides it.

    Raises:
        OSError: The file cannot be written.
    """
    with path.open("wb") as file:
        remembering = _RememberingFile(file)
        try:
            torch.save(state, cast(IO[bytes], remembering))
        except RuntimeError:
            if remembering.error is not None:
                raise remembering.error from None
            raise


class _RememberingFile:
    """A file that remembers its first error."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self._file.flush()


def saved_size(model: nn.Module) -> int:
    """Size of the state dict as torch.save writes it, bytes."""
    counter = _CountingFile()
    checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)  # not needed here, and half of the time
    try:
        torch.save(model.state_dict(), cast(IO[bytes], counter))
    finally:
        torch.serialization.set_crc32_options(checksums)
    return counter.size


class _CountingFile:
    """A file that only counts what is written to it."""

    size = 0

    def write(self, data: bytes) -> int:
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Nothing is held back."""


def state_digest(model: nn.Module) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of a network's tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {list(plain.shape)}\n".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_weights(model: nn.Module, plan: QuantizationPlan) -> None:
    """Refuse weights with NaN or infinite values: they would spoil the scale, and so the whole channel.

    Raises:
        TaoqError: Names every such layer.
    """
    faults = [
        Fault(item.layer.name, "its weight is not finite", "look for NaN or infinite values in the checkpoint")
        for item in plan.quantized
        if item.weights and not is_finite(model.get_parameter(f"{item.layer.name}.weight"))
    ]
    if faults:
        raise TaoqError(*faults)


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor has no NaN and no infinite value."""
    # the sum is one cheap pass; finite values may overflow it, so they are looked at again
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())
