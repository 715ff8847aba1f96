# SPDX-License-Identifier: Apache-2.0
"""quantize: apply a plan with its backend, measure the errors, and write the artifact with its report."""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, cast

import torch

import taoq
from taoq.errors import Fault, TaoqError, first_line
from taoq.files import sha256, total_size
from taoq.network import Outputs
from taoq.pipeline.accuracy import check_accuracy, evaluate_both, evaluated_figure, warn_of_small_budget
from taoq.pipeline.artifacts import MANIFEST, SCHEMA_VERSION, Manifest, versions
from taoq.pipeline.calibration import Feed, bias_shifts, calibration_batches, range_cache, source_digest
from taoq.pipeline.experiment import Experiment
from taoq.pipeline.models import OpenedModel, build_empty, reopen_float, start
from taoq.pipeline.prepare import Prepared, without
from taoq.pipeline.results.quantize import AccuracyCheck, Evaluation, LayerResult, QuantizeResult
from taoq.pipeline.search import SearchResult
from taoq.pipeline.staging import Stage, staged
from taoq.quantization.backends.base import NO_SHIFTS, M
from taoq.quantization.formats import FORMATS
from taoq.quantization.plan import verify
from taoq.quantization.types import QuantizationPlan
from taoq.spec.load import spec_to_dict
from taoq.tasks.base import Batches

REPORT, PAGE, TUNED = "quantization_report.json", "quantization_report.html", "tuned.yaml"
_ERROR_IMAGES = 16
"""Images that layer errors are measured on.

For MobileNetV3, the errors on 16 images differ from those on 64 by 0.3 dB on average and by 1.7 dB at most; on 4 images
they differ by up to 24 dB.
"""


@dataclass(frozen=True, kw_only=True)
class _Quantized(Generic[M]):
    """A quantized model that is not saved yet.

    Attributes:
        model: The quantized model, on the CPU.
        reference: The float model, loaded again.
        plan: The plan without the layers that the library left float.
        batches: The calibration data; None if none was needed.
        macs: Multiply-accumulates by layer, for one sample.
        float_size: Size of the float model in bytes.
        source_sha256: SHA-256 of the float model.
        seconds: Duration of calibration and quantization.
    """

    model: M
    reference: M
    plan: QuantizationPlan
    batches: Batches | None
    macs: Mapping[str, int]
    float_size: int
    source_sha256: str
    seconds: float


def quantize(
    prepared: Prepared[M],
    directory: Path,
    *,
    command: str = "",
    search: SearchResult | None = None,
    keep_over_budget: bool = True,
) -> QuantizeResult:
    """Quantize a model, verify and measure it, and write the artifact with its report.

    Args:
        prepared: The float model and the plan. The model is consumed.
        directory: Folder of the artifact.
        command: Command line, for the report.
        search: Search that found the plan, for the report.
        keep_over_budget: Whether to write an artifact whose loss exceeds `quantize.accuracy.max_drop`.
    """
    figure = evaluated_figure(prepared.experiment)
    quantized = _quantize(prepared)
    with staged(directory) as stage:
        payload = stage.path / prepared.backend.capability.payload
        prepared.backend.save(quantized.model, payload, prepared.experiment.spec.quantize.backend_kwargs)
        _check_runs(prepared, quantized.model, payload)
        layers = _measure_layers(prepared, quantized, figure)
        evaluation = evaluate_both(prepared, quantized.reference, quantized.model, payload, figure) if figure else None
        accuracy = check_accuracy(prepared.experiment.spec.quantize.accuracy, evaluation)
        result = _result(prepared, quantized, layers, evaluation, accuracy, search, payload, command)
        if accuracy and not accuracy.met and not keep_over_budget:
            return result
        _write(stage, result, prepared.experiment)
        stage.commit()
    return dataclasses.replace(result, directory=directory)


def _quantize(prepared: Prepared[M]) -> _Quantized[M]:
    """Calibrate and quantize, and verify that the library applied the plan."""
    experiment, backend, model_format = prepared.experiment, prepared.backend, prepared.format
    section = experiment.spec.quantize
    float_size = model_format.size(prepared.model)
    source = source_digest(prepared)
    batches = calibration_batches(prepared)
    cache = range_cache(prepared, batches, source)
    macs = model_format.macs(prepared.model, experiment.example())
    started = time.monotonic()
    calibrated = backend.calibrate(
        prepared.model, prepared.plan, Feed(batches), section.backend_kwargs, device=prepared.device, cache=cache
    )
    plan = without(prepared.plan, calibrated.left_out(prepared.plan), strict=section.strict)
    seconds = time.monotonic() - started
    # Without bias correction, load the float model after quantization, to have only one float model in memory.
    reference = reopen_float(experiment, backend) if section.bias_correction else None
    shifts = NO_SHIFTS if reference is None else bias_shifts(prepared, reference, calibrated, plan, batches)
    started = time.monotonic()
    model = calibrated.quantize(plan, shifts)
    seconds += time.monotonic() - started
    verify(plan, backend.applied(model))
    if reference is None:
        reference = reopen_float(experiment, backend)
    return _Quantized(
        model=model,
        reference=reference,
        plan=plan,
        batches=batches,
        macs=macs,
        float_size=float_size,
        source_sha256=source.result(),
        seconds=seconds,
    )


def _check_runs(prepared: Prepared[M], model: M, payload: Path) -> None:
    """Read the artifact as `evaluate` will, and run it once, so that one that does not run is not kept.

    Raises:
        TaoqError: If it does not run, or if its outputs are others than before it was written.
    """
    experiment, backend = prepared.experiment, prepared.backend
    info = FORMATS[backend.capability.format]
    try:
        saved = backend.load(payload, lambda: cast(M, build_empty(experiment)))
        outputs = _run_once(experiment, OpenedModel(saved, info.name, payload if info.whole else None, True))
        if info.whole:  # The file is all that there is.
            return
        expected = _run_once(experiment, OpenedModel(model, info.name, None, True))
    except TaoqError:
        raise
    except Exception as error:  # The network's code may raise anything.
        what = f"the quantized network does not run: {first_line(error)}"
        hint = "put layers whose weights the network reads without calling them into quantize.skip_names"
        raise TaoqError(Fault("quantize.layers", what, hint)) from error
    different = [
        name
        for name, values in expected.items()
        if not torch.allclose(outputs[name], values, rtol=0, atol=0, equal_nan=True)
    ]
    if different:
        what = f"the artifact gives other outputs after it is read again ({', '.join(different)})"
        hint = "the network keeps values from its first run that depend on its weights: it cannot be stored quantized"
        raise TaoqError(Fault("quantize.layers", what, hint))


def _run_once(experiment: Experiment, opened: OpenedModel) -> Outputs:
    return start(experiment, opened, "cpu", "quantize.device").run(experiment.example())


def _measure_layers(prepared: Prepared[M], quantized: _Quantized[M], figure: str) -> tuple[LayerResult, ...]:
    """Measure the errors of the layers of the plan."""
    backend, plan = prepared.backend, quantized.plan
    # Use data that this run opens anyway. Without any, only the errors of the weights are measured.
    batches = quantized.batches or (prepared.experiment.evaluation() if figure else None)
    errors = prepared.format.layer_errors(
        quantized.reference,
        quantized.model,
        [item.layer.name for item in plan.quantized],
        Feed(batches, "measuring layers", _ERROR_IMAGES),
        backend.weight,
        device=prepared.device,
    )
    applied = backend.applied(quantized.model)
    return tuple(
        LayerResult(
            plan=item,
            macs=quantized.macs.get(item.layer.name),
            error=errors.get(item.layer.name),
            input_range=applied[item.layer.name].input_range if item.layer.name in applied else None,
        )
        for item in plan.listed
    )


def _result(
    prepared: Prepared[M],
    quantized: _Quantized[M],
    layers: tuple[LayerResult, ...],
    evaluation: Evaluation | None,
    accuracy: AccuracyCheck | None,
    search: SearchResult | None,
    payload: Path,
    command: str,
) -> QuantizeResult:
    experiment, capability, plan = prepared.experiment, prepared.backend.capability, quantized.plan
    section, batches = experiment.spec.quantize, quantized.batches
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        taoq=taoq.__version__,
        task=experiment.task,
        backend=capability.name,
        format=capability.format,
        payload=capability.payload,
        sha256=sha256(payload),
        size=total_size(payload),
        float_size=quantized.float_size,
        source={"path": section.model_path, "sha256": quantized.source_sha256},
        spec=spec_to_dict(experiment.spec),
        plan=tuple(item.to_json() for item in plan.listed),
        calibration={"num_samples": batches.num_samples, "seed": section.calibration.seed} if batches else {},
        versions=versions((*capability.libraries, *experiment.libraries)) | experiment.plugins,
        accuracy=accuracy.to_json() if accuracy else {},
        preprocessing=experiment.preprocessing(),
    )
    return QuantizeResult(
        manifest=manifest,
        plan=plan,
        layers=layers,
        macs_quantized=plan.share(quantized.macs),
        seconds=quantized.seconds,
        device=prepared.device,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=command,
        section=section,
        target=capability.target,
        notices=(*plan.notices, *warn_of_small_budget(accuracy, evaluation)),
        evaluation=evaluation,
        accuracy=accuracy,
        search=search,
        model=quantized.model,
        directory=None,
    )


def _write(stage: Stage, result: QuantizeResult, experiment: Experiment) -> None:
    """Write the reports, the spec and the manifest."""
    stage.write_json(REPORT, result.to_json())
    stage.write_text(PAGE, result.html())
    stage.write_spec("experiment.yaml", experiment.spec)
    if result.search:
        stage.write_spec(TUNED, experiment.spec)
    stage.write_json(MANIFEST, dataclasses.asdict(result.manifest))
