"""Shipped specs load; specs of TAO users run unchanged but for paths."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from support.commands import Taoq
from taoq.actions import ACTIONS
from taoq.actions.base import load_experiment
from taoq.pipeline.experiment import Experiment
from taoq.pipeline.models import build_empty
from taoq.pipeline.prepare import Checked, resolve_rules
from taoq.quantization.backends import load_backend
from taoq.quantization.formats.onnx.export import export_graph
from taoq.quantization.formats.onnx.graph import Graph
from taoq.quantization.formats.onnx.layers import prepare
from taoq.spec.source import read_spec
from taoq.tasks import load_task
from taoq.tasks.base import Task

ROOT = Path(__file__).parent.parent
PLUGIN = ROOT / "examples" / "plugin_segmentation"
SPECS = sorted(ROOT.glob("specs/**/*.yaml")) + sorted(ROOT.glob("examples/**/*.yaml"))


def test_there_are_specs() -> None:
    assert len(SPECS) >= 8


@pytest.mark.parametrize("path", SPECS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_shipped_spec_loads_and_its_rules_match_its_network(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(PLUGIN / "src")  # its package need not be installed
    task = task_of(path)
    action = path.stem.partition("_")[0] if path.is_relative_to(ROOT / "specs") else "quantize"
    assert action in ACTIONS
    experiment = load_experiment(task, read_spec(str(path), []), action)
    if action == "quantize":
        section = experiment.spec.quantize
        checked = Checked(experiment=experiment, backend=load_backend(section.backend))
        if checked.backend.capability.format == "onnx":
            model: object = exported(experiment)
        else:
            with torch.device("meta"):  # the names of the layers, without their memory
                model = experiment.build(None)
        assert resolve_rules(checked, model, section).notices == ()


def task_of(path: Path) -> Task[Any]:
    """The task of a shipped spec."""
    if path.parent == PLUGIN:
        return importlib.import_module("taoq_segmentation.task").TASK
    examples = {"digits": "classification_pyt", "digit_scenes": "rtdetr"}
    return load_task(examples.get(path.parent.name, path.parent.name))


def exported(experiment: Experiment) -> Graph:
    """The graph that `export` makes of the network of a spec, ready to be quantized."""
    model = build_empty(experiment).eval()
    graph = export_graph(model, experiment.example(), list(experiment.outputs), opset=17, dynamic=True, fold=True)
    return prepare(graph, "model.onnx")


@pytest.fixture
def write_spec(tmp_path: Path, digits: Path) -> Callable[[str], Path]:
    """Write a spec on a tiny ResNet with its checkpoint in place of the paths."""
    network = timm.create_model("resnet18", num_classes=10, channels=(8, 8, 8, 8))
    torch.save({"state_dict": {f"model.{k}": v for k, v in network.state_dict().items()}}, tmp_path / "model.pth")

    def write(text: str) -> Path:
        path = tmp_path / "spec.yaml"
        model = "model: {backbone: {type: resnet_18, args: {channels: [8, 8, 8, 8]}}}\n"
        images = f"{{images_dir: {digits / 'calibration'}}}"
        data = f"dataset: {{num_classes: 10, img_size: 32, quant_calibration_dataset: {images}}}\n"
        text = text.replace("/path/to/model.pth", str(tmp_path / "model.pth")).replace(
            "/path/to/output", str(tmp_path / "out")
        )
        path.write_text(text if "dataset:" in text else model + data + text)
        return path

    return write


WEIGHT_ONLY = """\
quantize:
  backend: "torchao"
  mode: "weight_only_ptq"
  layers:
    - module_name: "Linear"
      weights: { dtype: "int8" }
  skip_names: ["classifier.fc"]
"""
STATIC = """\
quantize:
  model_path: "/path/to/model.pth"
  results_dir: "/path/to/output"
  backend: "modelopt.pytorch"
  mode: "static_ptq"
  algorithm: "minmax"
  layers:
    - module_name: "Conv2d"
      weights: { dtype: "int8" }
      activations: { dtype: "int8" }
    - module_name: "Linear"
      weights: { dtype: "int8" }
      activations: { dtype: "int8" }
"""


def test_the_weight_only_example_of_tao_s_documentation_runs(
    taoq: Taoq, write_spec: Callable[[str], Path], tmp_path: Path
) -> None:
    spec = write_spec(WEIGHT_ONLY)
    code, out, err = taoq(
        "classification_pyt", "quantize", "-e", str(spec),
        f"quantize.model_path={tmp_path / 'model.pth'}", f"quantize.results_dir={tmp_path / 'out'}",
    )  # fmt: skip
    assert code == 0, err
    assert f"warning: {spec}:9: quantize.skip_names[0]: 'classifier.fc' matches no layer\n" in err
    assert "quantized 1 of 1 layers" in out
    assert (tmp_path / "out" / "quantized_model_torchao.pth").is_file()


def test_the_static_example_of_tao_s_documentation_runs(
    taoq: Taoq, write_spec: Callable[[str], Path], tmp_path: Path
) -> None:
    code, out, err = taoq("classification_pyt", "quantize", "-e", str(write_spec(STATIC)))
    assert code == 0, err
    assert "quantized 22 of 22 layers with 200 calibration images" in out
    assert (tmp_path / "out" / "quantized_model_modelopt.pytorch.pth").is_file()


def test_a_whole_spec_of_a_tao_user_runs_unchanged(
    taoq: Taoq, write_spec: Callable[[str], Path], tmp_path: Path, digits: Path
) -> None:
    """Sections of other jobs, missing values in them, training fields, a stock skip list, TAO's file names."""
    spec = write_spec(f"""\
results_dir: {tmp_path}
encryption_key: tlt_encode
model_name: flowers
wandb: {{enable: true, project: p}}
model:
  backbone: {{type: resnet_18, args: {{channels: [8, 8, 8, 8]}}, freeze_backbone: true, pretrained_backbone_path: null}}
  head: {{type: TAOLinearClsHead, topk: [1, 5], in_channels: 448, loss: {{type: CrossEntropyLoss}}}}
dataset:
  dataset: CLDataset
  root_dir: {digits}
  num_classes: 10
  img_size: 32
  batch_size: 64
  workers: 0
  shuffle: true
  train_dataset: {{images_dir: /data/train}}
  val_dataset: {{images_dir: {digits}/val}}
  test_dataset: {{images_dir: {digits}/val}}
  quant_calibration_dataset: {{images_dir: {digits}/calibration}}
  augmentation:
    random_flip: {{enable: true}}
    mixup_cutmix: true
    with_random_blur: true
train:
  num_epochs: 30
  optim: {{lr: 6.0e-05}}
distill:
  teacher: ???
export:
  checkpoint: ???
  onnx_file: ???
gen_trt_engine: {{onnx_file: a.onnx, tensorrt: {{data_type: FP16}}}}
quantize:
  model_path: ${{results_dir}}/model.pth
  results_dir: ${{results_dir}}/quantize_int8
  backend: modelopt.pytorch
  mode: static_ptq
  algorithm: max
  default_layer_dtype: native
  default_activation_dtype: native
  device: cuda
  layers:
    - {{module_name: Conv2d, weights: {{dtype: int8, quant_axis: 0}}, activations: {{dtype: int8}}}}
    - {{module_name: Linear, weights: {{dtype: int8, quant_axis: 0}}, activations: {{dtype: int8}}}}
  skip_names: ["*fc*", BatchNorm2d, "*lm_head*"]
evaluate:
  checkpoint: ${{results_dir}}/quantize_int8/quantized_model_modelopt.pytorch.pth
  is_quantized: true
  num_gpus: 1
  gpu_ids: [0]
  trt_engine: ???
""")
    code, out, err = taoq("classification_pyt", "quantize", "-e", str(spec))
    assert code == 0, err
    assert "quantized 21 of 22 layers" in out
    assert "'*lm_head*' matches no layer" in err
    fields = [line.strip().partition(":")[0] for line in spec.read_text(encoding="utf-8").splitlines()]
    for name in ("default_layer_dtype", "default_activation_dtype"):
        where = f"{spec}:{fields.index(name) + 1}: quantize.{name}"
        assert f"warning: {where}: deprecated, no effect; the dtype comes from each rule\n" in err
    not_used = next(line for line in err.splitlines() if line.startswith("not used by taoq: "))
    assert [word.partition(" ")[0] for word in not_used.removeprefix("not used by taoq: ").split("), ")] == [
        "model.backbone.freeze_backbone",
        "model.backbone.pretrained_backbone_path",
        "model.head.in_channels",
        "model.head.loss",
        "dataset.augmentation.random_flip",
        "dataset.augmentation.mixup_cutmix",
        "dataset.augmentation.with_random_blur",
        "dataset.shuffle",
        "dataset.train_dataset",
        "evaluate.trt_engine",
        "encryption_key",
        "model_name",
        "wandb",
        "train",
        "distill",
        "gen_trt_engine",
    ]
    code, out, err = taoq("classification_pyt", "evaluate", "-e", str(spec))
    assert code == 0, err
    assert "val_acc_5" in out


def test_a_whole_detector_spec_of_a_tao_user_runs_unchanged(taoq: Taoq, tmp_path: Path, scenes: Path) -> None:
    network = build_detector(tmp_path / "model.pth")
    (tmp_path / "spec.yaml").write_text(
        f"""\
results_dir: {tmp_path}
encryption_key: tlt_encode
wandb: {{enable: false}}
model:
  backbone: resnet_18
  train_backbone: true
  pretrained_backbone_path: null
  return_interm_indices: [1, 2, 3]
  feat_channels: [256, 256, 256]
  dec_layers: 2
  num_queries: 20
  num_select: 20
  dropout_ratio: 0.0
  vfl_loss_coef: 1.0
  bbox_cost: 5.0
  loss_types: [vfl, boxes]
  frozen_fm: {{enabled: false, backbone: radio_v2-l}}
dataset:
  train_data_sources: [{{image_dir: /data/train, json_file: /data/train.json}}]
  val_data_sources: {{image_dir: {scenes}/val, json_file: {scenes}/val_24.json}}
  test_data_sources: {{image_dir: {scenes}/val, json_file: {scenes}/val_24.json}}
  num_classes: 11
  batch_size: 8
  workers: 0
  pin_memory: true
  dataset_type: serialized
  remap_mscoco_category: false
  augmentation:
    multi_scales: [480, 512]
    train_spatial_size: [64, 64]
    eval_spatial_size: [64, 64]
    distortion_prob: 0.8
train: {{num_epochs: 72, optim: {{lr: 0.0001}}}}
distill:
  teacher: ???
export:
  checkpoint: ???
  onnx_file: ???
gen_trt_engine:
  onnx_file: ???
quantize:
  model_path: ${{results_dir}}/model.pth
  results_dir: ${{results_dir}}/q_ao
  backend: torchao
  mode: weight_only_ptq
  layers: [{{module_name: Linear, weights: {{dtype: int8}}}}]
  skip_names: ["*dec_score_head*", "*dec_bbox_head*", "*enc_*_head*"]
evaluate:
  checkpoint: ${{results_dir}}/q_ao/quantized_model_torchao.pth
  is_quantized: true
  conf_threshold: 0.0
  input_width: null
  trt_engine: ???
inference:
  checkpoint: ???
  conf_threshold: 0.5
  color_map: null
  is_internal: false
""",
        encoding="utf-8",
    )
    code, out, err = taoq("rtdetr", "quantize", "-e", str(tmp_path / "spec.yaml"))
    assert code == 0, err
    heads = 1 + 3 + 1 + 2 * 3  # of the encoder, of the last decoder layer, boxes of every layer
    linear = sum(isinstance(module, torch.nn.Linear) for module in network.modules()) - 1  # a head of training
    assert f"quantized {linear - heads} of {linear} layers" in out
    assert [
        line for line in err.splitlines() if "warning: " in line and "is not available on this machine" not in line
    ] == []
    not_used = next(line for line in err.splitlines() if line.startswith("not used by taoq: "))
    for field in ("model.vfl_loss_coef", "model.feat_channels", "dataset.train_data_sources", "train", "distill"):
        assert f" {field} (" in not_used
    code, _, err = taoq("rtdetr", "evaluate", "-e", str(tmp_path / "spec.yaml"), "evaluate.device=cpu")
    assert code == 0, err
    assert (tmp_path / "evaluate" / "results.json").is_file()


def build_detector(path: Path) -> torch.nn.Module:
    """Write an untrained R18 with two decoder layers as Lightning would; TAO's largest category id is 10."""
    from transformers import RTDetrForObjectDetection

    from taoq.tasks.rtdetr.model import make_config
    from taoq.tasks.rtdetr.spec import DatasetSpec, ModelSpec, RtdetrSpec

    model = ModelSpec(backbone="resnet_18", dec_layers=2, num_queries=20)
    network = RTDetrForObjectDetection(make_config(RtdetrSpec(model=model, dataset=DatasetSpec(num_classes=11))))
    torch.save({"state_dict": {f"model.{key}": value for key, value in network.state_dict().items()}}, path)
    return network
