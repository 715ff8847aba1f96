# SPDX-License-Identifier: Apache-2.0
"""Prove that an exported file gives the outputs of the torch network on real images."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from taoq.errors import Fault, NotGiven, Notice, TaoqError
from taoq.network import Inputs, Outputs, batch_size, first_samples
from taoq.pipeline.experiment import BoundPostProcess, Experiment
from taoq.pipeline.models import OpenedModel, start
from taoq.plain import JsonObject
from taoq.runtimes.base import Runtime, noise
from taoq.tasks.base import Batches

log = logging.getLogger(__name__)

_QUANTIZED_TOLERANCE = 0.1
"""Least tolerance of a Q/DQ graph: two runtimes may round a value to different steps of 1/127 of the range."""
_EXAMINED = 8
"""How many times as many images as are compared are looked at, because images with ties are left out."""


@dataclass(frozen=True, kw_only=True)
class OutputDifference:
    """Difference between an output of an exported file and that of the torch network.

    Attributes:
        largest_difference: Largest absolute difference of any value; infinite if the outputs cannot be subtracted.
        largest_value: Largest magnitude in the expected output.
        accepted: Largest accepted difference.
    """

    largest_difference: float
    largest_value: float
    accepted: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Proof:
    """The comparison of an exported file with the torch network.

    Attributes:
        images: Number of images that were compared.
        left_out_for_ties: Number of images that were left out because the network decides them by a tie.
        tolerance: Accepted difference, as a fraction of the largest value.
        outputs: Difference of each output, by name.
    """

    images: int
    left_out_for_ties: int
    tolerance: float
    outputs: Mapping[str, OutputDifference]

    def to_json(self) -> JsonObject:
        """Return the entry of `<name>_export.json`."""
        outputs = {
            name: {"largest_difference": output.largest_difference, "largest_value": output.largest_value}
            for name, output in self.outputs.items()
        }
        return dataclasses.asdict(self) | {"outputs": outputs}


def prove(experiment: Experiment, reference: nn.Module, graph: Runtime, *, quantized: bool) -> Proof:
    """Compare the outputs of an exported file with those of the torch network.

    Args:
        experiment: The experiment.
        reference: The torch network as it is evaluated.
        graph: The exported file, ready to run.
        quantized: Whether both are quantized. Only significant entries must agree then, within a wider tolerance.

    Raises:
        TaoqError: If the outputs differ, are not finite, or cannot be compared on any image.
    """
    section = experiment.spec.export
    tolerance = max(section.tolerance, _QUANTIZED_TOLERANCE) if quantized else section.tolerance
    network = start(experiment, OpenedModel(reference, "torch", None, quantized), "cpu", "export.on_cpu")
    compared, ties, significant = 0, 0, False
    outputs: dict[str, OutputDifference] = {}
    for inputs in _images(experiment, section.check_images):
        if experiment.ambiguous is not None:
            clear = ~experiment.ambiguous(reference, inputs)
            ties += int((~clear).sum())
            inputs = {name: tensor[clear] for name, tensor in inputs.items()}
        inputs = first_samples(inputs, section.check_images - compared)
        if batch_size(inputs):
            compared += batch_size(inputs)
            expected = network.run(inputs)
            if not all(bool(value.isfinite().all()) for value in expected.values()):
                hint = "look for NaN or infinite values in the checkpoint"
                raise TaoqError(Fault("export.checkpoint", "the network's outputs are not finite", hint))
            differences = output_differences(experiment, expected, graph.run(inputs), only_significant=quantized)
            outputs = _larger(outputs, differences)
            significant |= experiment.significant is None or bool(experiment.significant(expected).any())
        if compared == section.check_images:
            break
    if not compared:
        what = f"the outputs cannot be compared on any of {ties} images: the network decides by ties"
        raise TaoqError(Fault("export.check_images", what, "give images like those that the network was trained on"))
    if ties:
        what = f"{ties} image(s) left out, where the network decides by a tie"
        log.warning(Notice("export.check_images", what))
    if quantized and not significant:
        what = f"the quantized network finds nothing in these {compared} image(s): no outputs were compared"
        log.warning(Notice("export.check_images", what))
    outputs = _checked(experiment, outputs, tolerance, "torch and ONNX")
    return Proof(images=compared, left_out_for_ties=ties, tolerance=tolerance, outputs=outputs)


def prove_postprocess(postprocess: BoundPostProcess, network: Runtime, graph: Runtime) -> dict[str, OutputDifference]:
    """Compare the outputs of a file with post-processing with what `evaluate` makes of the outputs of its network.

    Args:
        postprocess: The post-processing.
        network: The exported network without post-processing.
        graph: The whole file.

    Returns:
        The difference of each output, by name.

    Raises:
        TaoqError: If the outputs differ.
    """
    experiment = postprocess.experiment
    section = experiment.spec.export
    outputs: dict[str, OutputDifference] = {}
    left = section.check_images
    for inputs in _images(experiment, left):
        inputs = first_samples(inputs, left)
        left -= batch_size(inputs)
        expected = postprocess.expected(network.run(postprocess.network_inputs(inputs)), inputs)
        differences = output_differences(experiment, expected, graph.run(inputs), only_significant=False)
        outputs = _larger(outputs, differences)
        if not left:
            break
    return _checked(experiment, outputs, section.tolerance, "evaluate and the post-processing in the file")


def output_differences(
    experiment: Experiment, reference: Outputs, outputs: Outputs, *, only_significant: bool
) -> dict[str, OutputDifference]:
    """Return the difference of each output.

    Entries without an order are aligned in both directions, so that an extra entry on either side counts.

    Args:
        experiment: The experiment, which aligns entries and knows the significant ones.
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
        for name, difference in result.items():
            largest = float("inf")
            if first[name].shape == second[name].shape and bool((first[name] - second[name]).isfinite().all()):
                distances = (first[name] - second[name])[entries].abs()
                largest = float(distances.max()) if distances.numel() else 0.0
            larger = max(difference.largest_difference, largest)
            result[name] = dataclasses.replace(difference, largest_difference=larger)
    return result


def _larger(
    first: Mapping[str, OutputDifference], second: Mapping[str, OutputDifference]
) -> dict[str, OutputDifference]:
    """Return the larger differences and values of each output. There may be none yet in `first`."""
    return {
        name: OutputDifference(
            largest_difference=max(first.get(name, output).largest_difference, output.largest_difference),
            largest_value=max(first.get(name, output).largest_value, output.largest_value),
        )
        for name, output in second.items()
    }


def _checked(
    experiment: Experiment, outputs: Mapping[str, OutputDifference], tolerance: float, compared: str
) -> dict[str, OutputDifference]:
    """Return the differences, with the largest that is accepted of each output.

    Args:
        experiment: The experiment, which knows the outputs in which no difference is accepted.
        outputs: The differences.
        tolerance: Accepted difference, as a fraction of the largest value.
        compared: What was compared, for the message.

    Raises:
        TaoqError: If a difference is larger.
    """
    checked = {
        name: dataclasses.replace(
            output, accepted=0.0 if experiment.outputs[name].exact else tolerance * max(output.largest_value, 1e-12)
        )
        for name, output in outputs.items()
    }
    too_large = {name: output for name, output in checked.items() if output.largest_difference > output.accepted}
    if too_large:
        names = "; ".join(
            f"{name} by {difference.largest_difference:.2g}, its largest value is {difference.largest_value:.3g}"
            for name, difference in too_large.items()
        )
        hint = f"the file was not written; export.tolerance is {tolerance:g} of the largest value"
        raise TaoqError(Fault("export.tolerance", f"{compared} differ: {names}", hint))
    return checked


def _images(experiment: Experiment, number: int) -> Iterator[Inputs]:
    """Yield batches of images of the spec, until the caller has enough; if the spec names none, warn and yield noise.

    The first `number` of them are those that calibration with as many images would draw. Some may be left out for ties,
    so up to `_EXAMINED` times as many follow.
    """
    most = _EXAMINED * number
    drawn = _with_samples(experiment, number)
    reasons = []
    for source, more in (
        (drawn.calibration, experiment.calibration),
        (experiment.evaluation, None),
        (experiment.inference, None),
    ):
        try:
            batches: Batches = source()
        except NotGiven as error:
            reasons.append(error.faults[0])
            continue
        except TaoqError as error:  # The spec names images, but they cannot be read.
            reasons.append(error.faults[0])
            what = f"{error.faults[0].what}; export looks for other images"
            log.warning(Notice(error.faults[0].where, what))
            continue
        yield from _samples(batches, 0, number)
        if batches.num_samples >= number:
            yield from _samples(more() if more else batches, number, most)
        return
    what = f"the spec has no images ({reasons[0].where}: {reasons[0].what}): compared on noise"
    log.warning(Notice("export.check_images", what))
    for seed in range(most):
        yield noise(experiment.example(), 1, seed)


def _with_samples(experiment: Experiment, number: int) -> Experiment:
    """Return the experiment with this number of calibration images."""
    spec = experiment.spec
    calibration = dataclasses.replace(spec.quantize.calibration, num_samples=number, batch_size=None)
    return experiment.rebind(
        dataclasses.replace(spec, quantize=dataclasses.replace(spec.quantize, calibration=calibration))
    )


def _samples(batches: Batches, start: int, end: int) -> Iterator[Inputs]:
    """Yield the inputs of the samples from number `start` to before `end`, batch by batch."""
    position = 0
    for batch in batches:
        size = batch_size(batch.inputs)
        kept = slice(max(start - position, 0), end - position)
        inputs = {name: tensor[kept] for name, tensor in batch.inputs.items()}
        if batch_size(inputs):
            yield inputs
        position += size
        if position >= end:
            return
