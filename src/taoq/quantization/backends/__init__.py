# SPDX-License-Identifier: Apache-2.0
"""The table of backends. Importing it loads none of them."""

from __future__ import annotations

import importlib
from typing import Any, cast

from taoq.errors import Fault, MissingDependency, SpecError
from taoq.quantization.backends.base import Backend

BACKENDS = {
    "torchao": "taoq.quantization.backends.torchao",
    "modelopt.pytorch": "taoq.quantization.backends.modelopt_pytorch",
    "modelopt.onnx": "taoq.quantization.backends.modelopt_onnx",
    "onnxruntime": "taoq.quantization.backends.onnxruntime_static",
}
"""Module of each backend, by the value of `quantize.backend`."""


def load_backend(name: str) -> Backend[Any]:
    """Import a backend.

    Raises:
        SpecError: There is no such backend.
        MissingDependency: Its library is not installed.
    """
    if name not in BACKENDS:
        raise SpecError(
            Fault("quantize.backend", f"backend {name} is not built yet", "choose one of " + ", ".join(BACKENDS))
        )
    try:
        return cast(Backend[Any], importlib.import_module(BACKENDS[name]))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "taoq":
            raise
        raise MissingDependency(
            Fault(
                "quantize.backend",
                f"backend {name} needs the package '{error.name}'",
                "install taoq with its lock file",
            )
        ) from error
