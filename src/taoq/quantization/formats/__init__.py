# SPDX-License-Identifier: Apache-2.0
"""The table of model formats: torch networks and ONNX graphs. Importing this package imports none of them."""

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
        name: Name in manifests.
        target: `module:attribute` of the format.
        suffixes: File suffixes; empty for the format of all files whose suffix no other format has.
        whole: Whether a file holds the whole network; otherwise it holds the weights, and the task builds the network.
        noun: Noun for a file of the format, for messages.
        backends: Backends that quantize the format, for hints.
        make: How to convert another format to this one, for hints; empty if taoq cannot.
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
    """Return the format of a file, by its suffix."""
    suffix = PurePath(path).suffix
    matching = (info for info in FORMATS.values() if suffix in info.suffixes)
    return next(matching, next(info for info in FORMATS.values() if not info.suffixes))


def load_format(name: str) -> ModelFormat[Any]:
    """Import a format."""
    module, _, attribute = FORMATS[name].target.partition(":")
    loaded: ModelFormat[Any] = getattr(importlib.import_module(module), attribute)
    return loaded
