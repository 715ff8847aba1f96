# SPDX-License-Identifier: Apache-2.0
"""search: the plan that quantizes most within the accuracy budget of a spec, as a spec."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from taoq.actions.analysis import FILE, Evaluations, given_notes, noises, open_notes
from taoq.actions.measure import figure_of
from taoq.actions.results import exact_patterns
from taoq.actions.trials import Trials, Unit, calibrate
from taoq.console import show
from taoq.errors import Fault, RequirementNotMet, SpecError, did_you_mean
from taoq.quantization.backends.base import Backend
from taoq.quantization.plan import LayerPlan, described
from taoq.quantization.search import Candidate, Choice, Trial, best
from taoq.quantization.search import search as find
from taoq.quantization.spec import AccuracySpec, LayerSpec, QuantizeSpec
from taoq.tasks.base import Task

log = logging.getLogger(__name__)


def search(
    task: Task[Any],
    spec: Any,
    backend: Backend[Any],
    warnings: tuple[str, ...],
    directory: Path,
    known: Mapping[str, float],
    tried: set[str],
) -> tuple[Any, dict[str, Any]]:
    """Find the best plan.

    Args:
        task: The task.
        spec: Its spec; its rules name what may be quantized.
        backend: Its backend.
        warnings: Of the spec.
        directory: Gets analysis.json.
        known: Figures of artifacts, by what `described` says of their layers: they count, not those of the trials.
        tried: What `described` says of the plans that were evaluated before; gets those that are evaluated now.

    Returns:
        The tuned spec, and what the report says of the search; its `plan` is what `described` says of the layers.

    Raises:
        RequirementNotMet: Nothing that was tried is within the budget.
        SpecError: A field of `quantize.accuracy` does not fit.
    """
    section: QuantizeSpec = spec.quantize
    asked = section.accuracy
    assert asked is not None
    where = "quantize.accuracy"
    figure = figure_of(task, spec, asked.metric, f"{where}.metric")
    _check_dtypes(asked, backend)
    trials = calibrate(
        task,
        spec,
        backend,
        warnings,
        num_samples=spec.analyze.num_samples,
        groups=spec.analyze.groups,
        dtypes=asked.dtypes,
    )
    notes = open_notes(directory / FILE, trials.key)
    if asked.analysis:
        notes.found.update(given_notes(Path(asked.analysis), trials.key, f"{where}.analysis"))
    noise = noises(trials, notes)
    evaluations = Evaluations(trials=trials, notes=notes, figure=figure)
    units = {unit.name: unit for unit in trials.units}
    candidates = [
        Candidate(unit=name, dtype=dtype, amount=getattr(units[name], asked.maximize), noise=value)
        for (name, dtype), value in noise.items()
    ]
    before = evaluations.of(())
    log.info("searching: %s of the float model is %.4f, %g less is accepted", figure, before, asked.max_drop)

    def drop_of(choice: Choice) -> float | None:
        items = items_of(units, choice)
        name = described(items)
        if name not in tried and len(tried) >= asked.max_evaluations:
            return None
        tried.add(name)
        drop = before - (known[name] if name in known else evaluations.of(items))
        log.info("tried %d of %d layers or groups: %s falls by %.4f", len(choice), len(units), figure, drop)
        return drop

    whole = sum(getattr(trials, asked.maximize).values())
    found = find(candidates, drop_of, max_drop=asked.max_drop, whole=whole)
    notes.finish({})
    chosen = best(found)
    _show(found, asked, units)
    if chosen is None:
        nearest = min((trial for trial in found if trial.choice), key=lambda trial: trial.drop)
        what = (
            f"no plan of {len(found)} keeps {figure} within {asked.max_drop:g} of {before:.4f}; the best found loses"
            f" {nearest.drop:.4f} with {len(nearest.choice)} of {len(units)} layers or groups quantized"
        )
        hint = "accept more, raise quantize.accuracy.max_evaluations, or give other formats in quantize.accuracy.dtypes"
        raise RequirementNotMet(Fault(f"{where}.max_drop", what, hint))
    return tuned_spec(spec, trials, units, chosen.choice), {
        "maximize": asked.maximize,
        "max_drop": asked.max_drop,
        "metric": figure,
        "evaluations": [
            {
                "layers": len(items_of(units, trial.choice)),
                "share": trial.share,
                "metric": before - trial.drop,
                "drop": trial.drop,
                "within": trial.within,
                "what": trial.what,
            }
            for trial in found
        ],
        "share": chosen.share,
        "plan": described(items_of(units, chosen.choice)),
    }


def items_of(units: Mapping[str, Unit], choice: Choice) -> list[LayerPlan]:
    """The layers of a choice, in model order."""
    return [item for name, unit in units.items() if name in choice for item in unit.formats[choice[name]]]


def tuned_spec(spec: Any, trials: Trials, units: Mapping[str, Unit], choice: Choice) -> Any:
    """The spec with a rule for each layer whose format is not that of its rule, and skip names for those left out."""
    section: QuantizeSpec = spec.quantize
    assert section.accuracy is not None
    by_rule = {item.layer.name: item for item in trials.plan.quantized}
    chosen = {item.layer.name: item for item in items_of(units, choice)}
    rules = [
        _rule(section, item)
        for name, item in chosen.items()
        if name not in by_rule or described([item]) != described([by_rule[name]])
    ]
    left_out = [name for name in by_rule if name not in chosen]
    return dataclasses.replace(
        spec,
        quantize=dataclasses.replace(
            section,
            layers=[*section.layers, *rules],
            skip_names=[*section.skip_names, *exact_patterns(left_out)],
            accuracy=AccuracySpec(max_drop=section.accuracy.max_drop, metric=section.accuracy.metric),
        ),
    )


def _rule(section: QuantizeSpec, item: LayerPlan) -> LayerSpec:
    """The rule that decides a layer, for it alone, with the formats that were chosen."""
    match = re.fullmatch(r"quantize\.layers\[(\d+)\]", item.rule)
    assert match is not None
    rule = section.layers[int(match[1])]
    weights, activations = (
        dataclasses.replace(tensor, dtype=scheme.asked or scheme.dtype) if tensor and scheme else None
        for tensor, scheme in ((rule.weights, item.weights), (rule.activations, item.activations))
    )
    return LayerSpec(module_name=exact_patterns([item.layer.name])[0], weights=weights, activations=activations)


def _check_dtypes(asked: AccuracySpec, backend: Backend[Any]) -> None:
    known = backend.support.weights
    faults = [
        Fault(
            f"quantize.accuracy.dtypes[{index}]",
            f"backend {backend.name} has no {dtype} weights",
            did_you_mean(dtype, known, "choose of " + ", ".join(known)),
        )
        for index, dtype in enumerate(asked.dtypes)
        if dtype not in known
    ]
    if faults:
        raise SpecError(*faults)


def _show(found: Sequence[Trial], asked: AccuracySpec, units: Mapping[str, Unit]) -> None:
    table = Table(title=f"{len(found)} plans were evaluated; {asked.max_drop:g} less is accepted")
    table.add_column("tried", overflow="fold")
    for column in ("layers", asked.maximize, "drop", "within"):
        table.add_column(column, justify="right")
    for trial in found:
        count = len(items_of(units, trial.choice))
        share = f"{100 * trial.share:.1f} %"
        table.add_row(trial.what, str(count), share, f"{trial.drop:+.4f}", "yes" if trial.within else "no")
    show(table)
