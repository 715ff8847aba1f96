# SPDX-License-Identifier: Apache-2.0
"""quantize: quantize a checkpoint into an artifact."""

from __future__ import annotations

import logging
from pathlib import Path

from taoq.actions.base import Show, load_experiment
from taoq.errors import Notice, RequirementNotMet
from taoq.pipeline.prepare import Checked, Prepared, check, prepare
from taoq.pipeline.quantize import PAGE, TUNED, quantize
from taoq.pipeline.results.quantize import QuantizeResult
from taoq.pipeline.staging import results_dir
from taoq.pipeline.tune import tune
from taoq.quantization.backends.base import M
from taoq.quantization.spec import AccuracySpec
from taoq.quantization.types import QuantizationPlan
from taoq.spec.fields import changed
from taoq.spec.source import SpecSource
from taoq.status import Status, run_status
from taoq.tasks.base import S, Task
from taoq.views.pages import megabytes
from taoq.views.tables import error_table, evaluation_table, plan_table, search_table

log = logging.getLogger(__name__)

_SEARCH_FIELDS = ("maximize", "dtypes", "max_evaluations", "analysis")
"""Fields of `quantize.accuracy` that only have an effect with `action: search`."""


def run(task: Task[S], source: SpecSource, show: Show, *, dry_run: bool = False) -> QuantizeResult | QuantizationPlan:
    """Quantize the checkpoint of a spec.

    Args:
        task: The task.
        source: The spec file and its overrides.
        show: Receives what is printed.
        dry_run: Show and return the plan only; open no data and write nothing.

    Raises:
        RequirementNotMet: If the loss exceeds `quantize.accuracy.max_drop`. With `action: check` the artifact is
            written all the same, marked as not meeting its budget.
    """
    experiment = load_experiment(task, source, "quantize")
    directory = results_dir(experiment.spec, "quantize")
    checked = check(experiment, directory)
    budget = experiment.spec.quantize.accuracy
    _note_unused(budget)
    if dry_run:
        plan = _show_plan(prepare(checked), show).plan
        log.info("dry run: nothing was calibrated, nothing was written")
        return plan
    with run_status(directory, task.name, "quantize") as status:
        if budget and budget.action == "search":
            result = _search(checked, directory, source.command, show)
        else:
            result = quantize(_show_plan(prepare(checked), show), directory, command=source.command)
        _show_result(result, directory, status, show)
        if result.evaluation:
            status.running("Evaluation metrics.", task.kpi(result.evaluation.quantized_figures))
        if result.accuracy and not result.accuracy.met:
            hint = "the artifact is kept and marked; accuracy.action: search looks for the layers to leave float"
            raise RequirementNotMet(result.accuracy.fault(hint), result=result)
    return result


def _search(checked: Checked, directory: Path, command: str, show: Show) -> QuantizeResult:
    result = tune(checked, directory, command=command, observe=lambda search: show(search_table(search)))
    show(plan_table(result.plan))
    return result


def _show_plan(prepared: Prepared[M], show: Show) -> Prepared[M]:
    show(plan_table(prepared.plan))
    capability = prepared.backend.capability
    log.info("%s is for %s", capability.name, capability.target)
    return prepared


def _note_unused(budget: AccuracySpec | None) -> None:
    """Warn about search fields that are set without `action: search`."""
    if budget and budget.action != "search":
        for name in changed(budget, _SEARCH_FIELDS):
            log.warning(Notice(f"quantize.accuracy.{name}", "has no effect: it is for action: search"))


def _show_result(result: QuantizeResult, directory: Path, status: Status, show: Show) -> None:
    manifest, plan = result.manifest, result.plan
    kpi = {
        "layers_quantized": len(plan.quantized),
        "size_mb": manifest.size / 1e6,
        "float_size_mb": manifest.float_size / 1e6,
    }
    status.running("Quantized.", kpi)
    show(error_table(result.layers))
    images = manifest.calibration.get("num_samples")
    calibrated = f" with {images} calibration images" if images else ""
    show(
        f"quantized {len(plan.quantized)} of {len(plan.quantizable)} layers{calibrated}"
        f" in {result.seconds:.1f} s on {result.device};"
        f" {megabytes(manifest.float_size)} as float32, {megabytes(manifest.size)} now"
    )
    if result.evaluation:
        show(evaluation_table(result.evaluation))
    show(f"report: {directory / PAGE}\nartifact: {directory}")
    if result.search:
        show(f"plan: {directory / TUNED}; quantize runs it as it is")
