# SPDX-License-Identifier: Apache-2.0
"""taoq: quantize vision models from one YAML spec, and measure what it costs.

The public API is listed in `__all__`. Importing taoq imports no other library: each name is imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from taoq.api.analyze import analyze
    from taoq.api.benchmark import benchmark
    from taoq.api.compare import compare
    from taoq.api.evaluate import evaluate
    from taoq.api.export import export
    from taoq.api.load import load
    from taoq.api.quantize import quantize
    from taoq.api.run import run
    from taoq.errors import MissingDependency, Notice, RequirementNotMet, SpecError, TaoqError
    from taoq.pipeline.results.analyze import AnalyzeResult
    from taoq.pipeline.results.benchmark import BenchmarkResult
    from taoq.pipeline.results.compare import CompareResult
    from taoq.pipeline.results.evaluate import EvaluateResult
    from taoq.pipeline.results.export import ExportResult
    from taoq.pipeline.results.quantize import QuantizeResult

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
    "AnalyzeResult": "taoq.pipeline.results.analyze",
    "BenchmarkResult": "taoq.pipeline.results.benchmark",
    "CompareResult": "taoq.pipeline.results.compare",
    "EvaluateResult": "taoq.pipeline.results.evaluate",
    "ExportResult": "taoq.pipeline.results.export",
    "MissingDependency": "taoq.errors",
    "Notice": "taoq.errors",
    "QuantizeResult": "taoq.pipeline.results.quantize",
    "RequirementNotMet": "taoq.errors",
    "SpecError": "taoq.errors",
    "TaoqError": "taoq.errors",
}
"""Modules of the public classes. The public function `name` is defined in `taoq.api.name`."""


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'taoq' has no attribute '{name}'")
    return getattr(importlib.import_module(_MODULES.get(name, f"taoq.api.{name}")), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
