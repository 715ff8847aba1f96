# SPDX-License-Identifier: Apache-2.0
"""Build a spec from the arguments of the public API."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

import torch

from taoq.errors import Fault, SpecError, did_you_mean
from taoq.pipeline.supplied import Loader
from taoq.plain import JsonMapping, JsonObject
from taoq.quantization.backends import load_backend
from taoq.quantization.spec import DEVICE_PATTERN
from taoq.spec.load import load_spec
from taoq.spec.source import source_of
from taoq.tasks.sections import UNUSED, TaskSpec


def section_of(config: JsonMapping) -> JsonObject:
    """Return the `quantize` section of a config.

    Raises:
        SpecError: If the config has a field that is an argument of the function, or has no effect with a loader.
    """
    arguments = {"model_path": "the first argument", "results_dir": "results_dir=..."}
    faults = [
        Fault(f"quantize.{name}", "is an argument of the function, not of the config", f"give it as {argument}")
        for name, argument in arguments.items()
        if config.get(name) is not None
    ]
    calibration = config.get("calibration")
    if isinstance(calibration, Mapping):
        faults += [
            Fault(f"quantize.calibration.{name}", "has no effect: the loader decides", "leave it out")
            for name in ("batch_size", "seed")
            if calibration.get(name) is not None
        ]
        if calibration.get("cache"):
            what = "has no effect: it is not known what the data of a loader depends on"
            faults.append(Fault("quantize.calibration.cache", what, "leave it out"))
    if faults:
        raise SpecError(*faults)
    return dict(config)


def spec_of(**sections: JsonMapping) -> TaskSpec:
    """Build and check the spec of the sections.

    In `quantize`, `mode` defaults to the backend's first mode and `device` to the GPU if there is one.

    Raises:
        SpecError: If a section is invalid; lists every fault.
    """
    spec = load_spec(source_of(sections), TaskSpec, unused=UNUSED)
    if "quantize" not in sections:
        return spec
    # As in a spec file, None in the config means the default.
    config, section = sections["quantize"], spec.quantize
    capability = load_backend(section.backend).capability
    mode = section.mode if config.get("mode") is not None else capability.modes[0]
    device = section.device if config.get("device") is not None else device_of(None)
    return dataclasses.replace(spec, quantize=dataclasses.replace(section, mode=mode, device=device))


def calibration_samples(config: JsonMapping) -> int | None:
    """Return the number of calibration samples that a config sets; None for all samples of the loader."""
    calibration = config.get("calibration") or {}
    number: int | None = calibration.get("num_samples")
    return number


def with_evaluation(spec: TaskSpec, evaluation: Loader | None) -> TaskSpec:
    """Enable evaluation if evaluation data was passed."""
    evaluate = spec.quantize.evaluate or evaluation is not None
    return dataclasses.replace(spec, quantize=dataclasses.replace(spec.quantize, evaluate=evaluate))


def device_of(device: str | torch.device | None) -> str:
    """Return `device` as a spec writes it; if it is None, the GPU if there is one, else the CPU.

    Raises:
        SpecError: If it is not a device.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(DEVICE_PATTERN, str(device)):
        raise SpecError(Fault("device", f"'{device}' is not a device", "write cuda, cuda:N or cpu; trt for ONNX files"))
    return str(device)


def check_options(options: JsonMapping, function: str, names: Sequence[str]) -> None:
    """Check the keyword arguments that a function passes to a section of the spec.

    Args:
        options: The arguments.
        function: Name of the function, for messages.
        names: Names of the fields that have an effect.

    Raises:
        SpecError: If there is any other; lists all.
    """
    hint = f"its options are {', '.join(names)}"
    faults = [
        Fault(name, f"taoq.{function} has no such option", did_you_mean(name, names, hint))
        for name in options
        if name not in names
    ]
    if faults:
        raise SpecError(*faults)
