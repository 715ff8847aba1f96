"""FAN, against a second implementation under TAO's names and against the published sizes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from support.tao import lightning, shuffled
from support.tao.attentional import Fan
from support.tao.classifiers import CLASSES, assert_same, build
from taoq.errors import SpecError
from taoq.tasks.backbones.fan import FANS, create_fan

SHAPES: Mapping[str, dict[str, Any]] = {
    "fan_tiny_8_p4_hybrid": {"widths": [24, 24, 24], "heads": [4, 4, 4], "stem": [2, 1], "stem_widths": [8, 16]},
    # as fan_xlarge_16_p4_hybrid, whose last blocks are wider and see a map of half the size
    "fan_xlarge_16_p4_hybrid": {
        "widths": [24, 24, 40], "heads": [3, 3, 5], "stem": [1, 2], "stem_widths": [8, 16],
    },
    "fan_small_12_p16_224": {"widths": [32, 32], "heads": [4, 4]},
    "fan_small_12_p16_224_se_attn": {"widths": [32, 32], "heads": [2, 2]},
}  # fmt: skip
PUBLISHED = {
    "fan_tiny_12_p16_224": 7.3, "fan_small_12_p16_224": 28.3, "fan_base_18_p16_224": 54.3, "fan_large_24_p16_224": 80.5,
    "fan_tiny_8_p4_hybrid": 7.4, "fan_small_12_p4_hybrid": 26.1, "fan_base_16_p4_hybrid": 50.4,
    "fan_large_16_p4_hybrid": 76.8,
}  # fmt: skip
"""Millions of parameters (arXiv:2204.12451, tables 1 and 4, and the README of NVlabs/FAN)."""


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("size", "faint"), [(64, True), (176, False)])
def test_a_checkpoint_of_tao_gives_the_outputs_of_tao(tmp_path: Path, name: str, size: int, faint: bool) -> None:
    network = shuffled(Fan(**SHAPES[name], classes=CLASSES, squeeze=name.endswith("_se_attn")), faint=faint)
    torch.save(lightning(network), tmp_path / "fan.pth")
    assert_same(build(name, tmp_path / "fan.pth", size, SHAPES[name]), network, size)


@pytest.mark.parametrize("name", FANS)
def test_a_fan_has_the_published_size(name: str) -> None:
    with torch.device("meta"):
        network = create_fan(name, 1000)
        assert network(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert abs(millions - PUBLISHED.get(name, millions)) < 0.1


def test_an_unknown_argument_of_a_fan_is_refused() -> None:
    with pytest.raises(SpecError) as error:
        build("fan_tiny_8_p4_hybrid", None, 64, {"depth": 8})
    assert str(error.value) == (
        "model.backbone.args: taoq cannot build fan_tiny_8_p4_hybrid: FanConfig.__init__() got an unexpected keyword"
        " argument 'depth'\nhint: see the arguments of FAN in docs/tao-backbones.md"
    )
