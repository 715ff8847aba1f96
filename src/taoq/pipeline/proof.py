# SPDX-License-Identifier: Apache-2.0
"""Prove an exported file: it gives the outputs of the torch network on real images."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from taoq.errors import Fault, NotGiven, Notice, TaoqError
from taoq.network import Inputs, Outputs, batch_size, first_samples
from taoq.pipeline.experiment import Experiment
from taoq.pipeline.models import OpenedModel, start
from taoq.plain import JsonObject
from taoq.runtimes.base import Runtime, noise
from taoq.tasks.base import Batches

log = logging.getLogger(__name__)

_QUANTIZED_TOLERANCE = 0.1
"""Of a Q/DQ graph: a value that lies between two steps may be rounded either way, a step is 1/127 of the range."""


@dataclass(frozen=True, kw_only=True)
class OutputDifference:
    """How far an output of a file is from that of the torch network.

    Attributes:
        largest_difference: Largest difference of any value.
        largest_value: Largest magnitude of the torch network's output.
    """

    largest_difference: float
    largest_value: float

    def within(self, tolerance: float) -> bool:
        """Whether the difference is accepted, as a part of the largest value."""
        return self.largest_difference <= tolerance * max(self.largest_value, 1e-12)


@dataclass(frozen=True, kw_only=True)
class Proof:
    """The comparison of a file with the torch network.

    Attributes:
        images: Number of images that were compared.
        left_out_for_ties: Number of images that were left out, where the network decides by a tie.
        tolerance: Accepted difference, as a part of the largest value.
        outputs: How far each output is off.
    """

    images: int
    left_out_for_ties: int
    tolerance: float
    outputs: Mapping[str, OutputDifference]

    def to_json(self) -> JsonObject:
        """As `<name>_export.json` has it."""
        return dataclasses.asdict(self)


def prove(experiment: Experiment, reference: nn.Module, graph: Runtime, *, quantized: bool) -> Proof:
    """Run a file beside the torch network.

    Args:
        experiment: The experiment.
        reference: The torch network as it is evaluated.
        graph: The file, ready to run.
        quantized: Whether both are quantized: then only significant entries must agree, within a wider tolerance.

    Raises:
        TaoqError: They differ, or cannot be compared.
    """
    section = experiment.spec.export
    tolerance = max(section.tolerance, _QUANTIZED_TOLERANCE) if quantized else section.tolerance
    network = start(experiment, OpenedModel(reference, "torch", None, quantized), "cpu", "export.on_cpu")
    compared, ties = 0, 0
    outputs: dict[str, OutputDifference] = {}
    for inputs in _images(experiment, section.check_images):
        if experiment.ambiguous is not None:
            clear = ~experiment.ambiguous(reference, inputs)
            ties += int((~clear).sum())
            inputs = {name: tensor[clear] for name, tensor in inputs.items()}
        if batch_size(inputs):
            compared += batch_size(inputs)
            expected = network.run(inputs)
            if not all(bool(value.isfinite().all()) for value in expected.values()):
                hint = "look for NaN or infinite values in the checkpoint"
                raise TaoqError(Fault("export.checkpoint", "the network's outputs are not finite", hint))
            found = differences(experiment, expected, graph.run(inputs), only_significant=quantized)
            outputs = {name: _larger(outputs.get(name), difference) for name, difference in found.items()}
    if not compared:
        what = f"on none of {ties} images can the outputs be compared: the network chooses its queries by ties"
        raise TaoqError(Fault("export.check_images", what, "give images of what the network was trained for"))
    if ties:
        what = f"{ties} image(s) left out, where the network chooses its queries by a tie"
        log.warning(Notice("export.check_images", what))
    _check(outputs, tolerance)
    return Proof(images=compared, left_out_for_ties=ties, tolerance=tolerance, outputs=outputs)


def differences(
    experiment: Experiment, reference: Outputs, outputs: Outputs, *, only_significant: bool
) -> dict[str, OutputDifference]:
    """How far each output is off.

    Entries without an order are aligned both ways, so that none is forgotten.

    Args:
        experiment: Says how entries are aligned, and which are significant.
        reference: The expected outputs.
        outputs: The outputs to compare.
        only_significant: Whether only significant entries count.
    """
    result = {
        name: OutputDifference(largest_difference=0.0, largest_value=float(value.abs().max()))
        for name, value in reference.items()
    }
    pairs = (
        (reference, experiment.aligned(reference, outputs)),
        (outputs, experiment.aligned(outputs, reference)),
    )
    for first, second in pairs:
        entries = experiment.significant(first) if only_significant and experiment.significant else ...
        for name, so_far in result.items():
            largest = float("inf")
            if first[name].shape == second[name].shape and bool((first[name] - second[name]).isfinite().all()):
                apart = (first[name] - second[name])[entries].abs()
                largest = float(apart.max()) if apart.numel() else 0.0
            larger = max(so_far.largest_difference, largest)
            result[name] = dataclasses.replace(so_far, largest_difference=larger)
    return result


def _larger(first: OutputDifference | None, second: OutputDifference) -> OutputDifference:
    if first is None:
        return second
    return OutputDifference(
        largest_difference=max(first.largest_difference, second.largest_difference),
        largest_value=max(first.largest_value, second.largest_value),
    )


def _check(outputs: Mapping[str, OutputDifference], tolerance: float) -> None:
    apart = {name: difference for name, difference in outputs.items() if not difference.within(tolerance)}
    if apart:
        names = "; ".join(
            f"{name} by {difference.largest_difference:.2g}, its largest value is {difference.largest_value:.3g}"
            for name, difference in apart.items()
        )
        hint = f"the file was not written; export.tolerance is {tolerance:g} of the largest value"
        raise TaoqError(Fault("export.tolerance", f"torch and ONNX differ: {names}", hint))


def _images(experiment: Experiment, number: int) -> Iterator[Inputs]:
    """Batches of real images of the spec, `number` in all; noise if it names none, with a notice."""
    spec = experiment.spec
    drawn = dataclasses.replace(spec.quantize.calibration, num_samples=number, batch_size=None)
    experiment = experiment.rebind(
        dataclasses.replace(spec, quantize=dataclasses.replace(spec.quantize, calibration=drawn))
    )
    reasons = []
    for source in (experiment.calibration, experiment.evaluation, experiment.inference):
        try:
            batches: Batches = source()
        except NotGiven as error:
            reasons.append(error.faults[0])
            continue
        except TaoqError as error:  # given, but not there
            reasons.append(error.faults[0])
            what = f"{error.faults[0].what}; export looks for other images"
            log.warning(Notice(error.faults[0].where, what))
            continue
        left = number
        for batch in batches:
            yield first_samples(batch.inputs, left)
            left -= batch_size(batch.inputs)
            if left <= 0:
                return
        return
    what = f"the spec has no images ({reasons[0].where}: {reasons[0].what}): compared on noise"
    log.warning(Notice("export.check_images", what))
    for seed in range(number):
        yield noise(experiment.example(), 1, seed)
