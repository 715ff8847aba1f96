# SPDX-License-Identifier: Apache-2.0
"""The result of `benchmark`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from taoq.errors import Fault
from taoq.pipeline.timing import Latency
from taoq.plain import JsonObject
from taoq.views.pages import as_html, megabytes

FLOAT, QUANTIZED = "float32", "quantized"
COMPILED = ", compiled"
"""Suffix of the name of a compiled model."""


@dataclass(frozen=True, kw_only=True)
class MeasuredModel:
    """A model of a benchmark.

    Attributes:
        name: `float32` or `quantized`.
        file: Path of the checkpoint, artifact or ONNX file; the class name of a network passed from Python.
        size: Size of the model in bytes; the float model of an artifact counts as float32.
        peak_memory: Peak memory that loading and running the model on the CPU adds to a process, in bytes; None if not
            measured.
        batch: Batch size of the run that `peak_memory` was measured on.
    """

    name: str
    file: str
    size: int
    peak_memory: int | None
    batch: int


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult:
    """Result of `taoq.benchmark`: latencies of a quantized model and of its float model.

    Attributes:
        device: Device that the models ran on.
        threads: Number of CPU threads of torch.
        runs: Number of measured runs of each model.
        models: Files and sizes of the two models.
        rows: One row of latencies per model and batch size.
        verdict: Speed-ups in one line; if the model is slower, also the purpose of its backend.
        versions: Versions of Python and of the libraries; empty for a call from Python.
        command: Command line; empty for a call from Python.
        min_speedup: Required speed-up, `benchmark.min_speedup`; None if there is none.
        directory: Folder of the results; None if none were written.
    """

    device: str
    threads: int
    runs: int
    models: tuple[MeasuredModel, ...]
    rows: tuple[Latency, ...]
    verdict: str
    versions: Mapping[str, str]
    command: str = ""
    min_speedup: float | None = None
    directory: Path | None = None

    @property
    def slowest(self) -> float:
        """Smallest speed-up of the quantized model, compiled or not, over all batch sizes."""
        return min(row.speedup for row in self.rows if is_quantized_row(row))

    @property
    def fault(self) -> Fault | None:
        """Fault that reports a speed-up below `min_speedup`; None if the speed-up suffices."""
        if self.min_speedup is None or self.slowest >= self.min_speedup:
            return None
        what = f"{QUANTIZED} is {self.slowest:.2f} times as fast as {FLOAT}, {self.min_speedup:g} is asked"
        return Fault("benchmark.min_speedup", what, self.verdict)

    def to_json(self) -> JsonObject:
        """Return the content of results.json."""
        return {
            "device": self.device,
            "threads": self.threads,
            "runs": self.runs,
            "models": [dataclasses.asdict(model) for model in self.models],
            "rows": [row.to_json() for row in self.rows],
            "verdict": self.verdict,
            "versions": dict(self.versions),
            "command": self.command,
        }

    def _repr_html_(self) -> str:
        rows = [[row.model, str(row.batch), f"{row.p50_ms:.2f}", f"{row.speedup:.2f}"] for row in self.rows]
        sizes = ", ".join(f"{model.name} {megabytes(model.size)}" for model in self.models)
        return as_html(f"{self.verdict}; {sizes}", ["model", "batch", "p50 ms", "speed-up"], rows)


def is_quantized_row(row: Latency) -> bool:
    """Return whether a row belongs to the quantized model, compiled or not."""
    return row.model in (QUANTIZED, f"{QUANTIZED}{COMPILED}")
