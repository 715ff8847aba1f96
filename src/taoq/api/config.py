# SPDX-License-Identifier: Apache-2.0
"""The sections of a spec, as a Python caller gives them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from taoq.errors import Fault, SpecError
from taoq.pipeline.supplied import Loader
from taoq.plain import JsonMapping, JsonObject
from taoq.quantization.backends import load_backend
from taoq.spec.load import load_spec
from taoq.spec.source import source_of
from taoq.tasks.sections import UNUSED, TaskSpec


def section_of(config: JsonMapping) -> JsonObject:
    """The section `quantize`, with what a Python caller may leave out.

    Raises:
        SpecError: A field contradicts the arguments.
    """
    arguments = {"model_path": "the first argument", "results_dir": "results_dir=..."}
    faults = [
        Fault(f"quantize.{name}", "is an argument of the function, not of the config", f"give it as {argument}")
        for name, argument in arguments.items()
        if name in config
    ]
    calibration = config.get("calibration")
    if isinstance(calibration, Mapping):
        faults += [
            Fault(f"quantize.calibration.{name}", "has no effect: the loader decides", "leave it out")
            for name in ("batch_size", "seed")
            if name in calibration
        ]
    if faults:
        raise SpecError(*faults)
    return dict(config)


def spec_of(**sections: JsonMapping) -> TaskSpec:
    """The spec of some sections, checked; mode and device of `quantize` are filled in where they are left out."""
    spec = load_spec(source_of(sections), TaskSpec, unused=UNUSED)
    if "quantize" not in sections:
        return spec
    given, quantize = sections["quantize"], spec.quantize
    capability = load_backend(quantize.backend).capability
    mode = quantize.mode if "mode" in given else capability.modes[0]
    device = quantize.device if "device" in given else device_of(None)
    return dataclasses.replace(spec, quantize=dataclasses.replace(quantize, mode=mode, device=device))


def calibration_samples(config: JsonMapping) -> int | None:
    """Calibration samples that a config asks for; None takes all that the loader has."""
    calibration = config.get("calibration") or {}
    number: int | None = calibration.get("num_samples")
    return number


def with_evaluation(spec: TaskSpec, evaluation: Loader | None) -> TaskSpec:
    """What is given is measured."""
    evaluate = spec.quantize.evaluate or evaluation is not None
    return dataclasses.replace(spec, quantize=dataclasses.replace(spec.quantize, evaluate=evaluate))


def device_of(device: str | None) -> str:
    """The device that was given, else the GPU if there is one."""
    return device or ("cuda" if torch.cuda.is_available() else "cpu")
