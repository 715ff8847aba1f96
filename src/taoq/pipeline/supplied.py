# SPDX-License-Identifier: Apache-2.0
"""The experiment of a model, loaders and a metric that are supplied from Python."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from taoq.errors import Fault, NotGiven, Notice, SpecError, TaoqError, first_line
from taoq.network import Inputs, OutputSpec, first_samples
from taoq.pipeline.experiment import Experiment
from taoq.pipeline.loaders import LoaderBatches, Signature, open_loader
from taoq.plain import Plain
from taoq.quantization.formats import FORMATS, FormatInfo, format_of
from taoq.quantization.formats.torch.call import call, forward_signature
from taoq.tasks.base import Batches, Metric, Predictions
from taoq.tasks.metrics import AnyMetric, metric_factory
from taoq.tasks.sections import TaskSpec

log = logging.getLogger(__name__)

Model = nn.Module | str | Path
"""A torch network, or the path of an ONNX file."""
Loader = Iterable[object]
"""Batches: tensors, tuples or dictionaries; see `taoq.pipeline.loaders.split`."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A supplied model, and what the pipeline needs to know of it.

    Attributes:
        path: Its file; empty for a torch network.
        signature: Its inputs.
        build: Returns the network, like `Task.build_model`; not to be called for a file.
        example: Inputs of one sample; None if the model does not declare their shapes.
        outputs: Returns the shapes of its outputs, given inputs of one sample.
    """

    path: str
    signature: Signature
    build: Callable[[str | None], nn.Module]
    example: Inputs | None
    outputs: Callable[[Inputs], Mapping[str, OutputSpec]]


def model_format_of(model: Model) -> FormatInfo:
    """Return the format of a model.

    Raises:
        SpecError: If it is neither a network nor an ONNX file.
    """
    if isinstance(model, nn.Module):
        return FORMATS["torch"]
    if isinstance(model, str | Path) and format_of(str(model)).whole:
        return format_of(str(model))
    name = model if isinstance(model, str | Path) else type(model).__name__
    what = f"{name} is neither a torch network nor an ONNX file"
    raise SpecError(Fault("model", what, "give an nn.Module, or the path of a .onnx file"))


def supply(
    model: Model,
    spec: TaskSpec,
    *,
    calibration: Loader | None = None,
    evaluation: Loader | None = None,
    metric: AnyMetric | None = None,
    num_samples: int | None = None,
    data_name: str = "calibration",
    open_size: int | None = None,
) -> Experiment:
    """Return the experiment of a model, with its data and metric.

    Args:
        model: The float model. A network is copied for each use, and never modified.
        spec: The sections of the spec.
        calibration: Loader of calibration data; its targets are ignored.
        evaluation: Loader of labelled data.
        metric: The metric.
        num_samples: Number of calibration samples to use; None uses all.
        data_name: Name of the argument `calibration` in the public function, for messages.
        open_size: Size of the axes whose size an ONNX file leaves open, if there is no data to read it from; None if
            data is needed.

    Raises:
        SpecError: If an argument is missing or does not fit the others.
        TaoqError: If the model does not run on the data.
    """
    if (evaluation is None) != (metric is None):
        missing, given = ("metric", "evaluation") if metric is None else ("evaluation", "metric")
        raise SpecError(Fault(missing, f"missing: {given} is given", "give both, or none of them"))
    model_format_of(model)
    subject = _network(model) if isinstance(model, nn.Module) else _file(Path(model), open_size)
    opened = None if calibration is None else open_loader(calibration, subject.signature, data_name, labelled=False)
    evaluated = None if evaluation is None else open_loader(evaluation, subject.signature, "evaluation", labelled=True)
    if opened is not None:
        if num_samples and num_samples > opened.num_samples:
            what = f"is {num_samples}, the loader has {opened.num_samples} samples: all are used"
            log.info(Notice("quantize.calibration.num_samples", what))
        spec = _with_samples(spec, min(num_samples or opened.num_samples, opened.num_samples))
    data = opened or evaluated
    example = subject.example if data is None else first_samples(next(iter(data)).inputs, 1)
    quantize = dataclasses.replace(spec.quantize, model_path=subject.path)
    return _bind(
        dataclasses.replace(spec, quantize=quantize),
        subject,
        example,
        {} if example is None else subject.outputs(example),
        opened,
        evaluated,
        None if metric is None else metric_factory(metric),
    )


def _bind(
    spec: TaskSpec,
    subject: Subject,
    example: Inputs | None,
    outputs: Mapping[str, OutputSpec],
    calibration: LoaderBatches | None,
    evaluation: LoaderBatches | None,
    metric: Callable[[], Metric] | None,
) -> Experiment:
    def rebind(other: TaskSpec) -> Experiment:
        return _bind(other, subject, example, outputs, calibration, evaluation, metric)

    def calibration_batches() -> Batches:
        if calibration is None:
            what = "missing: this needs calibration data"
            raise NotGiven(Fault("calibration", what, "give a loader as calibration=..."))
        num_samples = min(spec.quantize.calibration.num_samples, calibration.num_samples)
        return dataclasses.replace(calibration, num_samples=num_samples)

    def evaluation_batches() -> Batches:
        if evaluation is None:
            what = "missing: this needs labelled data"
            raise NotGiven(Fault("evaluation", what, "give a loader as evaluation=..., and a metric"))
        return evaluation

    def new_metric() -> Metric:
        if metric is None:
            raise NotGiven(Fault("metric", "missing: this needs a metric", "give one of torchmetrics as metric=..."))
        return metric()

    def example_inputs() -> Inputs:
        if example is None:
            what = "missing: the shapes of the network's inputs are read from data"
            raise NotGiven(Fault("calibration", what, "give a loader, or a list with one batch"))
        return example

    return Experiment(
        task="",
        spec=spec,
        build=subject.build,
        example=example_inputs,
        outputs=outputs,
        calibration=calibration_batches,
        evaluation=evaluation_batches,
        inference=_no_inference,
        metric=new_metric,
        predictions=_no_predictions,
        network={"path": subject.path, "inputs": list(subject.signature.names)},
        restore=lambda stored: rebind(stored.load(TaskSpec)),
        rebind=rebind,
        refuse_another_model=_accept,
    )


def _no_inference() -> Batches:
    raise NotGiven(Fault("inference", "a model of your own has no inference data", "call taoq.load, and run it"))


def _no_predictions(directory: Path) -> Predictions:
    raise AssertionError(f"there is no inference data, so nothing is written to {directory}")


def _accept(stored: TaskSpec) -> None:
    """Accept every spec: loading the payload into the network fails if it is another network."""


def _network(model: nn.Module) -> Subject:
    dtypes = {tensor.dtype for tensor in model.parameters()}
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        if dtype in dtypes:
            what = f"has weights of {dtype}; taoq runs and quantizes float32 networks"
            raise SpecError(Fault("model", what, "give model.float()"))

    def build(checkpoint: str | None) -> nn.Module:  # noqa: ARG001 (the network has its weights)
        return copy.deepcopy(model).eval().cpu()

    def outputs(example: Inputs) -> Mapping[str, OutputSpec]:
        try:
            with preserve_state(model), torch.no_grad():  # Tensors that it caches stay usable for training.
                result = call(model.cpu().eval(), example)
        except Exception as error:  # The network's code may raise anything.
            what = f"does not run on the data: {first_line(error)}"
            raise TaoqError(Fault("model", what, "let the loader yield what its forward takes")) from error
        return {name: OutputSpec(("N", *tensor.shape[1:])) for name, tensor in _named(result).items()}

    return Subject(path="", signature=_signature(model), build=build, example=None, outputs=outputs)


_TARGETS = frozenset({"label", "labels", "label_ids", "target", "targets"})
"""Optional parameters by which networks (transformers, torchvision's detectors) take targets, to compute a loss."""


def _signature(model: nn.Module) -> Signature:
    """Return the parameters of forward that are inputs; `input` if it takes any arguments."""
    parameters = forward_signature(model).parameters.values()
    named = [entry for entry in parameters if entry.kind not in (entry.VAR_POSITIONAL, entry.VAR_KEYWORD)]
    if not named:
        return Signature(("input",), 1)
    required = [entry.name for entry in named if entry.default is entry.empty]
    inputs = [entry.name for entry in named if entry.name in required or entry.name not in _TARGETS]
    return Signature(tuple(inputs), len(required))


def _named(result: object) -> Mapping[str, Tensor]:
    """Return the tensors that forward returned, by name.

    Raises:
        TaoqError: If it returned something else.
    """
    if isinstance(result, Mapping):
        tensors = {str(key): value for key, value in result.items() if isinstance(value, Tensor) and value.ndim}
    else:
        values: list[Plain] = list(result) if isinstance(result, tuple | list) else [result]
        names = ["output"] if len(values) == 1 else [f"output_{index}" for index in range(len(values))]
        tensors = dict(zip(names, values, strict=True))
    if not tensors or not all(isinstance(value, Tensor) for value in tensors.values()):
        what = f"its forward returns {type(result).__name__}, not a tensor, a tuple of tensors or a mapping of them"
        raise TaoqError(Fault("model", what, "wrap it in a module that returns the tensors that count"))
    return tensors


def _file(path: Path, open_size: int | None) -> Subject:
    from taoq.quantization.formats.onnx.file import read_graph
    from taoq.quantization.formats.onnx.inputs import graph_inputs, zeros

    graph = read_graph(path)
    inputs = graph_inputs(graph, str(path))
    names = tuple(entry.name for entry in inputs)
    outputs = {
        name: OutputSpec(("N", *(f"{name}_{axis}" if size is None else size for axis, size in enumerate(shape[1:], 1))))
        for name, shape in graph.output_shapes.items()
    }

    def build(checkpoint: str | None) -> nn.Module:
        raise AssertionError(f"{checkpoint} holds its network itself")

    return Subject(
        path=str(path),
        signature=Signature(names, len(names)),
        build=build,
        example=zeros(inputs, open_size),
        outputs=lambda example: outputs,  # noqa: ARG005 (the file declares them)
    )


@contextlib.contextmanager
def preserve_state(model: Model) -> Iterator[None]:
    """Restore the device and the training mode of a network on exit. An ONNX file has no such state."""
    if not isinstance(model, nn.Module):
        yield
        return
    training = {module: module.training for module in model.modules()}
    devices = [(tensor, tensor.device) for tensor in (*model.parameters(), *model.buffers())]
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
        if len({device for _, device in devices}) == 1:
            model.to(devices[0][1])
        else:  # a network on several devices
            for tensor, device in devices:
                tensor.data = tensor.data.to(device)


def _with_samples(spec: TaskSpec, num_samples: int) -> TaskSpec:
    calibration = dataclasses.replace(spec.quantize.calibration, num_samples=num_samples)
    return dataclasses.replace(spec, quantize=dataclasses.replace(spec.quantize, calibration=calibration))
