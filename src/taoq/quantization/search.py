# SPDX-License-Identifier: Apache-2.0
"""Find the most that can be quantized within a budget: a ranking by noise, bisection over it, then local improvement.

Noise of layers adds up, nearly: quantization errors of different layers are hardly correlated. So the ranking by noise
per amount (the greedy order of the knapsack problem) is a good first guess, and the true metric decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Choice = Mapping[str, str]
"""The format of each unit that is quantized."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A unit in one format.

    Attributes:
        unit: A layer, or a group of layers.
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
    """A choice that was evaluated.

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


def within(drop: float, max_drop: float) -> bool:
    """Whether a drop is accepted; figures are float32, and 0.97 - 0.96 is more than 0.01 in them."""
    return drop <= max_drop + 1e-6


def search(
    candidates: Sequence[Candidate], drop_of: Callable[[Choice], float | None], *, max_drop: float, whole: int
) -> list[Trial]:
    """Try choices; the best is `best` of what is returned.

    Args:
        candidates: Every unit in every format that it may have.
        drop_of: Evaluates a choice; None where no more may be evaluated.
        max_drop: The budget.
        whole: The amount of the whole network, of which shares are told.

    Returns:
        All that was tried, in order.
    """
    formats: dict[str, list[Candidate]] = {}
    for candidate in sorted(candidates, key=lambda one: one.noise):
        formats.setdefault(candidate.unit, []).append(candidate)
    ranking = sorted(formats, key=lambda unit: formats[unit][0].noise / max(formats[unit][0].amount, 1))
    amounts = {unit: found[0].amount for unit, found in formats.items()}
    least_noise = {unit: found[0].dtype for unit, found in formats.items()}
    trials: list[Trial] = []

    def attempt(choice: Choice, what: str) -> bool:
        """Whether a choice is within the budget; none is that may not be evaluated any more."""
        known = next((trial for trial in trials if trial.choice == choice), None)
        if known is None:
            drop, share = drop_of(choice), sum(amounts[unit] for unit in choice) / (whole or 1)
            if drop is None:
                return False
            known = Trial(choice=choice, drop=drop, share=share, within=within(drop, max_drop), what=what)
            trials.append(known)
        return known.within

    def first(count: int) -> dict[str, str]:
        return {unit: least_noise[unit] for unit in ranking[:count]}

    if attempt(first(len(ranking)), "everything"):
        return trials
    good, bad = 0, len(ranking)
    while bad - good > 1:
        middle = (good + bad) // 2
        if attempt(first(middle), f"all but the worst {len(ranking) - middle}"):
            good = middle
        else:
            bad = middle
    current = first(good)

    def add(units: Sequence[str]) -> None:
        """Quantize as many of these units as well, halving what does not fit."""
        nonlocal current
        if not units:
            return
        larger = {**current, **{unit: least_noise[unit] for unit in units}}
        if attempt(larger, f"{len(units)} more"):
            current = larger
        elif len(units) > 1:
            add(units[: len(units) // 2])
            add(units[len(units) // 2 :])
        else:
            (unit,) = units
            for other in formats[unit][1:]:
                if attempt({**current, unit: other.dtype}, f"{unit} in {other.dtype}"):
                    current = {**current, unit: other.dtype}
                    return

    rest = sorted((unit for unit in ranking if unit not in current), key=lambda unit: formats[unit][0].noise)
    half = len(rest) // 2
    add(rest[:half])  # all of it is known not to fit
    add(rest[half:])
    return trials


def best(trials: Sequence[Trial]) -> Trial | None:
    """The trial within the budget that quantizes most, of those the one that loses least; None if there is none."""
    fitting = [trial for trial in trials if trial.within and trial.choice]
    return max(fitting, key=lambda trial: (trial.share, -trial.drop)) if fitting else None
