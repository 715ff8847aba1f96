# SPDX-License-Identifier: Apache-2.0
"""The analysis of a calibrated model: what each of its units does to the outputs, kept in a file as it is found."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from taoq.actions.measure import measure
from taoq.actions.results import replace_text
from taoq.actions.trials import EVALUATION, Trials
from taoq.bootstrap import difference
from taoq.errors import Fault, SpecError
from taoq.quantization.plan import LayerPlan, described
from taoq.status import steps
from taoq.tasks.base import Metric

log = logging.getLogger(__name__)

FILE = "analysis.json"
_NOISE = "noise, "  # what a finding is called, before the digest of its layers
_RESAMPLES = 200  # enough to say on which side of zero an interval is


@dataclass(frozen=True)
class Notes:
    """What was found so far. A file beside the analysis keeps it: an interrupted run goes on where it was.

    Attributes:
        path: The file of the finished analysis.
        key: What the findings depend on.
        found: The findings, by what was asked.
    """

    path: Path
    key: Mapping[str, str]
    found: dict[str, float] = field(default_factory=dict)

    def get(self, asked: str, find: Callable[[], float]) -> float:
        """A finding: known, or found now and written down."""
        if asked not in self.found:
            self.found[asked] = find()
            replace_text(_unfinished(self.path), self._text({}))
        return self.found[asked]

    def finish(self, results: Mapping[str, Any]) -> None:
        """Write the analysis: the findings, and what was made of them."""
        replace_text(self.path, self._text(results))
        _unfinished(self.path).unlink(missing_ok=True)

    def _text(self, results: Mapping[str, Any]) -> str:
        return json.dumps({"key": dict(self.key), "found": self.found, **results}, indent=1) + "\n"


def open_notes(path: Path, key: Mapping[str, str]) -> Notes:
    """The notes of earlier runs, finished or not, as far as they are of the same."""
    notes = Notes(path, key)
    for file in (path, _unfinished(path)):
        kept = _read(file)
        if kept is None:
            continue
        found, differing = _fitting(kept, key)
        if differing:
            what = "all but the ranking" if found else "everything"
            log.info("%s: is of another %s: %s is measured again", file, ", ".join(differing), what)
        if found:
            log.info("%s: %d measurements are taken from it", file, len(found))
        notes.found.update(found)
    return notes


def _unfinished(path: Path) -> Path:
    return path.with_suffix(f".unfinished{path.suffix}")


def given_notes(path: Path, key: Mapping[str, str], where: str) -> Mapping[str, float]:
    """The findings of a file that a spec names.

    Args:
        path: The file.
        key: What the findings must be of.
        where: The field that names it.

    Raises:
        SpecError: There is no such file, it is something else, or of another model.
    """
    kept = _read(path)
    if kept is None:
        hint = "name the analysis.json of taoq <task> analyze, or leave it out"
        raise SpecError(Fault(where, f"{path} is no analysis", hint))
    found, differing = _fitting(kept, key)
    if differing and not found:
        hint = "run taoq <task> analyze on this model, or leave it out"
        raise SpecError(Fault(where, f"{path} is of another {', '.join(differing)}", hint))
    return found


def _fitting(
    kept: tuple[Mapping[str, str], Mapping[str, float]], key: Mapping[str, str]
) -> tuple[Mapping[str, float], list[str]]:
    """The findings that are good for a key, and in what the keys differ.

    With another evaluation the ranking is the same, the metric is not.
    """
    before, found = kept
    differing = [name for name in {**before, **key} if before.get(name) != key.get(name)]
    if not differing:
        return found, []
    if differing == [EVALUATION]:
        return {asked: value for asked, value in found.items() if asked.startswith(_NOISE)}, differing
    return {}, differing


def _read(path: Path) -> tuple[Mapping[str, str], Mapping[str, float]] | None:
    """Key and findings of a file; None if there is none, or it is something else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        key = {str(name): str(value) for name, value in data["key"].items()}
        found = {str(name): float(value) for name, value in data["found"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return key, found


def noises(trials: Trials, notes: Notes) -> dict[tuple[str, str], float]:
    """Noise of each unit alone, by unit and format."""
    units = [(unit, dtype) for unit in trials.units for dtype in unit.formats]
    return {
        (unit.name, dtype): noise(trials, notes, unit.formats[dtype])
        for unit, dtype in steps(units, len(units), "ranking layers")
    }


def noise(trials: Trials, notes: Notes, items: Sequence[LayerPlan]) -> float:
    """Noise power over signal power of the outputs with these layers quantized."""
    return notes.get(f"{_NOISE}{_short(items)}", lambda: trials.noise(items))


@dataclass(frozen=True, kw_only=True)
class Evaluations:
    """The true metric of parts of a plan, on the evaluation data.

    Attributes:
        trials: The calibrated model.
        notes: Where the findings go.
        figure: The figure of the task that counts.
    """

    trials: Trials
    notes: Notes
    figure: str

    @functools.cached_property
    def reference(self) -> Metric:
        """Of the float model."""
        return self._measure(())

    def of(self, items: Sequence[LayerPlan]) -> float:
        """The figure with these layers quantized."""
        if self._asked(items) not in self.notes.found:
            self._measure(items)
        return self.notes.found[self._asked(items)]

    def loss_is_certain(self, items: Sequence[LayerPlan]) -> bool:
        """Whether the 95 % interval of the difference to float is all below zero."""

        def find() -> float:
            return difference(self.reference, self._measure(items), self.figure, resamples=_RESAMPLES).high

        return self.notes.get(f"{self.figure}, highest difference, {_short(items)}", find) < 0

    def _asked(self, items: Sequence[LayerPlan]) -> str:
        return f"{self.figure}, {_short(items)}"

    def _measure(self, items: Sequence[LayerPlan]) -> Metric:
        """The metric with these layers quantized; its figure is written down."""
        with tempfile.TemporaryDirectory() as folder:
            model = self.trials.runtime(items, Path(folder))
            found = measure(self.trials.task, self.trials.spec, [model], self.figure)
        self.notes.get(self._asked(items), lambda: found.figures[0][self.figure])
        return found.metrics[0]


def _short(items: Sequence[LayerPlan]) -> str:
    """A choice as a digest: hundreds of names make a long key."""
    return f"{len(items)} layers {hashlib.sha256(described(items).encode()).hexdigest()[:16]}"
