# SPDX-License-Identifier: Apache-2.0
"""quantize: spec -> plan -> backend -> artifact, and a report of what it cost."""

from __future__ import annotations

import dataclasses
import datetime
import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

import taoq
from taoq.errors import Fault, Notice, TaoqError, first_line
from taoq.files import sha256, total_size
from taoq.pipeline.artifacts import MANIFEST, SCHEMA_VERSION, Manifest, versions
from taoq.pipeline.calibration import Feed, range_cache
from taoq.pipeline.evaluate import figure_named, measure
from taoq.pipeline.experiment import Experiment
from taoq.pipeline.intervals import difference
from taoq.pipeline.models import OpenedModel, reopen_float, start
from taoq.pipeline.prepare import Checked, Prepared, without
from taoq.pipeline.results.quantize import AccuracyCheck, Evaluation, LayerResult, QuantizeResult
from taoq.pipeline.search import SearchResult, within
from taoq.pipeline.staging import Stage, staged
from taoq.quantization.backends.base import NO_SHIFTS, Calibrated, M
from taoq.quantization.formats import FORMATS
from taoq.quantization.formats.base import Shifts
from taoq.quantization.plan import verify
from taoq.quantization.spec import AccuracySpec
from taoq.quantization.types import QuantizationPlan
from taoq.runtimes.base import Runtime
from taoq.spec.load import spec_to_dict
from taoq.tasks.base import Batches

log = logging.getLogger(__name__)

REPORT, PAGE, TUNED = "quantization_report.json", "quantization_report.html", "tuned.yaml"
_ERROR_IMAGES = 16  # of MobileNetV3, 16 differ from 64 by 0.3 dB on average and 1.7 dB at most; 4 differ by up to 24 dB


@dataclass(frozen=True, kw_only=True)
class _Quantized(Generic[M]):
    """A quantized model, not saved yet.

    Attributes:
        model: The model, on the CPU.
        reference: The float model, read again.
        plan: The plan, without the layers that the library left out.
        batches: The calibration data; None if none was needed.
        macs: Multiply-accumulates of the layers.
        float_size: Size of the float model, bytes.
        source_sha256: Digest of the float model.
        seconds: Time for calibration and quantization.
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
    """Quantize, verify, measure, and write the artifact with its report.

    Args:
        prepared: The float model, which is consumed, and the plan.
        directory: Where the artifact goes.
        command: The command line, for the report.
        search: How the plan was found, for the report.
        keep_over_budget: Whether an artifact that loses more than `quantize.accuracy` accepts is written all the same.
    """
    figure = evaluated_figure(prepared.experiment)
    quantized = _quantize(prepared)
    with staged(directory) as stage:
        payload = stage.path / prepared.backend.capability.payload
        prepared.backend.save(quantized.model, payload, prepared.experiment.spec.quantize.backend_kwargs)
        _check_runs(prepared, quantized.model, payload)
        layers = _measure_layers(prepared, quantized, figure)
        evaluation = _evaluate(prepared, quantized, payload, figure) if figure else None
        accuracy = _check_accuracy(prepared.experiment.spec.quantize.accuracy, evaluation)
        result = _result(prepared, quantized, layers, evaluation, accuracy, search, payload, command)
        if accuracy and not accuracy.met and not keep_over_budget:
            return result
        _write(stage, result, prepared.experiment)
        stage.commit()
    return dataclasses.replace(result, directory=directory)


def evaluated_figure(experiment: Experiment) -> str:
    """The figure to evaluate; empty if a spec asks for none. What evaluation lacks is reported before the work.

    Raises:
        SpecError: The evaluation data is missing, or there is no such figure.
    """
    section = experiment.spec.quantize
    if not (section.evaluate or section.accuracy):
        return ""
    experiment.evaluation()
    return figure_named(experiment, section.accuracy.metric if section.accuracy else "auto", "quantize.accuracy.metric")


def bias_shifts(
    prepared: Prepared[M], reference: M, ready: Calibrated[M], plan: QuantizationPlan, batches: Batches | None
) -> Shifts:
    """What corrects the biases of the layers of a plan."""
    names = [item.layer.name for item in plan.quantized]
    feed = Feed(batches, "correcting biases")
    return prepared.format.bias_shifts(reference, ready.with_only(plan.quantized), names, feed, device=prepared.device)


def calibration_batches(prepared: Prepared[M]) -> Batches | None:
    """The calibration data that a plan needs; None if it needs none, and no data is opened."""
    needed = prepared.plan.needs_calibration or prepared.experiment.spec.quantize.bias_correction
    return prepared.experiment.calibration() if needed else None


def _quantize(prepared: Prepared[M]) -> _Quantized[M]:
    """Calibrate, quantize, and check that the library did what the plan says."""
    experiment, backend, model_format = prepared.experiment, prepared.backend, prepared.format
    section = experiment.spec.quantize
    float_size = model_format.size(prepared.model)
    source_sha256 = source_digest(prepared)
    batches = calibration_batches(prepared)
    cache = None
    if section.calibration.cache:
        cache = range_cache(Checked(experiment=experiment, backend=backend), batches, source_sha256.result())
    macs = model_format.macs(prepared.model, experiment.example())
    started = time.monotonic()
    ready = backend.calibrate(
        prepared.model, prepared.plan, Feed(batches), section.backend_kwargs, device=prepared.device, cache=cache
    )
    plan = without(prepared.plan, dict(ready.left_out(prepared.plan)), strict=section.strict)
    seconds = time.monotonic() - started
    # read late where it is not needed before: then only one model of both is float
    reference = reopen_float(experiment, backend) if section.bias_correction else None
    shifts = NO_SHIFTS if reference is None else bias_shifts(prepared, reference, ready, plan, batches)
    started = time.monotonic()
    model = ready.quantize(plan, shifts)
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
        source_sha256=source_sha256.result(),
        seconds=seconds,
    )


def source_digest(prepared: Prepared[M]) -> Future[str]:
    """The sha256 of the float checkpoint, computed beside the work: hashlib lets other threads run.

    Of a model without a file, the digest of the model, computed before calibration consumes it.
    """
    path = prepared.experiment.spec.quantize.model_path
    if not path:
        done: Future[str] = Future()
        done.set_result(prepared.format.digest(prepared.model))
        return done
    pool = ThreadPoolExecutor(1)
    digest = pool.submit(sha256, Path(path))
    pool.shutdown(wait=False)
    return digest


def _check_runs(prepared: Prepared[M], model: M, payload: Path) -> None:
    """Run the quantized model once: what does not run is seen before it is kept.

    Raises:
        TaoqError: It does not run.
    """
    experiment, backend = prepared.experiment, prepared.backend
    info = FORMATS[backend.capability.format]
    written = backend.load(payload, lambda: model) if info.whole else model
    opened = OpenedModel(written, info.name, payload if info.whole else None, True)
    try:
        start(experiment, opened, "cpu", "quantize.device").run(experiment.example())
    except (RuntimeError, TypeError) as error:
        # a network may use a layer's weight past the layer, which cannot be seen before
        what = f"the quantized network does not run: {first_line(error)}"
        hint = "it uses the weight of a layer without calling the layer: put such layers into quantize.skip_names"
        raise TaoqError(Fault("quantize.layers", what, hint)) from error


def _measure_layers(prepared: Prepared[M], quantized: _Quantized[M], figure: str) -> tuple[LayerResult, ...]:
    """The layers of the plan with what was measured of each."""
    backend, plan = prepared.backend, quantized.plan
    # on images that the run opens anyway; else of the weights alone
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


def _evaluate(prepared: Prepared[M], quantized: _Quantized[M], payload: Path, figure: str) -> Evaluation:
    """Figures of both models on the same images, and how sure the difference of the one that counts is."""
    experiment, name = prepared.experiment, prepared.backend.capability.format
    whole = FORMATS[name].whole
    files: Sequence[tuple[M, Path]] = [
        (quantized.reference, Path(experiment.spec.quantize.model_path)),
        (quantized.model, payload),
    ]
    models: list[Runtime] = [
        start(
            experiment,
            OpenedModel(model, name, path if whole else None, path == payload),
            experiment.spec.quantize.device,
            "quantize.device",
        )
        for model, path in files
    ]
    measured = measure(experiment, models, figure)
    before, after = measured.metrics
    return Evaluation(
        num_images=measured.num_images,
        seconds=measured.seconds,
        float_figures=dict(measured.figures[0]),
        quantized_figures=dict(measured.figures[1]),
        difference=difference(before, after, figure),
    )


def _check_accuracy(budget: AccuracySpec | None, evaluation: Evaluation | None) -> AccuracyCheck | None:
    """Whether the loss is within the budget of a spec."""
    if budget is None or evaluation is None:
        return None
    figure = evaluation.difference.figure
    before, after = evaluation.float_figures[figure], evaluation.quantized_figures[figure]
    return AccuracyCheck(
        metric=figure,
        float_figure=before,
        quantized_figure=after,
        max_drop=budget.max_drop,
        met=within(before - after, budget.max_drop),
    )


def _chance(accuracy: AccuracyCheck | None, evaluation: Evaluation | None) -> tuple[Notice, ...]:
    """A notice if a budget is smaller than what the images can tell from chance."""
    if accuracy is None or evaluation is None or evaluation.difference.low is None:
        return ()
    half_width = evaluation.difference.value - evaluation.difference.low
    if accuracy.max_drop >= half_width:
        return ()
    what = (
        f"{accuracy.max_drop:g} is less than {evaluation.num_images} images can tell from chance,"
        f" which is {half_width:.4f} here: evaluate on more images"
    )
    notice = Notice("quantize.accuracy.max_drop", what)
    log.warning(notice)
    return (notice,)


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
        notices=(*plan.notices, *_chance(accuracy, evaluation)),
        evaluation=evaluation,
        accuracy=accuracy,
        search=search,
        model=quantized.model,
        directory=None,
    )


def _write(stage: Stage, result: QuantizeResult, experiment: Experiment) -> None:
    """Write everything but the payload, the manifest last."""
    stage.write_json(REPORT, result.to_json())
    stage.write_text(PAGE, result.html())
    stage.write_spec("experiment.yaml", experiment.spec)
    if result.search:
        stage.write_spec(TUNED, experiment.spec)
    stage.write_json(MANIFEST, dataclasses.asdict(result.manifest))
