# SPDX-License-Identifier: Apache-2.0
"""The interface of a task: a value that supplies networks, data and metrics to the task-agnostic pipeline.

A task needs eight fields; all others have defaults. `examples/plugin_segmentation` is a task in a package of its own.
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
"""The labels that a metric compares outputs with, in a type of the task's own."""


@dataclass(frozen=True)
class Batch:
    """A batch of samples of a data set.

    Attributes:
        inputs: The inputs of the network.
        targets: The labels for the metric, in a type of the task's own.
        paths: The image files, one per sample; empty if the samples are not files.
    """

    inputs: Inputs
    targets: Targets
    paths: Sequence[str] = ()


class Batches(Protocol):
    """Lazily loaded batches that can be iterated over several times, always in the same order."""

    @property
    def num_samples(self) -> int:
        """Number of samples."""

    @property
    def key(self) -> str:
        """Digest of everything that the batches depend on: the files, their order, how they are read, their targets.

        Later runs reuse measurements on batches with the same key. An empty string if there is no such digest; then no
        measurements are reused.
        """

    def __iter__(self) -> Iterator[Batch]: ...


class Metric(Protocol):
    """A metric that collects batches and is computed once at the end."""

    @property
    def figures(self) -> Sequence[str]:
        """Names of the figures that models can be compared by, known before any data. The first is the primary one."""

    def update(self, outputs: Outputs, targets: Targets) -> None:
        """Add one batch."""

    def compute(self) -> Mapping[str, float]:
        """Return the figures, and any other numbers to show, by name. Figures in 0..1 can have an accuracy budget."""


@runtime_checkable
class Resampling(Metric, Protocol):
    """A metric that can be recomputed on resampled data, for bootstrap intervals of differences."""

    @property
    def num_samples(self) -> int:
        """Number of samples to resample from; 0 if the metric turned out not to support it."""

    def resampled(self, figure: str, counts: NDArray[np.int64]) -> float:
        """Compute a figure for data that has each sample any number of times. Call `compute` first.

        Args:
            figure: A name in `figures`.
            counts: How many times to count each sample, [num_samples]. The order of samples is the same for all metrics
                over the same data. All ones give the result of `compute`.

        Returns:
            The figure; NaN if it is not defined for these samples.
        """


@runtime_checkable
class Keyed(Protocol):
    """A metric whose figures can be reused by later runs."""

    @property
    def key(self) -> str:
        """Digest of everything that the figures depend on besides the batches: settings, annotations."""


@runtime_checkable
class Writing(Protocol):
    """A metric that writes plots or tables into the results folder."""

    def write(self, directory: Path) -> JsonMapping:
        """Write the files. Return additional entries for `results.json`."""


class Predictions(Protocol):
    """A writer of the predictions for images into a folder. Leaving its context closes the files."""

    @property
    def files(self) -> Sequence[str]:
        """Names of the files and folders that it writes."""

    def __enter__(self) -> Predictions: ...

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None: ...

    def write(self, outputs: Outputs, batch: Batch) -> None:
        """Add one batch."""


@dataclass(frozen=True)
class DeepStream:
    """Configuration of DeepStream's Gst-nvinfer plugin for a network.

    Attributes:
        properties: Entries of the `property` group of its configuration file.
        labels: Content of the labels file.
    """

    properties: JsonMapping
    labels: str


@dataclass(frozen=True, kw_only=True)
class Export(Generic[S]):
    """Optional functions that adapt `export` to a task.

    Attributes:
        with_size: Return the spec for another input size (height, width; pixels). Raises SpecError if the task does not
            support that size.
        deepstream: Return the task's part of nvdsinfer_config.yaml.
        align: Reorder outputs (second argument) like a reference (first argument), if their order has no meaning.
        ambiguous: Return which samples the network decides by a tie, so that two runtimes may disagree, [N] bool.
        significant: Return which entries of the outputs two runtimes must agree on, [N, entries] bool. For quantized
            networks, whose outputs depend on how a runtime rounds.
        postprocess: Post-processing that can be part of the file.
    """

    with_size: Callable[[S, int, int], S] | None = None
    deepstream: Callable[[S], DeepStream] | None = None
    align: Callable[[Outputs, Outputs], Outputs] | None = None
    ambiguous: Callable[[nn.Module, Inputs], Tensor] | None = None
    significant: Callable[[Outputs], Tensor] | None = None
    postprocess: PostProcess[S] | None = None


@dataclass(frozen=True, kw_only=True)
class PostProcess(Generic[S]):
    """Post-processing of a network's outputs, as a part of an exported file.

    Attributes:
        module: Return a network that takes the outputs of the task's network, and further inputs, by name.
        expected: Return what `evaluate` makes of the outputs of the network (second argument), given the inputs of the
            file: the outputs that the file must have.
        task: Return the task as it is for files with post-processing, whose inputs are those of the network, in order,
            and then the further ones. Its metric and predictions take the outputs of the file.
    """

    module: Callable[[S], nn.Module]
    expected: Callable[[S, Outputs, Inputs], Outputs]
    task: Callable[[Task[S]], Task[S]]


def _no_alias(name: str) -> str:  # noqa: ARG001 (no layer has an alias)
    return ""


def _model_section(spec: TaskSpec) -> object:
    return spec.model


@dataclass(frozen=True, kw_only=True)
class Task(Generic[S]):
    """A task as data.

    Attributes:
        name: Its name on the command line.
        spec: The dataclass of its spec.
        build_model: Build the float network of a spec. The second argument is the checkpoint with its weights; None for
            initial weights, where all weights are loaded later; an empty string if the user gave no checkpoint.
        example_inputs: Return inputs of one sample, of the right shapes.
        outputs: Return the specs of the network's outputs by name, in order.
        calibration_batches: Return the calibration data: at most `quantize.calibration.num_samples` samples, drawn with
            its seed; targets are not used.
        evaluation_batches: Return the labelled data of `evaluate`.
        metric: Return an empty metric for `evaluate`.
        inference_batches: Return the data of `inference`; None if the task has no such action.
        predictions: Return a writer into a folder for `inference`.
        records: Return a writer of what `evaluate` keeps of each sample into a folder; None if it keeps nothing.
        network: Return the part of a spec that defines the network, besides its checkpoint.
        complete: Return the spec with what libraries say about fields that the user did not write; the second argument
            says whether a field was written. Called once, when a spec is loaded.
        with_checkpoint: Return the spec with what a float checkpoint (second argument) shows about its network; an
            artifact stores this spec, so that it can be rebuilt without the checkpoint.
        check_same_model: Raise SpecError if a spec and the spec in a manifest define different networks. By default,
            all fields of the section `model` must be equal.
        preprocessing: Return what becomes of a file before it is an input of the network, for manifests and exported
            files; whoever deploys the network has to do the same. None if the task does not say it.
        unused: Patterns of fields that its spec accepts but does not use, with the reason.
        libraries: Distributions that its networks come from; their versions go into the manifest.
        alias: Return a second name of a layer, which patterns match and the plan shows; empty if there is none.
        sensitive: Patterns on aliases of layers that are known to lose accuracy when quantized, with a description.
        kpi: Return the figures of an evaluation as status.json shows them; as they are, if TAO has no other names.
        export: Functions that adapt `export` to the task.
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
    records: Callable[[S, Path], Predictions] | None = None
    network: Callable[[S], object] = _model_section
    complete: Callable[[S, Callable[[str], bool]], S] | None = None
    with_checkpoint: Callable[[S, str], S] | None = None
    check_same_model: Callable[[S, S], None] | None = None
    preprocessing: Callable[[S], JsonMapping] | None = None
    unused: Mapping[str, str] = field(default_factory=dict)
    libraries: tuple[str, ...] = ()
    alias: Callable[[str], str] = _no_alias
    sensitive: Mapping[str, str] = field(default_factory=dict)
    kpi: Callable[[Mapping[str, float]], Mapping[str, float | str]] = dict
    export: Export[S] = field(default_factory=lambda: Export())


def refuse_another_model(task: Task[S], spec: S, stored: S) -> None:
    """Refuse an artifact or exported file of another network than that of the spec.

    Args:
        task: The task.
        spec: The user's spec.
        stored: The spec in the artifact's manifest, or in the exported file.

    Raises:
        SpecError: If the networks differ; names every field that does.
    """
    if task.check_same_model is not None:
        task.check_same_model(spec, stored)
    elif dataclasses.is_dataclass(stored.model):
        refuse_differences(spec, stored, [f"model.{entry.name}" for entry in dataclasses.fields(stored.model)])


def refuse_differences(spec: TaskSpec, stored: TaskSpec, fields: Iterable[str]) -> None:
    """Refuse a spec whose fields differ from those of a stored one.

    Args:
        spec: The user's spec.
        stored: The spec in the artifact's manifest, or in the exported file.
        fields: The fields that must be equal, for example `dataset.num_classes`.

    Raises:
        SpecError: If any of them differ; names all that do.
    """
    values = [(name, attrgetter(name)(spec), attrgetter(name)(stored)) for name in fields]
    faults = [
        Fault(name, f"is {value}, the artifact was made with {stored_value}", "use the spec that it was quantized with")
        for name, value, stored_value in values
        if value != stored_value
    ]
    if faults:
        raise SpecError(*faults)
