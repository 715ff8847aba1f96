# SPDX-License-Identifier: Apache-2.0
"""What quantize, analyze and search begin with: a checked spec, its float model, and the plan for it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

from taoq.errors import Fault, NotGiven, SpecError, did_you_mean
from taoq.pipeline.artifacts import find_artifact
from taoq.pipeline.experiment import Experiment
from taoq.pipeline.models import device_for, open_float
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
    """A `quantize` section of which everything was checked that needs no model.

    Attributes:
        experiment: The experiment.
        backend: Its backend.
    """

    experiment: Experiment
    backend: AnyBackend


@dataclass(frozen=True, kw_only=True)
class Prepared(Generic[M]):
    """A float model and the plan for it.

    Attributes:
        experiment: The experiment.
        backend: Its backend.
        format: The format of the backend's models.
        model: The float model; whoever calibrates consumes it.
        plan: What is quantized, and how.
        device: Where quantization runs.
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
        directory: Where the results go; None if they are not kept.

    Raises:
        SpecError: With every fault.
    """
    section = experiment.spec.quantize
    backend = load_backend(section.backend)
    check_section(section, backend.capability)
    faults = backend.check(section)
    faults += _unknown_options(section, backend, faults)
    if faults:
        raise SpecError(*faults)
    _check_source(section, directory, backend)
    return Checked(experiment=experiment, backend=backend)


def prepare(checked: Checked) -> Prepared[Any]:
    """Open the float model and decide every layer.

    Raises:
        TaoqError: The model is damaged, or quantized already, or takes other inputs than the data.
        SpecError: A rule fits nothing, or nothing is left.
    """
    experiment, backend = checked.experiment, checked.backend
    name, section = backend.capability.format, experiment.spec.quantize
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
    """Decide the layers of a float model by the rules of a section.

    Raises:
        SpecError: A rule fits nothing, or nothing is left.
    """
    backend = checked.backend
    notices = check_section(section, backend.capability)
    layers = [checked.experiment.name_layer(layer) for layer in backend.layers(model, section.backend_kwargs)]
    plan = resolve(section, layers, backend.capability, notices)
    for notice in plan.notices:
        log.warning(notice)
    return plan


def without(plan: QuantizationPlan, left_out: dict[str, str], *, strict: bool) -> QuantizationPlan:
    """The plan without the layers that the library leaves float, by name with the reason; each rule gets a notice.

    Raises:
        TaoqError: `strict` is set and a layer is left out, or nothing else was quantized.
    """
    left = leave_out(plan, left_out, strict=strict)
    for notice in left.notices[len(plan.notices) :]:
        log.warning(notice)
    return left


def _unknown_options(section: QuantizeSpec, backend: AnyBackend, faults: Sequence[Fault]) -> list[Fault]:
    """Faults of options that a backend neither has nor refuses itself."""
    name, known = backend.capability.name, list(backend.capability.options)
    refused = {fault.where for fault in faults}
    options = {f"quantize.backend_kwargs.{key}": key for key in section.backend_kwargs if key not in known}
    otherwise = f"its options are {', '.join(known)}" if known else "leave it out"
    return [
        Fault(where, f"backend {name} has no option '{key}'", did_you_mean(key, known, otherwise))
        for where, key in options.items()
        if where not in refused
    ]


def _check_source(section: QuantizeSpec, directory: Path | None, backend: AnyBackend) -> None:
    """Check that the file of `quantize.model_path` is one that the backend quantizes, and that it is not replaced."""
    where, path = "quantize.model_path", section.model_path
    if path and find_artifact(path):
        raise SpecError(Fault(where, f"{path} is quantized already", "give the float checkpoint it was made from"))
    if section.calibration.cache and Path(section.calibration.cache).is_dir():
        what = f"{section.calibration.cache} is a folder"
        raise SpecError(Fault("quantize.calibration.cache", what, "name a file"))
    quantizes, given = FORMATS[backend.capability.format], format_of(path)
    if not path:
        if quantizes.whole:
            raise NotGiven(
                Fault(where, f"missing: backend {section.backend} quantizes {quantizes.noun}", quantizes.make)
            )
        return  # the task says whether it can do without
    if given != quantizes:
        what = f"{path} is {given.noun}, backend {section.backend} quantizes {quantizes.noun}"
        hint = f"set quantize.backend to {given.backends}"
        raise SpecError(Fault(where, what, f"{hint}; {quantizes.make}" if quantizes.make else hint))
    if directory and Path(path).resolve() == (directory / backend.capability.payload).resolve():
        raise SpecError(Fault("quantize.results_dir", f"the artifact would replace {path}", "name another folder"))
