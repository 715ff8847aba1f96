# SPDX-License-Identifier: Apache-2.0
"""Functions that adapt `export` to rtdetr, whose queries are the best of all positions, in an order without meaning."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
from torch import Tensor, nn

from taoq.network import Inputs, Outputs
from taoq.tasks.base import DeepStream
from taoq.tasks.rtdetr.data import INPUT, class_names
from taoq.tasks.rtdetr.spec import RtdetrSpec

_TIE = 5e-5
"""Difference of two scores below which two runtimes may order them differently, as a fraction of the largest score.

The errors of float32 grow with the values: 2**-24 of a value per operation. In the example, and in networks of the
published sizes with random weights, scores of torch and onnxruntime differ by at most 1.5e-6 of the largest score.
Rounding in a quantized network causes far larger differences, which no margin covers. There only detections are
compared, and a tie concerns the weakest query.
"""

_LEAST_SCORE = 0.3
"""Smallest score of a query whose outputs two runtimes must agree on."""


def with_size(spec: RtdetrSpec, height: int, width: int) -> RtdetrSpec:
    """Return the spec for another input size (pixels). The size is checked when the network is built."""
    augmentation = dataclasses.replace(spec.dataset.augmentation, eval_spatial_size=[height, width])
    return dataclasses.replace(spec, dataset=dataclasses.replace(spec.dataset, augmentation=augmentation))


def deepstream(spec: RtdetrSpec) -> DeepStream:
    """Return the DeepStream configuration: pixels in 0..1, boxes read by the parser of NVIDIA's deepstream_tao_apps."""
    return DeepStream(
        {
            "network-type": 0,
            "net-scale-factor": 1 / 255,
            "offsets": "0;0;0",
            "maintain-aspect-ratio": int(spec.dataset.augmentation.preserve_aspect_ratio),
            "num-detected-classes": spec.dataset.num_classes,
            "cluster-mode": 4,  # No NMS.
            "output-blob-names": "pred_boxes;pred_logits",
            "parse-bbox-func-name": "NvDsInferParseCustomDDETRTAO",
            "custom-lib-path": "/opt/nvidia/deepstream/deepstream/lib/libnvds_infercustomparser_tao.so",
        },
        "".join(f"{name}\n" for name in class_names(spec)),
    )


def align(reference: Outputs, outputs: Outputs) -> Outputs:
    """Return for each query of the reference the nearest query of the outputs, because queries may be swapped."""
    logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
    # The distance is the largest difference of any value. Logits have about ten times the range of boxes.
    distance = torch.cdist(reference["pred_boxes"], boxes, p=float("inf")).maximum(
        torch.cdist(reference["pred_logits"], logits, p=float("inf")) / 10
    )
    nearest = distance.argmin(-1, keepdim=True)
    return {
        "pred_logits": logits.gather(1, nearest.expand(-1, -1, logits.shape[-1])),
        "pred_boxes": boxes.gather(1, nearest.expand(-1, -1, 4)),
    }


def significant(outputs: Outputs) -> Tensor:
    """Return which queries are detections, [N, queries] bool.

    The other queries may be at any of many positions with similar scores.
    """
    return outputs["pred_logits"].sigmoid().amax(-1) > _LEAST_SCORE


def ambiguous(model: nn.Module, inputs: Inputs) -> Tensor:
    """Return for which images the choice of queries is a tie, [N] bool.

    There the last position that becomes a query and the first that does not have almost the same score.
    """
    parts = cast(Any, model)
    scores: list[Tensor] = []
    hook = parts.model.enc_score_head.register_forward_hook(lambda _, __, output: scores.append(output.float()))
    try:
        with torch.inference_mode():
            model(inputs[INPUT])
    finally:
        hook.remove()
    best = scores[0].amax(-1)
    if best.shape[1] <= parts.num_queries:
        return torch.zeros(len(best), dtype=torch.bool)
    last_query, first_other = best.topk(parts.num_queries + 1, dim=1).values[:, -2:].unbind(1)
    return (last_query - first_other < _TIE * best.abs().amax(1)).cpu()
