"""Specs with every field of TAO load: the experiment.yaml that TAO writes, and the templates of its skill bank."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml

from support.commands import Taoq, read_json
from taoq.actions import ACTIONS
from taoq.actions.base import load
from taoq.errors import SpecError
from taoq.plugins import TASKS
from taoq.spec.fields import default_value, fields_of, item_type
from taoq.spec.load import spec_to_dict
from taoq.spec.source import read_spec, source_of
from taoq.tasks import load_task

HERE = Path(__file__).parent
PATHS = {
    "evaluate": ("evaluate.checkpoint=model.pth",),
    "inference": ("inference.checkpoint=model.pth",),
    "export": ("export.checkpoint=model.pth", "export.onnx_file=model.onnx"),
}
"""What each action needs of an experiment: TAO's `???`."""
DIFFERENT: dict[str, dict[str, Any]] = {
    "classification_pyt": {
        "model.backbone.type": "fan_small_12_p4_hybrid",
        "inference.vis_after_n_batches": 16,
        "evaluate.is_quantized": False,
        "inference.is_quantized": False,
        "export.is_quantized": False,
        "export.input_width": 960,
        "export.input_height": 544,
    },
    "rtdetr": {
        "dataset.remap_mscoco_category": False,
        "evaluate.is_quantized": False,
        "inference.is_quantized": False,
        "export.is_quantized": False,
        "export.input_width": 640,
        "export.input_height": 640,
    },
}
"""The fields whose default in TAO is not that of taoq."""

every_task = pytest.mark.parametrize("name", TASKS.names())
every_action = pytest.mark.parametrize("action", [action for action in ACTIONS if action != "default_specs"])


def experiment(name: str) -> dict[str, Any]:
    """The experiment of TAO with every default."""
    data: dict[str, Any] = yaml.safe_load((HERE / f"{name}.yaml").read_text(encoding="utf-8"))
    return data


def leaves(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a tree by their path."""
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@every_task
@every_action
def test_the_experiment_that_tao_writes_is_the_default_spec(name: str, action: str) -> None:
    task = load_task(name)
    spec = load(task, read_spec(str(HERE / f"{name}.yaml"), PATHS.get(action, ())), action)
    loaded, defaults = dict(leaves(spec_to_dict(spec))), dict(leaves(spec_to_dict(task.spec())))
    given = dict(text.split("=") for text in PATHS.get(action, ()))
    assert {field: value for field, value in loaded.items() if value != defaults.get(field)} == DIFFERENT[name] | given


@every_task
@pytest.mark.parametrize("action", PATHS)
def test_what_tao_leaves_open_is_named(name: str, action: str) -> None:
    with pytest.raises(SpecError) as error:
        load(load_task(name), read_spec(str(HERE / f"{name}.yaml"), ()), action)
    fields = [text.partition("=")[0] for text in PATHS[action]]
    assert str(error.value) == "\n".join(
        f"{field}: missing: this field needs a value\nhint: write it in the spec, or give {field}=..."
        for field in fields
    )


@pytest.mark.soak
@every_task
def test_any_field_and_any_section_may_be_null(name: str) -> None:
    task = load_task(name)
    default = task.spec()

    def check(data: dict[str, Any]) -> None:
        assert load(task, source_of(data)) == default, data

    def nulls(schema: Any, wrap: Callable[[Any], dict[str, Any]]) -> None:
        for field, kind in fields_of(schema):
            check(wrap({field.name: None}))
            if dataclasses.is_dataclass(kind) and default_value(field) is not None:
                nulls(kind, lambda value, key=field.name: wrap({key: value}))

    nulls(task.spec, lambda value: value)
    check(dict.fromkeys(experiment(name)))


@every_task
def test_null_is_the_default_of_every_field_that_may_be_null(name: str) -> None:
    """Otherwise null would mean something else than to leave the field out."""
    seen: list[Any] = []

    def check(schema: Any) -> None:
        seen.append(schema)
        optional = {field.name for field in dataclasses.fields(schema) if "None" in str(field.type)}
        for field, kind in fields_of(schema):
            assert field.name not in optional or default_value(field) is None, (schema, field.name)
            for part in (kind, item_type(kind)):
                if dataclasses.is_dataclass(part):
                    check(part)

    check(load_task(name).spec)
    assert len(seen) > 10


def template(name: str) -> dict[str, Any]:
    """A template as TAO's skill bank makes them: TAO's default, but with the examples of its schema for null."""
    data = experiment(name)
    data["quantize"] = {}
    source = {"image_dir": "", "json_file": ""}
    edits: dict[str, Any] = {"encryption_key": ""}
    edits |= {f"{section}.{key}": "" for section in PATHS for key in ("results_dir", "checkpoint")}
    edits |= {f"{section}.trt_engine": "" for section in ("evaluate", "inference")}
    edits["export.onnx_file"] = ""
    if name == "rtdetr":
        edits |= {
            "model.pretrained_backbone_path": "",
            "model.frozen_fm.checkpoint": "",
            "dataset.train_data_sources": [source],
            "dataset.val_data_sources": source,
            "dataset.test_data_sources": source,
            "dataset.quant_calibration_data_sources": source,
            "dataset.infer_data_sources": {"image_dir": [""], "classmap": ""},
            "dataset.eval_class_ids": [1],
            "inference.input_width": 640,
            "inference.input_height": 640,
            "inference.color_map": {},
            "distill": {"teacher": copy.deepcopy(data["model"]), "pretrained_teacher_model_path": "", "bindings": []},
        }
    for path, value in edits.items():
        *sections, key = path.split(".")
        section = data
        for part in sections:
            section = section[part]
        section[key] = value
    return data


@every_task
@every_action
def test_a_template_of_the_skill_bank_loads(name: str, action: str) -> None:
    load(load_task(name), source_of(template(name)), action)


MISSING = {
    ("classification_pyt", "evaluate"): "dataset.val_dataset.images_dir: missing: evaluate needs labelled images\n"
    "hint: name a folder with one folder per class\n",
    ("classification_pyt", "inference"): "dataset.test_dataset.images_dir: missing: inference needs images\n"
    "hint: name a folder of images\n",
    ("rtdetr", "evaluate"): "dataset.test_data_sources.json_file: missing: evaluate needs annotated images\n"
    "hint: name a COCO json, and the folder of its images in image_dir\n",
    ("rtdetr", "inference"): "dataset.infer_data_sources.image_dir: missing: inference needs images\n"
    "hint: name a list of folders of images\n",
}


@pytest.mark.parametrize(("name", "action"), MISSING, ids=" ".join)
def test_a_template_without_paths_names_the_path_that_is_needed(
    taoq: Taoq, tmp_path: Path, name: str, action: str
) -> None:
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(template(name)), encoding="utf-8")
    code, _, err = taoq(name, action, "-e", str(tmp_path / "spec.yaml"), f"results_dir={tmp_path}")
    assert code == 2
    assert err.partition("\n")[2].endswith(MISSING[name, action])


def test_a_classification_experiment_of_tao_runs_with_its_paths_alone(taoq: Taoq, tmp_path: Path, digits: Path) -> None:
    network = timm.create_model("resnet18", num_classes=10, channels=(8, 8, 8, 8))
    torch.save({"state_dict": {f"model.{k}": v for k, v in network.state_dict().items()}}, tmp_path / "model.pth")
    words = [
        "-e", str(HERE / "classification_pyt.yaml"),
        f"results_dir={tmp_path}",
        "++model.backbone={type:resnet_18,args:{channels:[8,8,8,8]}}",
        f"dataset.root_dir={digits}",
        *(f"dataset.{part}_dataset.images_dir={digits / 'val'}" for part in ("val", "test", "quant_calibration")),
        "dataset.num_classes=10",
        "dataset.img_size=32",
        "dataset.workers=0",
        "dataset.batch_size=200",
        "quantize.model_path=${results_dir}/model.pth",
        "quantize.device=cpu",
        "quantize.backend=modelopt",
        "quantize.mode=static_ptq",
        "quantize.layers=[{module_name:*,weights:{dtype:int8},activations:{dtype:int8}}]",
        "quantize.skip_names=[*fc*]",
        "+quantize.calibration.num_samples=100",
        "evaluate.checkpoint=${quantize.results_dir}",
        "~evaluate.is_quantized",
        "evaluate.gpu_ids=[0]",
        "inference.checkpoint=${quantize.model_path}",
        "+evaluate.device=cpu",
        "+inference.device=cpu",
        "export.checkpoint=${quantize.model_path}",
        "export.onnx_file=${export.results_dir}/model.onnx",
        "export={input_width:null,input_height:null,on_cpu:true}",
    ]  # fmt: skip
    for action in ("quantize", "evaluate", "inference", "export"):
        code, _, err = taoq("model", "classification_pyt", action, *words)
        assert code == 0, err
    assert (tmp_path / "quantize" / "quantized_model_modelopt.pytorch.pth").is_file()
    assert read_json(tmp_path / "evaluate" / "results.json")["num_images"] == 597
    assert (tmp_path / "export" / "model.onnx").is_file()


def test_tao_s_default_size_of_an_export_is_refused_for_a_square_network(taoq: Taoq, tmp_path: Path) -> None:
    spec, paths = HERE / "classification_pyt.yaml", PATHS["export"]
    line = spec.read_text(encoding="utf-8").splitlines().index("  input_height: 544") + 1
    code, _, err = taoq("classification_pyt", "export", "-e", str(spec), f"results_dir={tmp_path}", *paths)
    assert (code, err.partition("\n")[2]) == (
        2,
        f"{spec}:{line}: export.input_height: the input is 544 x 960 (height x width), classification_pyt has square"
        " inputs\nhint: write the same input_height and input_width\n",
    )
