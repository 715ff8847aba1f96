# SPDX-License-Identifier: Apache-2.0
"""The public API: the pipeline for a network, an ONNX file, loaders and a metric of a Python caller.

Nothing here prints. What the user should know is logged to the logger `taoq` and kept in the result. Errors are
`taoq.TaoqError`. The networks that are given are not changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from taoq.actions import ACTIONS
from taoq.actions.base import nowhere
from taoq.errors import Fault, RequirementNotMet, SpecError, TaoqError, abbreviated, did_you_mean
from taoq.files import total_size
from taoq.pipeline.analyze import AnalyzeResult
from taoq.pipeline.analyze import analyze as analyze_checked
from taoq.pipeline.artifacts import Artifact, find_artifact, read_artifact
from taoq.pipeline.benchmark import FLOAT, QUANTIZED, BenchmarkResult, MeasuredModel, benchmark_models
from taoq.pipeline.compare import CompareResult, read_artifacts
from taoq.pipeline.compare import compare as compare_artifacts
from taoq.pipeline.evaluate import EvaluateResult, evaluate_runtime, figure_named
from taoq.pipeline.experiment import Experiment, bind
from taoq.pipeline.export import (
    ExportResult,
    check_target,
    float_source,
    quantized_source,
    refuse_replacement,
    write_export,
)
from taoq.pipeline.models import OpenedModel, fitting_artifact, open_artifact, start
from taoq.pipeline.prepare import check, prepare
from taoq.pipeline.quantize import quantize as quantize_prepared
from taoq.pipeline.results import QuantizeResult
from taoq.pipeline.supplied import Loader, Model, left_as_it_was, model_format_of, supply
from taoq.pipeline.tune import tune
from taoq.plain import JsonMapping, JsonObject
from taoq.plugins import BACKENDS
from taoq.quantization.backends import load_backend
from taoq.quantization.formats import FORMATS, format_of, load_format
from taoq.runtimes.base import Runtime
from taoq.spec.load import load_spec
from taoq.spec.source import read_spec, source_of
from taoq.tasks import load_task
from taoq.tasks.metrics import AnyMetric
from taoq.tasks.sections import UNUSED, TaskSpec


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
    spec = _spec(quantize=_section(config))
    _check_model(model, spec)
    if results_dir is None and not isinstance(model, nn.Module):
        what = "missing: an ONNX file is quantized into a file"
        raise SpecError(Fault("results_dir", what, "name a folder for the artifact"))
    experiment = supply(
        model,
        _with_evaluation(spec, evaluation),
        calibration=calibration,
        evaluation=evaluation,
        metric=metric,
        num_samples=_num_samples(config),
    )
    with _folder(results_dir) as directory:
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


def load(folder: str | Path, model: nn.Module | None = None, *, device: str | None = None) -> nn.Module | Runtime:
    """Open an artifact, after checking that it is whole.

    Args:
        folder: The folder of the artifact, or its payload.
        model: The float network that it was made from, for an artifact of a torch backend that `taoq.quantize` made;
            its weights do not matter. Artifacts of a task build their network themselves.
        device: Where an ONNX graph runs; None is the GPU if there is one.

    Returns:
        Of a torch backend the network, in eval mode on the CPU; of an ONNX backend a runtime, whose `run` takes and
        gives tensors by name.

    Raises:
        SpecError: The network is missing.
        TaoqError: The artifact is damaged, or does not fit the network.
    """
    directory = _artifact(folder)
    artifact = read_artifact(directory)
    manifest = artifact.manifest
    info = FORMATS[manifest.format]
    if manifest.task:
        task = load_task(manifest.task)
        experiment = bind(task, artifact.stored_spec.load(task.spec))
    elif info.whole:
        experiment = supply(directory / manifest.payload, TaskSpec())
    elif model is None:
        what = "was made from a network of your own, which it does not contain"
        raise SpecError(Fault(str(folder), what, "give that network: taoq.load(folder, model)"))
    else:
        _check_layers(model, artifact)
        experiment = supply(model, TaskSpec())
    opened = open_artifact(experiment, fitting_artifact(experiment, directory))
    if info.whole:
        return start(experiment, opened, _device(device), "device")
    network: nn.Module = opened.model
    if model is not None and not manifest.task:
        _check_shapes(model, network, artifact)
    return network


def evaluate(
    model: Model,
    evaluation: Loader,
    metric: AnyMetric,
    *,
    device: str | None = None,
    results_dir: str | Path | None = None,
) -> EvaluateResult:
    """Evaluate a model, float or quantized.

    Args:
        model: An nn.Module (`load` gives one), the path of an ONNX file, or the folder of an ONNX artifact.
        evaluation: Loader of labelled data; see `quantize`.
        metric: The metric; see `quantize`.
        device: cpu, cuda, cuda:N, or trt for ONNX; None is the GPU if there is one.
        results_dir: Gets results.json; without it nothing is written.

    Raises:
        TaoqError: The model does not run on the data.
    """
    experiment, opened = _open(model, evaluation=evaluation, metric=metric)
    with _kept(model):
        runtime = start(experiment, opened, _device(device), "device")
        return evaluate_runtime(experiment, runtime, _name(model), Path(results_dir) if results_dir else None)


def export(
    model: nn.Module,
    onnx_file: str | Path,
    data: Loader,
    *,
    artifact: str | Path | QuantizeResult | None = None,
    device: str = "cpu",
    **options: object,
) -> ExportResult:
    """Export a network as an ONNX file, and prove on data that it gives the same outputs.

    Args:
        model: The float network.
        onnx_file: The file to write; `<name>_export.json` beside it has the proof.
        data: Loader; see `quantize`.
        artifact: What `quantize` made of the network with modelopt.pytorch: the file gets its Q/DQ nodes.
        device: Where the network is traced: cpu or cuda.
        options: Fields of the section `export`: opset_version, batch_size, check_images, tolerance, dequantize,
            overwrite, verbose.

    Raises:
        SpecError: An option does not fit.
        TaoqError: The outputs differ, or the network cannot be exported.
    """
    target = Path(onnx_file)
    spec = _spec(export=options)
    check_target(spec.export, target)
    experiment = supply(model, spec, calibration=data)
    float_model = experiment.build(None)
    origin = {"path": "", "sha256": load_format("torch").digest(float_model)}
    refuse_replacement(spec.export, target, origin["sha256"])
    if artifact is None:
        source = float_source(float_model)
    else:
        if isinstance(artifact, QuantizeResult):
            quantized, backend = artifact.model, artifact.manifest.backend
        else:
            quantized, backend = load(artifact, model), read_artifact(_artifact(artifact)).manifest.backend
        source = quantized_source(quantized, backend, float_model, dequantize=spec.export.dequantize)
    return write_export(experiment, source, origin, target, device)


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
    """Rank the layers that a config would quantize by what they do to the outputs and to the metric.

    Args:
        model: The float model; see `quantize`.
        config: The section `quantize` of a spec.
        evaluation: Loader of labelled data.
        metric: The metric.
        calibration: Loader of calibration data.
        results_dir: Gets analysis.json and analysis.html; without it nothing is written.
        options: Fields of the section `analyze`: num_samples, groups, confirm, metric.

    Raises:
        SpecError: The config or an option is wrong.
        TaoqError: The model does not run.
    """
    spec = _spec(quantize=_section(config), analyze=options)
    _check_model(model, spec)
    experiment = supply(
        model,
        _with_evaluation(spec, evaluation),
        calibration=calibration,
        evaluation=evaluation,
        metric=metric,
        num_samples=_num_samples(config),
    )
    directory = Path(results_dir) if results_dir else None
    figure = figure_named(experiment, spec.analyze.metric, "analyze.metric")
    return analyze_checked(check(experiment, directory), figure, directory)


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
    section = _spec(benchmark=options).benchmark
    opened = {
        FLOAT: (baseline, *_open(baseline, calibration=data)),
        QUANTIZED: (quantized, *_open(quantized, calibration=data)),
    }
    if len({entry.format for _, _, entry in opened.values()}) > 1:
        what = "one of both is a torch model and the other an ONNX file: their speeds say nothing of quantization"
        raise SpecError(Fault("baseline", what, "give a float model of the same kind"))
    with _kept(baseline), _kept(quantized):
        models = {
            name: start(experiment, entry, _device(device), "device") for name, (_, experiment, entry) in opened.items()
        }
        result = benchmark_models(models, opened[FLOAT][1].example(), section)
    measured = tuple(
        MeasuredModel(name=name, file=_name(model), size=_size(entry), peak_memory=None, batch=max(section.batch_sizes))
        for name, (model, _, entry) in opened.items()
    )
    return dataclasses.replace(result, models=measured)


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
    spec = _spec(benchmark={"device": _device(device), **options})
    first = read_artifact(_artifact(artifacts[0]))
    if model is None and not FORMATS[first.manifest.format].whole:
        what = "was made from a network of your own, which it does not contain"
        raise SpecError(Fault(str(artifacts[0]), what, "give that network as model=..."))
    experiment = supply(first.payload if model is None else model, spec, evaluation=evaluation, metric=metric)
    comparison = read_artifacts(experiment, [str(path) for path in artifacts])
    return compare_artifacts(comparison, Path(results_dir) if results_dir else None)


def run(task: str, action: str, spec: str | Path | JsonMapping, overrides: Sequence[str] = (), **flags: object) -> Any:
    """Run a command of the command line, silently.

    Args:
        task: The task.
        action: The action.
        spec: Path of the spec, or the spec as a dictionary.
        overrides: `key=value`, as on the command line.
        flags: `dry_run=True` of quantize; `artifacts=[...]` of compare.

    Returns:
        What the action returns: QuantizeResult, EvaluateResult, ...

    Raises:
        TaoqError: Whatever the command would print; of the same types, with `exit_code`.
    """
    if action not in ACTIONS:
        hint = did_you_mean(action, ACTIONS, "actions are " + ", ".join(ACTIONS))
        raise SpecError(Fault(f"{task} {action}", "there is no such action", hint))
    module = importlib.import_module(ACTIONS[action].module)
    loaded = load_task(task)
    source = source_of(spec, overrides) if isinstance(spec, Mapping) else read_spec(str(spec), overrides)
    try:
        return module.run(loaded, source, nowhere, **flags)
    except TaoqError as error:
        error.locate(lambda where: source.locate(where, loaded.spec))
        raise


def _section(config: JsonMapping) -> JsonObject:
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


def _spec(**sections: JsonMapping) -> TaskSpec:
    """The spec of some sections, checked; mode and device of `quantize` are filled in where they are left out."""
    spec = load_spec(source_of(sections), TaskSpec, unused=UNUSED)
    given, quantize = sections.get("quantize", {}), spec.quantize
    capability = load_backend(quantize.backend).capability
    mode = quantize.mode if "mode" in given else capability.modes[0]
    device = quantize.device if "device" in given else _device(None)
    return dataclasses.replace(spec, quantize=dataclasses.replace(quantize, mode=mode, device=device))


def _num_samples(config: JsonMapping) -> int | None:
    """Calibration samples that a config asks for; None takes all that the loader has."""
    calibration = config.get("calibration") or {}
    number: int | None = calibration.get("num_samples")
    return number


def _with_evaluation(spec: TaskSpec, evaluation: Loader | None) -> TaskSpec:
    """What is given is measured."""
    evaluate = spec.quantize.evaluate or evaluation is not None
    return dataclasses.replace(spec, quantize=dataclasses.replace(spec.quantize, evaluate=evaluate))


def _check_layers(model: nn.Module, artifact: Artifact) -> None:
    """Refuse a network without the layers of an artifact.

    Raises:
        TaoqError: It lacks one.
    """
    own = {name for name, _ in model.named_modules()}
    missing = [row["layer"] for row in artifact.manifest.plan if row["layer"] not in own]
    if missing:
        what = f"does not fit this {type(model).__name__}, which has no layer {abbreviated(missing)}"
        raise TaoqError(Fault(str(artifact.payload), what, "give the network that was quantized"))


def _check_shapes(model: nn.Module, loaded: nn.Module, artifact: Artifact) -> None:
    """Refuse a network whose layers have other shapes: a library may take the stored weights all the same.

    Raises:
        TaoqError: One has.
    """
    for row in artifact.manifest.plan:
        name = row["layer"]
        own, stored = (list(network.get_parameter(f"{name}.weight").shape) for network in (model, loaded))
        if own != stored:
            what = f"does not fit this {type(model).__name__}: its layer {name} has the shape {own}, not {stored}"
            raise TaoqError(Fault(str(artifact.payload), what, "give the network that was quantized"))


def _check_model(model: Model, spec: TaskSpec) -> None:
    """Refuse a model that is not of the format that the backend quantizes.

    Raises:
        SpecError: It is not.
    """
    backend = spec.quantize.backend
    wanted = FORMATS[load_backend(backend).capability.format]
    given = model_format_of(model)
    if given != wanted:
        backends = [name for name in BACKENDS.names() if load_backend(name).capability.format == given.name]
        hint = f"choose {' or '.join(backends)}"
        if wanted.whole:
            hint += ", or make an ONNX file with taoq.export"
        what = f"the model is {'an ONNX file' if given.whole else 'a torch network'}, which {backend} does not quantize"
        raise SpecError(Fault("quantize.backend", what, hint))


@contextlib.contextmanager
def _folder(results_dir: str | Path | None) -> Iterator[Path]:
    """The folder of the results; a temporary one if none is kept."""
    if results_dir is not None:
        yield Path(results_dir)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _open(model: Model, **data: Any) -> tuple[Experiment, OpenedModel]:
    """A model with the data of a Python caller, not on a device yet."""
    directory = None if isinstance(model, nn.Module) else find_artifact(str(model))
    if directory is not None:
        manifest = read_artifact(directory).manifest
        if not FORMATS[manifest.format].whole:
            what = "is the artifact of a torch backend, which does not contain its network"
            raise SpecError(Fault(str(model), what, "give what taoq.load(folder, model) returns"))
        experiment = supply(directory / manifest.payload, TaskSpec(), **data)
        return experiment, open_artifact(experiment, fitting_artifact(experiment, directory))
    experiment = supply(model, TaskSpec(), **data)
    if isinstance(model, nn.Module):
        return experiment, OpenedModel(model, "torch", None, False)
    model_format = load_format(format_of(str(model)).name)
    graph = model_format.read(str(model), experiment.build)
    return experiment, OpenedModel(graph, model_format.name, Path(model), model_format.is_quantized(graph))


def _kept(model: Model) -> contextlib.AbstractContextManager[None]:
    return left_as_it_was(model) if isinstance(model, nn.Module) else contextlib.nullcontext()


def _artifact(folder: str | Path) -> Path:
    directory = find_artifact(str(folder))
    if directory is None:
        raise TaoqError(Fault(str(folder), "is no artifact", "name a folder that taoq wrote"))
    return directory


def _name(model: Model) -> str:
    return type(model).__name__ if isinstance(model, nn.Module) else str(model)


def _size(opened: OpenedModel) -> int:
    """Size of a model, bytes."""
    return total_size(opened.path) if opened.path else load_format(opened.format).size(opened.model)


def _device(device: str | None) -> str:
    return device or ("cuda" if torch.cuda.is_available() else "cpu")
