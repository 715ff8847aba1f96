"""The search, on budgets whose answer is known; no model."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from taoq.quantization.search import Candidate, Choice, Trial, best, within

from taoq.quantization import search as module


def candidates(noises: dict[str, float], amounts: dict[str, int] | None = None, dtype: str = "int8") -> list[Candidate]:
    return [
        Candidate(unit=unit, dtype=dtype, amount=(amounts or {}).get(unit, 1), noise=noise)
        for unit, noise in noises.items()
    ]


def search(candidates: list[Candidate], drop_of: Callable[[Choice], float | None], *, max_drop: float) -> list[Trial]:
    """Of a network that has no other layers."""
    whole = sum({one.unit: one.amount for one in candidates}.values())
    return module.search(candidates, drop_of, max_drop=max_drop, whole=whole)


def adding_up(drops: dict[str, float]) -> Callable[[Choice], float]:
    return lambda choice: sum(drops[unit] for unit in choice)


def test_all_is_tried_first_and_is_enough() -> None:
    noises = {"a": 0.1, "b": 0.2}
    tried = search(candidates(noises), adding_up(noises), max_drop=0.5)
    assert [(trial.what, dict(trial.choice), trial.share) for trial in tried] == [
        ("everything", {"a": "int8", "b": "int8"}, 1.0)
    ]


def test_the_worst_are_left_out_by_bisection() -> None:
    noises = {f"layer{number:02}": 0.001 * number for number in range(64)} | {"bad": 1.0, "worse": 2.0}
    drops = dict.fromkeys(noises, 0.0) | {"bad": 0.1, "worse": 0.1}
    tried = search(candidates(noises), adding_up(drops), max_drop=0.05)
    found = best(tried)
    assert found is not None
    assert set(drops) - set(found.choice) == {"bad", "worse"}
    assert len(tried) <= 12


def test_a_layer_that_the_ranking_misjudged_is_left_out_alone() -> None:
    noises = {f"layer{number:02}": 0.1 + 0.001 * number for number in range(32)}
    drops = dict.fromkeys(noises, 0.0) | {"layer09": 1.0}
    tried = search(candidates(noises), adding_up(drops), max_drop=0.01)
    found = best(tried)
    assert found is not None
    assert set(noises) - set(found.choice) == {"layer09"}


def test_large_layers_come_before_small_ones_of_the_same_noise() -> None:
    noises, amounts = {"large": 0.1, "small": 0.1, "tiny": 0.05}, {"large": 100, "small": 10, "tiny": 1}
    tried = search(candidates(noises, amounts), adding_up(dict.fromkeys(noises, 0.1)), max_drop=0.15)
    found = best(tried)
    assert found is not None
    assert dict(found.choice) == {"large": "int8"}
    assert found.share == pytest.approx(100 / 111)


def test_each_layer_gets_the_format_with_the_least_noise_and_another_where_that_fails() -> None:
    both = candidates({"a": 0.1, "b": 0.3, "c": 0.2}) + candidates({"a": 0.2, "b": 0.1, "c": 0.3}, dtype="fp8")
    tried = search(both, lambda _: 0.0, max_drop=0.0)
    assert dict(tried[0].choice) == {"a": "int8", "b": "fp8", "c": "int8"}

    def drop(choice: Choice) -> float:
        return 1.0 if choice.get("c") == "int8" else 0.0

    found = best(search(both, drop, max_drop=0.0))
    assert found is not None
    assert dict(found.choice) == {"a": "int8", "b": "fp8", "c": "fp8"}


def test_a_budget_that_nothing_meets() -> None:
    noises = {"a": 0.1, "b": 0.2, "c": 0.3}
    tried = search(candidates(noises), adding_up(noises), max_drop=-1.0)
    assert best(tried) is None
    assert {frozenset(trial.choice) for trial in tried} >= {frozenset("abc"), frozenset("a"), frozenset("b")}
    assert all(trial.choice for trial in tried)


@pytest.mark.parametrize("most", [1, 2, 5, 13])
def test_no_more_evaluations_than_allowed(most: int) -> None:
    random_ = random.Random(0)
    noises = {f"layer{number}": random_.random() for number in range(50)}
    calls: list[Choice] = []

    def drop(choice: Choice) -> float | None:
        if len(calls) == most:
            return None
        calls.append(choice)
        return random_.random()

    tried = search(candidates(noises), drop, max_drop=0.1)
    assert [trial.choice for trial in tried] == calls
    assert len({tuple(sorted(choice)) for choice in calls}) == len(calls)


def test_no_layer_computes_anything() -> None:
    tried = search(candidates({"a": 0.1}, {"a": 0}), lambda _: 0.0, max_drop=0.0)
    assert tried[0].share == 0.0


def test_a_drop_of_the_budget_is_within_it() -> None:
    assert 0.97 - 0.96 > 0.01
    assert within(0.97 - 0.96, 0.01)
    assert not within(0.0101, 0.01)


def test_shares_are_of_the_whole_network() -> None:
    (trial,) = module.search(candidates({"a": 0.1, "b": 0.1}), lambda _: 0.0, max_drop=0.0, whole=8)
    assert trial.share == 0.25
