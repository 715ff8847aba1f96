# SPDX-License-Identifier: Apache-2.0
"""What a task is: a value that supplies networks, data and metrics to the task-agnostic pipeline.

A task needs eight fields; everything else has a default. `examples/plugin_segmentation` is one outside of taoq.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, runtime_checkable

from taoq.errors import Fault, SpecError
from taoq.network import Inputs, Outputs, OutputSpec
from taoq.plain import JsonMapping
from taoq.tasks.sections import TaskSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

S = TypeVar("S", bound=TaskSpec)
"""The spec of a task."""


Targets = Any
"""What a metric compares outputs with: the task's own type."""


@dataclass(frozen=True)
class Batch:
    """Some samples of a data set.

    Attributes:
        inputs: What the network takes.
        targets: What the metric compares with; the task's own type.
        paths: The image files, one per sample; empty for samples that are not files.
    """

    inputs: Inputs
    targets: Targets
    paths: Sequence[str] = ()


class Batches(Protocol):
    """Lazy batches that can be iterated over more than once, each time in the same order."""

    @property
    def num_samples(self) -> int:
        """Number of samples."""

    @property
    def key(self) -> str:
        """A digest of everything that the batches depend on: the files, their order, how they are read, their targets.

        Empty if that is not known; what was measured on such batches is not reused.
        """

    def __iter__(self) -> Iterator[Batch]: ...


class Metric(Protocol):
    """Collects batches, then computes once."""

    @property
    def figures(self) -> Sequence[str]:
        """Names of the figures that may be compared, known before any data; the first is the task's primary one."""

    def update(self, outputs: Outputs, targets: Targets) -> None:
        """Add one batch."""

    def compute(self) -> Mapping[str, float]:
        """The figures, and any others, by name. Figures in 0..1 can have an accuracy budget."""


@runtime_checkable
class Resampling(Metric, Protocol):
    """A metric that says what a figure would be on other draws of the samples: it gives differences an interval."""

    @property
    def num_samples(self) -> int:
        """Number of samples that a resample draws from."""

    def resampled(self, figure: str, counts: NDArray[np.int64]) -> float:
        """A figure as if the samples were in the data more or less often; needs `compute` to have run.

        Args:
            figure: One of `figures`.
            counts: How often each sample is there, in an order that is the same for all metrics over the same data;
                all ones give what `compute` gives.

        Returns:
            The figure; NaN if nothing in these samples defines it.
        """


@runtime_checkable
class Keyed(Protocol):
    """A metric whose figures can be reused by a later run."""

    @property
    def key(self) -> str:
        """A digest of everything that the figures depend on besides the batches: settings, annotations."""


@runtime_checkable
class Writing(Protocol):
    """A metric that draws pictures or writes tables."""

    def write(self, directory: Path) -> JsonMapping:
        """Write them; return what `results.json` shows besides the figures."""


class Predictions(Protocol):
    """Writes what the network says about each image into a folder. Leaving its context closes the files."""

    @property
    def files(self) -> Sequence[str]:
        """Names of what it writes."""

    def __enter__(self) -> Predictions: ...

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None: ...

    def write(self, outputs: Outputs, batch: Batch) -> None:
        """Add one batch."""


@dataclass(frozen=True)
class DeepStream:
    """What DeepStream's Gst-nvinfer needs besides the ONNX file.

    Attributes:
        properties: Keys of its `property` group.
        labels: Content of the labels file.
    """

    properties: JsonMapping
    labels: str


@dataclass(frozen=True, kw_only=True)
class Export(Generic[S]):
    """What `export` can do for a task beyond writing the file and comparing outputs as they are.

    Attributes:
        with_size: The spec for another input size (height, width; pixels); raises SpecError if there is none.
        deepstream: The task's part of nvdsinfer_config.yaml.
        align: Outputs in the order of a reference's, where their order has no meaning.
        ambiguous: Which samples of a batch a network decides by a tie, so that two runtimes may differ, [N] bool.
        significant: Which entries of the outputs count, [N, entries] bool: those that a quantized network, which rounds
            near ties differently in every runtime, must agree on.
    """

    with_size: Callable[[S, int, int], S] | None = None
    deepstream: Callable[[S], DeepStream] | None = None
    align: Callable[[Outputs, Outputs], Outputs] | None = None
    ambiguous: Callable[[nn.Module, Inputs], Tensor] | None = None
    significant: Callable[[Outputs], Tensor] | None = None


def _no_alias(name: str) -> str:  # noqa: ARG001 (of any layer)
    return ""


def _model_section(spec: TaskSpec) -> object:
    return spec.model


@dataclass(frozen=True, kw_only=True)
class Task(Generic[S]):
    """A task as data.

    Attributes:
        name: As on the command line.
        spec: The dataclass of its spec.
        build_model: The float network of a spec, with the weights of a checkpoint; with None as initialised, for a
            payload that has all weights; with an empty string without a checkpoint, if the task can.
        example_inputs: Inputs of one sample, of the right shapes.
        outputs: The network's outputs, in order.
        calibration_batches: Data for calibration: seeded, capped, without labels.
        evaluation_batches: Labelled data.
        metric: An empty metric for `evaluate`.
        inference_batches: Data for `inference`; None if the task has no such action.
        predictions: A writer into a folder for `inference`.
        network: The part of a spec that says which network it is, besides the checkpoint.
        check_same_model: Raises SpecError if a spec and the spec in a manifest are about different networks; without
            it, the fields of the section `model` must be equal.
        unused: Patterns of fields that its spec accepts and does not use, with the reason.
        libraries: Distributions that its networks come from; their versions go into the manifest.
        alias: Another name of a layer that patterns match and the plan shows; empty if there is none.
        sensitive: Patterns on aliases of layers known to lose accuracy when they are quantized, with what they are.
        export: What `export` can do for it.
    """

    name: str
    spec: type[S]
    build_model: Callable[[S, str | None], nn.Module]
    example_inputs: Callable[[S], Inputs]
    outputs: Callable[[S], Mapping[str, OutputSpec]]
    calibration_batches: Callable[[S], Batches]
    evaluation_batches: Callable[[S], Batches]
    metric: Callable[[S], Metric]
    inference_batches: Callable[[S], Batches] | None = None
    predictions: Callable[[S, Path], Predictions] | None = None
    network: Callable[[S], object] = _model_section
    check_same_model: Callable[[S, S], None] | None = None
    unused: Mapping[str, str] = field(default_factory=dict)
    libraries: tuple[str, ...] = ()
    alias: Callable[[str], str] = _no_alias
    sensitive: Mapping[str, str] = field(default_factory=dict)
    export: Export[S] = field(default_factory=lambda: Export())


def refuse_another_model(task: Task[S], spec: S, stored: S) -> None:
    """Refuse an artifact or file that was made for another network than a spec is about.

    Args:
        task: The task.
        spec: The user's spec.
        stored: The spec in the artifact's manifest, or in the file.

    Raises:
        SpecError: With every field that differs.
    """
    if task.check_same_model is not None:
        task.check_same_model(spec, stored)
    elif dataclasses.is_dataclass(stored.model):
        refuse_differences(spec, stored, [f"model.{entry.name}" for entry in dataclasses.fields(stored.model)])


def refuse_differences(spec: TaskSpec, stored: TaskSpec, fields: Iterable[str]) -> None:
    """Refuse a spec whose fields differ from those of a stored one.

    Args:
        spec: The user's spec.
        stored: The spec in the artifact's manifest, or in the file.
        fields: What must be the same in both, `dataset.num_classes`.

    Raises:
        SpecError: With every field that differs.
    """
    pairs = [(name, attrgetter(name)(spec), attrgetter(name)(stored)) for name in fields]
    faults = [
        Fault(name, f"is {mine}, the artifact was made with {theirs}", "use the spec that it was quantized with")
        for name, mine, theirs in pairs
        if mine != theirs
    ]
    if faults:
        raise SpecError(*faults)
