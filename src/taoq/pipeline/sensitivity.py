# SPDX-License-Identifier: Apache-2.0
"""Run a calibrated model with any subset of its layers quantized, for analyze and search."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic

from torch import Tensor

from taoq.errors import Fault, Notice, SpecError
from taoq.files import digest
from taoq.network import Inputs, Outputs
from taoq.pipeline.calibration import (
    Feed,
    bias_shifts,
    calibration_batches,
    calibration_key,
    range_cache,
    source_digest,
)
from taoq.pipeline.experiment import Experiment
from taoq.pipeline.findings import EVALUATION
from taoq.pipeline.models import OpenedModel, reopen_float, start
from taoq.pipeline.prepare import Checked, Prepared, plan_layers, prepare, without
from taoq.quantization.backends.base import Calibrated, M
from taoq.quantization.capability import check as check_section
from taoq.quantization.dtypes import NATIVE
from taoq.quantization.formats.base import Values
from taoq.quantization.plan import matches
from taoq.quantization.spec import LayerSpec, QuantizeSpec, TensorSpec
from taoq.quantization.types import Layer, LayerFormat, LayerPlan, QuantizationPlan
from taoq.runtimes.base import Runtime
from taoq.tasks.base import Batches, Keyed

log = logging.getLogger(__name__)

_AS_WRITTEN = ""
"""Key of the plan that has the formats of the rules."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A layer, or a group of layers, that is quantized or left float as a unit.

    Attributes:
        name: Name of the layer, or pattern of the group.
        formats: The layers with their schemes, by format name; only the layers that the backend quantizes to it.
        macs: Multiply-accumulates of the layers, for one sample.
        bytes: Size of the weights in bytes as float32.
    """

    name: str
    formats: Mapping[str, tuple[LayerPlan, ...]]
    macs: int
    bytes: int

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers."""
        return tuple(dict.fromkeys(item.layer.name for items in self.formats.values() for item in items))

    @property
    def dtype(self) -> str:
        """Name of the first format, which is the only one if the formats are those of the rules."""
        return next(iter(self.formats))

    @property
    def items(self) -> tuple[LayerPlan, ...]:
        """The layers in the format `dtype`."""
        return self.formats[self.dtype]


@dataclass(frozen=True, kw_only=True)
class Trials(Generic[M]):
    """A calibrated model, and everything that is needed to run it with parts of its plan.

    Attributes:
        prepared: The experiment with its backend and the plan of the rules. Its model is consumed.
        units: The units to choose from, in model order.
        ready: The calibrated model.
        shifts: Bias correction by layer and format; empty if biases are not corrected.
        sample: Batches of inputs that outputs are compared on, kept in memory.
        key: Everything that an analysis of the model depends on, by name.
        macs: Multiply-accumulates of every layer of the network for one sample, by layer name.
        bytes: Size of the weights in bytes as float32, by layer name.
    """

    prepared: Prepared[M]
    units: tuple[Unit, ...]
    ready: Calibrated[M]
    shifts: Mapping[LayerFormat, Values]
    sample: Sequence[Inputs]
    key: Mapping[str, str]
    macs: Mapping[str, int]
    bytes: Mapping[str, int]

    @property
    def experiment(self) -> Experiment:
        """The experiment."""
        return self.prepared.experiment

    def runtime(self, items: Iterable[LayerPlan]) -> Runtime:
        """Open the model with only these layers quantized; the runtime is valid until the next call."""
        layers = list(items)
        shifts = {item.layer.name: self.shifts[item.format] for item in layers if item.format in self.shifts}
        model = self.ready.with_only(layers, shifts)
        opened = OpenedModel(model, self.prepared.format.name, None, bool(layers))
        return start(self.experiment, opened, self.experiment.spec.quantize.device, "quantize.device")

    def outputs(self, items: Iterable[LayerPlan]) -> list[Outputs]:
        """Return the outputs on the sample with only these layers quantized, batch by batch."""
        model = self.runtime(items)
        return [model.run(inputs) for inputs in self.sample]

    @functools.cached_property
    def reference(self) -> Sequence[Outputs]:
        """Outputs of the float model on the sample, batch by batch."""
        return self.outputs(())

    def noise(self, items: Iterable[LayerPlan]) -> float:
        """Return noise power / signal power with only these layers quantized, averaged over the outputs."""
        signals: dict[str, float] = {}
        noises: dict[str, float] = {}
        for before, after in zip(self.reference, self.outputs(items), strict=True):
            aligned = self.experiment.aligned(before, after)
            entries = _significant_entries(self.experiment, before)
            for name, values in before.items():
                if self.experiment.outputs[name].exact:
                    continue
                clean = values[entries].double()
                signals[name] = signals.get(name, 0.0) + float(clean.square().sum())
                error = aligned[name][entries].double() - clean
                noises[name] = noises.get(name, 0.0) + float(error.square().sum())
        ratios = [noises[name] / signals[name] for name in signals if signals[name]]
        mean = sum(ratios) / len(ratios) if ratios else 0.0
        return mean if math.isfinite(mean) else math.inf


def calibrate(
    checked: Checked, *, num_samples: int, groups: Sequence[str] = (), dtypes: Sequence[str] = ()
) -> Trials[Any]:
    """Open the float model of a spec and calibrate it once, for all layers that its rules match.

    Args:
        checked: The experiment.
        num_samples: Number of samples that outputs are compared on; they are kept in memory.
        groups: Patterns of layers that form one unit, from `analyze.groups`.
        dtypes: Names of the formats to choose from; empty takes the formats of the rules.

    Raises:
        TaoqError: If the model cannot be opened or quantized.
        SpecError: If a group matches no layer that is quantized.
    """
    experiment, backend = checked.experiment, checked.backend
    section = experiment.spec.quantize
    evaluated = experiment.evaluation()  # Report missing images before the work.
    prepared = prepare(checked)
    plans = {_AS_WRITTEN: prepared.plan}
    if dtypes:
        plans = {dtype: _plan_in_dtype(checked, prepared.model, section, dtype) for dtype in dtypes}
    _check_groups(plans, groups)
    source = source_digest(prepared)
    macs = prepared.format.macs(prepared.model, experiment.example())
    batches = calibration_batches(prepared)
    cache = range_cache(prepared, batches, source)
    first = next(iter(plans.values()))
    ready = backend.calibrate(
        prepared.model, first, Feed(batches), section.backend_kwargs, device=prepared.device, cache=cache
    )
    plans = _reduced(plans, ready, strict=section.strict)
    _check_groups(plans, groups)
    plan = plans.get(_AS_WRITTEN, prepared.plan)
    sampled = batches or evaluated  # Weight-only quantization has no calibration images.
    key = calibration_key(prepared, sampled, source) | {
        "device": prepared.device,
        "num_samples": str(num_samples),
        "bias correction": str(section.bias_correction),
        "network": digest(experiment.network),
        EVALUATION: _evaluation_key(experiment, evaluated),
    }
    return Trials(
        prepared=dataclasses.replace(prepared, plan=plan),
        units=_units(plans, groups, macs),
        ready=ready,
        shifts=_all_shifts(prepared, ready, plans, batches) if section.bias_correction else {},
        sample=list(Feed(sampled, "reading the sample", num_samples)),
        key=key,
        macs=macs,
        bytes={item.layer.name: _weight_bytes(item.layer) for item in plan.layers},
    )


def in_dtype(section: QuantizeSpec, dtype: str) -> QuantizeSpec:
    """Return a copy of a section whose rules quantize to another format."""

    def tensor(spec: TensorSpec | None) -> TensorSpec | None:
        return spec if spec is None or spec.dtype == NATIVE else dataclasses.replace(spec, dtype=dtype)

    def rule(spec: LayerSpec) -> LayerSpec:
        return dataclasses.replace(spec, weights=tensor(spec.weights), activations=tensor(spec.activations))

    return dataclasses.replace(section, layers=[rule(spec) for spec in section.layers])


def _plan_in_dtype(checked: Checked, model: object, section: QuantizeSpec, dtype: str) -> QuantizationPlan:
    changed = in_dtype(section, dtype)
    check_section(changed, checked.backend.capability)
    return plan_layers(checked, model, changed)


def _group_of(layer: Layer, groups: Sequence[str]) -> str | None:
    """Return the first group that matches a layer; None if the layer is a unit of its own."""
    return next((pattern for pattern in groups if matches(pattern, layer)), None)


def _check_groups(plans: Mapping[str, QuantizationPlan], groups: Sequence[str]) -> None:
    """Raise SpecError if a group matches no layer that is quantized, or only layers of earlier groups."""
    layers = {item.layer.name: item.layer for plan in plans.values() for item in plan.quantized}.values()
    used = {_group_of(layer, groups) for layer in layers}
    faults = [
        Fault(f"analyze.groups[{index}]", f"'{pattern}' matches no layer that is quantized", "see the plan: --dry-run")
        for index, pattern in enumerate(groups)
        if pattern not in used
    ]
    if faults:
        raise SpecError(*faults)


def _reduced(
    plans: Mapping[str, QuantizationPlan], ready: Calibrated[M], *, strict: bool
) -> dict[str, QuantizationPlan]:
    """Remove the layers that the library leaves float; a plan without any other is dropped if another plan remains."""
    left_out = {dtype: ready.left_out(plan) for dtype, plan in plans.items()}
    empty = [name for name, plan in plans.items() if all(item.layer.name in left_out[name] for item in plan.quantized)]
    if len(empty) == len(plans):
        empty = []  # `without` reports why.
    for dtype in empty:
        log.warning(Notice("quantize.accuracy.dtypes", f"{dtype} is not tried: the backend leaves every layer float"))
    kept = {dtype: plan for dtype, plan in plans.items() if dtype not in empty}
    return {dtype: without(plan, left_out[dtype], strict=strict) for dtype, plan in kept.items()}


def _significant_entries(experiment: Experiment, outputs: Outputs) -> Tensor | slice:
    """Return the entries that `Experiment.significant` selects; all entries if it selects none."""
    entries = experiment.significant(outputs) if experiment.significant else None
    return slice(None) if entries is None or not bool(entries.any()) else entries


def _all_shifts(
    prepared: Prepared[M], ready: Calibrated[M], plans: Mapping[str, QuantizationPlan], batches: Batches | None
) -> dict[LayerFormat, Values]:
    """Measure the bias corrections of the layers of each plan, by layer and format."""
    reference = reopen_float(prepared.experiment, prepared.backend)
    shifts: dict[LayerFormat, Values] = {}
    for plan in plans.values():
        formats = {item.layer.name: item.format for item in plan.quantized}
        by_layer = bias_shifts(prepared, reference, ready, plan, batches)
        shifts |= {formats[name]: shift for name, shift in by_layer.items()}
    return shifts


def _evaluation_key(experiment: Experiment, batches: Batches) -> str:
    """Return a digest of the evaluation data and the metric, or a unique key if one of them has no key."""
    metric = experiment.metric()
    if not batches.key or not isinstance(metric, Keyed):
        return str(uuid.uuid4())
    return digest([batches.key, metric.key])


def _weight_bytes(layer: Layer) -> int:
    """Return the size of a layer's weight in bytes as float32."""
    return 4 * math.prod(layer.weight_shape) if layer.weight_shape else 0


def _units(plans: Mapping[str, QuantizationPlan], groups: Sequence[str], macs: Mapping[str, int]) -> tuple[Unit, ...]:
    """Divide the quantized layers of all plans into units: the groups, and one unit for each other layer."""
    units: dict[str, dict[str, list[LayerPlan]]] = {}
    for dtype, plan in plans.items():
        for item in plan.quantized:
            group = _group_of(item.layer, groups)
            schemes = [scheme for scheme in (item.weights, item.activations) if scheme]
            label = dtype or "/".join(dict.fromkeys(scheme.dtype.name for scheme in schemes))
            units.setdefault(group or item.layer.name, {}).setdefault(label, []).append(item)
    # With the formats of the rules, a group whose layers have several formats is a unit with the one format "mixed".
    as_written = _AS_WRITTEN in plans
    return tuple(_unit(name, formats, macs, mixed=as_written and len(formats) > 1) for name, formats in units.items())


def _unit(name: str, formats: Mapping[str, list[LayerPlan]], macs: Mapping[str, int], *, mixed: bool) -> Unit:
    if mixed:
        formats = {"mixed": [item for items in formats.values() for item in items]}
    layers = {item.layer.name: item.layer for items in formats.values() for item in items}
    return Unit(
        name=name,
        formats={dtype: tuple(items) for dtype, items in formats.items()},
        macs=sum(macs.get(layer, 0) for layer in layers),
        bytes=sum(map(_weight_bytes, layers.values())),
    )
