"""A part of a plan that is tried after one calibration is what quantizing that part gives. Real libraries."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import networks
import numpy as np
import onnx_networks
import pytest
import torch
from networks import VARIANTS, backend_of, images, tiny_net
from onnx_networks import branches, pictures

from taoq.quantization.plan import QuantizationPlan

ONNX_VARIANTS = [("modelopt.onnx", "int8"), ("modelopt.onnx", "fp8_e4m3fn"), ("onnxruntime", "int8")]


def only(plan: QuantizationPlan, names: Iterable[str]) -> list[Any]:
    return [item for item in plan.quantized if item.layer.name in names]


@pytest.mark.parametrize(("backend", "dtype"), VARIANTS, ids=[" ".join(variant) for variant in VARIANTS])
def test_parts_of_a_torch_plan(backend: str, dtype: str) -> None:
    whole = networks.plan_of(backend, tiny_net(), networks.rules(backend, dtype, "*"))
    feed = networks.feed(images(1), images(2))
    ready = backend_of(backend).calibrate(tiny_net(), whole, feed, {}, device="cpu", cache=None)
    assert torch.equal(networks.run(ready.with_only([]), images()), networks.run(tiny_net(), images()))
    for part in (["fc1"], ["fc1", "fc2"], ["fc2"], []):
        found = networks.run(ready.with_only(only(whole, part)), images())
        alone = tiny_net()
        if part:
            alone = networks.quantize(backend, alone, networks.rules(backend, dtype, *part), feed)
        assert torch.equal(found, networks.run(alone, images()))


@pytest.mark.parametrize("backend", ["torchao", "modelopt.pytorch"])
def test_a_part_may_have_another_format_than_was_calibrated(backend: str) -> None:
    feed = networks.feed(images(1), images(2))
    plans = {
        dtype: networks.plan_of(backend, tiny_net(), networks.rules(backend, dtype, "*"))
        for dtype in ("int8", "fp8_e4m3fn")
    }
    ready = backend_of(backend).calibrate(tiny_net(), plans["int8"], feed, {}, device="cpu", cache=None)
    mixed = [*only(plans["fp8_e4m3fn"], ["fc1"]), *only(plans["int8"], ["fc2"])]
    found = networks.run(ready.with_only(mixed), images())
    rules = [*networks.rules(backend, "fp8_e4m3fn", "fc1"), *networks.rules(backend, "int8", "fc2")]
    alone = networks.quantize(backend, tiny_net(), rules, feed)
    assert torch.equal(found, networks.run(alone, images()))


@pytest.mark.parametrize(("backend", "dtype"), ONNX_VARIANTS, ids=[" ".join(variant) for variant in ONNX_VARIANTS])
def test_parts_of_an_onnx_plan(backend: str, dtype: str) -> None:
    layers = ("left", "right", "tokens", "head")
    rules = {layer: onnx_networks.rule(layer, dtype, dtype) for layer in layers}
    whole = onnx_networks.plan_of(backend, branches(), list(rules.values()))
    feed = onnx_networks.feed(pictures())
    ready = backend_of(backend).calibrate(branches(), whole, feed, {}, device="cpu", cache=None)
    assert not ready.left_out(whole)
    reference = onnx_networks.run(branches(), pictures(seed=1))
    np.testing.assert_array_equal(onnx_networks.run(ready.with_only([]), pictures(seed=1)), reference)
    for part in (["left"], ["right", "head"], list(layers)):
        names = [onnx_networks.LAYERS[layer] for layer in part]
        found = onnx_networks.run(ready.with_only(only(whole, names)), pictures(seed=1))
        alone = onnx_networks.quantize(backend, branches(), [rules[layer] for layer in part], feed)
        np.testing.assert_array_equal(found, onnx_networks.run(alone, pictures(seed=1)))


@pytest.mark.parametrize("backend", ["torchao", "modelopt.pytorch"])
def test_a_part_of_a_torch_plan_with_corrected_biases(backend: str) -> None:
    library, feed = backend_of(backend), networks.feed(images(1), images(2))
    whole = networks.plan_of(backend, networks.bare(), networks.rules(backend, "int8", "*"))
    names = [item.layer.name for item in whole.quantized]
    ready = library.calibrate(networks.bare(), whole, feed, {}, device="cpu", cache=None)
    shifts = library.bias_shifts(networks.bare(), ready.with_only(whole.quantized), names, feed, device="cpu")
    assert set(shifts) == set(names)
    for part in (names[-1:], names, names[:1], []):
        mine = {name: shifts[name] for name in part}
        found = networks.run(ready.with_only(only(whole, part), mine), images())
        alone = networks.bare()
        if part:
            alone = networks.quantize(backend, alone, networks.rules(backend, "int8", *part), feed)
            networks.correct_biases(library, networks.bare(), alone, part, feed)
        # the shifts of layers with other dtypes in their sums: the images ran in one order there
        torch.testing.assert_close(found, networks.run(alone, images()), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(networks.run(ready.with_only([]), images()), networks.run(networks.bare(), images()))


@pytest.mark.parametrize("backend", ["modelopt.onnx", "onnxruntime"])
def test_a_part_of_an_onnx_plan_with_corrected_biases(backend: str) -> None:
    library, feed = backend_of(backend), onnx_networks.feed(pictures())
    rules = {layer: onnx_networks.rule(layer) for layer in ("left", "tokens", "head")}
    whole = onnx_networks.plan_of(backend, branches(), list(rules.values()))
    ready = library.calibrate(branches(), whole, feed, {}, device="cpu", cache=None)
    names = [item.layer.name for item in whole.quantized]
    shifts = library.bias_shifts(branches(), ready.with_only(whole.quantized), names, feed, device="cpu")
    for layer, rule in rules.items():
        (name,) = [item.layer.name for item in whole.quantized if layer in item.layer.name]
        found = ready.with_only(only(whole, [name]), {name: shifts[name]})
        alone = onnx_networks.quantize(backend, branches(), [rule], feed)
        networks.correct_biases(library, branches(), alone, [name], feed)
        mine, theirs = (onnx_networks.run(model, pictures(seed=1)) for model in (found, alone))
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)
