# SPDX-License-Identifier: Apache-2.0
"""The task classification_pyt."""

from __future__ import annotations

import dataclasses

from taoq.network import OutputSpec
from taoq.tasks.backbones.tao_names import TAO_NETWORKS
from taoq.tasks.base import Export, Task, refuse_differences
from taoq.tasks.classification.data import (
    calibration_batches,
    evaluation_batches,
    example_inputs,
    inference_batches,
    preprocessing,
)
from taoq.tasks.classification.export import deepstream, with_size
from taoq.tasks.classification.metric import AccuracyMetric
from taoq.tasks.classification.model import build_model, with_checkpoint
from taoq.tasks.classification.predict import ClassificationPredictions, EvaluationTable
from taoq.tasks.classification.published import with_published
from taoq.tasks.classification.spec import UNUSED, AugmentationSpec, ClassificationSpec


def check_same_model(spec: ClassificationSpec, stored: ClassificationSpec) -> None:
    """Refuse an artifact of another network than that of the spec. The spec may leave the network out.

    Raises:
        SpecError: If network, number of classes, input size or preprocessing differ.
    """
    fields = ["dataset.num_classes", "dataset.img_size"]
    fields += [
        f"dataset.augmentation.{entry.name}"
        for entry in dataclasses.fields(AugmentationSpec)
        if entry.name != "preprocessing"
    ]
    named, made = spec.model.backbone, stored.model.backbone
    if named.type:
        fields.append("model.backbone.type")
    network = TAO_NETWORKS.get(made.type)
    if network and network.two_variants and named.variant not in ("auto", made.variant.replace("auto", "library")):
        fields.append("model.backbone.variant")
    refuse_differences(spec, stored, fields)


TASK = Task(
    name="classification_pyt",
    spec=ClassificationSpec,
    unused=UNUSED,
    libraries=("timm", "torchvision"),
    outputs=lambda spec: {"output": OutputSpec(("N", spec.dataset.num_classes))},
    network=lambda spec: (spec.model.backbone, spec.model.checkpoint_key),
    build_model=build_model,
    example_inputs=example_inputs,
    calibration_batches=calibration_batches,
    evaluation_batches=evaluation_batches,
    inference_batches=inference_batches,
    metric=AccuracyMetric,
    predictions=ClassificationPredictions,
    records=EvaluationTable,
    complete=with_published,
    with_checkpoint=with_checkpoint,
    check_same_model=check_same_model,
    preprocessing=lambda spec: preprocessing(spec.dataset.augmentation, spec.dataset.img_size).to_json(),
    export=Export(with_size=with_size, deepstream=deepstream),
)
