# SPDX-License-Identifier: Apache-2.0
"""A calibrated model with any of its layers quantized: what analyze and search try."""

from __future__ import annotations

import dataclasses
import functools
import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from taoq.actions.float_model import (
    Feed,
    calibration_key,
    hashed,
    open_float,
    plan_layers,
    quantization_device,
    range_cache,
    reopen_float,
    runtime_of,
    settled,
)
from taoq.errors import Fault, SpecError
from taoq.files import digest
from taoq.quantization.backends.base import Backend, Calibrated, Inputs
from taoq.quantization.plan import Layer, LayerPlan, QuantizationPlan, check, described, matches
from taoq.quantization.spec import NATIVE, LayerSpec, QuantizeSpec, TensorSpec
from taoq.runtime import Runtime
from taoq.tasks.base import Outputs, Task

EVALUATION = "evaluation"
"""The part of a key that says what the true metric was measured on, and how."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What is switched on and off as one: a layer, or a group of layers.

    Attributes:
        name: Of the layer, or the pattern of the group.
        formats: Its layers with their schemes, by format; only the layers that the backend quantizes in it.
        macs: Multiply-accumulates of its layers.
        bytes: Of their weights as float32.
    """

    name: str
    formats: Mapping[str, tuple[LayerPlan, ...]]
    macs: int
    bytes: int

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of its layers."""
        return tuple(dict.fromkeys(item.layer.name for items in self.formats.values() for item in items))


@dataclass(frozen=True, kw_only=True)
class Trials:
    """A calibrated model and all that is needed to run and judge parts of its plan.

    Attributes:
        task: The task.
        spec: Its spec.
        backend: Its backend.
        plan: Of the rules as they are written.
        units: What is switched, in model order.
        ready: The calibrated model.
        shifts: What is added to the biases of a quantized layer, by what `described` says of it; empty corrects none.
        device: Where it runs.
        sample: Some images, in memory.
        key: What an analysis of it depends on.
        macs: Multiply-accumulates of every layer of the network, by name.
        bytes: Of their weights as float32.
    """

    task: Task[Any]
    spec: Any
    backend: Backend[Any]
    plan: QuantizationPlan
    units: tuple[Unit, ...]
    ready: Calibrated[Any]
    shifts: Mapping[str, Any]
    device: str
    sample: Sequence[Inputs]
    key: Mapping[str, str]
    macs: Mapping[str, int]
    bytes: Mapping[str, int]

    def runtime(self, items: Iterable[LayerPlan], folder: Path) -> Runtime:
        """The model with these layers quantized, good until the next; ONNX needs a folder for the file."""
        chosen = list(items)
        named = {item.layer.name: described([item]) for item in chosen}
        shifts = {layer: self.shifts[name] for layer, name in named.items() if name in self.shifts}
        model, path = self.ready.with_only(chosen, shifts), folder / "model.onnx"
        if self.backend.format == "onnx":
            self.backend.save(model, path, {})
        return runtime_of(self.task, self.spec, self.backend, model, path, self.device)

    @functools.cached_property
    def reference(self) -> Sequence[Outputs]:
        """Outputs of the float model on the sample."""
        return self.outputs(())

    def outputs(self, items: Iterable[LayerPlan]) -> list[Outputs]:
        """Outputs on the sample with these layers quantized."""
        with tempfile.TemporaryDirectory() as folder:
            model = self.runtime(items, Path(folder))
            return [model.run(inputs) for inputs in self.sample]

    def noise(self, items: Iterable[LayerPlan]) -> float:
        """Noise power over signal power of the outputs with these layers quantized, the mean of the outputs."""
        signals: dict[str, float] = {}
        noises: dict[str, float] = {}
        for before, after in zip(self.reference, self.outputs(items), strict=True):
            aligned = self.task.export.align(before, after)
            # where the float network found something; what it says of the rest has no meaning
            counts = self.task.export.found(before) if self.task.export.found else slice(None)
            if not isinstance(counts, slice) and not bool(counts.any()):
                counts = torch.ones_like(counts)
            for name, values in before.items():
                clean = values[counts].double()
                signals[name] = signals.get(name, 0.0) + float(clean.square().sum())
                noises[name] = noises.get(name, 0.0) + float((aligned[name][counts].double() - clean).square().sum())
        ratios = [noises[name] / signals[name] for name in signals if signals[name]]
        found = sum(ratios) / len(ratios) if ratios else 0.0
        return found if math.isfinite(found) else math.inf


def calibrate(
    task: Task[Any],
    spec: Any,
    backend: Backend[Any],
    warnings: tuple[str, ...],
    *,
    num_samples: int,
    groups: Sequence[str] = (),
    dtypes: Sequence[str] = (),
) -> Trials:
    """Open the float model of a spec and calibrate it once, for all layers that its rules name.

    Args:
        task: The task.
        spec: Its spec.
        backend: Its backend.
        warnings: Of the spec.
        num_samples: Images that outputs are compared on; they are kept in memory.
        groups: Patterns of layers that belong together, from `analyze.groups`.
        dtypes: Formats to choose from; empty takes those of the rules.

    Raises:
        TaoqError: What quantizing raises.
        SpecError: A group fits no layer.
    """
    section: QuantizeSpec = spec.quantize
    model = open_float(task, spec, backend)
    macs = backend.macs(model, task.example_inputs(spec))
    plan = plan_layers(task, section, backend, model, warnings)
    plans = {"": plan}
    if dtypes:
        plans = {}
        for dtype in dtypes:
            changed = in_dtype(section, dtype)
            check(changed, backend.support)
            plans[dtype] = plan_layers(task, changed, backend, model, warnings)
    device = quantization_device(section, backend)
    source = hashed(section.model_path)
    batches = task.calibration_batches(spec) if plan.needs_calibration or section.bias_correction else None
    cache = range_cache(spec, backend, batches, source)
    first = next(iter(plans.values()))
    ready = backend.calibrate(model, first, Feed(batches), section.backend_kwargs, device=device, cache=cache)
    plans = {dtype: settled(one, ready.left_out(one), section) for dtype, one in plans.items()}
    plan = plans.get("", plan)
    shifts: dict[str, Any] = {}
    if section.bias_correction:
        reference, feed = reopen_float(task, spec, backend), Feed(batches, "measuring biases")
        for one in plans.values():
            shifts |= _shifts(backend, reference, ready, one, feed, device)
    evaluated = task.evaluation_batches(spec)
    seen = batches or evaluated  # weight-only has no calibration images
    return Trials(
        task=task,
        spec=spec,
        backend=backend,
        plan=plan,
        units=_units(plans, groups, macs),
        ready=ready,
        shifts=shifts,
        device=device,
        sample=list(Feed(seen, "reading the sample", num_samples)),
        key=calibration_key(spec, backend, seen, source.result())
        | {
            "device": device,
            "num_samples": str(num_samples),
            "bias correction": str(section.bias_correction),
            "network": digest(task.network(spec)),
            EVALUATION: digest([evaluated.key, task.metric(spec).key]),
        },
        macs=macs,
        bytes={item.layer.name: _bytes(item.layer) for item in plan.layers},
    )


def _shifts(
    backend: Backend[Any],
    reference: Any,
    ready: Calibrated[Any],
    plan: QuantizationPlan,
    feed: Feed,
    device: str,
) -> dict[str, Any]:
    """What corrects the biases of the layers of a plan, by what `described` says of each."""
    items = {item.layer.name: item for item in plan.quantized}
    model = ready.with_only(items.values())
    found = backend.bias_shifts(reference, model, list(items), feed, device=device)
    return {described([items[name]]): shift for name, shift in found.items()}


def _bytes(layer: Layer) -> int:
    """Of its weight as float32."""
    return 4 * math.prod(layer.weight_shape) if layer.weight_shape else 0


def in_dtype(section: QuantizeSpec, dtype: str) -> QuantizeSpec:
    """A section whose rules quantize to another format."""

    def tensor(one: TensorSpec | None) -> TensorSpec | None:
        return one if one is None or one.dtype == NATIVE else dataclasses.replace(one, dtype=dtype)

    def rule(one: LayerSpec) -> LayerSpec:
        return dataclasses.replace(one, weights=tensor(one.weights), activations=tensor(one.activations))

    return dataclasses.replace(section, layers=[rule(one) for one in section.layers])


def _units(plans: Mapping[str, QuantizationPlan], groups: Sequence[str], macs: Mapping[str, int]) -> tuple[Unit, ...]:
    """The quantized layers of all plans as units: groups where a pattern names them, else one each."""
    found: dict[str, dict[str, list[LayerPlan]]] = {}
    fitting: set[str] = set()
    for dtype, plan in plans.items():
        for item in plan.quantized:
            group = next((pattern for pattern in groups if matches(pattern, item.layer)), None)
            if group:
                fitting.add(group)
            label = dtype or "/".join(dict.fromkeys(s.dtype for s in (item.weights, item.activations) if s))
            found.setdefault(group or item.layer.name, {}).setdefault(label, []).append(item)
    faults = [
        Fault(f"analyze.groups[{index}]", f"'{pattern}' matches no layer that is quantized", "see the plan: --dry-run")
        for index, pattern in enumerate(groups)
        if pattern not in fitting
    ]
    if faults:
        raise SpecError(*faults)
    units = []
    for name, formats in found.items():
        if "" in plans and len(formats) > 1:  # a group whose layers have several formats is one all the same
            formats = {"mixed": [item for items in formats.values() for item in items]}
        layers = {item.layer.name: item.layer for items in formats.values() for item in items}
        units.append(
            Unit(
                name=name,
                formats={dtype: tuple(items) for dtype, items in formats.items()},
                macs=sum(macs.get(layer, 0) for layer in layers),
                bytes=sum(map(_bytes, layers.values())),
            )
        )
    return tuple(units)
