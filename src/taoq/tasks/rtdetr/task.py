# SPDX-License-Identifier: Apache-2.0
"""The task rtdetr."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from taoq.network import OutputSpec
from taoq.tasks.base import Export, Task, refuse_differences
from taoq.tasks.rtdetr.data import (
    calibration_batches,
    evaluation_batches,
    example_inputs,
    inference_batches,
    preprocessing,
)
from taoq.tasks.rtdetr.export import align, ambiguous, deepstream, significant, with_size
from taoq.tasks.rtdetr.metric import CocoMetric
from taoq.tasks.rtdetr.model import build_model, with_checkpoint
from taoq.tasks.rtdetr.names import SENSITIVE, original_name
from taoq.tasks.rtdetr.postprocess import POSTPROCESS
from taoq.tasks.rtdetr.predict import DetectionPredictions
from taoq.tasks.rtdetr.published import with_published
from taoq.tasks.rtdetr.spec import UNUSED, ModelSpec, RtdetrSpec, is_resnet


def check_same_model(spec: RtdetrSpec, stored: RtdetrSpec) -> None:
    """Refuse an artifact of another network than that of the spec. The spec may leave the network out.

    Raises:
        SpecError: If network, number of classes, input size or scaling of images differ.
    """
    fields = [
        "dataset.num_classes",
        "dataset.augmentation.eval_spatial_size",
        "dataset.augmentation.preserve_aspect_ratio",
        "dataset.augmentation.interpolation",
        "dataset.augmentation.antialias",
    ]
    if spec.model != ModelSpec():
        fields += ["model.architecture", "model.backbone", "model.hidden_dim", "model.dec_layers", "model.num_queries"]
    if is_resnet(stored.model) and spec.model.resnet not in ("auto", stored.model.resnet.replace("auto", "vd")):
        fields.append("model.resnet")
    refuse_differences(spec, stored, fields)


def kpi(figures: Mapping[str, float]) -> Mapping[str, float | str]:
    """Return figures as TAO's evaluate writes them to status.json: AP and AP50 as text, as `test_mAP` and `test_mAP50`.

    In the status.json of TAO, `val_mAP` and `val_mAP50` are figures of training.
    """
    shown: dict[str, float | str] = {}
    for name, value in figures.items():
        if name.startswith("val_"):
            shown[f"test_{name.removeprefix('val_')}"] = str(value)
        else:
            shown[name] = value
    return shown


TASK = Task(
    name="rtdetr",
    spec=RtdetrSpec,
    unused=UNUSED,
    libraries=("transformers", "timm"),
    outputs=lambda spec: {
        "pred_logits": OutputSpec(("N", "queries", spec.dataset.num_classes)),
        "pred_boxes": OutputSpec(("N", "queries", 4)),
    },
    # The number of detections per image does not change the network.
    network=lambda spec: dataclasses.replace(spec.model, num_select=1),
    build_model=build_model,
    example_inputs=example_inputs,
    calibration_batches=calibration_batches,
    evaluation_batches=evaluation_batches,
    inference_batches=inference_batches,
    metric=CocoMetric,
    predictions=DetectionPredictions,
    complete=with_published,
    with_checkpoint=with_checkpoint,
    check_same_model=check_same_model,
    preprocessing=lambda spec: preprocessing(spec).to_json(),
    kpi=kpi,
    export=Export(
        with_size=with_size,
        deepstream=deepstream,
        align=align,
        ambiguous=ambiguous,
        significant=significant,
        postprocess=POSTPROCESS,
    ),
    alias=original_name,
    sensitive=SENSITIVE,
)
