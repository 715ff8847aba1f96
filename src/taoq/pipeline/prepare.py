# SPDX-License-Identifier: Apache-2.0
"""The first steps of quantize, analyze and search: check the spec, open the float model, resolve the plan."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

from taoq.errors import Fault, NotGiven, SpecError, did_you_mean
from taoq.pipeline.artifacts import find_artifact
from taoq.pipeline.experiment import Experiment
from taoq.pipeline.models import device_for, experiment_for, open_float
from taoq.quantization.backends import load_backend
from taoq.quantization.backends.base import AnyBackend, Backend, M
from taoq.quantization.capability import check as check_section
from taoq.quantization.formats import FORMATS, format_of, load_format
from taoq.quantization.formats.base import ModelFormat
from taoq.quantization.plan import leave_out, resolve
from taoq.quantization.spec import QuantizeSpec
from taoq.quantization.types import QuantizationPlan

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Checked:
    """An experiment whose `quantize` section passed every check that needs no model.

    Attributes:
        experiment: The experiment.
        backend: Backend of the section.
    """

    experiment: Experiment
    backend: AnyBackend


@dataclass(frozen=True, kw_only=True)
class Prepared(Generic[M]):
    """A float model and the plan for it.

    Attributes:
        experiment: The experiment.
        backend: Backend of the `quantize` section.
        format: Format of the backend's models.
        model: The float model, which calibration consumes.
        plan: The decision for every layer.
        device: Device that calibration and quantization run on.
    """

    experiment: Experiment
    backend: Backend[M]
    format: ModelFormat[M]
    model: M
    plan: QuantizationPlan
    device: str


def check(experiment: Experiment, directory: Path | None) -> Checked:
    """Check everything about the `quantize` section that needs no model.

    Args:
        experiment: The experiment.
        directory: Folder of the results; None if they are not kept.

    Raises:
        SpecError: If the section has faults. Faults of its fields are reported together.
    """
    section = experiment.spec.quantize
    backend = load_backend(section.backend)
    check_section(section, backend.capability)
    faults = backend.check(section)
    faults += _unknown_options(section, backend, faults)
    if faults:
        raise SpecError(*faults)
    _check_source(section, directory, backend)
    return Checked(experiment=experiment_for(experiment, section.model_path), backend=backend)


def prepare(checked: Checked) -> Prepared[Any]:
    """Open the float model and decide every layer.

    Raises:
        TaoqError: If the model is damaged, already quantized, or takes inputs that differ from the data's.
        SpecError: If a rule matches no layer, or no layer is quantized.
    """
    backend, section = checked.backend, checked.experiment.spec.quantize
    name = backend.capability.format
    experiment = checked.experiment
    if not FORMATS[name].whole:
        experiment = experiment.of_checkpoint(section.model_path)
    model = open_float(experiment, backend)
    return Prepared(
        experiment=experiment,
        backend=backend,
        format=load_format(name),
        model=model,
        plan=plan_layers(checked, model, section),
        device=device_for(name, section.device, "quantize.device"),
    )


def plan_layers(checked: Checked, model: object, section: QuantizeSpec) -> QuantizationPlan:
    """Resolve the rules of a section for the layers of a float model, and log the notices.

    Layers that images do not reach stay float.

    Raises:
        SpecError: If a rule matches no layer, or no layer is quantized.
        TaoqError: If `strict` is set and images do not reach a layer that a rule matches.
    """
    plan = resolve_rules(checked, model, section)
    for notice in plan.notices:
        log.warning(notice)
    try:
        example = checked.experiment.example()
    except NotGiven:
        return plan  # The steps that need the data say what is missing.
    names = [item.layer.name for item in plan.quantized]
    unreached = load_format(checked.backend.capability.format).unreached(model, example, names)
    return without(plan, unreached, strict=section.strict)


def resolve_rules(checked: Checked, model: object, section: QuantizeSpec) -> QuantizationPlan:
    """Resolve the rules of a section for the layers of a float model, which is not run.

    Raises:
        SpecError: If a rule matches no layer, or no layer is quantized.
    """
    backend = checked.backend
    notices = check_section(section, backend.capability)
    layers = [checked.experiment.name_layer(layer) for layer in backend.layers(model, section.backend_kwargs)]
    return resolve(section, layers, backend.capability, notices)


def without(plan: QuantizationPlan, left_out: Mapping[str, str], *, strict: bool) -> QuantizationPlan:
    """Remove the layers that the library leaves float from a plan, and log one notice per rule.

    Args:
        plan: The plan.
        left_out: Reason of each layer to remove, by name.
        strict: Whether a layer that is left float is an error.

    Raises:
        TaoqError: If `strict` is set and a layer is left float, or if no layer is quantized any more.
    """
    remaining = leave_out(plan, left_out, strict=strict)
    for notice in remaining.notices[len(plan.notices) :]:
        log.warning(notice)
    return remaining


def _unknown_options(section: QuantizeSpec, backend: AnyBackend, faults: Sequence[Fault]) -> list[Fault]:
    """Return a fault for each option that the backend does not have, unless the backend refused it itself."""
    name, options = backend.capability.name, list(backend.capability.options)
    refused = {fault.where for fault in faults}
    unknown = {f"quantize.backend_kwargs.{key}": key for key in section.backend_kwargs if key not in options}
    hint = f"its options are {', '.join(options)}" if options else "leave it out"
    return [
        Fault(where, f"backend {name} has no option '{key}'", did_you_mean(key, options, hint))
        for where, key in unknown.items()
        if where not in refused
    ]


def _check_source(section: QuantizeSpec, directory: Path | None, backend: AnyBackend) -> None:
    """Check that the backend quantizes the file of `quantize.model_path`, and that the artifact does not replace it."""
    where, path = "quantize.model_path", section.model_path
    if path and find_artifact(path):
        raise SpecError(Fault(where, f"{path} is quantized already", "give the float checkpoint it was made from"))
    if section.calibration.cache and Path(section.calibration.cache).is_dir():
        what = f"{section.calibration.cache} is a folder"
        raise SpecError(Fault("quantize.calibration.cache", what, "name a file"))
    required, actual = FORMATS[backend.capability.format], format_of(path)
    if not path:
        if required.whole:
            raise NotGiven(Fault(where, f"missing: backend {section.backend} quantizes {required.noun}", required.make))
        return  # The task decides whether it can build a network without a checkpoint.
    if actual != required:
        what = f"{path} is {actual.noun}, backend {section.backend} quantizes {required.noun}"
        hint = f"set quantize.backend to {actual.backends}"
        raise SpecError(Fault(where, what, f"{hint}; {required.make}" if required.make else hint))
    if directory and Path(path).resolve() == (directory / backend.capability.payload).resolve():
        raise SpecError(Fault("quantize.results_dir", f"the artifact would replace {path}", "name another folder"))
