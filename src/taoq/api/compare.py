# SPDX-License-Identifier: Apache-2.0
"""taoq.compare."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from taoq.api.config import check_options, device_of, spec_of
from taoq.api.models import NO_NETWORK, artifact_folder
from taoq.errors import Fault, SpecError
from taoq.pipeline.artifacts import read_artifact
from taoq.pipeline.compare import compare as compare_artifacts
from taoq.pipeline.comparison import read_artifacts
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
    device: str | torch.device | None = None,
    results_dir: str | Path | None = None,
    **options: object,
) -> CompareResult:
    """Compare artifacts of `taoq.quantize` with each other and with their float model, on the same data.

    Measures accuracy, with the confidence interval of each difference, file size and latency. Lists the settings and
    layers in which the artifacts differ.

    Args:
        artifacts: Folders of the artifacts.
        evaluation: Iterable of labelled batches; see `taoq.quantize`.
        metric: Metric that is computed on `evaluation`; see `taoq.quantize`.
        model: Float network that the artifacts were made from; required for artifacts of torch backends.
        device: `cpu`, `cuda` or `cuda:N`. None selects the GPU if there is one.
        results_dir: Folder for results.json and compare.html. None writes nothing.
        options: Fields of the `benchmark` section of a spec: batch_sizes, warmup, runs.

    Returns:
        One row per model, the float models first.

    Raises:
        SpecError: If the network is missing, or if an option is invalid.
        TaoqError: If an artifact is damaged, or if it was made from another float model.

    Example:
        >>> import taoq
        >>> from torchmetrics.classification import MulticlassAccuracy
        >>> metric = MulticlassAccuracy(num_classes=10)
        >>> result = taoq.compare(["results/int8", "results/fp8"], labelled_images, metric, model=network)
        >>> sizes = {row.model: row.size for row in result.models}
    """
    check_options(options, "compare", ("batch_sizes", "warmup", "runs"))
    if isinstance(artifacts, str | Path):
        raise SpecError(Fault("artifacts", f"is one path, {artifacts}", "give a list of folders"))
    if not artifacts:
        raise SpecError(Fault("artifacts", "no artifact is given", "name the folders of artifacts"))
    spec = spec_of(benchmark={"device": device_of(device), **options})
    folders = [artifact_folder(path) for path in artifacts]
    subject = _first_payload(artifacts, folders) if model is None else model
    experiment = supply(subject, spec, evaluation=evaluation, metric=metric)
    comparison = read_artifacts(experiment, [str(path) for path in artifacts])
    return compare_artifacts(comparison, Path(results_dir) if results_dir else None)


def _first_payload(artifacts: Sequence[str | Path], folders: Sequence[Path]) -> Path:
    """Return the ONNX file of the first artifact.

    Raises:
        SpecError: If the artifact of a torch backend is among them, which needs its network.
    """
    opened = [read_artifact(folder) for folder in folders]
    for path, artifact in zip(artifacts, opened, strict=True):
        if not FORMATS[artifact.manifest.format].whole:
            raise SpecError(Fault(str(path), NO_NETWORK, "give that network as model=..."))
    return opened[0].payload
