# SPDX-License-Identifier: Apache-2.0
"""taoq.quantize."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from taoq.api.config import section_of, spec_of
from taoq.api.models import check_model, supply_float
from taoq.errors import Fault, RequirementNotMet, SpecError
from taoq.pipeline.prepare import check, prepare
from taoq.pipeline.quantize import quantize as quantize_prepared
from taoq.pipeline.results.quantize import QuantizeResult
from taoq.pipeline.supplied import Loader, Model
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
    """Quantize a model, and measure the error of each layer and the loss of accuracy.

    Args:
        model: Float model: an `nn.Module`, or the path of an ONNX file. It is not modified.
        config: Fields of the `quantize` section of a spec: backend, layers, skip_names, accuracy, ... `mode` defaults
            to the backend's first mode, `device` to the GPU if there is one.
        calibration: Iterable of calibration batches, such as a DataLoader; required by static quantization. It must
            yield the same batches each time. A batch is a tensor; a tuple or list, inputs first; or a dictionary whose
            keys name the inputs. Axis 0 of every tensor is the sample axis. Entries that are not inputs of the network
            are targets, which calibration ignores. All samples are used, unless the config sets
            `calibration.num_samples`.
        evaluation: Iterable of labelled batches. If given, the float and the quantized model are evaluated on them.
        metric: Metric that is computed on `evaluation`: a metric or a MetricCollection of torchmetrics, or a function
            `f(outputs, targets)` that returns one score per sample, higher is better.
        results_dir: Folder for the artifact and its reports. None keeps nothing on disk: the quantized network is
            `result.model`. Required for ONNX files.

    Returns:
        The result. For an `nn.Module`, `result.model` is the quantized network, in eval mode on the CPU.

    Raises:
        SpecError: If the config is invalid, or if data or a metric is missing.
        TaoqError: If the model does not run on the data, or if the library did not quantize it as planned.
        RequirementNotMet: If the model loses more accuracy than `accuracy` in the config allows. With
            `accuracy.action: check`, the attribute `result` of the error holds the result.

    Example:
        >>> import taoq
        >>> int8 = {"dtype": "int8"}
        >>> config = {
        ...     "backend": "modelopt.pytorch",
        ...     "layers": [{"module_name": "Conv2d", "weights": int8, "activations": int8}],
        ... }
        >>> result = taoq.quantize(network, config, calibration=images, results_dir="results/int8")
        >>> errors = {layer.name: layer.output_sqnr for layer in result.layers}  # dB
    """
    spec = spec_of(quantize=section_of(config))
    check_model(model, spec)
    if results_dir is None and not isinstance(model, nn.Module):
        what = "missing: an ONNX file is quantized into a file"
        raise SpecError(Fault("results_dir", what, "name a folder for the artifact"))
    experiment = supply_float(model, spec, config, calibration=calibration, evaluation=evaluation, metric=metric)
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
    """Yield the results folder; a temporary folder if the results are not kept."""
    if results_dir is not None:
        yield Path(results_dir)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
