# SPDX-License-Identifier: Apache-2.0
"""analyze: which layers hurt. All are ranked by what they do to the outputs; the true metric confirms the worst."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from taoq.actions import others
from taoq.actions.analysis import FILE, Evaluations, noise, noises, open_notes
from taoq.actions.float_model import choose_backend, show_plan
from taoq.actions.measure import figure_of
from taoq.actions.results import exact_patterns, staged, write_experiment
from taoq.actions.trials import Trials, Unit, calibrate
from taoq.artifact import versions
from taoq.console import show
from taoq.pages import page
from taoq.quantization.plan import LayerPlan
from taoq.quantization.sqnr import sqnr
from taoq.spec import SpecSource, load_spec
from taoq.status import Status, run_status
from taoq.tasks.base import Task
from taoq.tasks.sections import AnalyzeSpec

log = logging.getLogger(__name__)


def run(task: Task[Any], source: SpecSource) -> None:
    """Rank the layers that a spec would quantize; write analysis.json and analysis.html."""
    spec = load_spec(source, task.spec, unused=task.unused, not_needed=others("analyze", "quantize"))
    section: AnalyzeSpec = spec.analyze
    backend, warnings, directory = choose_backend(task, spec, "analyze")
    figure = figure_of(task, spec, section.metric, "analyze.metric")
    with run_status(directory, task.name, "analyze") as status:
        started = time.monotonic()
        trials = calibrate(task, spec, backend, warnings, num_samples=section.num_samples, groups=section.groups)
        show_plan(trials.plan, spec.quantize, backend)
        notes = open_notes(directory / FILE, trials.key)
        results = analyze(trials, Evaluations(trials=trials, notes=notes, figure=figure), status)
        results |= {
            "seconds": round(time.monotonic() - started, 3),
            "command": source.command,
            "versions": versions((*backend.libraries, *task.libraries)),
        }
        with staged(directory) as stage:
            (stage / "analysis.html").write_text(page("analyze", results), encoding="utf-8")
            write_experiment(stage / "experiment.yaml", spec)
        notes.finish(results)
    _show(results)
    print(f"results: {directory / FILE}, {directory / 'analysis.html'}")


def analyze(trials: Trials, evaluations: Evaluations, status: Status) -> dict[str, Any]:
    """What each unit does to the outputs, and the worst of them to the metric.

    Args:
        trials: The calibrated model.
        evaluations: The true metric.
        status: Gets a line for each part that is done.
    """
    section: AnalyzeSpec = trials.spec.analyze
    notes = evaluations.notes
    found = noises(trials, notes)
    # as the rules are written, a unit has one format
    ranking = sorted(trials.units, key=lambda unit: found[unit.name, _dtype(unit)], reverse=True)
    status.write("RUNNING", f"Ranked {len(ranking)} layers or groups.")
    curve, skipped, certain = _curve(trials, evaluations, ranking)
    before, after = evaluations.of(()), evaluations.of(_items(ranking))
    rows: list[dict[str, Any]] = []
    for position, unit in enumerate(ranking):
        row = {
            "name": unit.name,
            "layers": list(unit.layers),
            "dtype": _dtype(unit),
            "macs": unit.macs,
            "bytes": unit.bytes,
            "sqnr": sqnr(1.0, found[unit.name, _dtype(unit)]),
            "sqnr_all_but": None,
            "metric": None,
            "metric_all_but": None,
        }
        if position < section.confirm:
            alone, all_but = evaluations.of(_items([unit])), _items([one for one in ranking if one is not unit])
            row["sqnr_all_but"] = sqnr(1.0, noise(trials, notes, all_but))
            row["metric"] = alone
            row["metric_all_but"] = evaluations.of(all_but)
            status.write("RUNNING", f"Confirmed {unit.name}.", {evaluations.figure: alone})
        rows.append(row)
    return {
        "task": trials.task.name,
        "backend": trials.backend.name,
        "model": trials.spec.quantize.model_path,
        "metric": evaluations.figure,
        "num_samples": sum(len(next(iter(inputs.values()))) for inputs in trials.sample),
        "num_images": trials.task.evaluation_batches(trials.spec).num_samples,
        "float": before,
        "all": {
            "sqnr": sqnr(1.0, noise(trials, notes, _items(ranking))),
            "metric": after,
            "drop": before - after,
        },
        "layers": sum(len(unit.layers) for unit in ranking),
        "macs": sum(trials.macs.values()),
        "units": rows,
        "curve": curve,
        "advice": advice(skipped, certain=certain),
        "skip_names": exact_patterns(name for unit in ranking[:skipped] for name in unit.layers),
    }


def advice(left_out: int, *, certain: bool) -> str:
    """What the curve says of the layers to leave out.

    Args:
        left_out: How many there are.
        certain: Whether a loss is certain without them.
    """
    if not certain:
        return "without them the loss is not certain" if left_out else "no layer has to be left out: no loss is certain"
    if left_out:
        return "the best of what was tried: without them the loss is still certain"
    return "the loss is certain, and leaving layers out did not make it smaller"


def _curve(trials: Trials, evaluations: Evaluations, ranking: Sequence[Unit]) -> tuple[list[dict[str, Any]], int, bool]:
    """The metric without the worst 0, 1, 2, 4, 8, ... units, how many are best left out, and if a loss is certain then.

    Those are the fewest whose absence makes the loss uncertain: its 95 % interval has zero in it. Where none do, those
    with the best metric.
    """
    counts = [0, *(2**power for power in range(len(ranking).bit_length()) if 2**power < len(ranking))]
    whole_macs, whole_bytes = sum(trials.macs.values()), sum(trials.bytes.values())
    points: list[dict[str, Any]] = []
    for count in counts:
        kept = ranking[count:]
        certain = evaluations.loss_is_certain(_items(kept))
        points.append(
            {
                "left_out": count,
                "layers": sum(len(unit.layers) for unit in kept),
                "macs_share": sum(unit.macs for unit in kept) / whole_macs if whole_macs else 0.0,
                "bytes_share": sum(unit.bytes for unit in kept) / whole_bytes if whole_bytes else 0.0,
                "metric": evaluations.of(_items(kept)),
            }
        )
        if not certain:
            return points, count, False
    best = max(points, key=lambda point: (point["metric"], -point["left_out"]))
    return points, int(best["left_out"]), True


def _items(units: Sequence[Unit]) -> list[LayerPlan]:
    return [item for unit in units for item in unit.formats[_dtype(unit)]]


def _dtype(unit: Unit) -> str:
    return next(iter(unit.formats))


def _show(results: Mapping[str, Any]) -> None:
    figure = results["metric"]
    table = Table(
        title=f"worst of {len(results['units'])} layers or groups: outputs on {results['num_samples']} images,"
        f" {figure} on {results['num_images']}"
    )
    table.add_column("layer or group", overflow="fold")
    table.add_column("format")
    for column in ("SQNR dB", "all but it", figure, "all but it", "multiply-accumulates"):
        table.add_column(column, justify="right")
    for row in results["units"][:20]:
        share = f"{100 * row['macs'] / results['macs']:.1f} %" if results["macs"] else ""
        decibel = [f"{row[key]:.1f}" if row[key] is not None else "" for key in ("sqnr", "sqnr_all_but")]
        values = [f"{row[key]:.4f}" if row[key] is not None else "" for key in ("metric", "metric_all_but")]
        table.add_row(row["name"], row["dtype"], *decibel, *values, share)
    show(table)
    print(f"{figure}: float {results['float']:.4f}, all quantized {results['all']['metric']:.4f}")
    for point in results["curve"][1:]:
        print(
            f"  without the worst {point['left_out']}: {point['metric']:.4f}, {100 * point['macs_share']:.1f} % of the"
            " multiply-accumulates quantized"
        )
    if results["skip_names"]:
        print(f"quantize.skip_names: {json.dumps(results['skip_names'])}")
    print(results["advice"])
