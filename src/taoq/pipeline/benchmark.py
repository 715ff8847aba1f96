# SPDX-License-Identifier: Apache-2.0
"""benchmark: measure the speed and the memory of a quantized model and of its float model, in turns in the same run."""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from taoq.errors import Fault, Notice, SpecError, first_line
from taoq.files import total_size
from taoq.network import Inputs
from taoq.pipeline.artifacts import Manifest, find_artifact, read_artifact, source_is_unchanged, versions
from taoq.pipeline.experiment import Experiment, bind
from taoq.pipeline.memory import peak_resident, resident
from taoq.pipeline.models import experiment_for, open_runtime
from taoq.pipeline.results.benchmark import COMPILED, FLOAT, QUANTIZED, BenchmarkResult, MeasuredModel, is_quantized_row
from taoq.pipeline.staging import staged
from taoq.pipeline.timing import Latency, check_batch_sizes, latency, note_fixed_batches, run_in_turns
from taoq.quantization.backends import load_backend
from taoq.quantization.formats import format_of, load_format
from taoq.runtimes import load_runtime
from taoq.runtimes.base import Runtime, noise
from taoq.tasks import load_task
from taoq.tasks.sections import BenchmarkSpec, TaskSpec

log = logging.getLogger(__name__)

MIXED_FORMATS = "one is a torch model and the other an ONNX file: their speeds say nothing about quantization"
_NAME_QUANTIZED = "name an artifact, or a quantized ONNX file"
_NAME_FLOAT = "name the float checkpoint or ONNX file"


def check_benchmark(section: BenchmarkSpec) -> None:
    """Check a `benchmark` section before anything is opened.

    Raises:
        SpecError: If a field is wrong or the checkpoint is not quantized.
    """
    if not section.checkpoint:
        raise SpecError(Fault("benchmark.checkpoint", "missing", _NAME_QUANTIZED))
    if not Path(section.checkpoint).exists():
        raise SpecError(Fault("benchmark.checkpoint", f"there is no {section.checkpoint}", _NAME_QUANTIZED))
    if not _is_quantized(section.checkpoint):
        what = f"{section.checkpoint} is not quantized: its speed is that of its float model"
        raise SpecError(Fault("benchmark.checkpoint", what, _NAME_QUANTIZED))
    check_batch_sizes(section.batch_sizes)
    if section.batch_size > 0:
        what = "has no meaning here: a benchmark takes a list"
        raise SpecError(Fault("benchmark.batch_size", what, f"write benchmark.batch_sizes: [{section.batch_size}]"))


def benchmark(experiment: Experiment, directory: Path | None = None, *, command: str = "") -> BenchmarkResult:
    """Measure the checkpoint of the section `benchmark` against its float model.

    Args:
        experiment: The experiment, whose section `benchmark` passed `check_benchmark`.
        directory: Folder for results.json; None writes nothing.
        command: Command line, for the report.
    """
    section = experiment.spec.benchmark
    artifact = find_artifact(section.checkpoint)
    manifest = read_artifact(artifact).manifest if artifact else None
    files = {FLOAT: _baseline(section, manifest), QUANTIZED: section.checkpoint}
    experiment = _experiment_for(experiment, files)
    models = _open(experiment, files)
    largest = max(section.batch_sizes)
    measured = tuple(
        MeasuredModel(
            name=name,
            file=file,
            size=_size(section, name, file, manifest),
            peak_memory=_peak_memory(experiment, file, largest),
            batch=largest,
        )
        for name, file in files.items()
    )
    result = dataclasses.replace(
        benchmark_models(models, experiment.example(), section, target=_target(manifest)),
        models=measured,
        versions=versions(_libraries(section, manifest)),
        command=command,
        directory=directory,
    )
    if directory:
        with staged(directory) as stage:
            stage.write_json("results.json", result.to_json())
            stage.write_spec("experiment.yaml", experiment.spec)
            stage.commit()
    return result


def benchmark_models(
    models: Mapping[str, Runtime], example: Inputs, section: BenchmarkSpec, *, target: str = ""
) -> BenchmarkResult:
    """Measure the latency of models that are already open.

    Args:
        models: The models, with the names FLOAT and QUANTIZED.
        example: Inputs of one sample.
        section: The section `benchmark`.
        target: Purpose of the backend, which the verdict mentions if the quantized model is slower; empty if unknown.
    """
    timed = _with_variants(models, section, example)
    rows: list[Latency] = []
    for batch in section.batch_sizes:
        inputs = noise(example, batch)
        note_fixed_batches(timed, batch)
        seconds = run_in_turns(timed, inputs, warmup=section.warmup, runs=section.runs)
        rows += [latency(name, batch, own, seconds[_reference(name, timed)]) for name, own in seconds.items()]
    return BenchmarkResult(
        device=timed[FLOAT].device,
        threads=torch.get_num_threads(),
        runs=section.runs,
        models=(),
        rows=tuple(rows),
        verdict=_verdict(rows, target),
        versions={},
        min_speedup=section.min_speedup,
    )


def _experiment_for(experiment: Experiment, files: Mapping[str, str]) -> Experiment:
    """Return the experiment for the inputs and outputs of both files.

    Raises:
        SpecError: If only one of them has post-processing.
    """
    quantized, float_ = (experiment_for(experiment, files[name]) for name in (QUANTIZED, FLOAT))
    if quantized.outputs != float_.outputs:
        names = " and ".join(f"{', '.join(entry.outputs)}" for entry in (quantized, float_))
        what = f"the outputs of the two files are {names}: only one of them has post-processing"
        raise SpecError(Fault("benchmark.baseline", what, "name the float file that it was quantized from"))
    return quantized


def _baseline(section: BenchmarkSpec, manifest: Manifest | None) -> str:
    """Return the path of the float model: `benchmark.baseline`, or the source of the artifact."""
    if section.baseline:
        if _is_quantized(section.baseline):
            raise SpecError(Fault("benchmark.baseline", f"{section.baseline} is quantized", _NAME_FLOAT))
        return section.baseline
    if manifest is None:
        what = f"missing: {section.checkpoint} is not an artifact that names its float model"
        raise SpecError(Fault("benchmark.baseline", what, _NAME_FLOAT))
    if not source_is_unchanged(manifest.source):
        what = f"missing: {manifest.source['path'] or 'the float model'} is missing or has changed"
        raise SpecError(Fault("benchmark.baseline", what, _NAME_FLOAT))
    return manifest.source["path"]


def _is_quantized(file: str) -> bool:
    """Return whether a file is an artifact or contains a quantized network."""
    if find_artifact(file):
        return True
    info = format_of(file)
    if not info.whole:
        return False
    model_format = load_format(info.name)
    return model_format.is_quantized(model_format.read(file, _no_network))


def _no_network(checkpoint: str | None) -> torch.nn.Module:
    raise AssertionError(f"{checkpoint} holds its network itself")


def _open(experiment: Experiment, files: Mapping[str, str]) -> dict[str, Runtime]:
    """Open the float and the quantized model.

    Raises:
        SpecError: If the models have different formats.
    """
    section = experiment.spec.benchmark
    models: dict[str, Runtime] = {}
    for name, file in files.items():
        flag = section.is_quantized if name == QUANTIZED else None
        models[name] = open_runtime(
            experiment, dataclasses.replace(section, checkpoint=file, is_quantized=flag), "benchmark"
        )
    if len({type(model) for model in models.values()}) > 1:
        raise SpecError(Fault("benchmark.baseline", MIXED_FORMATS, "name a float model of the same kind"))
    return models


def _with_variants(models: Mapping[str, Runtime], section: BenchmarkSpec, example: Inputs) -> dict[str, Runtime]:
    """Add compiled models if the section asks for them, and the float model in float16 if the runtime supports it."""
    timed = dict(models)
    if section.compile:
        compiled = {name: model.compiled() for name, model in models.items()}
        if not any(compiled.values()):
            log.warning(Notice("benchmark.compile", "has no effect on ONNX files"))
        for name, model in compiled.items():
            if model is not None and _compiles(name, model, example):
                timed[f"{name}{COMPILED}"] = model
    half = models[FLOAT].half() if FLOAT in models else None
    if half is not None:
        timed["float16"] = half
    return timed


def _compiles(name: str, model: Runtime, example: Inputs) -> bool:
    """Run a compiled model once, and warn if that fails."""
    try:
        model.run(example)
    except Exception as error:  # noqa: BLE001 (the compiler runs the code of the network)
        what = f"torch.compile fails on the {name} model, which is measured without it: {first_line(error)}"
        log.warning(Notice("benchmark.compile", what))
        return False
    return True


def _reference(name: str, models: Mapping[str, Runtime]) -> str:
    """Return the float model that a model is compared with; for a compiled model, the compiled one if there is one."""
    compiled = f"{FLOAT}{COMPILED}"
    return compiled if name.endswith(COMPILED) and compiled in models else FLOAT


def _size(section: BenchmarkSpec, name: str, file: str, manifest: Manifest | None) -> int:
    """Return the size of a model in bytes.

    For a float model, prefer the float32 size of the manifest: the checkpoint may have been saved in float16.
    """
    if manifest and name == QUANTIZED:
        return manifest.size
    if manifest and (not section.baseline or source_is_unchanged({**manifest.source, "path": file})):
        return manifest.float_size
    return total_size(Path(file))


def _libraries(section: BenchmarkSpec, manifest: Manifest | None) -> list[str]:
    """Return the distributions of the runtime, and torch, whose number of threads is reported."""
    name = manifest.format if manifest else format_of(section.checkpoint).name
    kind = load_runtime(name, section.runtime, "benchmark.runtime")
    return list(dict.fromkeys(["torch", *kind.libraries]))


def _peak_memory(experiment: Experiment, file: str, batch: int) -> int | None:
    """Measure how many bytes opening and running a model adds to a new process.

    Return None if the process died, or if a Python caller supplied the network, which another process cannot build.
    """
    if not experiment.task:
        return None
    section = dataclasses.replace(experiment.spec.benchmark, checkpoint=file, is_quantized=None, device="cpu")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_measure_peak, experiment.task, experiment.spec, section, batch).result()
        except BrokenProcessPool:
            log.warning(Notice("benchmark", f"the process that measures the memory of {file} died"))
            return None


def _measure_peak(task: str, spec: TaskSpec, section: BenchmarkSpec, batch: int) -> int:
    logging.getLogger("taoq").addHandler(logging.NullHandler())
    experiment = experiment_for(bind(load_task(task), spec), section.checkpoint)
    inputs = noise(experiment.example(), batch)
    before = resident()
    model = open_runtime(experiment, section, "benchmark")
    for _ in range(2):
        model.run(inputs)
    return peak_resident() - before


def _target(manifest: Manifest | None) -> str:
    """Return the purpose of the backend of an artifact, as a clause of the verdict."""
    if manifest is None:
        return ""
    capability = load_backend(manifest.backend).capability
    return f"{capability.name} is for {capability.target}"


def _verdict(rows: Sequence[Latency], target: str) -> str:
    quantized = [row for row in rows if is_quantized_row(row)]
    parts = []
    for name in dict.fromkeys(row.model for row in quantized):
        speeds = [f"{row.speedup:.2f} at batch {row.batch}" for row in quantized if row.model == name]
        parts.append(("compiled: " if name.endswith(COMPILED) else "") + ", ".join(speeds))
    verdict = f"{QUANTIZED} / {FLOAT} in speed: {'; '.join(parts)}"
    slower = min(row.speedup for row in quantized) < 1.0
    return f"{verdict}; {target}" if slower and target else verdict
