"""`algorithm: entropy` is real histogram calibration, which ModelOpt does not offer under that name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from modelopt.torch.quantization.calib import HistogramCalibrator
from torch import Tensor

from support.networks import (
    Untouched,
    backend_of,
    error,
    every_modelopt_dtype,
    feed,
    images,
    normal,
    plan_of,
    quantize,
    rule,
    rules,
    run,
    tiny_net,
)
from taoq.errors import SpecError

MODELOPT = "modelopt.pytorch"


def stem_range(algorithm: str, *data: Tensor, options: dict[str, Any] | None = None) -> float:
    """The input range of the first layer after calibration."""
    layers = rules(MODELOPT, "int8", "stem")
    model = quantize(MODELOPT, tiny_net(), layers, feed(*data), options, algorithm=algorithm)
    return float(model.stem.input_quantizer.amax)


def heavy_tailed(seed: int = 0) -> Tensor:
    """Many small values and a few large values."""
    return normal(64, 3, 12, 12, seed=seed) ** 3


def test_entropy_cuts_off_a_heavy_tail() -> None:
    data = heavy_tailed()
    largest = float(data.abs().max())
    assert stem_range("max", data) == largest
    assert data.abs().quantile(0.5) < stem_range("entropy", data) < 0.8 * largest


def test_entropy_is_the_better_range_where_there_is_an_outlier() -> None:
    outlier = images(1)
    outlier[0, 0, 0, 0] = 100
    errors = {}
    for algorithm in ("max", "entropy"):
        layers = rules(MODELOPT, "int8", "stem")
        model = quantize(MODELOPT, tiny_net(), layers, feed(images(2), outlier), algorithm=algorithm)
        errors[algorithm] = error(run(model, images(3)), run(tiny_net(), images(3)))
    assert errors["entropy"] < 0.5 * errors["max"]


def test_entropy_quantizes_every_planned_layer() -> None:
    model = quantize(MODELOPT, tiny_net(), rules(MODELOPT, "int8", "*"), feed(images()), algorithm="entropy")
    assert list(backend_of(MODELOPT).applied(model)) == ["stem", "fc1", "fc2"]
    assert error(run(model, images()), run(tiny_net(), images())) < 0.05


def test_entropy_leaves_weights_to_their_maximum() -> None:
    model = quantize(MODELOPT, tiny_net(), rules(MODELOPT, "int8", "*"), feed(images()), algorithm="entropy")
    for name in ("stem", "fc1", "fc2"):
        weight = tiny_net().get_submodule(name).weight
        amax = model.get_submodule(name).weight_quantizer.amax
        assert torch.equal(amax.flatten(), weight.abs().flatten(1).amax(1))


def test_entropy_with_fp8_activations_is_refused() -> None:
    with pytest.raises(SpecError) as refused:
        plan_of(MODELOPT, tiny_net(), rules(MODELOPT, "fp8_e4m3fn", "*"), algorithm="entropy")
    assert str(refused.value) == (
        "quantize.algorithm: entropy cannot calibrate fp8_e4m3fn activations (quantize.layers[0])\n"
        "hint: write algorithm: max, or activations: {dtype: int8}"
    )


def test_entropy_with_one_range_per_index_is_refused() -> None:
    with pytest.raises(SpecError) as refused:
        plan_of(MODELOPT, tiny_net(), [rule("*", "int8", input_axis=1)], algorithm="entropy")
    assert str(refused.value) == (
        "quantize.layers[0].activations.quant_axis: entropy finds one range for a tensor, not one per index\n"
        "hint: write algorithm: max, or leave the axis out"
    )


@every_modelopt_dtype
def test_entropy_with_weights_alone_reads_no_data(dtype: str) -> None:
    layers = [rule("*", dtype, activations=False)]
    model = quantize(MODELOPT, tiny_net(), layers, Untouched(), algorithm="entropy")
    assert list(backend_of(MODELOPT).applied(model)) == ["stem", "fc1", "fc2"]
    assert error(run(model, images()), run(tiny_net(), images())) < 0.05


def test_options_of_entropy_reach_the_library() -> None:
    data = heavy_tailed()
    assert stem_range("entropy", data, options={"start_bin": 2048}) == float(data.abs().max())


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Bins of each histogram that the library searches, and how many ranges it tries; recorded during calibration."""
    searches: list[tuple[int, int]] = []
    compute_amax = HistogramCalibrator.compute_amax

    def record_and_compute(self: HistogramCalibrator, method: str, *, stride: int, start_bin: int) -> Tensor:
        bins = len(self._calib_hist)
        searches.append((bins, len(range(start_bin, bins + 1, stride))))
        return compute_amax(self, method, stride=stride, start_bin=start_bin)

    monkeypatch.setattr(HistogramCalibrator, "compute_amax", record_and_compute)
    return searches


@pytest.mark.parametrize("sigma", [0, 30])
def test_an_outlier_does_not_make_the_search_long(sigma: int, searches: list[tuple[int, int]]) -> None:
    with_outlier = images(2)
    with_outlier[0, 0, 0, 0] = max(sigma, 1)
    largest = stem_range("entropy", images(1), with_outlier)
    ((_, candidates),) = searches
    assert 2 <= candidates <= 257
    assert 1.5 < largest < 6  # the values are normally distributed


@pytest.mark.parametrize("scale", [0.0, 0.02], ids=["zeros", "small_values"])
def test_a_first_batch_of_small_values_neither_breaks_nor_slows_entropy(
    scale: float, searches: list[tuple[int, int]]
) -> None:
    largest = stem_range("entropy", scale * images(1), images(2))
    ((bins, candidates),) = searches
    assert bins <= 2**14
    assert candidates <= 257
    assert 1.5 < largest < 6
