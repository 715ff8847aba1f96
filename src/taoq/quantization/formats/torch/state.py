# SPDX-License-Identifier: Apache-2.0
"""The state dict of a torch network: saved size, digest, checks, and writing it to a file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import IO, cast

import torch
from torch import Tensor, nn

from taoq.errors import Fault, TaoqError
from taoq.quantization.types import QuantizationPlan


def save_state(state: object, path: Path) -> None:
    """Write a state with torch.save, which would hide errors of the disk in a RuntimeError.

    Raises:
        OSError: If the file cannot be written, for example because the disk is full.
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
    """A file that stores the first OSError of a write."""

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
    """Return the size of the state dict as torch.save writes it, bytes."""
    counter = _CountingFile()
    checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)  # Checksums would take half of the time.
    try:
        torch.save(model.state_dict(), cast(IO[bytes], counter))
    finally:
        torch.serialization.set_crc32_options(checksums)
    return counter.size


class _CountingFile:
    """A file that discards its data and counts the bytes."""

    size = 0

    def write(self, data: bytes) -> int:
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Do nothing: torch.save requires the method."""


def state_digest(model: nn.Module) -> str:
    """Return the SHA-256 of the names, dtypes, shapes and bytes of all tensors of the state dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {list(values.shape)}\n".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_weights(model: nn.Module, plan: QuantizationPlan) -> None:
    """Refuse weights with NaN or infinite values: one such value makes the scale of its whole channel useless.

    Raises:
        TaoqError: If there are such weights; lists every layer.
    """
    faults = [
        Fault(item.layer.name, "its weight is not finite", "look for NaN or infinite values in the checkpoint")
        for item in plan.quantized
        if item.weights and not is_finite(model.get_parameter(f"{item.layer.name}.weight"))
    ]
    if faults:
        raise TaoqError(*faults)


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor has no NaN and no infinite values."""
    # The sum is one cheap pass. A sum of finite values may overflow, so only then check every value.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())
