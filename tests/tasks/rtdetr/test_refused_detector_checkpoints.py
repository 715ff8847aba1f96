"""Checkpoints that do not fit a detector are refused in two lines; no code in them runs, and nothing is left behind."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.commands import Refusal, unchanged
from support.damage import Damage
from support.pickles import Bomb

CLASSIFIER = Path(__file__).parents[3] / "examples" / "digits" / "checkpoints" / "resnet_18.safetensors"
CONFIG = Path("model/config.json")
WEIGHTS = Path("model/model.safetensors")
CRATER = Path("it_ran")
NO_CONFIG = [
    "model/config.json: is missing or not readable: not a Hugging Face folder",
    "hint: give the folder with config.json and model.safetensors",
]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(CONFIG.unlink, NO_CONFIG, id="no config"),
        pytest.param(lambda: os.truncate(CONFIG, 300), NO_CONFIG, id="config cut off"),
        pytest.param(
            lambda: CONFIG.write_text("[]"),
            [
                "model/config.json: its model_type is None, not rt_detr or rt_detr_v2",
                "hint: give the folder of an RT-DETR",
            ],
            id="config that is a list",
        ),
        pytest.param(
            lambda: CONFIG.write_text('{"model_type": "detr"}'),
            [
                "model/config.json: its model_type is detr, not rt_detr or rt_detr_v2",
                "hint: give the folder of an RT-DETR",
            ],
            id="config of another network",
        ),
        pytest.param(
            WEIGHTS.unlink,
            ["model/model.safetensors: there is no such checkpoint", "hint: give a .pth, .ckpt or .safetensors file"],
            id="no weights",
        ),
        pytest.param(
            lambda: WEIGHTS.write_bytes(b"x" * 99),
            [
                "model/model.safetensors: is not a whole safetensors file:"
                " Error while deserializing header: header too large",
                "hint: copy the file again",
            ],
            id="weights that are no safetensors",
        ),
        pytest.param(
            lambda: os.truncate(WEIGHTS, 500_000),
            [
                "model/model.safetensors: is not a whole safetensors file:"
                " Error while deserializing header: incomplete metadata, file not fully covered",
                "hint: copy the file again",
            ],
            id="weights cut off",
        ),
        pytest.param(
            lambda: os.truncate(WEIGHTS, 0),
            [
                "model/model.safetensors: is not a whole safetensors file:"
                " Error while deserializing header: header too small",
                "hint: copy the file again",
            ],
            id="empty weights",
        ),
    ],
)
def test_a_damaged_hugging_face_folder_is_refused(refusal: Refusal, damage: Damage, message: list[str]) -> None:
    damage()
    assert refusal("quantize") == (1, message)


@pytest.mark.parametrize(
    ("write", "checkpoint", "message"),
    [
        pytest.param(
            unchanged,
            "nowhere.pth",
            ["nowhere.pth: there is no such checkpoint", "hint: give a .pth, .ckpt or .safetensors file"],
            id="no file",
        ),
        pytest.param(
            unchanged,
            CLASSIFIER,
            [
                f"{CLASSIFIER}: is not the checkpoint of an RT-DETR:"
                " its names are neither those of transformers nor the original code's",
                "hint: give the checkpoint of an RT-DETR",
            ],
            id="another architecture",
        ),
        pytest.param(
            lambda: torch.save({"epoch": 3}, "empty.pth"),
            "empty.pth",
            ["empty.pth: holds no state dict, only epoch", "hint: give a file that torch.save wrote of a state dict"],
            id="no tensors",
        ),
        pytest.param(
            lambda: torch.save({"model": Bomb(CRATER)}, "code.pth"),
            "code.pth",
            [
                "code.pth: holds objects besides tensors, which taoq does not load: they could run code",
                "hint: save the tensors alone where you trust the file: torch.save(model.state_dict(), 'weights.pth')",
            ],
            id="code",
        ),
        pytest.param(
            lambda: torch.save([load_file(WEIGHTS), Bomb(CRATER)], "code.pth", _use_new_zipfile_serialization=False),
            "code.pth",
            [
                "code.pth: holds objects besides tensors, which taoq does not load: they could run code",
                "hint: save the tensors alone where you trust the file: torch.save(model.state_dict(), 'weights.pth')",
            ],
            id="code, in the format of old torch",
        ),
        pytest.param(
            lambda: Path("code.pth").write_bytes(pickle.dumps(Bomb(CRATER))),
            "code.pth",
            [
                "code.pth: is cut off, or is not a checkpoint of torch",
                "hint: copy the file again, or give another one",
            ],
            id="a bare pickle with code",
        ),
    ],
)
def test_a_file_that_is_no_checkpoint_of_a_detector_is_refused(
    refusal: Refusal, write: Damage, checkpoint: str | Path, message: list[str]
) -> None:
    write()
    assert refusal("quantize", f"quantize.model_path={checkpoint}") == (1, message)
    assert not CRATER.exists()


def test_a_spec_without_a_checkpoint_is_refused(refusal: Refusal) -> None:
    assert refusal("quantize", "quantize.model_path=''") == (
        2,
        [
            "spec.yaml:23: model: no checkpoint is given",
            "hint: write quantize.model_path, evaluate.checkpoint or inference.checkpoint:"
            " a Hugging Face folder or a file",
        ],
    )


def test_a_folder_that_is_no_checkpoint_is_refused(refusal: Refusal) -> None:
    assert refusal("evaluate", "evaluate.checkpoint=data") == (
        1,
        [
            "data: is a folder without a manifest.json: it is not an artifact, or not a complete one",
            "hint: quantize again, or give a checkpoint file",
        ],
    )


def test_weights_that_do_not_fit_the_network_are_refused(refusal: Refusal) -> None:
    assert refusal(
        "evaluate",
        "evaluate.checkpoint=model/model.safetensors",
        "dataset.num_classes=11",
        "dataset.category_ids=as_ids",
    ) == (
        1,
        [
            "model/model.safetensors: does not fit the network: tensors 8 of another shape"
            " (model.enc_score_head.weight [10, 96] for [11, 96], model.enc_score_head.bias [10] for [11],"
            " model.decoder.class_embed.0.weight [10, 96] for [11, 96], ...)",
            "hint: check model.backbone, the other fields of model and dataset.num_classes",
        ],
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        pytest.param(
            ("model.nheads=7",),
            [
                "override model.nheads=7: model.nheads: model/config.json has encoder_attention_heads 6,"
                " the spec makes it 7",
                "hint: write model.nheads: 6",
            ],
            id="heads",
        ),
        pytest.param(
            ("model.act=gelou",),
            [
                "override model.act=gelou: model.act: model/config.json has activation_function silu,"
                " the spec makes it gelou",
                'hint: write model.act: "silu"',
            ],
            id="activation function",
        ),
        pytest.param(
            ("model.hidden_dim=48", "model.act=relu"),
            [
                "override model.hidden_dim=48: model.hidden_dim: model/config.json has encoder_hidden_dim 96,"
                " the spec makes it 48",
                "hint: write model.hidden_dim: 96",
                "override model.act=relu: model.act: model/config.json has activation_function silu,"
                " the spec makes it relu",
                'hint: write model.act: "silu"',
            ],
            id="two fields",
        ),
        pytest.param(
            ("model.backbone=resnet_50", "model.backbone_args={}"),
            [
                "override model.backbone_args={}: model.backbone_args.layer_type: model/config.json has"
                " layer_type basic, the spec makes it bottleneck",
                'hint: write model.backbone_args.layer_type: "basic", or choose the model.backbone',
            ],
            id="another backbone",
        ),
    ],
)
def test_a_config_that_differs_from_the_spec_is_refused(
    refusal: Refusal, overrides: tuple[str, ...], message: list[str]
) -> None:
    assert refusal("quantize", *overrides) == (2, message)
