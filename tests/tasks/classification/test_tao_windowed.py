"""TAO's checkpoints of Swin, FAN-Swin, GC ViT and the Mix Transformer, against a second implementation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from support.tao import lightning, shuffled
from support.tao.classifiers import CLASSES, assert_same, build
from support.tao.windowed import GcVit, MixTransformer, Swin

SWIN = {"embed_dim": 16, "depths": [2, 2, 1, 2], "num_heads": [2, 2, 4, 4]}
GCVIT = {"embed_dim": 32, "depths": [2, 1, 2, 2], "num_heads": [2, 2, 4, 4]}
MIT = {"embed_dims": [8, 16, 24, 32], "depths": [1, 2, 1, 1], "num_heads": [1, 2, 3, 4]}


def swin(window: int, fan: bool = False) -> nn.Module:
    return Swin(16, SWIN["depths"], SWIN["num_heads"], window, CLASSES, fan)


def gcvit(size: int) -> nn.Module:
    return GcVit(32, GCVIT["depths"], GCVIT["num_heads"], size, 2, True, CLASSES)


NETWORKS: Mapping[str, tuple[nn.Module, dict[str, Any], int]] = {
    "swin_tiny_patch4_window7_224": (swin(7), SWIN, 224),
    "swin_large_patch4_window12_384": (swin(12), SWIN, 384),
    # Maps that are not a multiple of the window, or smaller than it: TAO pads them before it shifts them.
    "swin_base_patch4_window7_224": (swin(7), SWIN, 160),
    "swin_base_patch4_window12_384": (swin(12), SWIN, 224),
    "fan_swin_tiny_patch4_window7_224": (swin(7, fan=True), SWIN, 224),
    "fan_swin_large_patch4_window7_224": (swin(7, fan=True), SWIN, 96),
    "gc_vit_xxtiny": (GcVit(64, (2, 2, 6, 2), (2, 4, 8, 16), 224, 3, False, CLASSES), {}, 224),
    "gc_vit_large": (gcvit(224), GCVIT, 224),
    "gc_vit_base_384": (gcvit(384), GCVIT, 384),
    "mit_b0": (MixTransformer(MIT["embed_dims"], MIT["depths"], MIT["num_heads"], CLASSES), MIT, 128),
    "mit_b5": (MixTransformer(MIT["embed_dims"], MIT["depths"], MIT["num_heads"], CLASSES), MIT, 160),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("faint", [False, True])
def test_a_checkpoint_of_tao_gives_the_outputs_of_tao(tmp_path: Path, name: str, faint: bool) -> None:
    network, args, size = NETWORKS[name]
    torch.save(lightning(shuffled(network, faint=faint)), tmp_path / "classifier_model_latest.pth")
    assert_same(build(name, tmp_path / "classifier_model_latest.pth", size, args), network, size)
