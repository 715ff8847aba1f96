# SPDX-License-Identifier: Apache-2.0
"""benchmark: measure the speed of a quantized model and of its float model."""

from __future__ import annotations

from taoq.actions.base import Show, load_experiment
from taoq.errors import RequirementNotMet
from taoq.pipeline.benchmark import benchmark, check_benchmark
from taoq.pipeline.results.benchmark import BenchmarkResult
from taoq.pipeline.staging import results_dir
from taoq.spec.source import SpecSource
from taoq.status import run_status
from taoq.tasks.base import S, Task
from taoq.views.pages import megabytes
from taoq.views.tables import benchmark_table


def run(task: Task[S], source: SpecSource, show: Show) -> BenchmarkResult:
    """Measure the checkpoint of the section `benchmark` and its float model.

    Raises:
        RequirementNotMet: If the speed-up is below `benchmark.min_speedup`.
    """
    experiment = load_experiment(task, source, "benchmark")
    check_benchmark(experiment.spec.benchmark)
    directory = results_dir(experiment.spec, "benchmark")
    with run_status(directory, task.name, "benchmark") as status:
        result = benchmark(experiment, directory, command=source.command)
        show(benchmark_table(result))
        for model in result.models:
            memory = ""
            if model.peak_memory:
                memory = f", {megabytes(model.peak_memory)} of memory on the CPU at batch {model.batch}"
            show(f"{model.name}: {megabytes(model.size)}{memory} ({model.file})")
        show(f"{result.verdict}\nresults: {directory}")
        status.running("Benchmark.", {"speedup": result.slowest})
        if result.fault:
            raise RequirementNotMet(result.fault, result=result)
    return result
