"""Checkpoints of TAO's RT-DETR, whose backbones are those of timm, against a second implementation."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from original import Original, shuffled
from tao_network import FanBackbone, ResNet, TaoRtdetr, WidenedConvNeXt, backbone_of, lightning
from test_rtdetr_model import ORIGINALS, TINY_MODEL, TINY_ORIGINAL, assert_same, photograph, run, spec
from torch import nn

from support.commands import Taoq
from support.tao.convolutional import ConvNeXt, EdgeNeXt, EfficientVit, EfficientVitLarge
from taoq.errors import SpecError
from taoq.tasks.rtdetr.model import build_model, with_checkpoint

SIZES = {"width": 32, "heads": 4, "inner": 48, "queries": 20, "classes": 5, "layers": 2, "expansion": 0.5}
FIELDS: dict[str, Any] = {**TINY_MODEL, "dec_layers": 2, "expansion": 0.5}
RESNETS: dict[str, Callable[[], nn.Module]] = {
    "resnet_18": lambda: ResNet(64, (64, 128, 256, 512), (2, 2, 2, 2), False, (1, 2, 3)),
    "resnet_34": lambda: ResNet(64, (64, 128, 256, 512), (3, 4, 6, 3), False, (1, 2, 3)),
    "resnet_50": lambda: ResNet(64, (64, 128, 256, 512), (3, 4, 6, 3), True, (1, 2, 3)),
    "resnet_101": lambda: ResNet(64, (64, 128, 256, 512), (3, 4, 23, 3), True, (1, 2, 3)),
}


def tao_checkpoint(backbone: nn.Module, path: Path) -> nn.Module:
    network = shuffled(TaoRtdetr(backbone, **SIZES))
    torch.save(lightning(network), path)
    return network


@pytest.mark.parametrize("name", RESNETS)
def test_a_resnet_of_tao_gives_the_outputs_of_tao(tmp_path: Path, name: str) -> None:
    network = tao_checkpoint(RESNETS[name](), tmp_path / "rtdetr_model_latest.pth")
    for size, fuse in (((128, 128), True), ((96, 160), False)):
        built = build_model(
            spec({**FIELDS, "backbone": name, "fuse": fuse}, size, 5), str(tmp_path / "rtdetr_model_latest.pth")
        )
        assert_same(run(built, photograph(size)), run(network, photograph(size)))


DEPTHS, WIDTHS = (2, 1, 3, 1), (8, 16, 24, 40)
CONVNEXT = {"depths": list(DEPTHS), "dims": list(WIDTHS)}
B = {"widths": [8, 16, 24, 32, 64], "depths": [1, 2, 1, 2, 1], "head_dim": 8}
L = {"widths": [8, 16, 16, 24, 64], "depths": [1, 1, 2, 1, 2]}


def fan(blocks: int, heads: int, stem: list[int]) -> dict[str, Any]:
    return {"widths": [24] * blocks, "heads": [heads] * blocks, "stem": stem, "stem_widths": [16, 24]}


BACKBONES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "convnext_tiny": (lambda: WidenedConvNeXt(DEPTHS, WIDTHS), CONVNEXT),
    "convnext_xlarge": (lambda: WidenedConvNeXt(DEPTHS, WIDTHS), CONVNEXT),
    "convnextv2_nano": (lambda: backbone_of(ConvNeXt(DEPTHS, WIDTHS, 1, grn=True), WIDTHS[1:]), CONVNEXT),
    "convnextv2_small": (lambda: backbone_of(ConvNeXt(DEPTHS, WIDTHS, 1, grn=True), WIDTHS[1:]), CONVNEXT),
    "convnextv2_tiny": (lambda: WidenedConvNeXt(DEPTHS, WIDTHS, grn=True), CONVNEXT),  # as TAO 6.0 had it
    "edgenext_x_small": (lambda: backbone_of(EdgeNeXt(DEPTHS, WIDTHS, 4, 1), WIDTHS[1:]), CONVNEXT),
    "efficientvit_b0": (lambda: backbone_of(EfficientVit(B["widths"], B["depths"], 8, 1), B["widths"][2:], "norm"), B),
    "efficientvit_l0": (
        lambda: backbone_of(EfficientVitLarge(L["widths"], L["depths"], 32, 1), L["widths"][2:], "norm"),
        L,
    ),
    "efficientvit_l3": (
        lambda: backbone_of(EfficientVitLarge(L["widths"], L["depths"], 32, 1), L["widths"][2:], "norm"),
        L,
    ),
    "fan_tiny_8_p4_hybrid": (lambda: FanBackbone([24] * 3, [4] * 3, [2, 1], 2), fan(3, 4, [2, 1])),
    "fan_small_12_p4_hybrid": (lambda: FanBackbone([24] * 2, [4] * 2, [1, 1], 1), fan(2, 4, [1, 1])),
    "fan_large_12_p4_hybrid": (lambda: FanBackbone([24] * 20, [3] * 20, [1, 1], 18), fan(20, 3, [1, 1])),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_another_backbone_of_tao_gives_the_outputs_of_tao(tmp_path: Path, name: str) -> None:
    build, args = BACKBONES[name]
    backbone = build()
    network = tao_checkpoint(backbone, tmp_path / "tao.pth")
    for size, fuse in (((128, 128), True), ((96, 160), False)):
        fields = {**FIELDS, "backbone": name, "backbone_args": args, "fuse": fuse}
        built: Any = build_model(spec(fields, size, 5), str(tmp_path / "tao.pth"))
        with torch.inference_mode():
            maps, expected = built.model.backbone.model(photograph(size)).feature_maps, backbone(photograph(size))
        for given, tensor in zip(maps, expected, strict=True):
            torch.testing.assert_close(given, tensor, rtol=1e-4, atol=1e-5)
        assert_same(run(built, photograph(size)), run(network, photograph(size)))


def test_the_stages_may_be_others(tmp_path: Path) -> None:
    backbone = ResNet(64, (64, 128, 256, 512), (2, 2, 2, 2), False, (0, 1, 2))
    network = tao_checkpoint(backbone, tmp_path / "tao.pth")
    fields = {**FIELDS, "backbone": "resnet_18", "return_interm_indices": [0, 1, 2], "feat_strides": [4, 8, 16]}
    built = build_model(spec(fields, (64, 96), 5), str(tmp_path / "tao.pth"))
    assert_same(run(built, photograph((64, 96))), run(network, photograph((64, 96))))


def test_frozen_batch_norms_have_no_batch_counts(tmp_path: Path) -> None:
    network = shuffled(TaoRtdetr(RESNETS["resnet_18"](), **SIZES))
    checkpoint = lightning(network)
    state = checkpoint["state_dict"]
    counts = [name for name in state if ".backbone." in name and name.endswith("num_batches_tracked")]
    checkpoint["state_dict"] = {name: value for name, value in state.items() if name not in counts}
    torch.save(checkpoint, tmp_path / "tao.pth")
    built = build_model(spec({**FIELDS, "backbone": "resnet_18"}, (128, 128), 5), str(tmp_path / "tao.pth"))
    assert counts
    assert_same(run(built, photograph((128, 128))), run(network, photograph((128, 128))))


def test_the_kind_of_resnet_is_seen_from_the_checkpoint_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tao_checkpoint(RESNETS["resnet_18"](), tmp_path / "tao.pth")
    theirs, _ = ORIGINALS["basic blocks, half-width fusion, as R18"]
    torch.save(Original(**theirs, **TINY_ORIGINAL).state_dict(), tmp_path / "authors.pth")
    own = spec({**FIELDS, "backbone": "resnet_18"}, (128, 128), 5)
    with caplog.at_level(logging.INFO, "taoq"):
        assert with_checkpoint(own, str(tmp_path / "tao.pth")).model.resnet == "plain"
    assert caplog.messages == [
        f"model.resnet: plain: {tmp_path / 'tao.pth'} has the ResNet of TAO, not that of RT-DETR's authors"
    ]
    assert with_checkpoint(own, str(tmp_path / "authors.pth")) == own


@pytest.mark.parametrize(("said", "file", "other"), [("vd", "tao.pth", "plain"), ("plain", "authors.pth", "vd")])
def test_a_kind_of_resnet_that_the_checkpoint_does_not_have_is_refused(
    tmp_path: Path, said: str, file: str, other: str
) -> None:
    tao_checkpoint(RESNETS["resnet_18"](), tmp_path / "tao.pth")
    torch.save(Original(depths=(2, 2, 2, 2), bottleneck=False, **SIZES).state_dict(), tmp_path / "authors.pth")
    with pytest.raises(SpecError) as error:
        build_model(spec({**FIELDS, "backbone": "resnet_18", "resnet": said}, (128, 128), 5), str(tmp_path / file))
    assert str(error.value).splitlines() == [
        f"model.resnet: is {said}, but the ResNet of {tmp_path / file} is {other}",
        "hint: leave it out: it is seen from the checkpoint",
    ]


def test_an_artifact_knows_its_resnet(detector_folder: Path, taoq: Taoq) -> None:
    """The artifact is rebuilt from its manifest, with the spec of TAO, which does not name the kind."""
    network = shuffled(TaoRtdetr(RESNETS["resnet_18"](), **{**SIZES, "classes": 10}))
    torch.save(lightning(network), "tao.pth")
    document = yaml.safe_load(Path("spec.yaml").read_text())
    document["model"] = {**FIELDS, "backbone": "resnet_18"}
    document["quantize"] |= {"model_path": "tao.pth", "backend": "torchao", "mode": "weight_only_ptq"}
    document["quantize"]["layers"] = [{"module_name": "Linear", "weights": {"dtype": "int8"}}]
    document["quantize"]["skip_names"] = ["backbone.layer1.0.conv1", "*dec_score_head*"]
    Path("tao.yaml").write_text(yaml.safe_dump(document))
    assert taoq("rtdetr", "quantize", "-e", "tao.yaml")[0] == 0
    assert yaml.safe_load(Path("results/quantize/experiment.yaml").read_text())["model"]["resnet"] == "plain"
    code, _, err = taoq("rtdetr", "evaluate", "-e", "tao.yaml", "evaluate.checkpoint=results/quantize")
    assert code == 0, err
    words = ("evaluate.checkpoint=results/quantize", "model.resnet=vd")
    code, _, err = taoq("rtdetr", "evaluate", "-e", "tao.yaml", *words)
    assert code == 2
    assert err.splitlines()[-2:] == [
        "override model.resnet=vd: model.resnet: is vd, the artifact was made with plain",
        "hint: use the spec that it was quantized with",
    ]
