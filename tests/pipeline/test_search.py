"""The search for what fits a budget, on budgets whose answer is known; no model."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

import pytest

from taoq.pipeline.search import Candidate, Choice, Trial, best, search, within

DropOf = Callable[[Choice], float | None]
"""What a choice loses; None once nothing more may be measured."""


def candidates(
    noises: Mapping[str, float], amounts: Mapping[str, int] | None = None, dtype: str = "int8"
) -> list[Candidate]:
    """A candidate for each unit; its amount is 1 if none is given."""
    return [
        Candidate(unit=unit, dtype=dtype, amount=(amounts or {}).get(unit, 1), noise=noise)
        for unit, noise in noises.items()
    ]


def run_search(
    units: list[Candidate], drop_of: DropOf, *, max_drop: float, total: int | None = None
) -> tuple[Trial, ...]:
    """Answer each choice that the search proposes; by default the network has no other layers."""
    if total is None:
        total = sum({candidate.unit: candidate.amount for candidate in units}.values())
    proposals = search(units, max_drop=max_drop, total=total)
    drop: float | None = None
    while True:
        try:
            drop = drop_of(proposals.send(drop))
        except StopIteration as end:
            return end.value


def best_choice(trials: tuple[Trial, ...]) -> dict[str, str]:
    trial = best(trials)
    assert trial is not None
    return dict(trial.choice)


def adding_up(drops: Mapping[str, float]) -> DropOf:
    return lambda choice: sum(drops[unit] for unit in choice)


def test_all_is_tried_first_and_is_enough() -> None:
    noises = {"a": 0.1, "b": 0.2}
    trials = run_search(candidates(noises), adding_up(noises), max_drop=0.5)
    assert [(trial.what, dict(trial.choice), trial.share) for trial in trials] == [
        ("everything", {"a": "int8", "b": "int8"}, 1.0)
    ]


def test_the_worst_are_left_out_by_bisection() -> None:
    noises = {f"layer{number:02}": 0.001 * number for number in range(64)} | {"bad": 1.0, "worse": 2.0}
    drops = dict.fromkeys(noises, 0.0) | {"bad": 0.1, "worse": 0.1}
    trials = run_search(candidates(noises), adding_up(drops), max_drop=0.05)
    assert set(drops) - set(best_choice(trials)) == {"bad", "worse"}
    assert len(trials) <= 12


def test_a_layer_that_the_ranking_misjudged_is_left_out_alone() -> None:
    noises = {f"layer{number:02}": 0.1 + 0.001 * number for number in range(32)}
    drops = dict.fromkeys(noises, 0.0) | {"layer09": 1.0}
    trials = run_search(candidates(noises), adding_up(drops), max_drop=0.01)
    assert set(noises) - set(best_choice(trials)) == {"layer09"}


def test_large_layers_come_before_small_ones_of_the_same_noise() -> None:
    noises, amounts = {"large": 0.1, "small": 0.1, "tiny": 0.05}, {"large": 100, "small": 10, "tiny": 1}
    trials = run_search(candidates(noises, amounts), adding_up(dict.fromkeys(noises, 0.1)), max_drop=0.15)
    trial = best(trials)
    assert trial is not None
    assert dict(trial.choice) == {"large": "int8"}
    assert trial.share == pytest.approx(100 / 111)


def test_each_layer_gets_the_format_with_the_least_noise() -> None:
    trials = run_search(in_two_formats(), lambda _: 0.0, max_drop=0.0)
    assert dict(trials[0].choice) == {"a": "int8", "b": "fp8", "c": "int8"}


def test_a_layer_gets_another_format_where_that_with_the_least_noise_does_not_fit() -> None:
    def drop_of(choice: Choice) -> float:
        return 1.0 if choice.get("c") == "int8" else 0.0

    trials = run_search(in_two_formats(), drop_of, max_drop=0.0)
    assert best_choice(trials) == {"a": "int8", "b": "fp8", "c": "fp8"}


def in_two_formats() -> list[Candidate]:
    return candidates({"a": 0.1, "b": 0.3, "c": 0.2}) + candidates({"a": 0.2, "b": 0.1, "c": 0.3}, dtype="fp8")


def test_a_budget_that_nothing_meets() -> None:
    noises = {"a": 0.1, "b": 0.2, "c": 0.3}
    trials = run_search(candidates(noises), adding_up(noises), max_drop=-1.0)
    assert best(trials) is None
    assert {frozenset(trial.choice) for trial in trials} >= {frozenset("abc"), frozenset("a"), frozenset("b")}
    assert all(trial.choice for trial in trials)


@pytest.mark.parametrize("most", [1, 2, 5, 13])
def test_no_more_evaluations_than_allowed(most: int) -> None:
    generator = random.Random(0)
    noises = {f"layer{number}": generator.random() for number in range(50)}
    measured: list[Choice] = []

    def drop_of(choice: Choice) -> float | None:
        if len(measured) == most:
            return None
        measured.append(choice)
        return generator.random()

    trials = run_search(candidates(noises), drop_of, max_drop=0.1)
    assert [trial.choice for trial in trials] == measured
    assert len({tuple(sorted(choice)) for choice in measured}) == len(measured)


def test_no_layer_computes_anything() -> None:
    trials = run_search(candidates({"a": 0.1}, {"a": 0}), lambda _: 0.0, max_drop=0.0)
    assert trials[0].share == 0.0


def test_a_drop_of_the_budget_is_within_it() -> None:
    assert 0.97 - 0.96 > 0.01
    assert within(0.97 - 0.96, 0.01)
    assert not within(0.0101, 0.01)


def test_shares_are_of_the_whole_network() -> None:
    (trial,) = run_search(candidates({"a": 0.1, "b": 0.1}), lambda _: 0.0, max_drop=0.0, total=8)
    assert trial.share == 0.25
