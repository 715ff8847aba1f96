# SPDX-License-Identifier: Apache-2.0
"""What `benchmark` returns."""

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
"""Behind the name of a model that went through a compiler."""


@dataclass(frozen=True, kw_only=True)
class MeasuredModel:
    """A model of a benchmark.

    Attributes:
        name: float32, or quantized.
        file: The checkpoint, artifact or file.
        size: Its size, bytes; of a float checkpoint of an artifact, as float32.
        peak_memory: What opening and running it adds to a process on the CPU, bytes; None if it was not measured.
        batch: Samples per run of that process.
    """

    name: str
    file: str
    size: int
    peak_memory: int | None
    batch: int


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult:
    """How fast a quantized model is beside its float model.

    Attributes:
        device: Where they ran.
        threads: Number of torch's threads.
        runs: Measured runs of each model.
        models: The models.
        rows: Latencies by batch size and model.
        verdict: The speed-ups in one line, and what the artifact is for if it is slower.
        versions: Versions of the libraries.
        command: The command line.
        min_speedup: What was asked for; None if nothing was.
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
        """The least speed-up of the quantized model, compiled or not, at any batch size."""
        return min(row.speedup for row in self.rows if is_quantized_row(row))

    @property
    def fault(self) -> Fault | None:
        """What is wrong if the speed-up is less than asked for."""
        if self.min_speedup is None or self.slowest >= self.min_speedup:
            return None
        what = f"{QUANTIZED} is {self.slowest:.2f} times as fast as {FLOAT}, {self.min_speedup:g} is asked"
        return Fault("benchmark.min_speedup", what, self.verdict)

    def to_json(self) -> JsonObject:
        """The content of results.json."""
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
    """Whether a row is about the quantized model, compiled or not."""
    return row.model in (QUANTIZED, f"{QUANTIZED}{COMPILED}")
