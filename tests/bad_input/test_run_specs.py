"""A spec whose evaluation or calibration cannot run is refused with its line."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from support.small_spec import PURPOSE, STATIC_EDITS, Edit, Refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            {"topk: [1, 5]": "topk: [1, 11]"},
            "spec.yaml:8: model.head.topk: [1, 11] does not fit 10 classes\nhint: write numbers from 1 to 10\n",
            id="topk is larger than num_classes",
        ),
        pytest.param(
            {"evaluate:\n": "evaluate:\n  num_gpus: 2\n"},
            "spec.yaml:37: evaluate.num_gpus: num_gpus is 2, gpu_ids is [0]: taoq runs on one device\n"
            "hint: write num_gpus: 1 and one entry in gpu_ids\n",
            id="two GPUs",
        ),
        pytest.param(
            {"device: cpu\ninference": "device: trt\ninference"},
            "spec.yaml:38: evaluate.device: trt does not run torch models\nhint: write cuda, cuda:N or cpu\n",
            id="device trt",
        ),
        pytest.param(
            {"device: cpu\ninference": "device: gpu\ninference"},
            "spec.yaml:38: evaluate.device: unknown value 'gpu'\n"
            "hint: the field is: Where to run: cuda, cuda:N or cpu; trt (TensorRT) for ONNX files\n",
            id="unknown device",
        ),
        pytest.param(
            {"evaluate:\n": "evaluate:\n  is_quantized: true\n"},
            "spec.yaml:37: evaluate.is_quantized: weights.safetensors is not an artifact: there is no manifest.json"
            " beside it that names it\n"
            "hint: quantize first, or give the folder of an artifact as evaluate.checkpoint\n",
            id="is_quantized of a float checkpoint",
        ),
        pytest.param(
            {"evaluate:\n  checkpoint: weights.safetensors\n": "evaluate:\n  is_quantized: true\n"},
            "spec.yaml:37: evaluate.is_quantized: is true, but evaluate.checkpoint is not given\n"
            "hint: quantize first, or give the folder of an artifact as evaluate.checkpoint\n",
            id="is_quantized of nothing",
        ),
        pytest.param(
            {"evaluate:\n  checkpoint: weights.safetensors\n": "evaluate:\n"},
            "spec.yaml:4: model.backbone.pretrained: no checkpoint is given, and pretrained weights are not asked for\n"
            "hint: give the checkpoint in the action's section, or set model.backbone.pretrained: true\n",
            id="no checkpoint",
        ),
        pytest.param(
            {"  val_dataset:\n    images_dir: data/val\n  test_dataset:\n    images_dir: data/test\n": ""},
            "spec.yaml:9: dataset.val_dataset.images_dir: missing: evaluate needs labelled images\n"
            "hint: name a folder with one folder per class\n",
            id="no images",
        ),
    ],
)
def test_a_spec_that_cannot_be_evaluated_is_refused(
    edit: Edit, refused: Refused, changes: Mapping[str, str], message: str
) -> None:
    edit(changes)
    assert refused("evaluate") == (2, message)


def test_static_quantization_without_calibration_images_is_refused(edit: Edit, refused: Refused) -> None:
    edit({**STATIC_EDITS, "  quant_calibration_dataset:\n    images_dir: data/calibration\n": ""})
    assert refused("quantize") == (
        2,
        f"{PURPOSE['modelopt.pytorch']}"
        "spec.yaml:9: dataset.quant_calibration_dataset.images_dir: missing: static_ptq with activations needs"
        " calibration images\n"
        "hint: name a folder of a few hundred images like those the model will see\n",
    )
