# SPDX-License-Identifier: Apache-2.0
"""Backends, by the value of `quantize.backend`. Importing this package loads none of them."""

from __future__ import annotations

from taoq.errors import Fault, TaoqError
from taoq.plugins import BACKENDS
from taoq.quantization.backends.base import AnyBackend, Backend


def load_backend(name: str) -> AnyBackend:
    """Import a backend.

    Raises:
        SpecError: There is no such backend.
        MissingDependency: Its library is not installed.
        TaoqError: It comes from another package, and does not load.
    """
    backend = BACKENDS.load(name, "quantize.backend")
    if not isinstance(backend, Backend):
        what = f"backend {name}{BACKENDS.rows()[name].origin} has not all of a backend's methods"
        raise TaoqError(Fault("quantize.backend", what, "see taoq.quantization.backends.base.Backend"))
    return backend
