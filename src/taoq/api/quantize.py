# SPDX-License-Identifier: Apache-2.0
"""taoq.quantize."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from taoq.api.config import calibration_samples, section_of, spec_of, with_evaluation
from taoq.api.models import check_model
from taoq.errors import Fault, RequirementNotMet, SpecError
from taoq.pipeline.prepare import check, prepare
from taoq.pipeline.quantize import quantize as quantize_prepared
from taoq.pipeline.results.quantize import QuantizeResult
from taoq.pipeline.supplied import Loader, Model, supply
from taoq.pipeline.tune import tune
from taoq.plain import JsonMapping
from taoq.tasks.metrics import AnyMetric


def quantize(
    model: Model,
    config: JsonMapping,
    *,
    calibration: Loader | None = None,
    evaluation: Loader | None = None,
    metric: AnyMetric | None = None,
    results_dir: str | Path | None = None,
) -> QuantizeResult:
    """Quantize a model, and measure what it cost.

    Args:
        model: The float model: an nn.Module, or the path of an ONNX file.
        config: The section `quantize` of a spec: backend, layers, skip_names, accuracy, ... `mode` is the backend's
            first where it is left out, `device` the GPU if there is one.
        calibration: Loader of calibration data; static quantization needs it. All of it is used, unless
            `calibration.num_samples` of the config says less. Each batch is a tensor, a tuple of (inputs, targets), or
            a dictionary; see `taoq.pipeline.loaders.split`. Axis 0 of every tensor counts samples.
        evaluation: Loader of labelled data: both models are evaluated on it.
        metric: How: a metric of torchmetrics, or a function from (outputs, targets) of a batch to a score per sample.
        results_dir: Folder of the artifact with its reports; without it nothing is kept, and `result.model` is all.

    Returns:
        The result; `model` is the quantized network, in eval mode on the CPU.

    Raises:
        SpecError: The config is wrong, or something is missing; with every fault.
        TaoqError: The model does not run, or the library did not do what the plan says.
        RequirementNotMet: It loses more than `accuracy` of the config accepts; with the result of a check.
    """
    spec = spec_of(quantize=section_of(config))
    check_model(model, spec)
    if results_dir is None and not isinstance(model, nn.Module):
        what = "missing: an ONNX file is quantized into a file"
        raise SpecError(Fault("results_dir", what, "name a folder for the artifact"))
    experiment = supply(
        model,
        with_evaluation(spec, evaluation),
        calibration=calibration,
        evaluation=evaluation,
        metric=metric,
        num_samples=calibration_samples(config),
    )
    with results_folder(results_dir) as directory:
        checked = check(experiment, directory)
        budget = experiment.spec.quantize.accuracy
        if budget and budget.action == "search":
            result = tune(checked, directory)
        else:
            result = quantize_prepared(prepare(checked), directory)
    if results_dir is None:
        result = dataclasses.replace(result, directory=None)
    if result.accuracy and not result.accuracy.met:
        hint = "accuracy.action: search looks for the layers to leave float"
        raise RequirementNotMet(result.accuracy.fault(hint), result=result)
    return result


@contextlib.contextmanager
def results_folder(results_dir: str | Path | None) -> Iterator[Path]:
    """The folder of the results; a temporary one if none is kept."""
    if results_dir is not None:
        yield Path(results_dir)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
