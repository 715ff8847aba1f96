# SPDX-License-Identifier: Apache-2.0
"""analyze: rank the layers by the noise that quantizing them adds to the outputs; check the worst with the metric."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic

from taoq.network import batch_size
from taoq.pipeline.artifacts import versions
from taoq.pipeline.evaluate import measure
from taoq.pipeline.findings import FILE, Finding, Findings, digest_of, open_findings
from taoq.pipeline.intervals import difference
from taoq.pipeline.prepare import Checked
from taoq.pipeline.results.analyze import AnalyzeResult, CurvePoint, RankedUnit
from taoq.pipeline.sensitivity import Trials, Unit, calibrate
from taoq.pipeline.staging import staged
from taoq.quantization.backends.base import M
from taoq.quantization.plan import exact_patterns
from taoq.quantization.sqnr import sqnr
from taoq.quantization.types import LayerPlan, QuantizationPlan, share_of
from taoq.status import track
from taoq.tasks.base import Metric

PAGE = "analysis.html"
_RESAMPLES = 200  # Enough to tell on which side of zero an interval is.

Progress = Callable[[str, Mapping[str, float]], None]
"""Receives a message and figures for each finished part of a long job."""


def silent(message: str, figures: Mapping[str, float]) -> None:
    """Report no progress."""


def ignore(value: object) -> None:
    """Do nothing with a value that is observed."""


@dataclass(frozen=True, kw_only=True)
class Measurements(Generic[M]):
    """Noise and metric of parts of a plan, each measured only once.

    Attributes:
        trials: The calibrated model.
        findings: The numbers that were measured so far.
        figure: Name of the figure to measure.
    """

    trials: Trials[M]
    findings: Findings
    figure: str

    def noise(self, items: Sequence[LayerPlan]) -> float:
        """Return noise power / signal power of the outputs with only these layers quantized."""
        return self.findings.get(Finding("noise", "", digest_of(items)), lambda: self.trials.noise(items))

    def noise_of_units(self) -> dict[tuple[str, str], float]:
        """Return the noise of each unit alone, by name of the unit and format."""
        units = [(unit, dtype) for unit in self.trials.units for dtype in unit.formats]
        return {
            (unit.name, dtype): self.noise(unit.formats[dtype])
            for unit, dtype in track(units, len(units), "ranking layers")
        }

    def metric(self, items: Sequence[LayerPlan]) -> float:
        """Return the figure with only these layers quantized."""
        finding = self._figure_of(items)
        if finding not in self.findings.values:
            self.measure(items)
        return self.findings.values[finding]

    def loss_is_certain(self, items: Sequence[LayerPlan]) -> bool:
        """Return whether the whole 95 % interval of the difference to float is below zero.

        For a metric without intervals, return whether there is any loss.
        """

        def highest() -> float:
            return difference(self.reference, self.measure(items), self.figure, resamples=_RESAMPLES).highest

        return self.findings.get(Finding("highest_difference", self.figure, digest_of(items)), highest) < 0

    @functools.cached_property
    def reference(self) -> Metric:
        """The metric of the float model."""
        return self.measure(())

    def measure(self, items: Sequence[LayerPlan]) -> Metric:
        """Evaluate the model with only these layers quantized, and save the figure in the findings."""
        measured = measure(self.trials.experiment, [self.trials.runtime(items)], self.figure)
        self.findings.get(self._figure_of(items), lambda: measured.figures[0][self.figure])
        return measured.metrics[0]

    def _figure_of(self, items: Sequence[LayerPlan]) -> Finding:
        return Finding("figure", self.figure, digest_of(items))


def analyze(
    checked: Checked,
    figure: str,
    directory: Path | None,
    *,
    command: str = "",
    progress: Progress = silent,
    observe: Callable[[QuantizationPlan], None] = ignore,
) -> AnalyzeResult:
    """Rank the layers that a spec would quantize.

    Args:
        checked: The experiment.
        figure: Name of the figure to measure.
        directory: Folder for analysis.json, with all measurements, and analysis.html; None writes nothing.
        command: Command line, for the report.
        progress: Called after each part of the work.
        observe: Called with the plan before the measurements.
    """
    started = time.monotonic()
    section = checked.experiment.spec.analyze
    trials = calibrate(checked, num_samples=section.num_samples, groups=section.groups)
    observe(trials.prepared.plan)
    findings = open_findings(directory / FILE if directory else None, trials.key)
    measurements = Measurements(trials=trials, findings=findings, figure=figure)
    result = rank(measurements, progress)
    result = replace(result, seconds=time.monotonic() - started, command=command, directory=directory)
    if directory:
        with staged(directory) as stage:
            stage.write_text(PAGE, result.html())
            stage.write_spec("experiment.yaml", checked.experiment.spec)
            stage.commit()
        findings.finish(result.to_json())
    return result


def rank(measurements: Measurements[M], progress: Progress) -> AnalyzeResult:
    """Measure how each unit affects the outputs, and how the worst units affect the metric."""
    trials = measurements.trials
    experiment, backend = trials.experiment, trials.prepared.backend.capability
    noise = measurements.noise_of_units()
    ranking = sorted(trials.units, key=lambda unit: noise[unit.name, unit.dtype], reverse=True)
    progress(f"Ranked {len(ranking)} layers or groups.", {})
    curve, left_out, certain = _curve(measurements, ranking)
    before, after = measurements.metric(()), measurements.metric(_items(ranking))
    return AnalyzeResult(
        task=experiment.task,
        backend=backend.name,
        model=experiment.spec.quantize.model_path,
        metric=measurements.figure,
        num_samples=sum(map(batch_size, trials.sample)),
        num_images=experiment.evaluation().num_samples,
        float_figure=before,
        all_quantized={
            "sqnr": sqnr(1.0, measurements.noise(_items(ranking))),
            "metric": after,
            "drop": before - after,
        },
        macs=sum(trials.macs.values()),
        units=tuple(_ranked_units(measurements, ranking, noise, progress)),
        curve=curve,
        advice=advice(left_out, certain=certain),
        skip_names=tuple(exact_patterns(name for unit in ranking[:left_out] for name in unit.layers)),
        versions=versions((*backend.libraries, *experiment.libraries)) | experiment.plugins,
    )


def _ranked_units(
    measurements: Measurements[M],
    ranking: Sequence[Unit],
    noise: Mapping[tuple[str, str], float],
    progress: Progress,
) -> list[RankedUnit]:
    """Return a row per unit, with the metric for the first `analyze.confirm` units."""
    confirm = measurements.trials.experiment.spec.analyze.confirm
    rows = []
    for position, unit in enumerate(ranking):
        row = RankedUnit(
            name=unit.name,
            layers=unit.layers,
            dtype=unit.dtype,
            macs=unit.macs,
            bytes=unit.bytes,
            sqnr=sqnr(1.0, noise[unit.name, unit.dtype]),
        )
        if position < confirm:
            remaining = _items([other for other in ranking if other is not unit])
            row = replace(
                row,
                metric=measurements.metric(unit.items),
                sqnr_all_but=sqnr(1.0, measurements.noise(remaining)),
                metric_all_but=measurements.metric(remaining),
            )
            progress(f"Confirmed {unit.name}.", {measurements.figure: row.metric or 0.0})
        rows.append(row)
    return rows


def _curve(measurements: Measurements[M], ranking: Sequence[Unit]) -> tuple[tuple[CurvePoint, ...], int, bool]:
    """Measure the metric without the worst 0, 1, 2, 4, 8, ... units, until the loss is no longer certain.

    A loss is certain if its whole 95 % interval is below zero.

    Returns:
        The points; the number of units to leave out; and whether the loss is still certain without them. The number is
        the first of the series for which the loss is not certain, otherwise the one with the best metric.
    """
    trials = measurements.trials
    counts = [0, *(2**power for power in range(len(ranking).bit_length()) if 2**power < len(ranking))]
    points: list[CurvePoint] = []
    for count in counts:
        items = _items(ranking[count:])
        names = [item.layer.name for item in items]
        certain = measurements.loss_is_certain(items)
        points.append(
            CurvePoint(
                left_out=count,
                layers=len(names),
                macs_share=share_of(names, trials.macs) or 0.0,
                bytes_share=share_of(names, trials.bytes) or 0.0,
                metric=measurements.metric(items),
            )
        )
        if not certain:
            return tuple(points), count, False
    best = max(points, key=lambda point: (point.metric, -point.left_out))
    return tuple(points), best.left_out, True


def advice(left_out: int, *, certain: bool) -> str:
    """Return the advice of the report about the layers to leave out.

    Args:
        left_out: Number of units to leave out.
        certain: Whether the loss is certain without them.
    """
    if not certain:
        return "without them the loss is not certain" if left_out else "no layer has to be left out: no loss is certain"
    if left_out:
        return "the best of what was tried: without them the loss is still certain"
    return "the loss is certain, and leaving layers out did not make it smaller"


def _items(units: Sequence[Unit]) -> list[LayerPlan]:
    return [item for unit in units for item in unit.items]
