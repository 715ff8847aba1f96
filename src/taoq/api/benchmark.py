# SPDX-License-Identifier: Apache-2.0
"""taoq.benchmark."""

from __future__ import annotations

import dataclasses

from taoq.api.config import device_of, spec_of
from taoq.api.models import kept, name_of, open_model
from taoq.errors import Fault, SpecError
from taoq.files import total_size
from taoq.pipeline.benchmark import benchmark_models
from taoq.pipeline.models import OpenedModel, start
from taoq.pipeline.results.benchmark import FLOAT, QUANTIZED, BenchmarkResult, MeasuredModel
from taoq.pipeline.supplied import Loader, Model
from taoq.quantization.formats import load_format


def benchmark(
    quantized: Model,
    baseline: Model,
    data: Loader,
    *,
    device: str | None = None,
    **options: object,
) -> BenchmarkResult:
    """Measure how fast a quantized model is beside its float model, in turns.

    Args:
        quantized: The quantized model; see `evaluate`.
        baseline: The float model, of the same kind.
        data: Loader, for the shapes of the inputs; see `quantize`.
        device: cpu, cuda, cuda:N, or trt for ONNX; None is the GPU if there is one.
        options: Fields of the section `benchmark`: batch_sizes, warmup, runs, compile.

    Raises:
        SpecError: An option does not fit, or the models are of different kinds.
        TaoqError: A model does not run.
    """
    section = spec_of(benchmark=options).benchmark
    opened = {
        FLOAT: (baseline, *open_model(baseline, calibration=data)),
        QUANTIZED: (quantized, *open_model(quantized, calibration=data)),
    }
    if len({entry.format for _, _, entry in opened.values()}) > 1:
        what = "one of both is a torch model and the other an ONNX file: their speeds say nothing of quantization"
        raise SpecError(Fault("baseline", what, "give a float model of the same kind"))
    with kept(baseline), kept(quantized):
        models = {
            name: start(experiment, entry, device_of(device), "device")
            for name, (_, experiment, entry) in opened.items()
        }
        result = benchmark_models(models, opened[FLOAT][1].example(), section)
    measured = tuple(
        MeasuredModel(
            name=name, file=name_of(model), size=_size(entry), peak_memory=None, batch=max(section.batch_sizes)
        )
        for name, (model, _, entry) in opened.items()
    )
    return dataclasses.replace(result, models=measured)


def _size(opened: OpenedModel) -> int:
    """Size of a model, bytes."""
    return total_size(opened.path) if opened.path else load_format(opened.format).size(opened.model)
