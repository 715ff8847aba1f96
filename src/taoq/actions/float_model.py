# SPDX-License-Identifier: Apache-2.0
"""What quantize, analyze and search begin with: a float model, the plan of a spec for it, and calibration images."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from taoq.actions.open_model import check_provenance, open_onnx
from taoq.actions.results import results_dir
from taoq.artifact import find_artifact, sha256, versions
from taoq.console import show
from taoq.errors import Fault, SpecError
from taoq.quantization import report
from taoq.quantization.backends import load_backend
from taoq.quantization.backends.base import Backend, Inputs
from taoq.quantization.plan import Layer, QuantizationPlan, check, leave_out, resolve
from taoq.quantization.ranges import RangeCache
from taoq.quantization.spec import QuantizeSpec
from taoq.runtime import Runtime, TorchRuntime, torch_device
from taoq.status import track
from taoq.tasks.base import Batches, Task

log = logging.getLogger(__name__)


def choose_backend(task: Task[Any], spec: Any, action: str) -> tuple[Backend[Any], tuple[str, ...], Path]:
    """The backend of a spec, warnings, and the folder of the results; all is checked that needs no model.

    Args:
        task: The task.
        spec: Its spec.
        action: Whose results they are.

    Raises:
        SpecError: With every fault.
    """
    section: QuantizeSpec = spec.quantize
    backend = load_backend(section.backend)
    warnings = check(section, backend.support)
    faults = backend.check_options(section.backend_kwargs, section.algorithm)
    if faults:
        raise SpecError(*faults)
    directory = results_dir(spec, action)
    _check_source(task, section, directory, backend)
    return backend, warnings, directory


def open_float(task: Task[Any], spec: Any, backend: Backend[Any]) -> Any:
    """The float model of a spec as its backend takes it.

    Raises:
        TaoqError: It is damaged, quantized already, or takes other inputs than the data.
    """
    path = spec.quantize.model_path
    return _read_graph(task, spec) if backend.format == "onnx" else task.build_model(spec, path)


def reopen_float(task: Task[Any], spec: Any, backend: Backend[Any]) -> Any:
    """The same once more, without the checks: what quantizing used up."""
    if backend.format == "onnx":
        from taoq.onnx_file import read_onnx
        from taoq.quantization.backends.onnx_layers import prepare

        path = Path(spec.quantize.model_path)
        return prepare(read_onnx(path), str(path))
    return task.build_model(spec, spec.quantize.model_path)


def plan_layers(
    task: Task[Any], section: QuantizeSpec, backend: Backend[Any], model: Any, warnings: tuple[str, ...]
) -> QuantizationPlan:
    """Decide the layers of a float model; a section that passed `choose_backend`.

    Raises:
        SpecError: A rule fits nothing, or nothing is left.
    """
    layers = [named(layer, task) for layer in backend.layers(model, section.backend_kwargs)]
    return resolve(section, layers, backend.support, warnings)


def settled(plan: QuantizationPlan, left_out: Mapping[str, str], section: QuantizeSpec) -> QuantizationPlan:
    """A plan without the layers that the library leaves float, by name with the reason; it is said.

    Raises:
        TaoqError: `quantize.strict` forbids it, or nothing else was quantized.
    """
    left = leave_out(plan, left_out, strict=section.strict)
    for warning in left.warnings[len(plan.warnings) :]:
        log.warning(warning)
    return left


def show_plan(plan: QuantizationPlan, section: QuantizeSpec, backend: Backend[Any]) -> None:
    """Print the plan, and log its warnings."""
    for warning in plan.warnings:
        log.warning(warning)
    show(report.table(plan, report.patterns(section)))
    log.info("%s is for %s", backend.name, backend.support.target)


def named(layer: Layer, task: Task[Any]) -> Layer:
    """A layer with what the task knows of it: another name, and whether it is sensitive."""
    module = layer.alias or layer.name  # a node is known by the module that it was exported from
    alias = task.alias(module) or module
    kinds = (kind for pattern, kind in task.sensitive.items() if fnmatchcase(alias, pattern))
    return dataclasses.replace(layer, alias=alias if alias != layer.name else "", sensitive=next(kinds, ""))


def quantization_device(section: QuantizeSpec, backend: Backend[Any]) -> str:
    """Where a section quantizes, on this machine."""
    if backend.format == "torch":
        return torch_device(section.device, "quantize.device")
    from taoq.onnx_runtime import execution_providers

    return execution_providers(section.device, "quantize.device")[1]


def runtime_of(task: Task[Any], spec: Any, backend: Backend[Any], model: Any, file: Path, device: str) -> Runtime:
    """A model of a backend, to be run where a spec quantizes.

    Args:
        task: The task.
        spec: Its spec.
        backend: The backend.
        model: The model; of ONNX it is not used any more.
        file: The file of an ONNX model.
        device: What `quantization_device` says; of torch models.
    """
    if backend.format == "torch":
        return TorchRuntime(model, task.outputs(spec), device)
    return open_onnx(task, spec, file, spec.quantize.device, where="quantize.device", model=model)


def hashed(path: str) -> Future[str]:
    """The sha256 of a checkpoint, beside the work: hashlib lets other threads run. Empty for no checkpoint."""
    pool = ThreadPoolExecutor(1)
    found = pool.submit(lambda: sha256(Path(path)) if path else "")
    pool.shutdown(wait=False)
    return found


def range_cache(spec: Any, backend: Backend[Any], batches: Batches | None, source: Future[str]) -> RangeCache | None:
    """The cache of a spec, where it names one and there is something to calibrate."""
    path = spec.quantize.calibration.cache
    if not path or batches is None or not spec.quantize.model_path:
        return None
    return RangeCache(Path(path), calibration_key(spec, backend, batches, source.result()))


def calibration_key(spec: Any, backend: Backend[Any], batches: Batches, model: str) -> dict[str, str]:
    """What calibration ranges depend on."""
    return {
        "model": model,
        "images": batches.key,
        "backend": backend.name,
        "algorithm": spec.quantize.algorithm,
        "options": json.dumps(spec.quantize.backend_kwargs, sort_keys=True),
        "versions": json.dumps(versions(backend.libraries)),
    }


@dataclass(frozen=True)
class Feed:
    """Inputs of batches, one batch in memory at a time; can be gone through again.

    Attributes:
        batches: The batches; None has none.
        what: What is going on, for the progress bar.
        limit: The first so many images; None takes all.
    """

    batches: Batches | None
    what: str = "calibrating"
    limit: int | None = None

    def __iter__(self) -> Iterator[Inputs]:
        if self.batches is None:
            return
        count = 0
        total = min(self.batches.num_samples, self.limit or self.batches.num_samples)
        for batch in track(self.batches, total, self.what):
            rest = total - count
            yield batch.inputs if len(batch.paths) <= rest else {name: t[:rest] for name, t in batch.inputs.items()}
            count += len(batch.paths)
            if count >= total:
                return


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


def _read_graph(task: Task[Any], spec: Any) -> Any:
    """The float graph of an ONNX file, ready to be quantized."""
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
