# SPDX-License-Identifier: Apache-2.0
"""benchmark: how fast a quantized model is beside its float model, in turns, in the same run."""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
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
from taoq.actions.timing import SPEEDUP, check_batch_sizes, in_turns, latency, say_fixed_batches
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
from taoq.tasks.base import Inputs, Task
from taoq.tasks.sections import BenchmarkSpec

log = logging.getLogger(__name__)

FLOAT, QUANTIZED = "float32", "quantized"
_NAME_QUANTIZED = "name an artifact, or a quantized ONNX file"
_NAME_FLOAT = "name the float checkpoint or ONNX file"
_COMPILED = ", compiled"  # after the name of a model


def run(task: Task[Any], source: SpecSource) -> None:
    """Measure the checkpoint of a spec against its float model; write results.json.

    Raises:
        RequirementNotMet: It is not as much faster as `benchmark.min_speedup` asks.
    """
    spec = load_spec(source, task.spec, unused=task.unused, not_needed=others("benchmark"))
    section: BenchmarkSpec = spec.benchmark
    _check(section)
    directory = results_dir(spec, "benchmark")
    with run_status(directory, task.name, "benchmark") as status:
        artifact = find_artifact(section.checkpoint)
        manifest = read_manifest(artifact) if artifact else None
        files = {FLOAT: _baseline(section, manifest), QUANTIZED: section.checkpoint}
        models = _open(task, spec, section, files)
        rows = []
        for batch in section.batch_sizes:
            inputs = noise(task.example_inputs(spec), batch)
            say_fixed_batches(models, batch)
            seconds = in_turns(models, inputs, warmup=section.warmup, runs=section.runs)
            rows += [latency(name, batch, found, seconds[_reference(name, models)]) for name, found in seconds.items()]
        largest = max(section.batch_sizes)
        memory = {name: _peak(task, spec, section, file, largest) for name, file in files.items()}
        sizes = {
            FLOAT: _float_size(section, files[FLOAT], manifest),
            QUANTIZED: manifest.size if manifest else total_size(Path(section.checkpoint)),
        }
        words = _verdict(manifest, rows)
        results = {
            "device": models[FLOAT].device,
            "threads": torch.get_num_threads(),
            "runs": section.runs,
            "models": [
                {"name": name, "file": file, "size": sizes[name], "peak_memory": memory[name], "batch": largest}
                for name, file in files.items()
            ],
            "rows": rows,
            "verdict": words,
            "versions": versions(("torch", "onnxruntime-gpu")),
            "command": source.command,
        }
        with staged(directory) as stage:
            write_json(stage / "results.json", results)
            write_experiment(stage / "experiment.yaml", spec)
        _show(results)
        print(words)
        print(f"results: {directory}")
        slowest = min(row["speedup"] for row in rows if row["model"].startswith(QUANTIZED))
        status.write("RUNNING", "Benchmark.", {"speedup": slowest})
        if section.min_speedup is not None and slowest < section.min_speedup:
            what = f"{QUANTIZED} is {slowest:.2f} times as fast as {FLOAT}, {section.min_speedup:g} is asked"
            raise RequirementNotMet(Fault("benchmark.min_speedup", what, words))


def _check(section: BenchmarkSpec) -> None:
    if not section.checkpoint:
        raise SpecError(Fault("benchmark.checkpoint", "missing", _NAME_QUANTIZED))
    if not Path(section.checkpoint).exists():
        raise SpecError(Fault("benchmark.checkpoint", f"there is no {section.checkpoint}", _NAME_QUANTIZED))
    if not _is_quantized(section.checkpoint):
        what = f"{section.checkpoint} is not quantized: its speed is that of its float model"
        raise SpecError(Fault("benchmark.checkpoint", what, _NAME_QUANTIZED))
    check_batch_sizes(section)
    if section.batch_size > 0:
        what = "has no meaning here: a benchmark takes a list"
        raise SpecError(Fault("benchmark.batch_size", what, f"write benchmark.batch_sizes: [{section.batch_size}]"))


def _baseline(section: BenchmarkSpec, manifest: Manifest | None) -> str:
    """The float model: named, or the one that the artifact was made from."""
    if section.baseline:
        if _is_quantized(section.baseline):
            raise SpecError(Fault("benchmark.baseline", f"{section.baseline} is quantized", _NAME_FLOAT))
        return section.baseline
    if manifest is None:
        what = f"missing: {section.checkpoint} is no artifact that names what it was made from"
        raise SpecError(Fault("benchmark.baseline", what, _NAME_FLOAT))
    if not is_there(manifest.source):
        what = f"missing: {manifest.source['path'] or 'what the artifact was made from'} is not there as it was"
        raise SpecError(Fault("benchmark.baseline", what, _NAME_FLOAT))
    return manifest.source["path"]


def _is_quantized(file: str) -> bool:
    """Whether it is an artifact, or an ONNX file with quantized layers."""
    if find_artifact(file):
        return True
    if not file.endswith(".onnx"):
        return False
    from taoq.onnx_file import is_quantized, read_onnx

    return is_quantized(read_onnx(Path(file)))


def _open(task: Task[Any], spec: Any, section: BenchmarkSpec, files: Mapping[str, str]) -> dict[str, Runtime]:
    models: dict[str, Runtime] = {}
    for name, file in files.items():
        of_it = section.is_quantized if name == QUANTIZED else None
        one = dataclasses.replace(section, checkpoint=file, is_quantized=of_it)
        models[name] = open_runtime(task, spec, one, "benchmark")
    kinds = {type(model) for model in models.values()}
    if section.compile and TorchRuntime not in kinds:
        log.warning("benchmark.compile: has no effect on ONNX files")
    if len(kinds) > 1:
        what = "one of both is a torch model and the other an ONNX file: their speeds say nothing of quantization"
        raise SpecError(Fault("benchmark.baseline", what, "name a float model of the same kind"))
    for name, model in list(models.items()):
        if isinstance(model, TorchRuntime) and section.compile:
            _add_compiled(models, name, model, task.example_inputs(spec))
        if isinstance(model, TorchRuntime) and name == FLOAT and model.device != "cpu":
            models["float16"] = model.half()
    return models


def _add_compiled(models: dict[str, Runtime], name: str, model: TorchRuntime, inputs: Inputs) -> None:
    """Put a compiled model to the others; one that torch.compile fails on is left out, which is said."""
    compiled = model.compiled()
    try:
        compiled.run(inputs)
    except RuntimeError as error:  # of its tracer or of its compiler
        what = "benchmark.compile: torch.compile fails on the %s model, which is measured without it: %s"
        log.warning(what, name, str(error).strip().splitlines()[0])
    else:
        models[f"{name}{_COMPILED}"] = compiled


def _reference(name: str, models: Mapping[str, Runtime]) -> str:
    """The float model that a model's speed is told of: compiled where it is, too."""
    compiled = f"{FLOAT}{_COMPILED}"
    return compiled if name.endswith(_COMPILED) and compiled in models else FLOAT


def _float_size(section: BenchmarkSpec, file: str, manifest: Manifest | None) -> int:
    """Bytes of the float model as float32, where the artifact knows; a checkpoint may have half of that."""
    if manifest and (not section.baseline or is_there({**manifest.source, "path": file})):
        return manifest.float_size
    return total_size(Path(file))


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
    compared = [row for row in rows if row["model"].startswith(QUANTIZED)]
    parts = []
    for name in dict.fromkeys(row["model"] for row in compared):
        speeds = [f"{row['speedup']:.2f} at batch {row['batch']}" for row in compared if row["model"] == name]
        parts.append(("compiled: " if name.endswith(_COMPILED) else "") + ", ".join(speeds))
    words = f"{QUANTIZED} / {FLOAT} in speed: {'; '.join(parts)}"
    if manifest is not None and min(row["speedup"] for row in compared) < 1.0:
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
    compiled = any(row["model"].endswith(_COMPILED) for row in results["rows"])
    table.caption = SPEEDUP + ("; compiled against compiled" if compiled else "")
    show(table)
    for model in results["models"]:
        memory = ""
        if model["peak_memory"]:
            memory = f", {size(model['peak_memory'])} of memory on the CPU at batch {model['batch']}"
        print(f"{model['name']}: {size(model['size'])}{memory} ({model['file']})")
