# SPDX-License-Identifier: Apache-2.0
"""taoq: quantize vision models from one YAML spec, and know what it cost.

The public API is what `__all__` names. Importing taoq imports no library; the first use of a name does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from taoq.api import analyze, benchmark, compare, evaluate, export, load, quantize, run
    from taoq.errors import MissingDependency, Notice, RequirementNotMet, SpecError, TaoqError
    from taoq.pipeline.analyze import AnalyzeResult
    from taoq.pipeline.benchmark import BenchmarkResult
    from taoq.pipeline.compare import CompareResult
    from taoq.pipeline.evaluate import EvaluateResult
    from taoq.pipeline.export import ExportResult
    from taoq.pipeline.results import QuantizeResult

__version__ = "0.1.0"

__all__ = [
    "AnalyzeResult",
    "BenchmarkResult",
    "CompareResult",
    "EvaluateResult",
    "ExportResult",
    "MissingDependency",
    "Notice",
    "QuantizeResult",
    "RequirementNotMet",
    "SpecError",
    "TaoqError",
    "analyze",
    "benchmark",
    "compare",
    "evaluate",
    "export",
    "load",
    "quantize",
    "run",
]

_MODULES = {
    "taoq.errors": ("MissingDependency", "Notice", "RequirementNotMet", "SpecError", "TaoqError"),
    "taoq.pipeline.analyze": ("AnalyzeResult",),
    "taoq.pipeline.benchmark": ("BenchmarkResult",),
    "taoq.pipeline.compare": ("CompareResult",),
    "taoq.pipeline.evaluate": ("EvaluateResult",),
    "taoq.pipeline.export": ("ExportResult",),
    "taoq.pipeline.results": ("QuantizeResult",),
    "taoq.api": ("analyze", "benchmark", "compare", "evaluate", "export", "load", "quantize", "run"),
}


def __getattr__(name: str) -> object:
    for module, names in _MODULES.items():
        if name in names:
            value = getattr(importlib.import_module(module), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'taoq' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
