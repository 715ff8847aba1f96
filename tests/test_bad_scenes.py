"""Whatever is wrong with a detector's spec, data or checkpoint: two lines, and nothing is left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

ROOT = Path(__file__).parent.parent
SCENES = ROOT / "examples" / "digit_scenes"
CLASSIFIER = ROOT / "examples" / "digits" / "checkpoints" / "resnet_18.safetensors"
Refused = Callable[..., tuple[int, list[str]]]


class Case(NamedTuple):
    """What is broken, the command, and what it must say."""

    name: str
    action: str
    breaks: Callable[[], object]
    words: tuple[str, ...]
    code: int
    message: list[str]


class Code:
    """Would make a file if it were unpickled."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("it_ran"),))


@pytest.fixture
def job(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: spec.yaml, model/ and data/ with three scenes for everything."""
    monkeypatch.chdir(tmp_path)
    spec = yaml.safe_load((SCENES / "rtdetr.yaml").read_text(encoding="utf-8"))
    data = json.loads((scenes / "val.json").read_text(encoding="utf-8"))
    data["images"] = data["images"][:3]
    data["annotations"] = [entry for entry in data["annotations"] if entry["image_id"] <= 3]
    Path("data").mkdir()
    for image in data["images"]:
        shutil.copy(scenes / "val" / image["file_name"], "data")
    Path("val.json").write_text(json.dumps(data), encoding="utf-8")
    shutil.copytree(SCENES / "checkpoints" / "rtdetr_small", "model")
    spec["results_dir"] = "results"
    spec["dataset"]["test_data_sources"] = {"image_dir": "data", "json_file": "val.json"}
    spec["dataset"]["quant_calibration_data_sources"] = {"image_dir": "data"}
    spec["dataset"]["infer_data_sources"] = {"image_dir": ["data"]}
    spec["quantize"]["model_path"] = "model"
    spec["quantize"]["results_dir"] = "results/quantize"
    for action in ("evaluate", "inference"):
        spec[action] = {"checkpoint": "model", "device": "cpu"}
    Path("spec.yaml").write_text(yaml.safe_dump(spec), encoding="utf-8")
    return tmp_path


@pytest.fixture
def refused(taoq: Callable[..., tuple[int, str, str]], job: Path) -> Refused:
    """Run an action that must fail; returns the exit code and the faults on stderr. All that is new is the log."""

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in job.rglob("*") if path.is_file()}

    def run(action: str, *words: str) -> tuple[int, list[str]]:
        before = files()
        code, _, err = taoq("rtdetr", action, "-e", "spec.yaml", *words)
        new = {path: data for path, data in files().items() if before.get(path) != data}
        assert {path.name for path in new} <= {"status.json", "log.txt"}
        for path, data in new.items():
            if path.name == "status.json":
                assert json.loads(data.splitlines()[-1])["status"] == "FAILURE"
        lines = err.splitlines()
        return code, lines[next((n for n, line in enumerate(lines) if "hint: " in line), 1) - 1 :]

    return run


def edit(change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(Path("val.json").read_text(encoding="utf-8"))
    change(data)
    Path("val.json").write_text(json.dumps(data), encoding="utf-8")


def nothing() -> None:
    """The words of the command are wrong enough."""


def first(data: dict[str, Any], **values: Any) -> None:
    data["annotations"][0].update(values)


def four_categories(data: dict[str, Any]) -> None:
    data.update(categories=data["categories"][:4], annotations=[])


CASES = [
    Case(
        "no json",
        "evaluate",
        lambda: Path("val.json").unlink(),
        (),
        1,
        [
            "spec.yaml:15: dataset.test_data_sources.json_file: val.json cannot be read: No such file or directory",
            "hint: name a COCO json",
        ],
    ),
    Case(
        "no image folder",
        "evaluate",
        lambda: shutil.rmtree("data"),
        (),
        1,
        ["spec.yaml:14: dataset.test_data_sources.image_dir: there is no folder data", "hint: name a folder of images"],
    ),
    Case(
        "json that does not parse",
        "evaluate",
        lambda: Path("val.json").write_text("{no"),
        (),
        1,
        ["spec.yaml:15: dataset.test_data_sources.json_file: val.json is not JSON", "hint: name a COCO json"],
    ),
    Case(
        "json that is a list",
        "evaluate",
        lambda: Path("val.json").write_text("[]"),
        (),
        1,
        [
            "val.json: is not a COCO json: it is not an object with images, annotations and categories",
            "hint: see cocodataset.org/#format-data",
        ],
    ),
    Case(
        "json without images",
        "evaluate",
        lambda: edit(lambda data: data.pop("images")),
        (),
        1,
        ["val.json: is not a COCO json: it has no list 'images'", "hint: see cocodataset.org/#format-data"],
    ),
    Case(
        "json with no image",
        "evaluate",
        lambda: edit(lambda data: data.update(images=[])),
        (),
        1,
        ["val.json: names no images", "hint: name a COCO json with images"],
    ),
    Case(
        "json without categories",
        "evaluate",
        lambda: edit(lambda data: data.pop("categories")),
        (),
        1,
        ["val.json: is not a COCO json: it has no list 'categories'", "hint: see cocodataset.org/#format-data"],
    ),
    Case(
        "annotation without a box",
        "evaluate",
        lambda: edit(lambda data: data["annotations"][0].pop("bbox")),
        (),
        1,
        ["val.json: is not a COCO json: annotations[0] has no 'bbox'", "hint: see cocodataset.org/#format-data"],
    ),
    Case(
        "unknown category",
        "evaluate",
        lambda: edit(lambda data: first(data, category_id=77)),
        (),
        1,
        ["val.json: annotation 1: its category_id 77 is no category", "hint: correct the json"],
    ),
    Case(
        "unknown image",
        "evaluate",
        lambda: edit(lambda data: first(data, image_id=77)),
        (),
        1,
        ["val.json: annotation 1: its image_id 77 is no image", "hint: correct the json"],
    ),
    Case(
        "box outside of its image",
        "evaluate",
        lambda: edit(lambda data: first(data, bbox=[200, 0, 9, 9])),
        (),
        1,
        [
            "val.json: annotation 1: its bbox [200, 0, 9, 9] is outside of the image, 160 x 160",
            "hint: correct the json: a bbox is [x, y, width, height] in pixels",
        ],
    ),
    Case(
        "box of three numbers",
        "evaluate",
        lambda: edit(lambda data: first(data, bbox=[1, 2, 3])),
        (),
        1,
        ["val.json: annotation 1: its bbox is not [x, y, width, height]", "hint: correct the json"],
    ),
    Case(
        "two images with one id",
        "evaluate",
        lambda: edit(lambda data: data["images"][1].update(id=1)),
        (),
        1,
        [
            "val.json: is not a COCO json: the ids of 'images' are not different whole numbers",
            "hint: see cocodataset.org/#format-data",
        ],
    ),
    Case(
        "missing image",
        "evaluate",
        lambda: Path("data/0002.jpg").unlink(),
        (),
        1,
        [
            "data/0002.jpg: val.json names it, but there is no such image",
            "hint: image_dir is data; file names are relative to it",
        ],
    ),
    Case(
        "file that is no picture",
        "evaluate",
        lambda: Path("data/0002.jpg").write_bytes(b"no picture"),
        (),
        1,
        [
            "data/0002.jpg: cannot be read as an image: its content is of no image format",
            "hint: replace the file, or take it out of the folder",
        ],
    ),
    Case(
        "picture cut off",
        "evaluate",
        lambda: Path("data/0002.jpg").write_bytes(Path("data/0002.jpg").read_bytes()[:900]),
        (),
        1,
        [
            "data/0002.jpg: cannot be read as an image: image file is truncated (21 bytes not processed)",
            "hint: replace the file, or take it out of the folder",
        ],
    ),
    Case(
        "file that is no picture, in calibration",
        "quantize",
        lambda: Path("data/0002.jpg").write_bytes(b"no picture"),
        (),
        1,
        [
            "data/0002.jpg: cannot be read as an image: its content is of no image format",
            "hint: replace the file, or take it out of the folder",
        ],
    ),
    Case(
        "num_classes that fits no json",
        "evaluate",
        nothing,
        ("dataset.num_classes=4",),
        1,
        [
            "override dataset.num_classes=4: dataset.num_classes: is 4; val.json has 10 categories with ids up to 10",
            "hint: write 10, or 11 if the network was trained with TAO's largest id + 1",
        ],
    ),
    Case(
        "num_classes that does not fit the checkpoint",
        "evaluate",
        lambda: edit(four_categories),
        ("dataset.num_classes=4",),
        2,
        [
            "override dataset.num_classes=4: dataset.num_classes: model/config.json has num_labels 10, the spec makes it 4",
            "hint: write dataset.num_classes: 10",
        ],
    ),
    Case(
        "size that the strides do not allow",
        "evaluate",
        nothing,
        ("dataset.augmentation.eval_spatial_size=[150,160]",),
        2,
        [
            "override dataset.augmentation.eval_spatial_size=[150,160]: dataset.augmentation.eval_spatial_size: [150, 160] does not fit the strides [8, 16, 32]: both must be multiples of 32",
            "hint: write [160, 160]",
        ],
    ),
    Case(
        "size of one number",
        "evaluate",
        nothing,
        ("dataset.augmentation.eval_spatial_size=[160]",),
        2,
        [
            "override dataset.augmentation.eval_spatial_size=[160]: dataset.augmentation.eval_spatial_size: [160] is not a height and a width",
            "hint: write two numbers, [640, 640]",
        ],
    ),
    Case(
        "num_select above queries x classes",
        "evaluate",
        nothing,
        ("model.num_select=301",),
        2,
        [
            "override model.num_select=301: model.num_select: 301 is more than 30 queries x 10 classes",
            "hint: write at most 300",
        ],
    ),
    Case(
        "two faults at once",
        "quantize",
        nothing,
        ("model.eval_idx=3", "model.depth_mult=2"),
        2,
        [
            "override model.eval_idx=3: model.eval_idx: 3 is no layer of 3",
            "hint: write -1 for the last layer",
            "override model.depth_mult=2: model.depth_mult: 2: transformers' fusion blocks have three RepVGG blocks, which is depth_mult 1",
            "hint: write 1, which all published RT-DETR networks have",
        ],
    ),
    Case(
        "checkpoint of another architecture",
        "quantize",
        nothing,
        (f"quantize.model_path={CLASSIFIER}",),
        1,
        [
            f"{CLASSIFIER}: is not the checkpoint of an RT-DETR: its names are neither those of transformers nor the original code's",
            "hint: give the checkpoint of an RT-DETR",
        ],
    ),
    Case(
        "config that differs in two fields",
        "quantize",
        nothing,
        ("model.hidden_dim=48", "model.act=relu"),
        2,
        [
            "override model.hidden_dim=48: model.hidden_dim: model/config.json has encoder_hidden_dim 96, the spec makes it 48",
            "hint: write model.hidden_dim: 96",
            "override model.act=relu: model.act: model/config.json has activation_function silu, the spec makes it relu",
            'hint: write model.act: "silu"',
        ],
    ),
    Case(
        "config of another backbone",
        "quantize",
        nothing,
        ("model.backbone=resnet_50", "model.backbone_args={}"),
        2,
        [
            "override model.backbone_args={}: model.backbone_args.layer_type: model/config.json has layer_type basic, the spec makes it bottleneck",
            'hint: write model.backbone_args.layer_type: "basic", or choose the model.backbone',
        ],
    ),
    Case(
        "folder without config.json",
        "quantize",
        lambda: Path("model/config.json").unlink(),
        (),
        1,
        [
            "model/config.json: is missing or not readable: not a Hugging Face folder",
            "hint: give the folder with config.json and model.safetensors",
        ],
    ),
    Case(
        "config of another network",
        "quantize",
        lambda: Path("model/config.json").write_text('{"model_type": "detr"}'),
        (),
        1,
        ["model/config.json: its model_type is detr, not rt_detr or rt_detr_v2", "hint: give the folder of an RT-DETR"],
    ),
    Case(
        "folder without weights",
        "quantize",
        lambda: Path("model/model.safetensors").unlink(),
        (),
        1,
        ["model/model.safetensors: there is no such checkpoint", "hint: give a .pth, .ckpt or .safetensors file"],
    ),
    Case(
        "weights that are no safetensors",
        "quantize",
        lambda: Path("model/model.safetensors").write_bytes(b"x" * 99),
        (),
        1,
        [
            "model/model.safetensors: is not a whole safetensors file: Error while deserializing header: header too large",
            "hint: copy the file again",
        ],
    ),
    Case(
        "unknown backbone",
        "quantize",
        nothing,
        ("model.backbone=resnet_52",),
        2,
        [
            "override model.backbone=resnet_52: model.backbone: unknown value 'resnet_52'",
            "hint: did you mean 'resnet_50' or 'resnet_34' or 'resnet_18'?",
        ],
    ),
    Case(
        "backbone of TAO that no library has",
        "quantize",
        nothing,
        ("model.backbone=convnext_tiny",),
        2,
        [
            "override model.backbone=convnext_tiny: model.backbone: unknown value 'convnext_tiny'",
            "hint: one of resnet_18, resnet_34, resnet_50, resnet_101",
        ],
    ),
    Case(
        "unknown argument of the config",
        "quantize",
        nothing,
        ("model.args={decoder_point: 3}",),
        2,
        [
            "override model.args={decoder_point: 3}: model.args.decoder_point: RTDetrConfig has no argument 'decoder_point'",
            "hint: did you mean 'decoder_n_points' or 'decoder_ffn_dim' or 'decoder_in_channels'?",
        ],
    ),
    Case(
        "argument that a field says",
        "quantize",
        nothing,
        ("model.args={num_queries: 3}",),
        2,
        [
            "override model.args={num_queries: 3}: model.args.num_queries: is what model.num_queries says",
            "hint: write model.num_queries instead",
        ],
    ),
    Case(
        "unknown argument of the backbone",
        "quantize",
        nothing,
        ("model.backbone_args={depth: 3}",),
        2,
        [
            "override model.backbone_args={depth: 3}: model.backbone_args.depth: RTDetrResNetConfig has no argument 'depth'",
            "hint: did you mean 'depths'?",
        ],
    ),
    Case(
        "heads that the checkpoint does not have",
        "quantize",
        nothing,
        ("model.nheads=7",),
        2,
        [
            "override model.nheads=7: model.nheads: model/config.json has encoder_attention_heads 6, the spec makes it 7",
            "hint: write model.nheads: 6",
        ],
    ),
    Case(
        "activation that the checkpoint does not have",
        "quantize",
        nothing,
        ("model.act=gelou",),
        2,
        [
            "override model.act=gelou: model.act: model/config.json has activation_function silu, the spec makes it gelou",
            'hint: write model.act: "silu"',
        ],
    ),
    Case(
        "stage that a backbone does not have",
        "quantize",
        nothing,
        ("model.return_interm_indices=[1,2,5]",),
        2,
        [
            "override model.return_interm_indices=[1,2,5]: model.return_interm_indices: [1, 2, 5] are not stages of the backbone",
            "hint: write numbers from 0 to 3, [1, 2, 3]",
        ],
    ),
    Case(
        "no calibration data",
        "quantize",
        nothing,
        ("dataset.quant_calibration_data_sources.image_dir=''",),
        2,
        [
            "override dataset.quant_calibration_data_sources.image_dir='': dataset.quant_calibration_data_sources.image_dir: missing: static_ptq with activations needs calibration images",
            "hint: name a folder of a few hundred images like those the model will see",
        ],
    ),
    Case(
        "no checkpoint",
        "quantize",
        nothing,
        ("quantize.model_path=''",),
        2,
        [
            "spec.yaml:23: model: no checkpoint is given",
            "hint: write quantize.model_path, evaluate.checkpoint or inference.checkpoint: a Hugging Face folder or a file",
        ],
    ),
    Case(
        "checkpoint that is not there",
        "quantize",
        nothing,
        ("quantize.model_path=nowhere.pth",),
        1,
        ["nowhere.pth: there is no such checkpoint", "hint: give a .pth, .ckpt or .safetensors file"],
    ),
    Case(
        "pickle with code",
        "quantize",
        lambda: torch.save({"model": Code()}, "code.pth"),
        ("quantize.model_path=code.pth",),
        1,
        [
            "code.pth: holds objects besides tensors, which taoq does not load: they could run code",
            "hint: save the tensors alone where you trust the file: torch.save(model.state_dict(), 'weights.pth')",
        ],
    ),
    Case(
        "pattern that matches nothing",
        "quantize",
        nothing,
        ("quantize.layers.0.module_name=encoder.lateral",),
        2,
        [
            "override quantize.layers.0.module_name=encoder.lateral: quantize.layers[0].module_name: pattern 'encoder.lateral' matches no layer",
            "hint: did you mean 'encoder.lateral_convs.1.conv' or 'encoder.lateral_convs.0.conv' or 'model.encoder.lateral_convs.1.conv'?",
        ],
    ),
    Case(
        "frozen foundation model",
        "quantize",
        nothing,
        ("model.frozen_fm.enabled=true",),
        2,
        [
            "override model.frozen_fm.enabled=true: model.frozen_fm.enabled: no library has TAO's frozen foundation model",
            "hint: use a network without it",
        ],
    ),
    Case(
        "classmap of another length",
        "inference",
        lambda: Path("names.txt").write_text("a\nb\n"),
        ("dataset.infer_data_sources.classmap=names.txt",),
        1,
        [
            "override dataset.infer_data_sources.classmap=names.txt: dataset.infer_data_sources.classmap: names.txt names 2 classes, dataset.num_classes is 10",
            "hint: write one line per class",
        ],
    ),
    Case(
        "no classmap",
        "inference",
        nothing,
        ("dataset.infer_data_sources.classmap=nowhere.txt",),
        1,
        [
            "override dataset.infer_data_sources.classmap=nowhere.txt: dataset.infer_data_sources.classmap: nowhere.txt cannot be read",
            "hint: give a text file, one class a line",
        ],
    ),
    Case(
        "colour of an unknown class",
        "inference",
        nothing,
        ("inference.color_map={nine: red}",),
        2,
        [
            "override inference.color_map={nine: red}: inference.color_map.nine: there is no class 'nine'",
            "hint: classes are 0, 1, 2, 3, 4, 5, 6, 7, 8, 9",
        ],
    ),
    Case(
        "unknown colour",
        "inference",
        nothing,
        ("inference.color_map={'9': redd}",),
        2,
        [
            "override inference.color_map={'9': redd}: inference.color_map.9: unknown colour 'redd'",
            "hint: write a name (red) or #rrggbb",
        ],
    ),
    Case(
        "no folders for inference",
        "inference",
        nothing,
        ("dataset.infer_data_sources.image_dir=[]",),
        2,
        [
            "override dataset.infer_data_sources.image_dir=[]: dataset.infer_data_sources.image_dir: missing: inference needs images",
            "hint: name a list of folders of images",
        ],
    ),
    Case(
        "unknown category to evaluate",
        "evaluate",
        nothing,
        ("dataset.eval_class_ids=[3, 99]",),
        2,
        [
            "override dataset.eval_class_ids=[3, 99]: dataset.eval_class_ids: [99] are no category ids of val.json",
            "hint: its ids are [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]",
        ],
    ),
    Case(
        "no annotations",
        "evaluate",
        nothing,
        ("dataset.test_data_sources.json_file=''",),
        2,
        [
            "override dataset.test_data_sources.json_file='': dataset.test_data_sources.json_file: missing: evaluate needs annotated images",
            "hint: name a COCO json, and the folder of its images in image_dir",
        ],
    ),
    Case(
        "no folder of annotated images",
        "evaluate",
        nothing,
        ("dataset.test_data_sources.image_dir=''",),
        2,
        [
            "override dataset.test_data_sources.image_dir='': dataset.test_data_sources.image_dir: missing: where are the images?",
            "hint: name the folder of the images",
        ],
    ),
    Case(
        "folder that is no checkpoint",
        "evaluate",
        nothing,
        ("evaluate.checkpoint=data",),
        1,
        [
            "data: is a folder without a manifest.json: no artifact, or not all of it",
            "hint: quantize again, or give a checkpoint file",
        ],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_it_is_refused(refused: Refused, case: Case) -> None:
    case.breaks()
    assert refused(case.action, *case.words) == (case.code, case.message)
    assert not Path("it_ran").exists()
