"""Calibration of graphs: batches, values that are not finite, and the cache of ranges. Real libraries, small graphs."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
from onnx import numpy_helper
from torch import Tensor

from support.graphs import (
    LAYERS,
    MODELOPT,
    branches,
    bytes_of,
    dequantized_inputs,
    every_onnx_backend,
    feed,
    input_scale,
    input_scales,
    node,
    pictures,
    quantize,
    rule,
)
from support.networks import Untouched, every_algorithm
from taoq.errors import TaoqError
from taoq.network import Inputs
from taoq.quantization.formats.onnx.graph import Graph
from taoq.quantization.ranges import RangeCache

NOT_FINITE = (
    "quantize.calibration: the calibration images have values that are not finite\n"
    "hint: look at the normalisation of the dataset section"
)


def with_weight(layer: str, value: float) -> Graph:
    """Branches with the first value of a layer's weight replaced."""
    model = branches()
    (tensor,) = (tensor for tensor in model.proto.initializer if tensor.name == node(model, layer).input[1])
    weight = numpy_helper.to_array(tensor).copy()
    weight.flat[0] = value
    tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))
    return Graph(model.model)


def file_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@every_onnx_backend
@every_algorithm
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_calibration_images_that_are_not_finite_are_refused(backend: str, algorithm: str, value: float) -> None:
    images = pictures()
    images[3, 1, 2, 2] = value
    with pytest.raises(TaoqError) as refused:
        quantize(backend, branches(), [rule("left")], feed(pictures(), images), algorithm=algorithm)
    assert str(refused.value) == NOT_FINITE


@every_onnx_backend
@pytest.mark.parametrize("activations", ["int8", None])
def test_a_weight_that_is_not_finite_is_refused_before_calibration(backend: str, activations: str | None) -> None:
    with pytest.raises(TaoqError) as refused:
        quantize(backend, with_weight("/left/Conv", float("nan")), [rule("left", "int8", activations)])
    assert str(refused.value) == (
        "/left/Conv: its weight is not finite\nhint: look for NaN or infinite values in the checkpoint"
    )


@every_onnx_backend
@every_algorithm
def test_no_calibration_data_is_an_error_and_never_random_data(backend: str, algorithm: str) -> None:
    with pytest.raises(TaoqError) as refused:
        quantize(backend, branches(), [rule("left")], [], algorithm=algorithm)
    assert str(refused.value) == "quantize.calibration: there are no images\nhint: give calibration images"


@every_onnx_backend
def test_weights_alone_need_no_calibration_data(backend: str) -> None:
    model = quantize(backend, branches(), [rule("*", "int8", None)], Untouched())
    assert dequantized_inputs(model) == {name: [1] for name in LAYERS.values()}


class LazyBatches:
    """Batches that are made one by one; `most_alive` is how many of them existed at the same time."""

    def __init__(self, count: int) -> None:
        self.most_alive = 0
        self._count = count
        self._alive: weakref.WeakSet[Tensor] = weakref.WeakSet()

    def __iter__(self) -> Iterator[Inputs]:
        for seed in range(self._count):
            images = pictures(seed=seed)
            self._alive.add(images)
            self.most_alive = max(self.most_alive, len(self._alive))
            yield {"image": images}
            del images


@every_onnx_backend
@every_algorithm
def test_calibration_releases_each_batch(backend: str, algorithm: str) -> None:
    batches = LazyBatches(12)
    quantize(backend, branches(), [rule("left")], batches, algorithm=algorithm)
    assert 1 <= batches.most_alive <= 3  # the previous one, the next one, and ModelOpt's first


@every_onnx_backend
def test_every_batch_counts(backend: str) -> None:
    loud = pictures()
    loud[-1] *= 50
    model = quantize(backend, branches(), [rule("stem")], feed(pictures(), loud, pictures()))
    largest = float(loud.abs().max())
    span = largest / 127 if backend == MODELOPT else float(loud.max() - loud.min()) / 255
    assert input_scale(model, "/stem/Conv") == pytest.approx(span, rel=1e-5)


@every_onnx_backend
def test_a_partial_last_batch_fills_up_the_batch_of_the_graph(backend: str) -> None:
    any_batch = quantize(backend, branches(), [rule("*")], feed(pictures(6)))
    for batches in (feed(pictures(6)), feed(pictures(4), pictures(6)[4:5], pictures(6)[5:])):
        fixed_batch = quantize(backend, branches(4), [rule("*")], batches)
        assert input_scales(fixed_batch) == pytest.approx(input_scales(any_batch), rel=1e-5)


@every_onnx_backend
@every_algorithm
def test_quantizing_twice_gives_the_same_bytes(backend: str, algorithm: str) -> None:
    first, second = (
        quantize(backend, branches(), [rule("*")], feed(*pictures(24).split(8)), algorithm=algorithm) for _ in range(2)
    )
    assert bytes_of(first) == bytes_of(second)


@every_onnx_backend
def test_entropy_cuts_off_an_outlier(backend: str) -> None:
    images = pictures(64)
    images[0, 0, 0, 0] = 1000
    entropy, maximum = (
        input_scale(
            quantize(backend, branches(), [rule("stem")], feed(*images.split(16)), algorithm=algorithm), "/stem/Conv"
        )
        for algorithm in ("entropy", "max")
    )
    assert entropy < 0.5 * maximum


@every_onnx_backend
def test_a_cache_serves_the_same_layers_and_fewer_without_data(backend: str, tmp_path: Path) -> None:
    cache = RangeCache(tmp_path / "ranges.json", {"model": "a"})
    quantize(backend, branches(), [rule("*")], feed(pictures()), cache=cache)
    for rules in ([rule("*")], [rule("left"), rule("head")]):
        cached = quantize(backend, branches(), rules, Untouched(), cache=cache)
        assert bytes_of(cached) == bytes_of(quantize(backend, branches(), rules, feed(pictures())))
    assert file_names(tmp_path) == ["ranges.json"]


@every_onnx_backend
def test_calibration_of_one_layer_caches_the_ranges_of_all(backend: str, tmp_path: Path) -> None:
    cache = RangeCache(tmp_path / "ranges.json", {"model": "a"})
    quantize(backend, branches(), [rule("left")], feed(pictures()), cache=cache)
    cached = quantize(backend, branches(), [rule("*")], Untouched(), cache=cache)
    assert bytes_of(cached) == bytes_of(quantize(backend, branches(), [rule("*")], feed(pictures())))


@every_onnx_backend
def test_a_cache_with_another_key_is_not_used(backend: str, tmp_path: Path) -> None:
    path = tmp_path / "ranges.json"
    quantize(backend, branches(), [rule("*")], feed(pictures() * 5), cache=RangeCache(path, {"images": "a"}))
    recalibrated = quantize(backend, branches(), [rule("*")], feed(pictures()), cache=RangeCache(path, {"images": "b"}))
    assert bytes_of(recalibrated) == bytes_of(quantize(backend, branches(), [rule("*")], feed(pictures())))


@every_onnx_backend
def test_a_damaged_cache_is_an_error_before_calibration(backend: str, tmp_path: Path) -> None:
    path = tmp_path / "ranges.json"
    path.write_text("{")
    with pytest.raises(TaoqError) as refused:
        quantize(backend, branches(), [rule("*")], Untouched(), cache=RangeCache(path, {}))
    assert str(refused.value) == (
        f"quantize.calibration.cache: {path} is not a file of calibration ranges\nhint: delete it, or name another file"
    )
    assert path.read_text() == "{"


@every_onnx_backend
def test_ranges_that_are_not_finite_are_not_cached(backend: str, tmp_path: Path) -> None:
    cache = RangeCache(tmp_path / "ranges.json", {})
    with pytest.raises(TaoqError):
        quantize(backend, with_weight("/left/Conv", float("nan")), [rule("head")], feed(pictures()), cache=cache)
    assert file_names(tmp_path) == []


@every_onnx_backend
def test_weights_alone_write_no_cache(backend: str, tmp_path: Path) -> None:
    cache = RangeCache(tmp_path / "ranges.json", {})
    quantize(backend, branches(), [rule("*", "int8", None)], Untouched(), cache=cache)
    assert file_names(tmp_path) == []
