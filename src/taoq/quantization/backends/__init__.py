# SPDX-License-Identifier: Apache-2.0
"""Load backends by the value of `quantize.backend`. Importing this package imports no backend."""

from __future__ import annotations

from taoq.errors import Fault, TaoqError
from taoq.plugins import BACKENDS
from taoq.quantization.backends.base import AnyBackend, Backend


def load_backend(name: str) -> AnyBackend:
    """Import a backend.

    Raises:
        SpecError: If there is no such backend.
        MissingDependency: If its library is not installed.
        TaoqError: If it comes from another package and cannot be loaded, or lacks methods of a backend.
    """
    backend = BACKENDS.load(name, "quantize.backend")
    if not isinstance(backend, Backend):
        what = f"backend {name}{BACKENDS.rows()[name].origin} lacks methods of a backend"
        raise TaoqError(Fault("quantize.backend", what, "see taoq.quantization.backends.base.Backend"))
    return backend
