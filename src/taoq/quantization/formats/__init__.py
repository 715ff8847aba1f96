# SPDX-License-Identifier: Apache-2.0
"""The table of formats: torch networks and ONNX graphs. Importing it loads none of them."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from taoq.quantization.formats.base import ModelFormat


@dataclass(frozen=True)
class FormatInfo:
    """A row of the table.

    Attributes:
        name: As manifests have it.
        target: `module:attribute` of the format.
        suffixes: Suffixes of its files; empty for files that no other format claims.
        whole: Whether a file holds the network itself; else the task builds the network, and a file has its weights.
        noun: What one of its files is called.
        backends: The backends that quantize such files, for hints.
        make: How such a file is made of one of another format, for hints; empty if taoq makes none.
    """

    name: str
    target: str
    suffixes: tuple[str, ...]
    whole: bool
    noun: str
    backends: str
    make: str


FORMATS = {
    info.name: info
    for info in (
        FormatInfo(
            "onnx",
            "taoq.quantization.formats.onnx.format:FORMAT",
            (".onnx",),
            True,
            "an ONNX file",
            "modelopt.onnx (GPUs) or onnxruntime (CPUs)",
            "taoq <task> export makes an ONNX file of a checkpoint",
        ),
        FormatInfo(
            "torch",
            "taoq.quantization.formats.torch.format:FORMAT",
            (),
            False,
            "a torch checkpoint",
            "modelopt.pytorch or torchao",
            "",
        ),
    )
}


def format_of(path: str) -> FormatInfo:
    """The format of a file, by its suffix."""
    suffix = PurePath(path).suffix
    claimed = (info for info in FORMATS.values() if suffix in info.suffixes)
    return next(claimed, next(info for info in FORMATS.values() if not info.suffixes))


def load_format(name: str) -> ModelFormat[Any]:
    """Import a format."""
    module, _, attribute = FORMATS[name].target.partition(":")
    loaded: ModelFormat[Any] = getattr(importlib.import_module(module), attribute)
    return loaded
