"""What else can be wrong with a detector's json, weights and calibration data: two lines, nothing left behind."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import test_bad_scenes
from test_bad_scenes import Code, Refused, edit, first, nothing

job, refused = test_bad_scenes.job, test_bad_scenes.refused

CALIBRATION_JSON = "dataset.quant_calibration_data_sources.json_file"
TEST_JSON = "dataset.test_data_sources.json_file"
WEIGHTS = "model/model.safetensors"
COCO_HINT = "hint: see cocodataset.org/#format-data"
CORRECT = "hint: correct the json"
FIELDS_HINT = "hint: check model.backbone, the other fields of model and dataset.num_classes"
COPY = "hint: copy the file again"
REPLACE = "hint: replace the file, or take it out of the folder"


def cut(path: str, size: int) -> None:
    Path(path).write_bytes(Path(path).read_bytes()[:size])


def all_missing() -> None:
    for image in Path("data").iterdir():
        image.unlink()
    Path("data/notes.txt").write_text("none here")


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        pytest.param(
            lambda: (Path("val.json").unlink(), Path("val.json").mkdir()),
            [f"spec.yaml:15: {TEST_JSON}: val.json cannot be read: Is a directory", "hint: name a COCO json"],
            id="a folder in the place of the json",
        ),
        pytest.param(
            lambda: Path("val.json").write_bytes(b"\xff\xfe\x00"),
            [f"spec.yaml:15: {TEST_JSON}: val.json is not JSON", "hint: name a COCO json"],
            id="a binary file",
        ),
        pytest.param(
            lambda: Path("val.json").write_text("[" * 100_000),
            [f"spec.yaml:15: {TEST_JSON}: val.json is not JSON", "hint: name a COCO json"],
            id="brackets without end",
        ),
        pytest.param(
            lambda: edit(lambda data: data.update(images={"1": "a.jpg"})),
            ["val.json: is not a COCO json: it has no list 'images'", COCO_HINT],
            id="images by name",
        ),
        pytest.param(
            lambda: edit(lambda data: data["images"][1].pop("file_name")),
            ["val.json: is not a COCO json: images[1] has no 'file_name'", COCO_HINT],
            id="an image without a file",
        ),
        pytest.param(
            lambda: edit(lambda data: data["images"][1].update(id="2")),
            ["val.json: is not a COCO json: the ids of 'images' are not different whole numbers", COCO_HINT],
            id="an id that is a text",
        ),
        pytest.param(
            lambda: edit(lambda data: data["categories"][1].update(id=1)),
            ["val.json: is not a COCO json: the ids of 'categories' are not different whole numbers", COCO_HINT],
            id="two categories with one id",
        ),
        pytest.param(
            lambda: edit(lambda data: data.update(categories=[], annotations=[])),
            ["val.json: names no categories", "hint: name a COCO json with categories"],
            id="no category",
        ),
        pytest.param(
            lambda: edit(lambda data: data.pop("annotations")),
            ["val.json: is not a COCO json: it has no list 'annotations'", COCO_HINT],
            id="no annotations",
        ),
        pytest.param(
            lambda: edit(lambda data: first(data, image_id=[1])),
            ["val.json: annotation 1: its image_id [1] is no image", CORRECT],
            id="an image_id that is a list",
        ),
        pytest.param(
            lambda: edit(lambda data: first(data, category_id={"name": "3"})),
            ["val.json: annotation 1: its category_id {'name': '3'} is no category", CORRECT],
            id="a category_id that is an object",
        ),
        pytest.param(
            lambda: edit(lambda data: first(data, bbox=["1", "2", "3", "4"])),
            ["val.json: annotation 1: its bbox is not [x, y, width, height]", CORRECT],
            id="a box of texts",
        ),
        pytest.param(
            lambda: edit(lambda data: first(data, bbox=None)),
            ["val.json: annotation 1: its bbox is not [x, y, width, height]", CORRECT],
            id="no box",
        ),
        pytest.param(
            lambda: edit(lambda data: first(data, bbox=[-20, 5, 20, 9])),
            [
                "val.json: annotation 1: its bbox [-20, 5, 20, 9] is outside of the image, 160 x 160",
                "hint: correct the json: a bbox is [x, y, width, height] in pixels",
            ],
            id="a box left of its image",
        ),
        pytest.param(
            all_missing,
            [
                "data/0001.jpg: val.json names it, but there is no such image; 3 of 3 are missing",
                "hint: image_dir is data; file names are relative to it",
            ],
            id="no image at all",
        ),
    ],
)
def test_a_json_of_annotations_is_refused(refused: Refused, breaks: Callable[[], Any], message: list[str]) -> None:
    breaks()
    assert refused("evaluate") == (1, message)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        pytest.param(
            ("model.eval_idx=3",),
            2,
            ["override model.eval_idx=3: model.eval_idx: 3 is no layer of 3", "hint: write -1 for the last layer"],
            id="a decoder layer after the last",
        ),
        pytest.param(
            ("model.eval_idx=-4",),
            2,
            ["override model.eval_idx=-4: model.eval_idx: -4 is no layer of 3", "hint: write -1 for the last layer"],
            id="a decoder layer before the first",
        ),
        pytest.param(
            ("dataset.eval_class_ids=[]",),
            2,
            [
                "override dataset.eval_class_ids=[]: dataset.eval_class_ids: empty: nothing would be evaluated",
                "hint: name category ids, or leave the field out to evaluate all",
            ],
            id="no classes to evaluate",
        ),
        pytest.param(
            ("dataset.num_classes=11", "dataset.remap_mscoco_category=true"),
            1,
            [
                "override dataset.num_classes=11: dataset.num_classes: is 11; val.json has 10 categories"
                " with ids up to 10",
                "hint: write 10, or dataset.remap_mscoco_category: false if the outputs are category ids",
            ],
            id="the largest id + 1, but remapped",
        ),
        pytest.param(
            ("dataset.num_classes=11",),
            2,
            [
                "override dataset.num_classes=11: dataset.num_classes: model/config.json has num_labels 10,"
                " the spec makes it 11",
                "hint: write dataset.num_classes: 10",
            ],
            id="classes that fit the json and not the checkpoint",
        ),
        pytest.param(
            ("evaluate.checkpoint=model/model.safetensors", "dataset.num_classes=11"),
            1,
            [
                "model/model.safetensors: does not fit the network: tensors 8 of another shape"
                " (model.enc_score_head.weight [10, 96] for [11, 96], model.enc_score_head.bias [10] for [11],"
                " model.decoder.class_embed.0.weight [10, 96] for [11, 96], ...)",
                FIELDS_HINT,
            ],
            id="classes that do not fit a file of weights",
        ),
    ],
)
def test_a_spec_is_refused(refused: Refused, words: tuple[str, ...], code: int, message: list[str]) -> None:
    assert refused("evaluate", *words) == (code, message)


@pytest.mark.parametrize(
    ("breaks", "words", "code", "message"),
    [
        pytest.param(
            lambda: cut(WEIGHTS, 500_000),
            (),
            1,
            [
                f"{WEIGHTS}: is not a whole safetensors file: Error while deserializing header:"
                " incomplete metadata, file not fully covered",
                COPY,
            ],
            id="weights cut off",
        ),
        pytest.param(
            lambda: cut(WEIGHTS, 0),
            (),
            1,
            [
                f"{WEIGHTS}: is not a whole safetensors file: Error while deserializing header: header too small",
                COPY,
            ],
            id="empty weights",
        ),
        pytest.param(
            lambda: cut("model/config.json", 300),
            (),
            1,
            [
                "model/config.json: is missing or not readable: not a Hugging Face folder",
                "hint: give the folder with config.json and model.safetensors",
            ],
            id="config cut off",
        ),
        pytest.param(
            lambda: Path("model/config.json").write_text("[]"),
            (),
            1,
            [
                "model/config.json: its model_type is None, not rt_detr or rt_detr_v2",
                "hint: give the folder of an RT-DETR",
            ],
            id="config that is a list",
        ),
        pytest.param(
            lambda: Path("code.pth").write_bytes(pickle.dumps(Code())),
            ("quantize.model_path=code.pth",),
            1,
            [
                "code.pth: is cut off, or is not a checkpoint of torch",
                "hint: copy the file again, or give another one",
            ],
            id="a bare pickle with code",
        ),
        pytest.param(
            lambda: torch.save([load_file(WEIGHTS), Code()], "code.pth", _use_new_zipfile_serialization=False),
            ("quantize.model_path=code.pth",),
            1,
            [
                "code.pth: holds objects besides tensors, which taoq does not load: they could run code",
                "hint: save the tensors alone where you trust the file: torch.save(model.state_dict(), 'weights.pth')",
            ],
            id="of old torch, with code",
        ),
        pytest.param(
            lambda: torch.save({"epoch": 3}, "empty.pth"),
            ("quantize.model_path=empty.pth",),
            1,
            ["empty.pth: holds no state dict", "hint: give a file that torch.save wrote of a state dict"],
            id="without tensors",
        ),
    ],
)
def test_a_checkpoint_is_refused(
    refused: Refused, breaks: Callable[[], Any], words: tuple[str, ...], code: int, message: list[str]
) -> None:
    breaks()
    assert refused("quantize", *words) == (code, message)
    assert not Path("it_ran").exists()


@pytest.mark.parametrize(
    ("breaks", "words", "code", "message"),
    [
        pytest.param(
            lambda: Path("data").rename("elsewhere"),
            (),
            1,
            [
                "spec.yaml:12: dataset.quant_calibration_data_sources.image_dir: there is no folder data",
                "hint: name a folder of images",
            ],
            id="no folder",
        ),
        pytest.param(
            all_missing,
            (),
            1,
            [
                "spec.yaml:12: dataset.quant_calibration_data_sources.image_dir: data has no images",
                "hint: image files end in .bmp, .gif, .jpeg, .jpg, .png, .tif, .tiff, .webp",
            ],
            id="a folder without images",
        ),
        pytest.param(
            nothing,
            (f"{CALIBRATION_JSON}=nowhere.json",),
            1,
            [
                f"override {CALIBRATION_JSON}=nowhere.json: {CALIBRATION_JSON}: nowhere.json cannot be read:"
                " No such file or directory",
                "hint: name a COCO json",
            ],
            id="no json",
        ),
        pytest.param(
            lambda: Path("list.json").write_text(json.dumps({"images": [{"id": 1, "file_name": "x/0001.jpg"}]})),
            (f"{CALIBRATION_JSON}=list.json",),
            1,
            [
                "data/x/0001.jpg: list.json names it, but there is no such image",
                "hint: image_dir is data; file names are relative to it",
            ],
            id="a json of other paths",
        ),
        pytest.param(
            lambda: cut("data/0002.jpg", 900),
            (),
            1,
            [
                "data/0002.jpg: cannot be read as an image: image file is truncated (21 bytes not processed)",
                REPLACE,
            ],
            id="a picture cut off",
        ),
    ],
)
def test_calibration_data_is_refused(
    refused: Refused, breaks: Callable[[], Any], words: tuple[str, ...], code: int, message: list[str]
) -> None:
    breaks()
    assert refused("quantize", *words) == (code, message)


@pytest.mark.parametrize("action", ["evaluate", "inference"])
def test_a_damaged_picture_is_named_by_reader_processes_too(refused: Refused, action: str) -> None:
    cut("data/0002.jpg", 0)
    assert refused(action, "dataset.workers=2", "dataset.batch_size=1") == (
        1,
        ["data/0002.jpg: cannot be read as an image: its content is of no image format", REPLACE],
    )


def test_calibration_needs_neither_annotations_nor_categories(
    job: Path, taoq: Callable[..., tuple[int, str, str]]
) -> None:
    Path("list.json").write_text(json.dumps({"images": [{"id": 1, "file_name": "0001.jpg"}]}))
    code, _, err = taoq("rtdetr", "quantize", "-e", "spec.yaml", f"{CALIBRATION_JSON}=list.json")
    assert code == 0, err
    report = json.loads(Path("results/quantize/quantization_report.json").read_text())
    assert report["calibration"] == {"num_samples": 1, "seed": 0}


def test_an_earlier_result_stays_when_a_later_run_is_refused(
    job: Path, taoq: Callable[..., tuple[int, str, str]]
) -> None:
    words = ("rtdetr", "evaluate", "-e", "spec.yaml")
    assert taoq(*words)[0] == 0
    before = Path("results/evaluate/results.json").read_bytes()
    cut("data/0003.jpg", 0)
    assert taoq(*words)[0] == 1
    assert Path("results/evaluate/results.json").read_bytes() == before
