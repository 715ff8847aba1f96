# SPDX-License-Identifier: Apache-2.0
"""Load runtimes by the name in a `runtime` field. Importing this package imports none of them."""

from __future__ import annotations

from taoq.errors import Fault, SpecError, TaoqError, did_you_mean
from taoq.plain import Options
from taoq.plugins import RUNTIMES
from taoq.runtimes.base import RuntimeKind

AUTO = "auto"
_DEFAULTS = {"torch": "torch", "onnx": "onnxruntime"}
"""The runtime of each format that `AUTO` chooses."""


def load_runtime(format_name: str, name: str = AUTO, where: str = "runtime") -> RuntimeKind:
    """Import a runtime for models of a format.

    Args:
        format_name: Name of the format: torch or onnx.
        name: Name of the runtime, or `AUTO`.
        where: The field that names it, for messages.

    Raises:
        SpecError: If there is no such runtime, or if it does not run models of this format.
        TaoqError: If it comes from another package and cannot be loaded.
    """
    runtime = find_runtime(_DEFAULTS[format_name] if name == AUTO else name, where)
    if format_name not in runtime.formats:
        what = f"runtime {name} runs {', '.join(runtime.formats)} models, this one is {format_name}"
        raise SpecError(Fault(where, what, "write auto, or leave it out"))
    return runtime


def find_runtime(name: str, where: str) -> RuntimeKind:
    """Import a runtime for models of any format.

    Args:
        name: Name of the runtime.
        where: The field that names it, for messages.

    Raises:
        SpecError: If there is no such runtime.
        TaoqError: If it comes from another package and cannot be loaded.
    """
    runtime = RUNTIMES.load(name, where)
    if not isinstance(runtime, RuntimeKind):
        what = f"runtime {name}{RUNTIMES.rows()[name].origin} lacks methods of a runtime"
        raise TaoqError(Fault(where, what, "see taoq.runtimes.base.RuntimeKind"))
    return runtime


def check_options(runtime: RuntimeKind, options: Options, where: str) -> None:
    """Refuse `runtime_kwargs` that a runtime does not have.

    Args:
        runtime: The runtime.
        options: The `runtime_kwargs` of a spec.
        where: Their field, for messages.

    Raises:
        SpecError: If any key is unknown; names every one.
    """
    keys = list(runtime.options)
    otherwise = "its options are " + ", ".join(keys) if keys else f"runtime {runtime.name} has no options"
    faults = [
        Fault(f"{where}.{key}", f"runtime {runtime.name} has no option '{key}'", did_you_mean(key, keys, otherwise))
        for key in options
        if key not in keys
    ]
    if faults:
        raise SpecError(*faults)
