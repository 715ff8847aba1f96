# SPDX-License-Identifier: Apache-2.0
"""What a task is: a value that supplies models, data and metrics to the task-agnostic actions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from taoq.errors import Fault, SpecError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

S = TypeVar("S")
"""The spec of a task."""

Inputs = Mapping[str, "Tensor"]
"""Tensors by model input name, in the order of the model's arguments; axis 0 is the batch."""

Outputs = Mapping[str, "Tensor"]
"""Tensors by model output name."""


@dataclass(frozen=True)
class Batch:
    """Some samples of a data set.

    Attributes:
        inputs: What the model takes.
        targets: What the metric compares with; the task's own type.
        paths: The image files, one a sample.
    """

    inputs: Inputs
    targets: Any
    paths: Sequence[str]


class Batches(Protocol):
    """Lazy batches that can be gone through more than once, each time in the same order."""

    @property
    def num_samples(self) -> int:
        """Number of images."""

    @property
    def key(self) -> str:
        """A digest of all that the batches depend on: the files, their order, how they are read, their targets."""

    def __iter__(self) -> Iterator[Batch]: ...


class Metric(Protocol):
    """Collects over batches, then computes once."""

    @property
    def figures(self) -> Sequence[str]:
        """Names of the figures that can be resampled, known before any data; the first is the task's primary one."""

    @property
    def num_samples(self) -> int:
        """Number of images that a resample draws from."""

    @property
    def key(self) -> str:
        """A digest of all that the figures depend on besides the batches: settings, annotations; known before any."""

    def update(self, outputs: Outputs, targets: Any) -> None:
        """Add one batch."""

    def compute(self) -> Mapping[str, float]:
        """The figures that go into status.json, under TAO's names."""

    def resampled(self, figure: str, counts: NDArray[np.int64]) -> float:
        """A figure as if the images were in the data more or less often; needs `compute` to have run.

        Args:
            figure: One of `figures`.
            counts: How often each image is there, in an order that is the same for all metrics over the same data;
                all one gives what `compute` gives.

        Returns:
            The figure; NaN if nothing in these images defines it.
        """

    def write(self, directory: Path) -> Mapping[str, Any]:
        """Write pictures and tables; return what `results.json` shows besides the figures."""


class Predictions(Protocol):
    """Writes what the model says of each image into a folder; leaving it closes the files."""

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

    properties: Mapping[str, Any]
    labels: str


def _as_they_are(reference: Outputs, outputs: Outputs) -> Outputs:  # noqa: ARG001 (of any network)
    return outputs


@dataclass(frozen=True, kw_only=True)
class Export(Generic[S]):
    """What export needs of a task.

    Attributes:
        with_size: The spec for another input size: height and width, pixels; raises SpecError if there is none.
        deepstream: The task's part of nvdsinfer_config.yaml.
        align: Outputs in the order of a reference's, where their order has no meaning.
        ambiguous: Which samples of a batch a network decides by a tie, and two runtimes may differ on, [N] bool.
        found: Which entries of the outputs are findings, [N, entries] bool: what a quantized network, which rounds near
            ties differently in every runtime, must agree on.
    """

    with_size: Callable[[S, int, int], S]
    deepstream: Callable[[S], DeepStream]
    align: Callable[[Outputs, Outputs], Outputs] = _as_they_are
    ambiguous: Callable[[nn.Module, Inputs], Tensor] | None = None
    found: Callable[[Outputs], Tensor] | None = None


def _no_alias(name: str) -> str:  # noqa: ARG001 (of any layer)
    return ""


@dataclass(frozen=True, kw_only=True)
class Task(Generic[S]):
    """A task as data: adding one is adding a folder.

    Attributes:
        name: As on the command line.
        spec: The dataclass of its spec; has the sections quantize, evaluate, inference, export.
        unused: Fields of TAO's spec that it accepts and does not use, as patterns, with the reason.
        libraries: Distributions that its networks are from; their versions go into the manifest.
        outputs: The model's outputs, in order: name, and size of the last axis.
        network: The part of a spec that says which network it is, besides the checkpoint.
        build_model: The float model of a spec, with the weights of a checkpoint, or initialised if it is None.
        example_inputs: Inputs of one sample, of the right shape.
        calibration_batches: Images for calibration: seeded, capped, without labels.
        evaluation_batches: Labelled images.
        inference_batches: Images.
        metric: An empty metric for `evaluate`.
        predictions: A writer into a folder for `inference`.
        alias: Another name of a layer that patterns match and the plan shows, from its name; empty where there is none.
        sensitive: Patterns on aliases of layers known to lose accuracy when they are quantized, and what they are.
        check_same_model: Raise if a spec and the spec in an artifact's manifest are about different models.
        export: What export needs of it.
    """

    name: str
    spec: type[S]
    unused: Mapping[str, str]
    libraries: tuple[str, ...]
    outputs: Callable[[S], Mapping[str, int]]
    network: Callable[[S], Any]
    build_model: Callable[[S, str | None], nn.Module]
    example_inputs: Callable[[S], Inputs]
    calibration_batches: Callable[[S], Batches]
    evaluation_batches: Callable[[S], Batches]
    inference_batches: Callable[[S], Batches]
    metric: Callable[[S], Metric]
    predictions: Callable[[S, Path], Predictions]
    check_same_model: Callable[[S, S], None]
    export: Export[S]
    alias: Callable[[str], str] = _no_alias
    sensitive: Mapping[str, str] = field(default_factory=dict)


def image_shape(task: Task[S], spec: S) -> tuple[int, ...]:
    """Shape of one image as the networks of a spec take it: (1, 3, height, width)."""
    (images,) = task.example_inputs(spec).values()
    return tuple(images.shape)


def refuse_differences(spec: S, stored: S, fields: Iterable[str]) -> None:
    """Refuse an artifact that was made for another model than a spec is about.

    Args:
        spec: The user's spec.
        stored: The spec in the artifact's manifest.
        fields: What must be the same in both, `dataset.num_classes`.

    Raises:
        SpecError: With every field that differs.
    """
    pairs = [(field, attrgetter(field)(spec), attrgetter(field)(stored)) for field in fields]
    faults = [
        Fault(field, f"is {mine}, the artifact was made with {theirs}", "use the spec that it was quantized with")
        for field, mine, theirs in pairs
        if mine != theirs
    ]
    if faults:
        raise SpecError(*faults)
