"""TAO's checkpoints of convolutional networks, against a second implementation under TAO's names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from support.tao import lightning, shuffled
from support.tao.classifiers import assert_same, build
from support.tao.convolutional import ConvNeXt, EdgeNeXt, EfficientVit, EfficientVitLarge

DEPTHS, WIDTHS = (2, 1, 3, 1), (8, 16, 24, 40)
CONVNEXT = {"depths": list(DEPTHS), "dims": list(WIDTHS)}
B = {"widths": [8, 16, 24, 32, 64], "depths": [1, 2, 1, 2, 1], "head_dim": 8}
L = {"widths": [8, 16, 16, 24, 64], "depths": [1, 1, 2, 1, 2]}

NETWORKS: Mapping[str, tuple[nn.Module, dict[str, Any]]] = {
    "convnext_tiny": (ConvNeXt(DEPTHS, WIDTHS, 5), CONVNEXT),
    "convnext_xlarge": (ConvNeXt(DEPTHS, WIDTHS, 5), CONVNEXT),
    "convnextv2_atto": (ConvNeXt(DEPTHS, WIDTHS, 5, grn=True), CONVNEXT),  # MLPs are convolutions in timm
    "convnextv2_tiny": (ConvNeXt(DEPTHS, WIDTHS, 5, grn=True), CONVNEXT),
    "convnextv2_huge": (ConvNeXt(DEPTHS, WIDTHS, 5, grn=True), CONVNEXT),
    "edgenext_xx_small": (EdgeNeXt(DEPTHS, WIDTHS, 4, 5), CONVNEXT),
    "edgenext_base": (EdgeNeXt(DEPTHS, WIDTHS, 8, 5), CONVNEXT),
    "efficientvit_b0": (EfficientVit(B["widths"], B["depths"], 8, 5), B),
    "efficientvit_b2": (EfficientVit(B["widths"], B["depths"], 32, 5), {**B, "head_dim": 32}),
    "efficientvit_l0": (EfficientVitLarge(L["widths"], L["depths"], 32, 5), L),
    "efficientvit_l2": (EfficientVitLarge(L["widths"], L["depths"], 32, 5), L),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("size", "faint"), [(64, True), (160, False)])
def test_a_checkpoint_of_tao_gives_the_outputs_of_tao(tmp_path: Path, name: str, size: int, faint: bool) -> None:
    network, args = NETWORKS[name]
    torch.save(lightning(shuffled(network, faint=faint)), tmp_path / "classifier_model_latest.pth")
    assert_same(build(name, tmp_path / "classifier_model_latest.pth", size, args), network, size)
