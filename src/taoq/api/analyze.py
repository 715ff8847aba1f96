# SPDX-License-Identifier: Apache-2.0
"""taoq.analyze."""

from __future__ import annotations

from pathlib import Path

from taoq.api.config import check_options, section_of, spec_of
from taoq.api.models import check_model, supply_float
from taoq.pipeline.analyze import analyze as analyze_checked
from taoq.pipeline.evaluate import figure_named
from taoq.pipeline.prepare import check
from taoq.pipeline.results.analyze import AnalyzeResult
from taoq.pipeline.supplied import Loader, Model
from taoq.plain import JsonMapping
from taoq.tasks.metrics import AnyMetric


def analyze(
    model: Model,
    config: JsonMapping,
    *,
    evaluation: Loader,
    metric: AnyMetric,
    calibration: Loader | None = None,
    results_dir: str | Path | None = None,
    **options: object,
) -> AnalyzeResult:
    """Rank layers by how much quantizing them changes the network's outputs and the metric.

    Args:
        model: Float model; see `taoq.quantize`.
        config: Fields of the `quantize` section of a spec. The layers that they quantize are ranked.
        evaluation: Iterable of labelled batches; see `taoq.quantize`.
        metric: Metric that is computed on `evaluation`; see `taoq.quantize`.
        calibration: Iterable of calibration batches, required by static quantization.
        results_dir: Folder for analysis.json and analysis.html. None writes nothing.
        options: Fields of the `analyze` section of a spec: num_samples, groups, confirm, metric.

    Returns:
        The ranking, worst layer first, and `skip_names`: patterns of the layers to leave float.

    Raises:
        SpecError: If the config or an option is invalid.
        TaoqError: If the model does not run on the data.

    Example:
        >>> import taoq
        >>> from torchmetrics.classification import MulticlassAccuracy
        >>> int8 = {"dtype": "int8"}
        >>> config = {
        ...     "backend": "modelopt.pytorch",
        ...     "layers": [{"module_name": "*", "weights": int8, "activations": int8}],
        ... }
        >>> metric = MulticlassAccuracy(num_classes=10)
        >>> analysis = taoq.analyze(network, config, calibration=images, evaluation=labelled_images, metric=metric)
        >>> config["skip_names"] = list(analysis.skip_names)
    """
    check_options(options, "analyze", ("num_samples", "groups", "confirm", "metric"))
    spec = spec_of(quantize=section_of(config), analyze=options)
    check_model(model, spec)
    experiment = supply_float(model, spec, config, calibration=calibration, evaluation=evaluation, metric=metric)
    directory = Path(results_dir) if results_dir else None
    figure = figure_named(experiment, spec.analyze.metric, "analyze.metric")
    return analyze_checked(check(experiment, directory), figure, directory)
