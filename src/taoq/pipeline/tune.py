# SPDX-License-Identifier: Apache-2.0
"""Quantize as much as an accuracy budget allows: calibrate once, measure plans, write the artifact of the best plan."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

from taoq.errors import Fault, RequirementNotMet, SpecError, did_you_mean
from taoq.pipeline.analyze import Measurements, ignore
from taoq.pipeline.evaluate import figure_named
from taoq.pipeline.findings import FILE, given_findings, open_findings
from taoq.pipeline.prepare import Checked, check, prepare
from taoq.pipeline.quantize import quantize
from taoq.pipeline.results.quantize import AccuracyCheck, QuantizeResult
from taoq.pipeline.search import Candidate, Choice, EvaluatedPlan, SearchResult, Trial, best, search
from taoq.pipeline.sensitivity import Trials, Unit, calibrate
from taoq.quantization.backends.base import AnyBackend, M
from taoq.quantization.plan import exact_patterns
from taoq.quantization.spec import AccuracySpec, LayerSpec, QuantizeSpec
from taoq.quantization.types import LayerFormat, LayerPlan
from taoq.tasks.sections import TaskSpec

log = logging.getLogger(__name__)

_WHERE = "quantize.accuracy"
_ARTIFACTS = 3
"""Greatest number of plans that become artifacts before the search gives up."""
Formats = tuple[LayerFormat, ...]
"""A plan as a hashable value: its layers and their formats."""


@dataclass(frozen=True, kw_only=True)
class Tuner(Generic[M]):
    """A calibrated model with the measurements of its plans.

    Attributes:
        checked: The experiment.
        budget: The section `quantize.accuracy`.
        trials: The calibrated model.
        measurements: Noise and metric of plans.
        noise: Noise of each unit alone, by name of the unit and format.
    """

    checked: Checked
    budget: AccuracySpec
    trials: Trials[M]
    measurements: Measurements[M]
    noise: Mapping[tuple[str, str], float]

    @property
    def units(self) -> Mapping[str, Unit]:
        """The units to choose from, by name."""
        return {unit.name: unit for unit in self.trials.units}

    def items(self, choice: Choice) -> list[LayerPlan]:
        """Return the layers of a choice, in model order."""
        return [item for unit in self.trials.units if unit.name in choice for item in unit.formats[choice[unit.name]]]

    def formats(self, choice: Choice) -> Formats:
        """Return the layers of a choice with their formats, as a hashable value."""
        return tuple(item.format for item in self.items(choice))


def tune(
    checked: Checked, directory: Path, *, command: str = "", observe: Callable[[SearchResult], None] = ignore
) -> QuantizeResult:
    """Search for the plan that quantizes the most within the budget, and write its artifact.

    The loss of the artifact decides. It may exceed the loss in the trial of the plan if the two compute differently: a
    float16 graph, for example, is tried in float32. The loss of the artifact then replaces that of the trial, and the
    search continues. Only an artifact that is within the budget is written.

    Args:
        checked: The experiment, whose rules name the layers that may be quantized.
        directory: Folder for analysis.json and the artifact.
        command: Command line, for the report.
        observe: Called with the result of each search, before the artifact is made.

    Raises:
        RequirementNotMet: If no artifact is within the budget.
        SpecError: If a field of `quantize.accuracy` is wrong.
    """
    tuner = start_search(checked, directory)
    losses: dict[Formats, float] = {}
    tried: tuple[Formats, ...] = ()
    accuracy: AccuracyCheck | None = None
    for _ in range(_ARTIFACTS):
        trials, tried = run_search(tuner, losses, tried)
        tuner.measurements.findings.finish({})
        chosen = best(trials)
        searched = search_result(tuner, trials, chosen)
        observe(searched)
        if chosen is None:
            raise RequirementNotMet(_nothing_fits(tuner, trials))
        tuned = check(checked.experiment.rebind(tuned_spec(tuner, chosen.choice)), directory)
        result = quantize(prepare(tuned), directory, command=command, search=searched, keep_over_budget=False)
        accuracy = result.accuracy
        assert accuracy is not None
        if accuracy.met:
            return result
        losses[tuner.formats(chosen.choice)] = accuracy.drop
        log.info("the artifact loses more than the trial of its plan did: searching on")
    assert accuracy is not None
    raise RequirementNotMet(accuracy.fault("nothing was written: raise max_drop, or give other formats"))


def start_search(checked: Checked, directory: Path) -> Tuner[Any]:
    """Calibrate once for all plans of a search, and measure the noise of each unit.

    Raises:
        SpecError: If a field of `quantize.accuracy` is wrong.
    """
    experiment = checked.experiment
    budget, section = experiment.spec.quantize.accuracy, experiment.spec.analyze
    assert budget is not None
    figure = figure_named(experiment, budget.metric, f"{_WHERE}.metric")
    _check_dtypes(budget, checked.backend)
    trials = calibrate(checked, num_samples=section.num_samples, groups=section.groups, dtypes=budget.dtypes)
    findings = open_findings(directory / FILE, trials.key)
    if budget.analysis:
        findings.values.update(given_findings(Path(budget.analysis), trials.key, f"{_WHERE}.analysis"))
    measurements = Measurements(trials=trials, findings=findings, figure=figure)
    return Tuner(
        checked=checked,
        budget=budget,
        trials=trials,
        measurements=measurements,
        noise=measurements.noise_of_units(),
    )


def run_search(
    tuner: Tuner[M], losses: Mapping[Formats, float], tried: tuple[Formats, ...]
) -> tuple[tuple[Trial, ...], tuple[Formats, ...]]:
    """Measure the choices that a search proposes.

    Args:
        tuner: The calibrated model with its measurements.
        losses: Losses of artifacts, by plan; they take precedence over the losses in trials.
        tried: Plans that earlier searches evaluated; `max_evaluations` limits the plans of all searches together.

    Returns:
        The trials of this search, and the plans that all searches evaluated.
    """
    budget, measurements = tuner.budget, tuner.measurements
    before = measurements.metric(())
    figure = measurements.figure
    log.info("searching: %s of the float model is %.4f, %g less is accepted", figure, before, budget.max_drop)
    candidates = [
        Candidate(unit=name, dtype=dtype, amount=_amount(tuner.units[name], budget.maximize), noise=noise)
        for (name, dtype), noise in tuner.noise.items()
    ]
    proposals = search(candidates, max_drop=budget.max_drop, total=_total_amount(tuner))
    drop: float | None = None
    while True:
        try:
            choice = proposals.send(drop)
        except StopIteration as end:
            return end.value, tried
        formats = tuner.formats(choice)
        if formats not in tried:
            if len(tried) >= budget.max_evaluations:
                drop = None
                continue
            tried = (*tried, formats)
        drop = losses[formats] if formats in losses else before - measurements.metric(tuner.items(choice))
        log.info("tried %d of %d layers or groups: %s falls by %.4f", len(choice), len(tuner.units), figure, drop)


def search_result(tuner: Tuner[M], trials: tuple[Trial, ...], chosen: Trial | None) -> SearchResult:
    """Summarize a search for the report; `chosen` is None if no plan is within the budget."""
    before, budget = tuner.measurements.metric(()), tuner.budget
    return SearchResult(
        maximize=budget.maximize,
        max_drop=budget.max_drop,
        metric=tuner.measurements.figure,
        evaluations=tuple(
            EvaluatedPlan(
                layers=len(tuner.items(trial.choice)),
                share=trial.share,
                metric=before - trial.drop,
                drop=trial.drop,
                within=trial.within,
                what=trial.what,
            )
            for trial in trials
        ),
        share=chosen.share if chosen else 0.0,
        plan="; ".join(map(str, tuner.formats(chosen.choice))) if chosen else "nothing",
    )


def tuned_spec(tuner: Tuner[M], choice: Choice) -> TaskSpec:
    """Return the spec of a choice: it adds a rule for each layer whose format changes, and skips those left float."""
    spec = tuner.checked.experiment.spec
    section = spec.quantize
    by_rule = {item.layer.name: item for item in tuner.trials.prepared.plan.quantized}
    chosen = {item.layer.name: item for item in tuner.items(choice)}
    rules = [
        _rule(section, item)
        for name, item in chosen.items()
        if name not in by_rule or item.format != by_rule[name].format
    ]
    left_out = [name for name in by_rule if name not in chosen]
    return dataclasses.replace(
        spec,
        quantize=dataclasses.replace(
            section,
            layers=[*section.layers, *rules],
            skip_names=[*section.skip_names, *exact_patterns(left_out)],
            accuracy=AccuracySpec(max_drop=tuner.budget.max_drop, metric=tuner.budget.metric),
        ),
    )


def _rule(section: QuantizeSpec, item: LayerPlan) -> LayerSpec:
    """Copy the rule that decides a layer, for that layer alone and with the formats of the choice."""
    assert item.rule is not None
    rule = section.layers[item.rule.index]
    weights, activations = (
        dataclasses.replace(tensor, dtype=(scheme.requested or scheme.dtype).name) if tensor and scheme else None
        for tensor, scheme in ((rule.weights, item.weights), (rule.activations, item.activations))
    )
    return LayerSpec(module_name=exact_patterns([item.layer.name])[0], weights=weights, activations=activations)


def _amount(unit: Unit, maximize: str) -> int:
    return unit.macs if maximize == "macs" else unit.bytes


def _total_amount(tuner: Tuner[M]) -> int:
    amounts = tuner.trials.macs if tuner.budget.maximize == "macs" else tuner.trials.bytes
    return sum(amounts.values())


def _check_dtypes(budget: AccuracySpec, backend: AnyBackend) -> None:
    names = [dtype.name for dtype in backend.capability.weights.dtypes]
    faults = [
        Fault(
            f"{_WHERE}.dtypes[{index}]",
            f"backend {backend.capability.name} has no {dtype} weights",
            did_you_mean(dtype, names, "choose from " + ", ".join(names)),
        )
        for index, dtype in enumerate(budget.dtypes)
        if dtype not in names
    ]
    if faults:
        raise SpecError(*faults)


def _nothing_fits(tuner: Tuner[M], trials: tuple[Trial, ...]) -> Fault:
    before, figure = tuner.measurements.metric(()), tuner.measurements.figure
    nearest = min((trial for trial in trials if trial.choice), key=lambda trial: trial.drop)
    quantized = f"{len(nearest.choice)} of {len(tuner.units)} layers or groups"
    what = (
        f"no plan of {len(trials)} keeps {figure} within {tuner.budget.max_drop:g} of {before:.4f};"
        f" the best found loses {nearest.drop:.4f} with {quantized} quantized"
    )
    hint = "raise max_drop or quantize.accuracy.max_evaluations, or give other formats in quantize.accuracy.dtypes"
    return Fault(f"{_WHERE}.max_drop", what, hint)
