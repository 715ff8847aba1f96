# SPDX-License-Identifier: Apache-2.0
"""Post-processing as a part of an exported file, with the inputs and outputs of the authors' export.

Inputs are images [N, 3, height, width] and orig_target_sizes [N, 2] int64, width and height of the original images.
Outputs are labels [N, detections] int64, boxes [N, detections, 4] (left, top, right, bottom in pixels of the original
images) and scores [N, detections] in 0..1. The authors' code: github.com/lyuwenyu/RT-DETR, `tools/export_onnx.py`. It
does not clip boxes; here they are clipped to the image, as in `evaluate`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from taoq.network import Inputs, Outputs, OutputSpec
from taoq.tasks.base import Batch, Batches, Export, PostProcess, Task, refuse_differences
from taoq.tasks.rtdetr.data import INPUT, Targets, example_inputs
from taoq.tasks.rtdetr.model import input_size
from taoq.tasks.rtdetr.predict import detections
from taoq.tasks.rtdetr.spec import RtdetrSpec

IMAGES, SIZES = "images", "orig_target_sizes"
"""Names of the inputs."""


class Selection(nn.Module):
    """The `num_select` best pairs of query and class, as `taoq.tasks.rtdetr.predict.detections` selects them."""

    def __init__(self, spec: RtdetrSpec) -> None:
        super().__init__()
        self._num_select = spec.model.num_select
        self._size = input_size(spec)
        self._padded = spec.dataset.augmentation.preserve_aspect_ratio

    def forward(self, pred_logits: Tensor, pred_boxes: Tensor, orig_target_sizes: Tensor) -> tuple[Tensor, ...]:
        """Return labels, boxes and scores."""
        num_classes = pred_logits.shape[-1]
        logits, best = pred_logits.flatten(1).topk(self._num_select, dim=1)
        query = torch.div(best, num_classes, rounding_mode="trunc")
        labels = best - query * num_classes
        center, size = pred_boxes.gather(1, query.unsqueeze(-1).expand(-1, -1, 4)).chunk(2, dim=-1)
        corners = torch.cat([center - size / 2, center + size / 2], -1)
        image = orig_target_sizes.float()
        scale = image * self._padding(orig_target_sizes) if self._padded else image
        boxes = corners * torch.cat([scale, scale], 1).unsqueeze(1)
        return labels, boxes.clamp(min=0).minimum(torch.cat([image, image], 1).unsqueeze(1)), logits.sigmoid()

    def _padding(self, sizes: Tensor) -> Tensor:
        """Return the width and height of the input as multiples of those of the scaled image in it, [N, 2]; see `fit`.

        Computed in integers, because float32 cannot tell to which side every quotient is rounded.
        """
        sides, input_sides = sizes.clamp(min=1), torch.tensor(self._size).flip(0)
        # Scaled so that the other side fills the input. If it is then too long, this side fills the input.
        scaled = _rounded_quotient(sides * input_sides.flip(0), sides.flip(1)).minimum(input_sides)
        return input_sides / scaled.clamp(min=1)


def _rounded_quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return the quotient of positive integers, rounded to the nearest integer and a half to the nearest even one."""
    quotient = torch.div(numerator, denominator, rounding_mode="trunc")
    doubled = 2 * (numerator - quotient * denominator)
    odd = quotient - 2 * torch.div(quotient, 2, rounding_mode="trunc")
    return quotient + (doubled + odd > denominator).long()  # Only an odd quotient and a half are rounded up.


def _expected(spec: RtdetrSpec, outputs: Outputs, inputs: Inputs) -> Outputs:
    """Return the detections of `evaluate` as outputs of a file."""
    sizes = inputs[SIZES].float()
    found = list(detections(spec, outputs, Targets(tuple(range(len(sizes))), sizes), 0.0))
    return {
        "labels": torch.stack([image.labels for image in found]),
        "boxes": torch.stack([image.boxes for image in found]),
        "scores": torch.stack([image.scores for image in found]),
    }


@dataclass(frozen=True)
class _WithSizes:
    """Batches with the sizes of the images as an input."""

    batches: Batches

    @property
    def num_samples(self) -> int:
        """Number of images."""
        return self.batches.num_samples

    @property
    def key(self) -> str:
        """Digest of everything that the batches depend on."""
        return self.batches.key

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            inputs = {IMAGES: batch.inputs[INPUT], SIZES: batch.targets.sizes.long()}
            yield dataclasses.replace(batch, inputs=inputs)


def _with_sizes(batches: Callable[[RtdetrSpec], Batches]) -> Callable[[RtdetrSpec], Batches]:
    return lambda spec: _WithSizes(batches(spec))


def _example_inputs(spec: RtdetrSpec) -> Inputs:
    """Return one black image, which fills the input."""
    height, width = input_size(spec)
    return {IMAGES: example_inputs(spec)[INPUT], SIZES: torch.tensor([[width, height]])}


def _outputs(spec: RtdetrSpec) -> dict[str, OutputSpec]:
    number = spec.model.num_select
    return {
        "labels": OutputSpec(("N", number), exact=True),
        "boxes": OutputSpec(("N", number, 4)),
        "scores": OutputSpec(("N", number)),
    }


def _align(reference: Outputs, outputs: Outputs) -> Outputs:
    """Return for each detection of the reference the nearest one of the outputs: equal scores have no order."""
    largest = reference["boxes"].amax((1, 2), keepdim=True).clamp(min=1)

    def positions(detected: Outputs) -> Tensor:
        """Return points, [N, detections, 6], where another label is farther away than any box or score."""
        labels, scores = detected["labels"].unsqueeze(-1), detected["scores"].unsqueeze(-1)
        return torch.cat([2 * labels.float(), detected["boxes"] / largest, scores], -1)

    nearest = torch.cdist(positions(reference), positions(outputs), p=float("inf")).argmin(-1)
    return {
        "labels": outputs["labels"].gather(1, nearest),
        "boxes": outputs["boxes"].gather(1, nearest.unsqueeze(-1).expand(-1, -1, 4)),
        "scores": outputs["scores"].gather(1, nearest),
    }


def _task(task: Task[RtdetrSpec]) -> Task[RtdetrSpec]:
    """Return the task for files with post-processing."""
    assert task.inference_batches is not None

    def check_same_model(spec: RtdetrSpec, stored: RtdetrSpec) -> None:
        """Check `num_select` as well, which such a file has built in."""
        assert task.check_same_model is not None
        task.check_same_model(spec, stored)
        refuse_differences(spec, stored, ["model.num_select"])

    return dataclasses.replace(
        task,
        outputs=_outputs,
        network=lambda spec: [spec.model, list(_outputs(spec))],
        example_inputs=_example_inputs,
        calibration_batches=_with_sizes(task.calibration_batches),
        evaluation_batches=_with_sizes(task.evaluation_batches),
        inference_batches=_with_sizes(task.inference_batches),
        check_same_model=check_same_model,
        export=Export(align=_align),
    )


POSTPROCESS = PostProcess(module=Selection, expected=_expected, task=_task)
