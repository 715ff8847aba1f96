"""A part of a plan that is tried after one calibration is what quantizing that part gives. Real libraries."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch

from support import graphs, networks
from support.graphs import branches, pictures
from support.networks import VARIANTS, bare, bias_shifts, images, tiny_net
from taoq.quantization.types import QuantizationPlan

ONNX_VARIANTS = [("modelopt.onnx", "int8"), ("modelopt.onnx", "fp8_e4m3fn"), ("onnxruntime", "int8")]


def only(plan: QuantizationPlan, names: Iterable[str]) -> list[Any]:
    return [item for item in plan.quantized if item.layer.name in names]


@pytest.mark.parametrize(("backend", "dtype"), VARIANTS, ids=[" ".join(variant) for variant in VARIANTS])
def test_parts_of_a_torch_plan(backend: str, dtype: str) -> None:
    whole = networks.plan_of(backend, tiny_net(), networks.rules(backend, dtype, "*"))
    feed = networks.feed(images(1), images(2))
    ready = networks.calibrate(backend, tiny_net(), whole, feed)
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
    ready = networks.calibrate(backend, tiny_net(), plans["int8"], feed)
    mixed = [*only(plans["fp8_e4m3fn"], ["fc1"]), *only(plans["int8"], ["fc2"])]
    found = networks.run(ready.with_only(mixed), images())
    rules = [*networks.rules(backend, "fp8_e4m3fn", "fc1"), *networks.rules(backend, "int8", "fc2")]
    alone = networks.quantize(backend, tiny_net(), rules, feed)
    assert torch.equal(found, networks.run(alone, images()))


@pytest.mark.parametrize(("backend", "dtype"), ONNX_VARIANTS, ids=[" ".join(variant) for variant in ONNX_VARIANTS])
def test_parts_of_an_onnx_plan(backend: str, dtype: str) -> None:
    layers = ("left", "right", "tokens", "head")
    rules = {layer: graphs.rule(layer, dtype, dtype) for layer in layers}
    whole = graphs.plan_of(backend, branches(), list(rules.values()))
    feed = graphs.feed(pictures())
    ready = networks.calibrate(backend, branches(), whole, feed)
    assert not ready.left_out(whole)
    reference = graphs.run(branches(), pictures(seed=1))
    np.testing.assert_array_equal(graphs.run(ready.with_only([]), pictures(seed=1)), reference)
    for part in (["left"], ["right", "head"], list(layers)):
        names = [graphs.LAYERS[layer] for layer in part]
        found = graphs.run(ready.with_only(only(whole, names)), pictures(seed=1))
        alone = graphs.quantize(backend, branches(), [rules[layer] for layer in part], feed)
        np.testing.assert_array_equal(found, graphs.run(alone, pictures(seed=1)))


@pytest.mark.parametrize("backend", ["torchao", "modelopt.pytorch"])
def test_a_part_of_a_torch_plan_with_corrected_biases(backend: str) -> None:
    feed = networks.feed(images(1), images(2))
    whole = networks.plan_of(backend, bare(), networks.rules(backend, "int8", "*"))
    names = [item.layer.name for item in whole.quantized]
    ready = networks.calibrate(backend, bare(), whole, feed)
    shifts = bias_shifts(backend, bare(), ready.with_only(whole.quantized), names, feed)
    assert set(shifts) == set(names)
    for part in (names[-1:], names, names[:1]):
        found = networks.run(ready.with_only(only(whole, part), {name: shifts[name] for name in part}), images())
        rules = networks.rules(backend, "int8", *part)
        alone = networks.quantize_corrected(backend, bare, rules, feed)
        assert torch.equal(found, networks.run(alone, images()))
    assert torch.equal(networks.run(ready.with_only([]), images()), networks.run(bare().requires_grad_(False), images()))


@pytest.mark.parametrize("backend", ["modelopt.onnx", "onnxruntime"])
def test_a_part_of_an_onnx_plan_with_corrected_biases(backend: str) -> None:
    feed = graphs.feed(pictures())
    rules = {layer: graphs.rule(layer) for layer in ("left", "tokens", "head")}
    whole = graphs.plan_of(backend, branches(), list(rules.values()))
    ready = networks.calibrate(backend, branches(), whole, feed)
    names = [item.layer.name for item in whole.quantized]
    shifts = bias_shifts(backend, branches(), ready.with_only(whole.quantized), names, feed)
    for layer, rule in rules.items():
        (name,) = [item.layer.name for item in whole.quantized if layer in item.layer.name]
        found = ready.with_only(only(whole, [name]), {name: shifts[name]})
        alone = graphs.corrected(backend, branches(), [rule], feed)
        assert graphs.bytes_of(found) == graphs.bytes_of(alone)
