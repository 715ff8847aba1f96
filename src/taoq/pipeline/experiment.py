# SPDX-License-Identifier: Apache-2.0
"""The experiment: a task bound to a spec. Everything the pipeline asks of a task, with the spec already in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from taoq.errors import Fault, SpecError
from taoq.network import Inputs, Outputs, OutputSpec
from taoq.plugins import BACKENDS, TASKS, distributions
from taoq.quantization.types import Layer
from taoq.spec.load import StoredSpec
from taoq.tasks.base import Batches, DeepStream, Metric, Predictions, S, Task, refuse_another_model
from taoq.tasks.sections import TaskSpec

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A task bound to a spec, or a network and data of a Python caller.

    Attributes:
        task: Name of the task; empty if a Python caller supplies the network.
        spec: The spec.
        build: The float network of a checkpoint; see `Task.build_model`.
        example: Inputs of one sample.
        outputs: The network's outputs, in order.
        calibration: Data for calibration; raises NotGiven if the spec names none.
        evaluation: Labelled data; raises NotGiven if the spec names none.
        inference: Data for inference; raises NotGiven if the spec names none.
        metric: An empty metric.
        predictions: A writer into a folder.
        network: What says which network it is, besides the checkpoint; plain data or a dataclass.
        libraries: Distributions that the network comes from.
        alias: Another name of a layer; empty if there is none.
        sensitive: Patterns on aliases of layers known to lose accuracy, with what they are.
        restore: The experiment of a stored spec; raises TaoqError if the spec does not fit this taoq.
        rebind: The experiment of another spec of the same task.
        refuse_another_model: Raises SpecError if the spec of another experiment is about another network.
        with_size: The experiment for another input size (height, width); None if the task has only one.
        deepstream: The task's part of DeepStream's configuration; None if it has none.
        align: Outputs in the order of a reference's.
        ambiguous: Which samples a network decides by a tie; None if it decides none so.
        significant: Which entries of the outputs count; None if all do.
    """

    task: str
    spec: TaskSpec
    build: Callable[[str | None], nn.Module]
    example: Callable[[], Inputs]
    outputs: Mapping[str, OutputSpec]
    calibration: Callable[[], Batches]
    evaluation: Callable[[], Batches]
    inference: Callable[[], Batches]
    metric: Callable[[], Metric]
    predictions: Callable[[Path], Predictions]
    network: object
    restore: Callable[[StoredSpec], Experiment]
    rebind: Callable[[TaskSpec], Experiment]
    refuse_another_model: Callable[[TaskSpec], None]
    libraries: tuple[str, ...] = ()
    alias: Callable[[str], str] = str
    sensitive: Mapping[str, str] = field(default_factory=dict)
    with_size: Callable[[int, int], Experiment] | None = None
    deepstream: Callable[[], DeepStream] | None = None
    align: Callable[[Outputs, Outputs], Outputs] | None = None
    ambiguous: Callable[[nn.Module, Inputs], Tensor] | None = None
    significant: Callable[[Outputs], Tensor] | None = None

    @property
    def plugins(self) -> dict[str, str]:
        """Version of each package that the task or the backend comes from, if it is not taoq itself."""
        rows = (TASKS.rows().get(self.task), BACKENDS.rows().get(self.spec.quantize.backend))
        return distributions([row for row in rows if row])

    def name_layer(self, layer: Layer) -> Layer:
        """A layer with what the task knows about it: another name, and whether it is sensitive."""
        module = layer.alias or layer.name  # a node is known by the module that it was exported from
        alias = self.alias(module) or module
        kinds = (kind for pattern, kind in self.sensitive.items() if fnmatchcase(alias, pattern))
        return dataclasses.replace(layer, alias=alias if alias != layer.name else "", sensitive=next(kinds, ""))

    def aligned(self, reference: Outputs, outputs: Outputs) -> Outputs:
        """Outputs in the order of a reference's."""
        return self.align(reference, outputs) if self.align else outputs


def bind(task: Task[S], spec: S) -> Experiment:
    """Bind a task to a spec. Opens no data and builds no network."""
    export = task.export
    inference, predictions, with_size, deepstream = (
        task.inference_batches,
        task.predictions,
        export.with_size,
        export.deepstream,
    )

    def no_inference() -> SpecError:
        what = f"task {task.name} has no inference"
        return SpecError(Fault("inference", what, "use evaluate, or the Python API"))

    def inference_batches() -> Batches:
        if inference is None:
            raise no_inference()
        return inference(spec)

    def write_predictions(directory: Path) -> Predictions:
        if predictions is None:
            raise no_inference()
        return predictions(spec, directory)

    def refuse_other(stored: TaskSpec) -> None:
        assert isinstance(stored, task.spec)
        refuse_another_model(task, spec, stored)

    def rebind(other: TaskSpec) -> Experiment:
        assert isinstance(other, task.spec)
        return bind(task, other)

    return Experiment(
        task=task.name,
        spec=spec,
        build=lambda checkpoint: task.build_model(spec, checkpoint),
        example=lambda: task.example_inputs(spec),
        outputs=task.outputs(spec),
        calibration=lambda: task.calibration_batches(spec),
        evaluation=lambda: task.evaluation_batches(spec),
        inference=inference_batches,
        metric=lambda: task.metric(spec),
        predictions=write_predictions,
        network=task.network(spec),
        restore=lambda stored: bind(task, stored.load(task.spec)),
        rebind=rebind,
        refuse_another_model=refuse_other,
        libraries=task.libraries,
        alias=task.alias,
        sensitive=task.sensitive,
        with_size=None if with_size is None else lambda height, width: bind(task, with_size(spec, height, width)),
        deepstream=None if deepstream is None else lambda: deepstream(spec),
        align=export.align,
        ambiguous=export.ambiguous,
        significant=export.significant,
    )


def restored(experiment: Experiment, stored: StoredSpec) -> Experiment:
    """The experiment of a stored spec, if it is about the network of an experiment.

    Raises:
        TaoqError: The spec does not fit this taoq.
        SpecError: It is about another network than the experiment.
    """
    restored = experiment.restore(stored)
    experiment.refuse_another_model(restored.spec)
    return restored
