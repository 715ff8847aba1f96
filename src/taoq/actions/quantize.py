# SPDX-License-Identifier: Apache-2.0
"""quantize: spec -> plan -> backend -> artifact, and a report of what it cost."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import taoq
from taoq.actions import others
from taoq.actions.float_model import (
    Feed,
    choose_backend,
    hashed,
    open_float,
    plan_layers,
    quantization_device,
    range_cache,
    reopen_float,
    runtime_of,
    settled,
    show_plan,
)
from taoq.actions.measure import figure_of, measure
from taoq.actions.open_model import open_onnx
from taoq.actions.results import staged, write_experiment, write_json
from taoq.actions.search import search
from taoq.artifact import MANIFEST, SCHEMA_VERSION, Manifest, sha256, versions
from taoq.bootstrap import difference
from taoq.console import show, size
from taoq.errors import Fault, RequirementNotMet, TaoqError
from taoq.files import total_size
from taoq.pages import page
from taoq.quantization import report
from taoq.quantization.backends.base import Backend, Inputs, verify
from taoq.quantization.search import within
from taoq.quantization.spec import AccuracySpec, QuantizeSpec
from taoq.runtime import Runtime, TorchRuntime
from taoq.spec import SpecSource, changed, load_spec, spec_to_dict
from taoq.status import Status, run_status
from taoq.tasks.base import Task

log = logging.getLogger(__name__)

_OF_THE_MANIFEST = (
    "task", "backend", "payload", "sha256", "size", "float_size", "source", "calibration", "versions",
)  # fmt: skip
"""What the report repeats."""
_OF_THE_SEARCH = ("maximize", "dtypes", "max_evaluations", "analysis")
"""Fields of the budget that a check does not need."""
_TUNED = "tuned.yaml"
_CHANCES = 3  # plans of a search that become artifacts, until one is within the budget
_ERROR_IMAGES = 16  # of MobileNetV3, 16 differ from 64 by 0.3 dB on average and 1.7 dB at most; 4 differ by up to 24 dB


def run(task: Task[Any], source: SpecSource, *, dry_run: bool = False) -> None:
    """Quantize the checkpoint of a spec.

    Args:
        task: The task.
        source: The spec.
        dry_run: Print the plan, touch no data and write nothing.

    Raises:
        RequirementNotMet: It loses more than `quantize.accuracy` accepts. A check keeps the artifact, which says so.
    """
    spec = load_spec(source, task.spec, unused=task.unused, not_needed=others("quantize"))
    section: QuantizeSpec = spec.quantize
    backend, warnings, directory = choose_backend(task, spec, "quantize")
    _say_unused(section.accuracy)
    if dry_run:
        show_plan(plan_layers(task, section, backend, open_float(task, spec, backend), warnings), section, backend)
        log.info("dry run: nothing was calibrated, nothing was written")
        return
    with run_status(directory, task.name, "quantize") as status:
        make = functools.partial(
            quantize, task, backend=backend, warnings=warnings, directory=directory, status=status,
            command=source.command,
        )  # fmt: skip
        if section.accuracy and section.accuracy.action == "search":
            _quantize_best(functools.partial(search, task, spec, backend, warnings, directory), make)
        else:
            make(spec)


def _quantize_best(find: Callable[..., tuple[Any, Mapping[str, Any]]], make: Callable[..., None]) -> None:
    """Quantize what a search finds. The artifact has the last word: it may lose more than the trial of its plan.

    It does not where both compute the same; a float16 graph, which is tried in float32, may.

    Args:
        find: `search` of what is known and of what was tried.
        make: `quantize` of a spec and of what a search says of it.

    Raises:
        RequirementNotMet: No plan was found whose artifact is within the budget.
    """
    known: dict[str, float] = {}
    tried: set[str] = set()
    for chances in reversed(range(_CHANCES)):
        tuned, searched = find(known, tried)
        try:
            make(tuned, searched=searched)
            return
        except _PlanTooBad as error:
            if not chances:
                raise
            known[searched["plan"]] = error.figure
            log.info("the artifact loses more than the trial of its plan did: searching on")


class _PlanTooBad(RequirementNotMet):
    """The artifact of a plan that a search found loses too much: it is not written.

    Attributes:
        figure: Its metric.
    """

    def __init__(self, fault: Fault, figure: float) -> None:
        super().__init__(fault)
        self.figure = figure


def quantize(
    task: Task[Any],
    spec: Any,
    *,
    backend: Backend[Any],
    warnings: tuple[str, ...],
    directory: Path,
    status: Status,
    command: str,
    searched: Mapping[str, Any] | None = None,
) -> None:
    """Quantize, verify, measure, write the artifact and its report.

    Args:
        task: The task.
        spec: Its spec.
        backend: Its backend.
        warnings: Of the spec.
        directory: Where the artifact goes.
        status: The log of the run.
        command: The command line, for the report.
        searched: What a search says of the plan, for the report.

    Raises:
        RequirementNotMet: It loses more than `quantize.accuracy` accepts; what a search found is not written then.
    """
    section: QuantizeSpec = spec.quantize
    figure = _figure(task, spec)
    model = open_float(task, spec, backend)
    plan = plan_layers(task, section, backend, model, warnings)
    show_plan(plan, section, backend)
    device = quantization_device(section, backend)
    float_size = backend.float_size(model)
    source_sha256 = hashed(section.model_path)
    batches = task.calibration_batches(spec) if plan.needs_calibration or section.bias_correction else None
    cache = range_cache(spec, backend, batches, source_sha256)
    macs = backend.macs(model, task.example_inputs(spec))
    started = time.monotonic()
    ready = backend.calibrate(model, plan, Feed(batches), section.backend_kwargs, device=device, cache=cache)
    model, left_out = ready.quantize(plan)
    seconds = time.monotonic() - started
    plan = settled(plan, left_out, section)
    names = [item.layer.name for item in plan.quantized]
    reference = reopen_float(task, spec, backend)
    if section.bias_correction:
        feed = Feed(batches, "correcting biases")
        model = backend.add_to_biases(model, backend.bias_shifts(reference, model, names, feed, device=device))
    verify(plan, backend.applied(model))
    if backend.format == "torch":
        _check_runs(TorchRuntime(model, task.outputs(spec), "cpu"), task.example_inputs(spec))
    calibration = {"num_samples": batches.num_samples, "seed": section.calibration.seed} if batches else {}
    with staged(directory) as stage:
        payload = stage / backend.payload
        backend.save(model, payload, section.backend_kwargs)
        if backend.format == "onnx":
            open_onnx(task, spec, payload).run(task.example_inputs(spec))
        # on images that the run opens anyway; else of the weights alone
        seen = batches or (task.evaluation_batches(spec) if figure else None)
        feed = Feed(seen, "measuring layers", _ERROR_IMAGES)
        errors = backend.layer_errors(reference, model, names, feed, device=device)
        layers = report.measured_rows(plan, errors, backend.ranges(model), macs)
        evaluation = None
        if figure:
            pairs = ((reference, Path(section.model_path)), (model, payload))
            models = [runtime_of(task, spec, backend, one, file, device) for one, file in pairs]
            evaluation = _evaluate(task, spec, models, figure)
        accuracy = _judge(section.accuracy, figure, evaluation) if section.accuracy and evaluation else None
        if searched and accuracy and not accuracy["met"]:
            fault = _too_bad(accuracy, "nothing was written: accept more, or give other formats")
            raise _PlanTooBad(fault, accuracy["quantized"])
        chance = _chance(accuracy, evaluation) if accuracy and evaluation else []
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
            source={"path": section.model_path, "sha256": source_sha256.result()},
            spec=spec_to_dict(spec),
            plan=tuple(report.rows(plan)),
            calibration=calibration,
            versions=versions((*backend.libraries, *task.libraries)),
            accuracy=accuracy or {},
        )
        found = {
            **{name: getattr(manifest, name) for name in _OF_THE_MANIFEST},
            "mode": plan.mode,
            "algorithm": plan.algorithm,
            "target": backend.support.target,
            "layers_quantized": len(plan.quantized),
            "layers_quantizable": len(plan.quantizable),
            "macs_quantized": report.quantized_share(plan, macs),
            "seconds": round(seconds, 3),
            "device": device,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "warnings": [*plan.warnings, *chance],
            "command": command,
            "rules": report.asked(section),
            "skip_names": list(section.skip_names),
            "layers": layers,
            "evaluation": evaluation,
            "accuracy": accuracy,
            "search": searched,
        }
        write_json(stage / "quantization_report.json", found)
        (stage / "quantization_report.html").write_text(page("quantize", found), encoding="utf-8")
        write_experiment(stage / "experiment.yaml", spec)
        if searched:
            write_experiment(stage / _TUNED, spec)
        write_json(stage / MANIFEST, dataclasses.asdict(manifest))
    _tell(found, directory, status)
    if searched:
        print(f"plan: {directory / _TUNED}; quantize runs it as it is")
    if accuracy and not accuracy["met"]:
        hint = "the artifact is kept and marked; accuracy.action: search looks for the layers to leave float"
        raise RequirementNotMet(_too_bad(accuracy, hint))


def _say_unused(asked: AccuracySpec | None) -> None:
    """Warn of what is set for a search where none is asked for."""
    if asked and asked.action != "search":
        for name in changed(asked, _OF_THE_SEARCH):
            log.warning("quantize.accuracy.%s: has no effect: it is for action: search", name)


def _figure(task: Task[Any], spec: Any) -> str:
    """The figure to evaluate; empty where a spec asks for none. What evaluation lacks is said before the work.

    Raises:
        SpecError: The evaluation data is missing, or there is no such figure.
    """
    section: QuantizeSpec = spec.quantize
    if not (section.evaluate or section.accuracy):
        return ""
    task.evaluation_batches(spec)
    asked = section.accuracy.metric if section.accuracy else "auto"
    return figure_of(task, spec, asked, "quantize.accuracy.metric")


def _tell(found: Mapping[str, Any], directory: Path, status: Status) -> None:
    """Say what a report says, on the screen and in status.json."""
    kpi = {
        "layers_quantized": found["layers_quantized"],
        "size_mb": found["size"] / 1e6,
        "float_size_mb": found["float_size"] / 1e6,
    }
    status.write("RUNNING", "Quantized.", kpi)
    show(report.error_table(found["layers"]))
    images = found["calibration"].get("num_samples")
    calibrated = f" with {images} calibration images" if images else ""
    print(
        f"quantized {found['layers_quantized']} of {found['layers_quantizable']} layers{calibrated}"
        f" in {found['seconds']:.1f} s on {found['device']};"
        f" {size(found['float_size'])} as float32, {size(found['size'])} now"
    )
    if found["evaluation"]:
        status.write("RUNNING", "Evaluation metrics.", found["evaluation"]["quantized"])
        show(report.figures_table(found["evaluation"]))
    print(f"report: {directory / 'quantization_report.html'}\nartifact: {directory}")


def _evaluate(task: Task[Any], spec: Any, models: Sequence[Runtime], figure: str) -> dict[str, Any]:
    """Figures of both models on the same images, and how sure the difference of the one that counts is."""
    found = measure(task, spec, models, figure)
    before, after = found.metrics
    return {
        "num_images": found.num_images,
        "seconds": round(found.seconds, 3),
        "float": dict(found.figures[0]),
        "quantized": dict(found.figures[1]),
        "differences": [dataclasses.asdict(difference(before, after, figure))],
    }


def _judge(asked: AccuracySpec, figure: str, evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Whether the loss is within the budget of a spec."""
    before, after = evaluation["float"][figure], evaluation["quantized"][figure]
    return {
        "metric": figure,
        "float": before,
        "quantized": after,
        "drop": before - after,
        "max_drop": asked.max_drop,
        "met": within(before - after, asked.max_drop),
    }


def _too_bad(accuracy: Mapping[str, Any], hint: str) -> Fault:
    what = (
        f"{accuracy['metric']} falls from {accuracy['float']:.4f} to {accuracy['quantized']:.4f}, by"
        f" {accuracy['drop']:.4f}; {accuracy['max_drop']:g} is accepted"
    )
    return Fault("quantize.accuracy.max_drop", what, hint)


def _chance(accuracy: Mapping[str, Any], evaluation: Mapping[str, Any]) -> list[str]:
    """A warning where a budget is smaller than what the images can tell from chance."""
    (one,) = evaluation["differences"]
    unsure = one["value"] - one["low"]
    if accuracy["max_drop"] >= unsure:
        return []
    warning = (
        f"quantize.accuracy.max_drop: {accuracy['max_drop']:g} is less than {evaluation['num_images']} images can tell"
        f" from chance, which is {unsure:.4f} here: evaluate on more images"
    )
    log.warning(warning)
    return [warning]


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
