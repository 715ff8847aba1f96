# SPDX-License-Identifier: Apache-2.0
"""taoq.compare."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from taoq.api.config import device_of, spec_of
from taoq.api.models import artifact_folder
from taoq.errors import Fault, SpecError
from taoq.pipeline.artifacts import read_artifact
from taoq.pipeline.compare import compare as compare_artifacts
from taoq.pipeline.compare import read_artifacts
from taoq.pipeline.results.compare import CompareResult
from taoq.pipeline.supplied import Loader, supply
from taoq.quantization.formats import FORMATS
from taoq.tasks.metrics import AnyMetric


def compare(
    artifacts: Sequence[str | Path],
    evaluation: Loader,
    metric: AnyMetric,
    *,
    model: nn.Module | None = None,
    device: str | None = None,
    results_dir: str | Path | None = None,
    **options: object,
) -> CompareResult:
    """Measure artifacts of `quantize` and the float models that they were made from, on the same data, in turns.

    Args:
        artifacts: Their folders.
        evaluation: Loader of labelled data; see `quantize`.
        metric: The metric; see `quantize`.
        model: The float network of artifacts of torch backends.
        device: cpu, cuda or cuda:N; None is the GPU if there is one.
        results_dir: Gets results.json and compare.html; without it nothing is written.
        options: Fields of the section `benchmark`: batch_sizes, warmup, runs.

    Raises:
        SpecError: The network is missing, or an option does not fit.
        TaoqError: An artifact is damaged, or its float model is not the one that it was made from.
    """
    if not artifacts:
        raise SpecError(Fault("artifacts", "no artifact is given", "name the folders of artifacts"))
    spec = spec_of(benchmark={"device": device_of(device), **options})
    first = read_artifact(artifact_folder(artifacts[0]))
    if model is None and not FORMATS[first.manifest.format].whole:
        what = "was made from a network of your own, which it does not contain"
        raise SpecError(Fault(str(artifacts[0]), what, "give that network as model=..."))
    experiment = supply(first.payload if model is None else model, spec, evaluation=evaluation, metric=metric)
    comparison = read_artifacts(experiment, [str(path) for path in artifacts])
    return compare_artifacts(comparison, Path(results_dir) if results_dir else None)
