# SPDX-License-Identifier: Apache-2.0
"""Runtimes, by the value of a `runtime` field. Importing this package loads none of them."""

from __future__ import annotations

from taoq.errors import Fault, SpecError, TaoqError, did_you_mean
from taoq.plain import Options
from taoq.plugins import RUNTIMES
from taoq.runtimes.base import RuntimeKind

AUTO = "auto"
OWN = {"torch": "torch", "onnx": "onnxruntime"}
"""The runtime of each format where a spec leaves the choice to taoq."""


def load_runtime(format_name: str, name: str = AUTO, where: str = "runtime") -> RuntimeKind:
    """Import a runtime for models of a format.

    Args:
        format_name: Name of the format.
        name: Value of the field `runtime`.
        where: The field, for messages.

    Raises:
        SpecError: There is no such runtime, or it does not run this format.
        TaoqError: It comes from another package, and does not load.
    """
    runtime = find_runtime(OWN[format_name] if name == AUTO else name, where)
    if format_name not in runtime.formats:
        what = f"runtime {name} runs {', '.join(runtime.formats)} models, this one is {format_name}"
        raise SpecError(Fault(where, what, "write auto, or leave it out"))
    return runtime


def find_runtime(name: str, where: str) -> RuntimeKind:
    """Import a runtime, whatever it runs.

    Raises:
        SpecError: There is no such runtime.
        TaoqError: It comes from another package, and does not load.
    """
    runtime = RUNTIMES.load(name, where)
    if not isinstance(runtime, RuntimeKind):
        what = f"runtime {name}{RUNTIMES.rows()[name].origin} has not all of a runtime's methods"
        raise TaoqError(Fault(where, what, "see taoq.runtimes.base.RuntimeKind"))
    return runtime


def check_options(runtime: RuntimeKind, options: Options, where: str) -> None:
    """Refuse `runtime_kwargs` that a runtime does not have.

    Raises:
        SpecError: With every unknown key.
    """
    known = list(runtime.options)
    otherwise = "its options are " + ", ".join(known) if known else f"runtime {runtime.name} has no options"
    faults = [
        Fault(f"{where}.{key}", f"runtime {runtime.name} has no option '{key}'", did_you_mean(key, known, otherwise))
        for key in options
        if key not in known
    ]
    if faults:
        raise SpecError(*faults)
