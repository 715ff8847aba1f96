# SPDX-License-Identifier: Apache-2.0
"""benchmark: how fast a quantized model is beside its float model, in turns, in the same run."""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import shlex
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from taoq.actions import others
from taoq.actions.open_model import open_runtime
from taoq.actions.results import results_dir, staged, write_experiment, write_json
from taoq.actions.timing import check_batch_sizes, in_turns, latency
from taoq.artifact import Manifest, find_artifact, is_there, read_manifest, versions
from taoq.console import show, size
from taoq.errors import Fault, RequirementNotMet, SpecError
from taoq.files import total_size
from taoq.memory import peak_resident, resident
from taoq.quantization.backends import load_backend
from taoq.runtime import Runtime, TorchRuntime, noise
from taoq.spec import SpecSource, load_spec
from taoq.status import run_status
from taoq.tasks import load_task
from taoq.tasks.base import Task
from taoq.tasks.sections import BenchmarkSpec

log = logging.getLogger(__name__)

FLOAT, QUANTIZED = "float32", "quantized"


def run(task: Task[Any], source: SpecSource) -> None:
    """Measure the checkpoint of a spec against its float model; write results.json.

    Raises:
        RequirementNotMet: It is not as much faster as `benchmark.min_speedup` asks.
    """
    spec = load_spec(source, task.spec, unused=task.unused, not_needed=others("benchmark"))
    section: BenchmarkSpec = spec.benchmark
    if not section.checkpoint:
        raise SpecError(Fault("benchmark.checkpoint", "missing", "name an artifact or an ONNX file"))
    check_batch_sizes(section)
    directory = results_dir(spec, "benchmark")
    with run_status(directory, task.name, "benchmark") as status:
        artifact = find_artifact(section.checkpoint)
        manifest = read_manifest(artifact) if artifact else None
        files = {FLOAT: _baseline(section, manifest), QUANTIZED: section.checkpoint}
        models = _open(task, spec, section, files)
        rows = []
        for batch in section.batch_sizes:
            inputs = noise(task.example_inputs(spec), batch)
            seconds = in_turns(models, inputs, warmup=section.warmup, runs=section.runs)
            rows += [latency(name, batch, found, seconds[FLOAT]) for name, found in seconds.items()]
        largest = max(section.batch_sizes)
        memory = {name: _peak(task, spec, section, file, largest) for name, file in files.items()}
        words = _verdict(manifest, rows)
        results = {
            "device": models[FLOAT].device,
            "threads": torch.get_num_threads(),
            "runs": section.runs,
            "models": [
                {"name": name, "file": file, "size": _size(file), "peak_memory": memory[name], "batch": largest}
                for name, file in files.items()
            ],
            "rows": rows,
            "verdict": words,
            "versions": versions(("torch", "onnxruntime-gpu")),
            "command": shlex.join(sys.argv),
        }
        with staged(directory) as stage:
            write_json(stage / "results.json", results)
            write_experiment(stage / "experiment.yaml", spec)
        _show(results)
        print(words)
        print(f"results: {directory}")
        slowest = min(row["speedup"] for row in rows if row["model"] == QUANTIZED)
        status.write("RUNNING", "Benchmark.", {"speedup": slowest})
        if section.min_speedup is not None and slowest < section.min_speedup:
            what = f"{QUANTIZED} is {slowest:.2f} times as fast as {FLOAT}, {section.min_speedup:g} is asked"
            raise RequirementNotMet(Fault("benchmark.min_speedup", what, words))


def _baseline(section: BenchmarkSpec, manifest: Manifest | None) -> str:
    """The float model: named, or the one that the artifact was made from."""
    if section.baseline:
        return section.baseline
    if manifest is None:
        what = f"missing: {section.checkpoint} is no artifact that names what it was made from"
        raise SpecError(Fault("benchmark.baseline", what, "name the float checkpoint or ONNX file"))
    if not is_there(manifest.source):
        what = f"missing: {manifest.source['path'] or 'what the artifact was made from'} is not there as it was"
        raise SpecError(Fault("benchmark.baseline", what, "name the float checkpoint or ONNX file"))
    return manifest.source["path"]


def _open(task: Task[Any], spec: Any, section: BenchmarkSpec, files: Mapping[str, str]) -> dict[str, Runtime]:
    models: dict[str, Runtime] = {}
    for name, file in files.items():
        one = dataclasses.replace(section, checkpoint=file, is_quantized=None)
        models[name] = open_runtime(task, spec, one, "benchmark")
    kinds = {type(model) for model in models.values()}
    if len(kinds) > 1:
        what = "one of both is a torch model and the other an ONNX file: their speeds say nothing of quantization"
        raise SpecError(Fault("benchmark.baseline", what, "name a float model of the same kind"))
    for name, model in list(models.items()):
        if isinstance(model, TorchRuntime) and section.compile:
            models[f"{name}, compiled"] = model.compiled()
        if isinstance(model, TorchRuntime) and name == FLOAT and model.device != "cpu":
            models["float16"] = model.half()
    return models


def _size(file: str) -> int:
    directory = find_artifact(file)
    return read_manifest(directory).size if directory else total_size(Path(file))


def _peak(task: Task[Any], spec: Any, section: BenchmarkSpec, file: str, batch: int) -> int | None:
    """Bytes that opening a model and running it adds to a process of its own; None where that process failed."""
    one = dataclasses.replace(section, checkpoint=file, is_quantized=None, device="cpu")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_measure_peak, task.name, spec, one, batch).result()
        except BrokenProcessPool:
            log.warning("benchmark: the process that measures the memory of %s died", file)
            return None


def _measure_peak(name: str, spec: Any, section: BenchmarkSpec, batch: int) -> int:
    logging.getLogger("taoq").addHandler(logging.NullHandler())
    task = load_task(name)
    inputs = noise(task.example_inputs(spec), batch)
    before = resident()
    model = open_runtime(task, spec, section, "benchmark")
    for _ in range(2):
        model.run(inputs)
    return peak_resident() - before


def _verdict(manifest: Manifest | None, rows: Sequence[Mapping[str, Any]]) -> str:
    found = {row["batch"]: row["speedup"] for row in rows if row["model"] == QUANTIZED}
    speeds = ", ".join(f"{value:.2f} at batch {batch}" for batch, value in found.items())
    words = f"{QUANTIZED} / {FLOAT} in speed: {speeds}"
    if manifest is not None and min(found.values()) < 1.0:
        backend = load_backend(manifest.backend)
        words += f"; {backend.name} is for {backend.support.target}"
    return words


def _show(results: Mapping[str, Any]) -> None:
    table = Table(title=f"on {results['device']}, {results['threads']} threads, {results['runs']} runs in turns")
    table.add_column("model")
    for column in ("batch", "p50 ms", "p90 ms", "p99 ms", "images/s", "speed-up"):
        table.add_column(column, justify="right")
    for row in results["rows"]:
        latencies = [f"{row[key]:.2f}" for key in ("p50_ms", "p90_ms", "p99_ms")]
        table.add_row(
            row["model"], str(row["batch"]), *latencies, f"{row['images_per_second']:.1f}", f"{row['speedup']:.2f}"
        )
    show(table)
    for model in results["models"]:
        memory = f", {size(model['peak_memory'])} of memory at batch {model['batch']}" if model["peak_memory"] else ""
        print(f"{model['name']}: {size(model['size'])}{memory} ({model['file']})")
