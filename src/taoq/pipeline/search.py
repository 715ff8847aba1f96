# SPDX-License-Identifier: Apache-2.0
"""Search for the plan that quantizes most within an accuracy budget: bisect a ranking by noise, then add units.

Nothing is measured here: the search proposes a choice and is sent what it loses. The noise of layers adds up, nearly,
because quantization errors of different layers are hardly correlated. So the ranking by noise per amount (the greedy
order of the knapsack problem) is a good first guess, and the true metric decides.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field

from taoq.plain import JsonObject

Choice = Mapping[str, str]
"""The format of each unit that is quantized; a unit is a layer, or a group of layers."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A unit in one format.

    Attributes:
        unit: Name of the layer or group.
        dtype: The format.
        amount: What it adds to the goal: multiply-accumulates, or bytes.
        noise: Noise power over signal power at the outputs of the network, with only this unit quantized.
    """

    unit: str
    dtype: str
    amount: int
    noise: float


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A choice that was measured.

    Attributes:
        choice: The choice.
        drop: What it loses of the metric.
        share: The part of the total amount that it quantizes, 0..1.
        within: Whether the drop is within the budget.
        what: The step of the search.
    """

    choice: Choice
    drop: float
    share: float
    within: bool
    what: str


Search = Generator[Choice, float | None, tuple[Trial, ...]]
"""Yields choices, is sent what each loses, and returns all trials in order."""


def within(drop: float, max_drop: float) -> bool:
    """Return whether a drop is accepted. Figures are float32, in which 0.97 - 0.96 is more than 0.01."""
    return drop <= max_drop + 1e-6


def search(candidates: Sequence[Candidate], *, max_drop: float, total: int) -> Search:
    """Propose choices to measure; call `best` on the trials that are returned.

    Send the drop of each choice. Send None to stop: the search then ends with the trials that it has.

    Args:
        candidates: Every unit, in every format that it may have.
        max_drop: The budget.
        total: The amount of the whole network; shares are relative to it.
    """
    formats: dict[str, list[Candidate]] = {}
    for candidate in sorted(candidates, key=lambda candidate: candidate.noise):
        formats.setdefault(candidate.unit, []).append(candidate)
    ranking = sorted(formats, key=lambda unit: formats[unit][0].noise / max(formats[unit][0].amount, 1))
    searcher = _Searcher(formats, max_drop, total)
    choice = yield from searcher.bisect(ranking)
    remaining = sorted((unit for unit in ranking if unit not in choice), key=lambda unit: formats[unit][0].noise)
    half = len(remaining) // 2  # all of them at once are known not to fit
    choice = yield from searcher.add(choice, remaining[:half])
    yield from searcher.add(choice, remaining[half:])
    return tuple(searcher.trials)


@dataclass
class _Searcher:
    """The trials so far, and the steps that add to them.

    Attributes:
        formats: The formats of each unit, that with the least noise first.
        max_drop: The budget.
        total: The amount of the whole network.
        trials: What was measured.
    """

    formats: Mapping[str, Sequence[Candidate]]
    max_drop: float
    total: int
    trials: list[Trial] = field(default_factory=list)

    def attempt(self, choice: Choice, what: str) -> Generator[Choice, float | None, bool]:
        """Return whether a choice is within the budget. No choice is after the search was told to stop."""
        earlier = next((trial for trial in self.trials if trial.choice == choice), None)
        if earlier is not None:
            return earlier.within
        drop = yield choice
        if drop is None:
            return False
        share = sum(self.formats[unit][0].amount for unit in choice) / (self.total or 1)
        accepted = within(drop, self.max_drop)
        self.trials.append(Trial(choice=choice, drop=drop, share=share, within=accepted, what=what))
        return accepted

    def bisect(self, ranking: Sequence[str]) -> Generator[Choice, float | None, Choice]:
        """Return the largest start of a ranking that bisection finds within the budget."""
        if (yield from self.attempt(self.in_best_formats(ranking), "everything")):
            return self.in_best_formats(ranking)
        good, bad = 0, len(ranking)
        while bad - good > 1:
            middle = (good + bad) // 2
            choice = self.in_best_formats(ranking[:middle])
            if (yield from self.attempt(choice, f"all except the worst {len(ranking) - middle}")):
                good = middle
            else:
                bad = middle
        return self.in_best_formats(ranking[:good])

    def add(self, choice: Choice, units: Sequence[str]) -> Generator[Choice, float | None, Choice]:
        """Return a choice with as many of these units as fit: all of them, or else what fits of each half."""
        if not units:
            return choice
        larger = {**choice, **self.in_best_formats(units)}
        if (yield from self.attempt(larger, f"{len(units)} more")):
            return larger
        if len(units) > 1:
            half = len(units) // 2
            choice = yield from self.add(choice, units[:half])
            return (yield from self.add(choice, units[half:]))
        (unit,) = units
        for candidate in self.formats[unit][1:]:
            larger = {**choice, unit: candidate.dtype}
            if (yield from self.attempt(larger, f"{unit} in {candidate.dtype}")):
                return larger
        return choice

    def in_best_formats(self, units: Sequence[str]) -> Choice:
        """Return units, each in its format with the least noise."""
        return {unit: self.formats[unit][0].dtype for unit in units}


def best(trials: Sequence[Trial]) -> Trial | None:
    """Return the trial within the budget that quantizes most, at equal shares with the least drop; None without one."""
    fitting = [trial for trial in trials if trial.within and trial.choice]
    return max(fitting, key=lambda trial: (trial.share, -trial.drop)) if fitting else None


@dataclass(frozen=True, kw_only=True)
class EvaluatedPlan:
    """A trial of a search, for the report.

    Attributes:
        layers: Number of quantized layers.
        share: The part of the goal that is quantized, 0..1.
        metric: The figure.
        drop: What it loses.
        within: Whether the drop is within the budget.
        what: The step of the search.
    """

    layers: int
    share: float
    metric: float
    drop: float
    within: bool
    what: str


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The result of a search.

    Attributes:
        maximize: The goal: macs, or bytes.
        max_drop: The budget.
        metric: Name of the figure.
        evaluations: The plans that were evaluated, in order.
        share: The part of the goal that the chosen plan quantizes.
        plan: The layers and formats of the chosen plan, in one line.
    """

    maximize: str
    max_drop: float
    metric: str
    evaluations: tuple[EvaluatedPlan, ...]
    share: float
    plan: str

    def to_json(self) -> JsonObject:
        """Return it as in reports."""
        return {**vars(self), "evaluations": [vars(entry) for entry in self.evaluations]}
