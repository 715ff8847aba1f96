# SPDX-License-Identifier: Apache-2.0
"""What export needs to know of a detector: its queries are a set, chosen as the best of all positions."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
from torch import Tensor, nn

from taoq.network import Inputs, Outputs
from taoq.tasks.base import DeepStream
from taoq.tasks.rtdetr.data import INPUT, class_names
from taoq.tasks.rtdetr.spec import RtdetrSpec

_TIE = 1e-4
"""Scores of positions, in logits, that two runtimes may order differently."""

_LEAST_SCORE = 0.3
"""Score of a detection that counts."""


def with_size(spec: RtdetrSpec, height: int, width: int) -> RtdetrSpec:
    """The spec for another input size; whether the network takes it is seen when it is built."""
    augmentation = dataclasses.replace(spec.dataset.augmentation, eval_spatial_size=[height, width])
    return dataclasses.replace(spec, dataset=dataclasses.replace(spec.dataset, augmentation=augmentation))


def deepstream(spec: RtdetrSpec) -> DeepStream:
    """Images in 0..1; boxes come through the parser of NVIDIA's deepstream_tao_apps, without NMS."""
    return DeepStream(
        {
            "network-type": 0,
            "net-scale-factor": 1 / 255,
            "offsets": "0;0;0",
            "maintain-aspect-ratio": int(spec.dataset.augmentation.preserve_aspect_ratio),
            "num-detected-classes": spec.dataset.num_classes,
            "cluster-mode": 4,
            "output-blob-names": "pred_boxes;pred_logits",
            "parse-bbox-func-name": "NvDsInferParseCustomDDETRTAO",
            "custom-lib-path": "/opt/nvidia/deepstream/deepstream/lib/libnvds_infercustomparser_tao.so",
        },
        "".join(f"{name}\n" for name in class_names(spec)),
    )


def align(reference: Outputs, outputs: Outputs) -> Outputs:
    """For each query of the reference the nearest query of the outputs: queries that score the same may swap."""
    logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
    # the largest difference of any value counts; boxes are in 0..1, logits in about ten times that
    apart = torch.cdist(reference["pred_boxes"], boxes, p=float("inf")).maximum(
        torch.cdist(reference["pred_logits"], logits, p=float("inf")) / 10
    )
    nearest = apart.argmin(-1, keepdim=True)
    return {
        "pred_logits": logits.gather(1, nearest.expand(-1, -1, logits.shape[-1])),
        "pred_boxes": boxes.gather(1, nearest.expand(-1, -1, 4)),
    }


def significant(outputs: Outputs) -> Tensor:
    """Queries that found something, [N, queries]: others may be at any of many positions that score alike."""
    return outputs["pred_logits"].sigmoid().amax(-1) > _LEAST_SCORE


def ambiguous(model: nn.Module, inputs: Inputs) -> Tensor:
    """Images whose last query and first left out position score the same: either may become a query, [N] bool."""
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
    last, out = best.topk(parts.num_queries + 1, dim=1).values[:, -2:].unbind(1)
    return (last - out < _TIE).cpu()
