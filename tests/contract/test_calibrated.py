"""Trying a part of a plan after calibration gives what quantizing that part alone gives. Real libraries."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from support import graphs, networks
from support.graphs import branches, every_onnx_backend, every_onnx_variant, pictures
from support.networks import bare, bias_shifts, every_torch_backend, every_torch_variant, images, tiny_net
from taoq.quantization.types import LayerPlan, QuantizationPlan


def layer_plans(plan: QuantizationPlan, names: Iterable[str]) -> list[LayerPlan]:
    return [layer_plan for layer_plan in plan.quantized if layer_plan.layer.name in names]


@every_torch_variant
def test_parts_of_a_torch_plan(backend: str, dtype: str) -> None:
    plan = networks.plan_of(backend, tiny_net(), networks.rules(backend, dtype, "*"))
    feed = networks.feed(images(1), images(2))
    calibrated = networks.calibrate(backend, tiny_net(), plan, feed)
    assert torch.equal(networks.run(calibrated.with_only([]), images()), networks.run(tiny_net(), images()))
    for names in (["fc1"], ["fc1", "fc2"], ["fc2"], []):
        output = networks.run(calibrated.with_only(layer_plans(plan, names)), images())
        alone = tiny_net()
        if names:
            alone = networks.quantize(backend, alone, networks.rules(backend, dtype, *names), feed)
        assert torch.equal(output, networks.run(alone, images()))


@every_torch_backend
def test_a_part_may_have_another_dtype_than_was_calibrated(backend: str) -> None:
    feed = networks.feed(images(1), images(2))
    plans = {
        dtype: networks.plan_of(backend, tiny_net(), networks.rules(backend, dtype, "*"))
        for dtype in ("int8", "fp8_e4m3fn")
    }
    calibrated = networks.calibrate(backend, tiny_net(), plans["int8"], feed)
    mixed = [*layer_plans(plans["fp8_e4m3fn"], ["fc1"]), *layer_plans(plans["int8"], ["fc2"])]
    output = networks.run(calibrated.with_only(mixed), images())
    rules = [*networks.rules(backend, "fp8_e4m3fn", "fc1"), *networks.rules(backend, "int8", "fc2")]
    alone = networks.quantize(backend, tiny_net(), rules, feed)
    assert torch.equal(output, networks.run(alone, images()))


@every_onnx_variant
def test_parts_of_an_onnx_plan(backend: str, dtype: str) -> None:
    layers = ("left", "right", "tokens", "head")
    rules = {layer: graphs.rule(layer, dtype, dtype) for layer in layers}
    plan = graphs.plan_of(backend, branches(), list(rules.values()))
    feed = graphs.feed(pictures())
    calibrated = networks.calibrate(backend, branches(), plan, feed)
    assert not calibrated.left_out(plan)
    reference = graphs.run(branches(), pictures(seed=1))
    np.testing.assert_array_equal(graphs.run(calibrated.with_only([]), pictures(seed=1)), reference)
    for part in (["left"], ["right", "head"], list(layers)):
        names = [graphs.LAYERS[layer] for layer in part]
        output = graphs.run(calibrated.with_only(layer_plans(plan, names)), pictures(seed=1))
        alone = graphs.quantize(backend, branches(), [rules[layer] for layer in part], feed)
        np.testing.assert_array_equal(output, graphs.run(alone, pictures(seed=1)))


@every_torch_backend
def test_a_part_of_a_torch_plan_with_corrected_biases(backend: str) -> None:
    feed = networks.feed(images(1), images(2))
    plan = networks.plan_of(backend, bare(), networks.rules(backend, "int8", "*"))
    names = [layer_plan.layer.name for layer_plan in plan.quantized]
    calibrated = networks.calibrate(backend, bare(), plan, feed)
    shifts = bias_shifts(backend, bare(), calibrated.with_only(plan.quantized), names, feed)
    assert set(shifts) == set(names)
    for part in (names[-1:], names, names[:1]):
        model = calibrated.with_only(layer_plans(plan, part), {name: shifts[name] for name in part})
        output = networks.run(model, images())
        alone = networks.quantize_corrected(backend, bare, networks.rules(backend, "int8", *part), feed)
        assert torch.equal(output, networks.run(alone, images()))
    reference = networks.run(bare().requires_grad_(False), images())
    assert torch.equal(networks.run(calibrated.with_only([]), images()), reference)


@every_onnx_backend
def test_a_part_of_an_onnx_plan_with_corrected_biases(backend: str) -> None:
    feed = graphs.feed(pictures())
    rules = {layer: graphs.rule(layer) for layer in ("left", "tokens", "head")}
    plan = graphs.plan_of(backend, branches(), list(rules.values()))
    calibrated = networks.calibrate(backend, branches(), plan, feed)
    names = [layer_plan.layer.name for layer_plan in plan.quantized]
    shifts = bias_shifts(backend, branches(), calibrated.with_only(plan.quantized), names, feed)
    for layer, rule in rules.items():
        name = graphs.LAYERS[layer]
        model = calibrated.with_only(layer_plans(plan, [name]), {name: shifts[name]})
        alone = graphs.corrected(backend, branches(), [rule], feed)
        assert graphs.bytes_of(model) == graphs.bytes_of(alone)
