# SPDX-License-Identifier: Apache-2.0
"""taoq.benchmark."""

from __future__ import annotations

import dataclasses

import torch

from taoq.api.config import check_options, device_of, spec_of
from taoq.api.models import name_of, open_model
from taoq.errors import Fault, RequirementNotMet, SpecError
from taoq.files import total_size
from taoq.pipeline.benchmark import MIXED_FORMATS, benchmark_models
from taoq.pipeline.models import OpenedModel, start
from taoq.pipeline.results.benchmark import FLOAT, QUANTIZED, BenchmarkResult, MeasuredModel
from taoq.pipeline.supplied import Loader, Model, preserve_state
from taoq.pipeline.timing import check_batch_sizes
from taoq.quantization.formats import load_format


def benchmark(
    quantized: Model,
    baseline: Model,
    data: Loader,
    *,
    device: str | torch.device | None = None,
    **options: object,
) -> BenchmarkResult:
    """Measure the latency of a quantized model and of its float model, alternating between the two.

    Args:
        quantized: Quantized model, in one of the forms that `taoq.evaluate` accepts.
        baseline: Float model of the same kind: both are networks, or both are ONNX files.
        data: Iterable of batches, from which only the shapes and dtypes of the inputs are taken.
        device: `cpu`, `cuda`, `cuda:N`, or `trt` (TensorRT) for ONNX files. None selects the GPU if there is one.
        options: Fields of the `benchmark` section of a spec: batch_sizes, warmup, runs, compile, min_speedup.

    Returns:
        One row of latencies per model and batch size. `slowest` is the smallest speed-up.

    Raises:
        SpecError: If an option is invalid, or if the models are of different kinds.
        TaoqError: If a model does not run.
        RequirementNotMet: If the speed-up is below `min_speedup`; `error.result` holds the result.

    Example:
        >>> import taoq
        >>> quantized = taoq.load("results/int8", network)
        >>> result = taoq.benchmark(quantized, network, images, device="cpu", batch_sizes=[1, 8], runs=10)
        >>> print(result.verdict)
    """
    check_options(options, "benchmark", ("batch_sizes", "warmup", "runs", "compile", "min_speedup"))
    section = spec_of(benchmark=options).benchmark
    check_batch_sizes(section.batch_sizes)
    opened = {
        FLOAT: (baseline, *open_model(baseline, calibration=data, data_name="data")),
        QUANTIZED: (quantized, *open_model(quantized, calibration=data, data_name="data")),
    }
    if len({entry.format for _, _, entry in opened.values()}) > 1:
        raise SpecError(Fault("baseline", MIXED_FORMATS, "give a float model of the same kind"))
    with preserve_state(baseline), preserve_state(quantized):
        runtimes = {
            name: start(experiment, entry, device_of(device), "device")
            for name, (_, experiment, entry) in opened.items()
        }
        result = benchmark_models(runtimes, opened[FLOAT][1].example(), section)
    models = tuple(
        MeasuredModel(
            name=name, file=name_of(model), size=_size(entry), peak_memory=None, batch=max(section.batch_sizes)
        )
        for name, (model, _, entry) in opened.items()
    )
    result = dataclasses.replace(result, models=models)
    if result.fault:
        raise RequirementNotMet(dataclasses.replace(result.fault, where="min_speedup"), result=result)
    return result


def _size(opened: OpenedModel) -> int:
    """Return the size of a model in bytes."""
    return total_size(opened.path) if opened.path else load_format(opened.format).size(opened.model)
