"""TAO's checkpoints of vision transformers, against a second implementation under TAO's names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from support.tao import lightning, shuffled
from support.tao.classifiers import CLASSES, assert_same, build
from support.tao.transformers import Clip, DinoV2, DinoV3, MaeVit, Radio

VIT = {"embed_dim": 32, "depth": 2, "num_heads": 4}
SHAPE = (32, 2, 4)


def radio(teachers: int, summary: int, multiple: int, **others: bool) -> nn.Module:
    return Radio(*SHAPE, teachers, summary, multiple, CLASSES, **others)


def dinov3(name: str) -> nn.Module:
    return DinoV3(timm.create_model(name, num_classes=0, **VIT), 32, CLASSES)


# Each network, the arguments that make taoq's as small, and the size of images.
NETWORKS: Mapping[str, tuple[nn.Module, dict[str, Any], int]] = {
    "vit_base_patch16_mae": (MaeVit(*SHAPE, 16, CLASSES), VIT, 224),
    "vit_huge_patch14_mae": (MaeVit(*SHAPE, 14, CLASSES), VIT, 224),
    "vit_large_patch14_dinov2_swiglu": (DinoV2(64, 2, 4, 342, 0, 518, CLASSES), {**VIT, "embed_dim": 64}, 224),
    "vit_large_patch14_dinov2_swiglu_legacy": (DinoV2(64, 2, 4, 342, 0, 224, CLASSES), {**VIT, "embed_dim": 64}, 224),
    "vit_giant_patch14_reg4_dinov2_swiglu": (DinoV2(*SHAPE, 170, 4, 518, CLASSES), VIT, 518),
    "dinov3_vits16": (dinov3("vit_small_patch16_dinov3"), VIT, 96),
    "dinov3_vith16plus": (dinov3("vit_huge_plus_patch16_dinov3"), VIT, 128),
    "c_radio_p1_vit_huge_patch16_mlpnorm": (radio(3, 3, 16, normed=True), VIT, 224),
    "c_radio_p2_vit_huge_patch16_mlpnorm": (radio(4, 4, 16, normed=True), VIT, 128),
    "c_radio_p3_vit_huge_patch16_mlpnorm": (radio(4, 3, 16, normed=True), VIT, 224),
    "c_radio_v2_vit_base_patch16": (radio(4, 3, 8), VIT, 224),
    "c_radio_v2_vit_huge_patch16": (radio(4, 3, 8), VIT, 96),
    "c_radio_v3_vit_base_patch16_reg4_dinov2": (radio(4, 3, 8, scaled=True), VIT, 224),
    "c_radio_v3_vit_huge_patch16_reg4_dinov2": (radio(4, 3, 8, scaled=True), VIT, 64),
    "vit_l_14_siglip_clipa_224": (Clip(*SHAPE, 224, 768, CLASSES), VIT, 224),
    "vit_l_14_siglip_clipa_336": (Clip(*SHAPE, 336, 768, CLASSES), VIT, 224),
    "vit_h_14_siglip_clipa_224": (Clip(*SHAPE, 224, 1024, CLASSES), VIT, 112),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("faint", [False, True])
def test_a_checkpoint_of_tao_gives_the_outputs_of_tao(tmp_path: Path, name: str, faint: bool) -> None:
    network, args, size = NETWORKS[name]
    torch.save(lightning(shuffled(network, faint=faint)), tmp_path / "classifier_model_latest.pth")
    assert_same(build(name, tmp_path / "classifier_model_latest.pth", size, args), network, size)
