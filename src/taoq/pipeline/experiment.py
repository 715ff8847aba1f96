# SPDX-License-Identifier: Apache-2.0
"""The experiment: a task bound to a spec, with everything that the pipeline needs from a task."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from taoq.errors import Fault, SpecError
from taoq.network import Inputs, Outputs, OutputSpec
from taoq.plain import JsonMapping
from taoq.plugins import BACKENDS, TASKS, distributions
from taoq.quantization.types import Layer
from taoq.spec.load import StoredSpec
from taoq.tasks.base import Batches, DeepStream, Metric, PostProcess, Predictions, S, Task, refuse_another_model
from taoq.tasks.sections import TaskSpec

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A task bound to a spec, or a network and data that a Python caller supplies.

    Attributes:
        task: Name of the task; empty if a Python caller supplies the network.
        spec: The spec.
        build: Builds the float network of a checkpoint; see `Task.build_model`.
        example: Returns the inputs of one sample.
        outputs: Outputs of the network, in order.
        calibration: Opens the calibration data; raises NotGiven if the spec names none.
        evaluation: Opens the labelled data; raises NotGiven if the spec names none.
        inference: Opens the inference data; raises NotGiven if the spec names none.
        metric: Returns an empty metric.
        predictions: Opens a writer of predictions into a folder.
        records: Opens a writer of what `evaluate` keeps of each sample into a folder; None if it keeps nothing.
        network: Settings that identify the network, besides the checkpoint; plain data or a dataclass.
        preprocessing: Returns what becomes of a file before it is an input; empty if nobody says it.
        libraries: Distributions that define the network.
        alias: Returns another name of a layer; empty if it has none.
        sensitive: Patterns on aliases of layers that are known to lose accuracy, with the kind of layer.
        restore: Returns the experiment of a stored spec; raises TaoqError if this taoq cannot load the spec.
        rebind: Returns the experiment of another spec of the same task.
        refuse_another_model: Raises SpecError if a spec describes another network than this experiment's.
        with_checkpoint: Returns the experiment with what a float checkpoint shows about its network; None if the task
            takes nothing from the checkpoint but its weights.
        with_size: Returns the experiment for another input size (height, width); None if the task has only one size.
        deepstream: Returns the task's part of nvdsinfer_config.yaml; None if the task has none.
        align: Reorders outputs (second argument) like a reference (first argument); None if their order is fixed.
        ambiguous: Returns which samples the network decides by a tie; None if it decides none by a tie.
        significant: Returns which entries of the outputs count; None if all do.
        postprocess: Returns the post-processing that an exported file can have; None if the task has none.
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
    records: Callable[[Path], Predictions] | None = None
    preprocessing: Callable[[], JsonMapping] = dict
    libraries: tuple[str, ...] = ()
    alias: Callable[[str], str] = str
    sensitive: Mapping[str, str] = field(default_factory=dict)
    with_checkpoint: Callable[[str], Experiment] | None = None
    with_size: Callable[[int, int], Experiment] | None = None
    deepstream: Callable[[], DeepStream] | None = None
    align: Callable[[Outputs, Outputs], Outputs] | None = None
    ambiguous: Callable[[nn.Module, Inputs], Tensor] | None = None
    significant: Callable[[Outputs], Tensor] | None = None
    postprocess: Callable[[], BoundPostProcess] | None = None

    @property
    def plugins(self) -> dict[str, str]:
        """Versions of the packages, other than taoq, that provide the task or the backend."""
        rows = (TASKS.rows().get(self.task), BACKENDS.rows().get(self.spec.quantize.backend))
        return distributions([row for row in rows if row])

    def name_layer(self, layer: Layer) -> Layer:
        """Add the task's knowledge of a layer: its alias, and whether it is sensitive."""
        module = layer.alias or layer.name  # The alias of an ONNX node is the module that it was exported from.
        alias = self.alias(module) or module
        kinds = (kind for pattern, kind in self.sensitive.items() if fnmatchcase(alias, pattern))
        return dataclasses.replace(layer, alias=alias if alias != layer.name else "", sensitive=next(kinds, ""))

    def of_checkpoint(self, checkpoint: str) -> Experiment:
        """Return the experiment with what a float torch checkpoint shows about its network."""
        return self.with_checkpoint(checkpoint) if self.with_checkpoint and checkpoint else self

    def aligned(self, reference: Outputs, outputs: Outputs) -> Outputs:
        """Return outputs in the order of a reference's entries."""
        return self.align(reference, outputs) if self.align else outputs


@dataclass(frozen=True)
class BoundPostProcess:
    """Post-processing as a part of an exported file, bound to a spec; see `taoq.tasks.base.PostProcess`.

    Attributes:
        experiment: The experiment for files that have it.
        inputs: Names of the inputs that the network has without it.
        module: The network that is appended.
        expected: Returns the outputs that a file must have, given those of its network and the inputs of the file.
    """

    experiment: Experiment
    inputs: tuple[str, ...]
    module: nn.Module
    expected: Callable[[Outputs, Inputs], Outputs]

    def network_inputs(self, inputs: Inputs) -> Inputs:
        """Return those inputs of a file that its network reads, under their names in the network."""
        return dict(zip(self.inputs, inputs.values(), strict=False))


def bind(task: Task[S], spec: S) -> Experiment:
    """Bind a task to a spec. Opens no data and builds no network."""
    export = task.export
    inference, predictions, records = task.inference_batches, task.predictions, task.records
    with_size, deepstream, postprocess = export.with_size, export.deepstream, export.postprocess
    with_checkpoint, preprocessing = task.with_checkpoint, task.preprocessing

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

    def bind_postprocess(part: PostProcess[S]) -> BoundPostProcess:
        return BoundPostProcess(
            experiment=bind(part.task(task), spec),
            inputs=tuple(task.example_inputs(spec)),
            module=part.module(spec),
            expected=lambda outputs, inputs: part.expected(spec, outputs, inputs),
        )

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
        records=None if records is None else lambda directory: records(spec, directory),
        preprocessing=dict if preprocessing is None else lambda: preprocessing(spec),
        libraries=task.libraries,
        alias=task.alias,
        sensitive=task.sensitive,
        with_checkpoint=None if with_checkpoint is None else lambda path: bind(task, with_checkpoint(spec, path)),
        with_size=None if with_size is None else lambda height, width: bind(task, with_size(spec, height, width)),
        deepstream=None if deepstream is None else lambda: deepstream(spec),
        align=export.align,
        ambiguous=export.ambiguous,
        significant=export.significant,
        postprocess=None if postprocess is None else lambda: bind_postprocess(postprocess),
    )


def restored(experiment: Experiment, stored: StoredSpec) -> Experiment:
    """Return the experiment of a stored spec that describes the same network.

    Raises:
        TaoqError: If this taoq cannot load the spec.
        SpecError: If the spec describes another network.
    """
    stored_experiment = experiment.restore(stored)
    experiment.refuse_another_model(stored_experiment.spec)
    return stored_experiment
