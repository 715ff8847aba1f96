# SPDX-License-Identifier: Apache-2.0
"""quantize: spec -> plan -> backend -> artifact."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shlex
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import taoq
from taoq.actions import others
from taoq.actions.open_model import check_provenance, open_onnx
from taoq.actions.results import results_dir, staged, write_experiment, write_json
from taoq.artifact import MANIFEST, SCHEMA_VERSION, Manifest, find_artifact, sha256, versions
from taoq.console import show, size
from taoq.errors import Fault, SpecError, TaoqError
from taoq.files import total_size
from taoq.quantization import report
from taoq.quantization.backends import load_backend
from taoq.quantization.backends.base import Backend, Inputs, verify
from taoq.quantization.plan import Layer, QuantizationPlan, check, leave_out, resolve
from taoq.quantization.ranges import RangeCache
from taoq.quantization.spec import QuantizeSpec
from taoq.runtime import Runtime, TorchRuntime, torch_device
from taoq.spec import SpecSource, load_spec, spec_to_dict
from taoq.status import Status, run_status, track
from taoq.tasks.base import Batches, Task

log = logging.getLogger(__name__)


def run(task: Task[Any], source: SpecSource, *, dry_run: bool = False) -> None:
    """Quantize the checkpoint of a spec.

    Args:
        task: The task.
        source: The spec.
        dry_run: Print the plan, touch no data and write nothing.
    """
    spec = load_spec(source, task.spec, unused=task.unused, not_needed=others("quantize"))
    section: QuantizeSpec = spec.quantize
    backend = load_backend(section.backend)
    warnings = check(section, backend.support)
    faults = backend.check_options(section.backend_kwargs, section.algorithm)
    if faults:
        raise SpecError(*faults)
    directory = results_dir(spec, "quantize")
    _check_source(task, section, directory, backend)
    if dry_run:
        _plan(task, spec, backend, warnings)
        log.info("dry run: nothing was calibrated, nothing was written")
        return
    with run_status(directory, task.name, "quantize") as status:
        model, plan = _plan(task, spec, backend, warnings)
        summary = _quantize(task, spec, backend, model, plan, directory, status)
    print(summary)


def _check_source(task: Task[Any], section: QuantizeSpec, directory: Path, backend: Backend[Any]) -> None:
    where, is_onnx = "quantize.model_path", section.model_path.endswith(".onnx")
    if section.model_path and find_artifact(section.model_path):
        what = f"{section.model_path} is quantized already"
        raise SpecError(Fault(where, what, "give the float checkpoint it was made from"))
    if section.calibration.cache and Path(section.calibration.cache).is_dir():
        what = f"{section.calibration.cache} is a folder"
        raise SpecError(Fault("quantize.calibration.cache", what, "name a file"))
    if backend.format == "onnx" and not is_onnx:
        what = f"{section.model_path} is not an ONNX file" if section.model_path else "missing: the .onnx file"
        hint = f"backend {backend.name} quantizes ONNX files: taoq {task.name} export makes one of a checkpoint"
        raise SpecError(Fault(where, what, hint))
    if backend.format == "torch" and is_onnx:
        what = f"{section.model_path} is an ONNX file, backend {backend.name} quantizes torch checkpoints"
        raise SpecError(Fault(where, what, "set quantize.backend to modelopt.onnx (GPUs) or onnxruntime (CPUs)"))
    if not section.model_path:
        return  # the task says whether it can do without
    if Path(section.model_path).resolve() == (directory / backend.payload).resolve():
        what = f"the artifact would replace {section.model_path}"
        raise SpecError(Fault("quantize.results_dir", what, "name another folder"))


def _plan(task: Task[Any], spec: Any, backend: Backend[Any], warnings: tuple[str, ...]) -> tuple[Any, QuantizationPlan]:
    """Open the float model, decide its layers, show the plan."""
    section: QuantizeSpec = spec.quantize
    model = _read_graph(task, spec) if backend.format == "onnx" else task.build_model(spec, section.model_path)
    layers = [named(layer, task) for layer in backend.layers(model, section.backend_kwargs)]
    plan = resolve(section, layers, backend.support, warnings)
    for warning in plan.warnings:
        log.warning(warning)
    patterns = {f"quantize.layers[{index}]": rule.module_name for index, rule in enumerate(section.layers)}
    patterns |= {f"quantize.skip_names[{index}]": pattern for index, pattern in enumerate(section.skip_names)}
    show(report.table(plan, patterns))
    log.info("%s is for %s", backend.name, backend.support.target)
    return model, plan


def _read_graph(task: Task[Any], spec: Any) -> Any:
    """The float graph of an ONNX file, ready to be quantized.

    Raises:
        TaoqError: It is damaged, quantized already, or takes other inputs than the data.
    """
    from taoq.onnx_file import is_quantized, read_onnx
    from taoq.quantization.backends.onnx_layers import prepare

    path = Path(spec.quantize.model_path)
    model = read_onnx(path)
    if is_quantized(model):
        what = f"{path} is quantized already: it has QuantizeLinear or DequantizeLinear nodes"
        raise SpecError(Fault("quantize.model_path", what, "give the float file it was made from"))
    check_provenance(task, spec, model, path)
    # what onnxruntime cannot run, no library can calibrate
    open_onnx(task, spec, path, model=model).run(task.example_inputs(spec))
    return prepare(model, str(path))


def named(layer: Layer, task: Task[Any]) -> Layer:
    """A layer with what the task knows of it: another name, and whether it is sensitive."""
    module = layer.alias or layer.name  # a node is known by the module that it was exported from
    alias = task.alias(module) or module
    kinds = (kind for pattern, kind in task.sensitive.items() if fnmatchcase(alias, pattern))
    return dataclasses.replace(layer, alias=alias if alias != layer.name else "", sensitive=next(kinds, ""))


def _quantize(
    task: Task[Any],
    spec: Any,
    backend: Backend[Any],
    model: Any,
    plan: QuantizationPlan,
    directory: Path,
    status: Status,
) -> str:
    """Quantize, verify, write the artifact. Returns what to tell the user."""
    section: QuantizeSpec = spec.quantize
    device = _device(section, backend)
    float_size = backend.float_size(model)
    hashing = ThreadPoolExecutor(1)  # beside the work: hashlib lets other threads run
    source_sha256 = hashing.submit(sha256, Path(section.model_path)) if section.model_path else None
    hashing.shutdown(wait=False)
    batches = task.calibration_batches(spec) if plan.needs_calibration else None
    cache = None
    if section.calibration.cache and batches and source_sha256:
        cache = RangeCache(Path(section.calibration.cache), _cache_key(spec, backend, batches, source_sha256.result()))
    started = time.monotonic()
    model, left_out = backend.quantize(model, plan, _Feed(batches), section.backend_kwargs, device=device, cache=cache)
    seconds = time.monotonic() - started
    settled = leave_out(plan, left_out, strict=section.strict)
    for warning in settled.warnings[len(plan.warnings) :]:
        log.warning(warning)
    plan = settled
    verify(plan, backend.applied(model))
    if backend.format == "torch":
        _check_runs(TorchRuntime(model, task.outputs(spec), "cpu"), task.example_inputs(spec))
    calibration = {"num_samples": batches.num_samples, "seed": section.calibration.seed} if batches else {}
    with staged(directory) as stage:
        payload = stage / backend.payload
        backend.save(model, payload, section.backend_kwargs)
        if backend.format == "onnx":
            open_onnx(task, spec, payload).run(task.example_inputs(spec))
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            taoq=taoq.__version__,
            task=task.name,
            backend=backend.name,
            format=backend.format,
            payload=backend.payload,
            sha256=sha256(payload),
            size=total_size(payload),
            float_size=float_size,
            source={
                "path": section.model_path,
                "sha256": source_sha256.result() if source_sha256 else "",
            },
            spec=spec_to_dict(spec),
            plan=tuple(report.rows(plan)),
            calibration=calibration,
            versions=versions((*backend.libraries, *task.libraries)),
        )
        summary = {
            "backend": backend.name,
            "mode": plan.mode,
            "algorithm": plan.algorithm,
            "layers_quantized": len(plan.quantized),
            "layers_quantizable": len(plan.quantizable),
            "size": manifest.size,
            "float_size": float_size,
            "seconds": round(seconds, 3),
            "device": device,
            "calibration": calibration,
            "warnings": list(plan.warnings),
            "command": shlex.join(sys.argv),
            "layers": manifest.plan,
        }
        write_json(stage / "quantization_report.json", summary)
        write_experiment(stage / "experiment.yaml", spec)
        write_json(stage / MANIFEST, dataclasses.asdict(manifest))
    kpi = {
        "layers_quantized": len(plan.quantized),
        "size_mb": manifest.size / 1e6,
        "float_size_mb": float_size / 1e6,
    }
    status.write("RUNNING", "Quantized.", kpi)
    calibrated = f" with {batches.num_samples} calibration images" if batches else ""
    return (
        f"quantized {len(plan.quantized)} of {len(plan.quantizable)} layers{calibrated} in {seconds:.1f} s on {device};"
        f" {size(float_size)} as float32, {size(manifest.size)} now\nartifact: {directory}"
    )


def _check_runs(runtime: Runtime, inputs: Inputs) -> None:
    """Run the quantized model once: a network may use a layer's weight past the layer, which cannot be seen before.

    Raises:
        TaoqError: It does not run.
    """
    try:
        runtime.run(inputs)
    except (RuntimeError, TypeError) as error:
        what = f"the quantized network does not run: {str(error).splitlines()[0]}"
        hint = "it uses the weight of a layer without calling the layer: put such layers into quantize.skip_names"
        raise TaoqError(Fault("quantize.layers", what, hint)) from error


def _device(section: QuantizeSpec, backend: Backend[Any]) -> str:
    if backend.format == "torch":
        return torch_device(section.device, "quantize.device")
    from taoq.onnx_runtime import execution_providers

    return execution_providers(section.device, "quantize.device")[1]


def _cache_key(spec: Any, backend: Backend[Any], batches: Batches, model: str) -> dict[str, str]:
    """What calibration ranges depend on."""
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in batches.paths]
    dataset = spec_to_dict(spec)["dataset"]
    images = json.dumps([stats, dataset, spec.quantize.calibration.batch_size])
    return {
        "model": model,
        "images": hashlib.sha256(images.encode()).hexdigest(),
        "backend": backend.name,
        "algorithm": spec.quantize.algorithm,
        "options": json.dumps(spec.quantize.backend_kwargs, sort_keys=True),
        "versions": json.dumps(versions(backend.libraries)),
    }


@dataclass(frozen=True)
class _Feed:
    """Inputs of the calibration batches, one batch in memory at a time; can be gone through again."""

    batches: Batches | None

    def __iter__(self) -> Iterator[Inputs]:
        if self.batches is not None:
            for batch in track(self.batches, self.batches.num_samples, "calibrating"):
                yield batch.inputs
