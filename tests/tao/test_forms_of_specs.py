"""Specs in the forms that TAO ships and documents load; their paths are given here on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from taoq.actions.base import load
from taoq.errors import SpecError
from taoq.quantization.spec import LayerSpec, TensorSpec
from taoq.spec.source import read_spec
from taoq.tasks import load_task
from taoq.tasks.classification.spec import ClassificationSpec
from taoq.tasks.rtdetr.spec import CocoSpec, RtdetrSpec

QUANTIZE = """\
quantize:
  backend: modelopt
  mode: static_ptq
  algorithm: max
  model_path:  ???
  results_dir: ${results_dir}
  default_layer_dtype: native
  default_activation_dtype: native
  layers:
    - module_name: '*'
      weights: {dtype: fp8_e4m3fn}
      activations: {dtype: fp8_e4m3fn}
  skip_names: ['*router*', 'output.*', BatchNorm2d, '*head*']
"""
TRAIN = """\
results_dir: ???
wandb:
  enable: False
train:
  seed: 47
  resume_training_checkpoint_path: null
  num_gpus: 8
  gpu_ids: [0, 1, 2, 3, 4, 5, 6, 7]
  optim: {lr: 1e-4, skip_names: [PatchEmbed], betas: [0.0, 0.9]}
"""
CLASSIFIER = (
    QUANTIZE
    + TRAIN
    + """\
distill:
  teacher:
    backbone: {type: vit_large_patch14_dinov2_swiglu, freeze_backbone: True}
  pretrained_teacher_model_path: ???
model:
  backbone: {type: resnet_101, freeze_backbone: False}
  head: {type: TAOLinearClsHead, binary: False, topk: [1, 5], loss: {type: CrossEntropyLoss}}
evaluate:
  checkpoint: ${results_dir}/train/classifier_model_latest.pth
export:
  results_dir: "${results_dir}/export"
  checkpoint: ${results_dir}/train/classifier_model_latest.pth
  onnx_file: "${export.results_dir}/classifier.onnx"
dataset:
  dataset: "CLDataset"
  root_dir: "???"
  num_classes: 3
  val_dataset: {images_dir: "${dataset.root_dir}/val"}
  test_dataset: {images_dir: "${dataset.root_dir}/test"}
  quant_calibration_dataset: {images_dir: "${dataset.root_dir}/val"}
"""
)
DETECTOR = (
    QUANTIZE
    + TRAIN
    + """\
model: {backbone: resnet_50, train_backbone: False, pretrained_backbone_path: ???, dec_layers: 6, num_queries: 300}
evaluate:
  num_gpus: 1
  checkpoint: "???"
inference:
  checkpoint: "???"
  color_map:
    "person": blue
    "car": null
export:
  checkpoint: "???"
  onnx_file: "???"
  input_width: 640
  input_height: 640
dataset:
  train_data_sources:
    - image_dir: "???"
      json_file: "???"
  infer_data_sources:
    image_dir:
      - "???"
    classmap: "???"
  quant_calibration_data_sources:
    image_dir: "???"
    json_file: "???"
  num_classes: 80
  remap_mscoco_category: True
  dataset_type: default
  augmentation:
    multi_scales: [[480, 832], [512, 896]]
    eval_spatial_size: [544, 960]
""".replace("pretrained_backbone_path: ???", "pretrained_backbone_path: null")
)
CLASSIFIER_PATHS = ("results_dir=/out", "dataset.root_dir=/data", "quantize.model_path=model.pth")
DETECTOR_PATHS = (
    "results_dir=/out",
    "quantize.model_path=model.pth",
    "dataset.infer_data_sources={image_dir:/data/images,classmap:/data/names.txt}",
    "dataset.quant_calibration_data_sources=[{image_dir:/data/images,json_file:/data/all.json}]",
)
FP8 = TensorSpec(dtype="fp8_e4m3fn")


def write(folder: Path, text: str) -> str:
    (folder / "spec.yaml").write_text(text, encoding="utf-8")
    return str(folder / "spec.yaml")


@pytest.mark.parametrize("action", ["quantize", "evaluate", "export"])
def test_a_classification_spec(tmp_path: Path, action: str) -> None:
    spec: ClassificationSpec = load(
        load_task("classification_pyt"), read_spec(write(tmp_path, CLASSIFIER), CLASSIFIER_PATHS), action
    )
    assert (spec.quantize.backend, spec.quantize.results_dir) == ("modelopt.pytorch", "/out")
    assert spec.quantize.layers == [LayerSpec(module_name="*", weights=FP8, activations=FP8)]
    assert spec.dataset.quant_calibration_dataset.images_dir == "/data/val"
    assert spec.evaluate.checkpoint == "/out/train/classifier_model_latest.pth"
    assert spec.export.onnx_file == "/out/export/classifier.onnx"


@pytest.mark.parametrize(
    ("action", "paths"),
    [
        ("quantize", ()),
        ("evaluate", ("evaluate.checkpoint=model.pth",)),
        ("inference", ("inference.checkpoint=model.pth",)),
        ("export", ("export.checkpoint=model.pth", "export.onnx_file=${export.results_dir}/model.onnx")),
    ],
)
def test_a_detection_spec(tmp_path: Path, action: str, paths: Sequence[str]) -> None:
    source = read_spec(write(tmp_path, DETECTOR), [*DETECTOR_PATHS, *paths])
    spec: RtdetrSpec = load(load_task("rtdetr"), source, action)
    assert spec.dataset.infer_data_sources.image_dir == ["/data/images"]
    assert spec.dataset.quant_calibration_data_sources == CocoSpec(image_dir="/data/images", json_file="/data/all.json")
    assert spec.inference.color_map == {"person": "blue"}
    if action == "export":
        assert spec.export.onnx_file == "/out/export/model.onnx"


def test_what_is_left_open_in_a_spec_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, DETECTOR)
    with pytest.raises(SpecError) as error:
        load(load_task("rtdetr"), read_spec(path, ["results_dir=/out"]), "quantize")
    assert [fault.where for fault in error.value.faults] == [
        "dataset.quant_calibration_data_sources.image_dir",
        "dataset.quant_calibration_data_sources.json_file",
        "dataset.infer_data_sources.image_dir",
        "dataset.infer_data_sources.classmap",
        "quantize.model_path",
    ]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "dataset.val_data_sources",
            "[{image_dir:a,json_file:b},{image_dir:c,json_file:d}]",
            "lists 2 sections, only one is read\n"
            "hint: the field is: Annotated images for evaluate, if test_data_sources is not given",
        ),
        (
            "dataset.infer_data_sources.classmap",
            "[a,b]",
            "is a list, not a single value\nhint: the field is: Text file with the class names, one per line",
        ),
        (
            "dataset.infer_data_sources.image_dir",
            "{a:b}",
            "is a section, not a list\nhint: the field is: Folders of images, or one folder",
        ),
        (
            "quantize.skip_names",
            "fc",
            "is the value 'fc', not a list\n"
            "hint: the field is: Patterns of layers that stay float regardless of the rules",
        ),
        (
            "evaluate.gpu_ids",
            "0",
            "is the value '0', not a list\n"
            "hint: the field is: A list with one entry: the index of the GPU that `device: cuda` means",
        ),
    ],
)
def test_a_form_that_tao_refuses_too_is_refused(tmp_path: Path, field: str, value: str, message: str) -> None:
    source = read_spec(write(tmp_path, "results_dir: /out\n"), [f"{field}={value}"])
    with pytest.raises(SpecError) as error:
        load(load_task("rtdetr"), source)
    assert str(error.value) == f"{field}: {message}"
