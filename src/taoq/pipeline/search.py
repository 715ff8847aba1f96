# SPDX-License-Identifier: Apache-2.0
"""Find the most that can be quantized within a budget: a ranking by noise, bisection over it, then local improvement.

Pure: measurements in, next choice out. Noise of layers adds up, nearly: quantization errors of different layers are
hardly correlated. So the ranking by noise per amount (the greedy order of the knapsack problem) is a good first guess,
and the true metric decides.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

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
        noise: What it alone does to the outputs of the network: noise power over signal power.
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
        share: The part of all amounts that it quantizes, 0..1.
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
    """Whether a drop is accepted; figures are float32, where 0.97 - 0.96 is more than 0.01."""
    return drop <= max_drop + 1e-6


def search(candidates: Sequence[Candidate], *, max_drop: float, whole: int) -> Search:
    """Propose choices to measure; the best is `best` of what is returned.

    Send the drop of each choice; send None once no more may be measured, and the search ends with what it has.

    Args:
        candidates: Every unit in every format that it may have.
        max_drop: The budget.
        whole: The amount of the whole network, which shares are parts of.
    """
    formats: dict[str, list[Candidate]] = {}
    for candidate in sorted(candidates, key=lambda candidate: candidate.noise):
        formats.setdefault(candidate.unit, []).append(candidate)
    ranking = sorted(formats, key=lambda unit: formats[unit][0].noise / max(formats[unit][0].amount, 1))
    amounts = {unit: of_unit[0].amount for unit, of_unit in formats.items()}
    least_noise = {unit: of_unit[0].dtype for unit, of_unit in formats.items()}
    trials: list[Trial] = []

    def attempt(choice: Choice, what: str) -> Generator[Choice, float | None, bool]:
        """Whether a choice is within the budget; a choice that may not be measured any more is not."""
        known = next((trial for trial in trials if trial.choice == choice), None)
        if known is not None:
            return known.within
        drop = yield choice
        if drop is None:
            return False
        share = sum(amounts[unit] for unit in choice) / (whole or 1)
        trials.append(Trial(choice=choice, drop=drop, share=share, within=within(drop, max_drop), what=what))
        return trials[-1].within

    def best_units(count: int) -> dict[str, str]:
        return {unit: least_noise[unit] for unit in ranking[:count]}

    if (yield from attempt(best_units(len(ranking)), "everything")):
        return tuple(trials)
    good, bad = 0, len(ranking)
    while bad - good > 1:
        middle = (good + bad) // 2
        if (yield from attempt(best_units(middle), f"all except the worst {len(ranking) - middle}")):
            good = middle
        else:
            bad = middle
    current: dict[str, str] = best_units(good)

    def add(units: Sequence[str]) -> Generator[Choice, float | None, None]:
        """Quantize as many of these units as well, halving what does not fit."""
        nonlocal current
        if not units:
            return
        larger = {**current, **{unit: least_noise[unit] for unit in units}}
        if (yield from attempt(larger, f"{len(units)} more")):
            current = larger
        elif len(units) > 1:
            yield from add(units[: len(units) // 2])
            yield from add(units[len(units) // 2 :])
        else:
            (unit,) = units
            for other in formats[unit][1:]:
                if (yield from attempt({**current, unit: other.dtype}, f"{unit} in {other.dtype}")):
                    current = {**current, unit: other.dtype}
                    return

    rest = sorted((unit for unit in ranking if unit not in current), key=lambda unit: formats[unit][0].noise)
    half = len(rest) // 2
    yield from add(rest[:half])  # all of them together are known not to fit
    yield from add(rest[half:])
    return tuple(trials)


def best(trials: Sequence[Trial]) -> Trial | None:
    """The trial within the budget that quantizes most, of those the one that loses least; None if there is none."""
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
        within: Whether that is within the budget.
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
    """What a search gave.

    Attributes:
        maximize: What it quantizes most of: macs, or bytes.
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
        """As reports have it."""
        return {**vars(self), "evaluations": [vars(entry) for entry in self.evaluations]}
