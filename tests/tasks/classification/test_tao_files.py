"""Which network a checkpoint belongs to, and files of TAO that are not those of the spec's network."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import convnext, edgenext, pvt_v2, swin_transformer
from torch import Tensor, nn

from support.tao import lightning, shuffled
from support.tao.classifiers import CLASSES, assert_same, build, photographs, spec
from support.tao.convolutional import ConvNeXt, EdgeNeXt, EfficientVit, EfficientVitLarge
from support.tao.transformers import Clip
from support.tao.windowed import MixTransformer, Swin
from taoq.errors import SpecError, TaoqError
from taoq.tasks.backbones.tao_keys import from_tao
from taoq.tasks.classification.model import build_model, with_checkpoint
from taoq.tasks.classification.task import check_same_model

DEPTHS, WIDTHS = (1, 1, 2, 1), (8, 16, 24, 32)
CONVNEXT: dict[str, Any] = {"depths": list(DEPTHS), "dims": list(WIDTHS)}
SWIN: dict[str, Any] = {"embed_dim": 8, "depths": [2, 1, 1, 2], "num_heads": [1, 2, 2, 4]}
VIT_B: dict[str, Any] = {"widths": [8, 16, 24, 32, 64], "depths": [1, 1, 1, 1, 1], "head_dim": 8}
MIT: dict[str, Any] = {"embed_dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_heads": [1, 2, 3, 4]}


def swin() -> nn.Module:
    return shuffled(Swin(8, SWIN["depths"], SWIN["num_heads"], 7, CLASSES))


def efficientvit() -> nn.Module:
    return shuffled(EfficientVit(VIT_B["widths"], VIT_B["depths"], 8, CLASSES))


def saved(network: nn.Module, path: Path) -> Path:
    torch.save(lightning(network), path)
    return path


TWO = {
    "swin_small_patch4_window7_224": (swin, SWIN, "swin_small_patch4_window7_224"),
    "efficientvit_b3": (efficientvit, VIT_B, "efficientvit_b3"),
}


@pytest.mark.parametrize("name", TWO)
def test_one_spec_loads_the_network_of_tao_and_that_of_timm(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    make, args, entry = TWO[name]
    theirs = make()
    tao = saved(theirs, tmp_path / "tao.pth")
    assert_same(build(name, tao, 224, args), theirs, 224)
    assert f"model.backbone.variant: tao: {tao} has TAO's {name}, which differs from timm's" in caplog.messages
    caplog.clear()
    library = shuffled(timm.create_model(entry, num_classes=CLASSES, **args))
    save_file(library.state_dict(), tmp_path / "timm.safetensors")
    assert_same(build(name, tmp_path / "timm.safetensors", 224, args), library, 224)
    assert not caplog.messages


@pytest.mark.parametrize("name", TWO)
def test_the_spec_that_an_artifact_stores_says_which_network_it_is(name: str, tmp_path: Path) -> None:
    make, args, entry = TWO[name]
    wanted = spec(name, 224, args)
    found = with_checkpoint(wanted, str(saved(make(), tmp_path / "tao.pth")))
    assert found.model.backbone.variant == "tao"
    assert {key: value.shape for key, value in build_model(found, None).state_dict().items()} == {
        key: value.shape for key, value in build_model(found, str(tmp_path / "tao.pth")).state_dict().items()
    }
    torch.save(timm.create_model(entry, num_classes=CLASSES, **args).state_dict(), tmp_path / "timm.pth")
    assert with_checkpoint(wanted, str(tmp_path / "timm.pth")) == wanted
    assert with_checkpoint(wanted, str(tmp_path / "nowhere.pth")) == wanted


@pytest.mark.parametrize(("variant", "has"), [("tao", "timm's"), ("library", "TAO's")])
def test_a_variant_that_contradicts_the_checkpoint_is_refused(variant: str, has: str, tmp_path: Path) -> None:
    name, path = "efficientvit_b3", tmp_path / "file.pth"
    saved(efficientvit() if variant == "library" else timm.create_model(name, num_classes=CLASSES, **VIT_B), path)
    with pytest.raises(TaoqError) as error:
        build(name, path, 224, VIT_B, variant=variant)
    assert str(error.value) == (
        f"model.backbone.variant: is {variant}, but {path} has {has} names of the tensors of efficientvit_b3\n"
        "hint: leave it out: it is seen from the checkpoint"
    )


@pytest.mark.parametrize(("said", "made"), [("tao", "auto"), ("library", "tao")])
def test_an_artifact_of_the_other_variant_is_refused(said: str, made: str) -> None:
    own, stored = (spec("efficientvit_b3", 224, VIT_B, variant=variant) for variant in (said, made))
    with pytest.raises(SpecError) as error:
        check_same_model(own, stored)
    assert str(error.value) == (
        f"model.backbone.variant: is {said}, the artifact was made with {made}\n"
        "hint: use the spec that it was quantized with"
    )
    for variant in ("auto", made if made == "tao" else "library"):
        check_same_model(spec("efficientvit_b3", 224, VIT_B, variant=variant), stored)


@pytest.mark.parametrize("container", ["plain", "model", "state_dict"])
def test_the_authors_files_have_the_same_names(container: str, tmp_path: Path) -> None:
    """ConvNeXt's authors save the names that TAO took over, without a prefix."""
    theirs = shuffled(ConvNeXt(DEPTHS, WIDTHS, CLASSES))
    state = theirs.state_dict()
    torch.save(state if container == "plain" else {container: state, "epoch": 299}, tmp_path / "convnext.pth")
    assert_same(build("convnext_tiny", tmp_path / "convnext.pth", 64, CONVNEXT), theirs, 64)


def test_frozen_batch_norms_have_no_counts(tmp_path: Path) -> None:
    """TAO's `freeze_norm` replaces batch norms by ones with the same tensors but the count."""
    theirs = efficientvit()
    data = lightning(theirs)
    data["state_dict"] = {k: v for k, v in data["state_dict"].items() if not k.endswith("num_batches_tracked")}
    torch.save(data, tmp_path / "frozen.pth")
    assert_same(build("efficientvit_b3", tmp_path / "frozen.pth", 64, VIT_B), theirs, 64)
    resnet = timm.create_model("resnet18", num_classes=CLASSES, channels=[8, 8, 8, 8])
    state = {f"model.{k}": v for k, v in resnet.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save({"state_dict": state}, tmp_path / "resnet.pth")
    loaded = build("resnet_18", tmp_path / "resnet.pth", 64, {"channels": [8, 8, 8, 8]})
    torch.testing.assert_close(loaded(photographs(64)), resnet.eval()(photographs(64)))


def test_tensors_that_a_classifier_does_not_use_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    path = saved(shuffled(Clip(32, 1, 4, 224, 768, CLASSES)), tmp_path / "clip.pth")
    build("vit_l_14_siglip_clipa_224", path, 224, {"embed_dim": 32, "depth": 1, "num_heads": 4})
    assert caplog.messages == [
        f"{path}: 18 tensors are not needed for classification:"
        " model.ln_final.bias, model.ln_final.weight, model.logit_scale, ..."
    ]


def test_a_classifier_that_tao_cannot_run_is_said_to_be_ours(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    large = {**VIT_B, "widths": [8, 8, 8, 8, 32]}
    path = saved(shuffled(EfficientVitLarge(large["widths"], large["depths"], 32, CLASSES)), tmp_path / "large.pth")
    build("efficientvit_l0", path, 64, {"widths": large["widths"], "depths": large["depths"]})
    assert caplog.messages == [
        f"{path}: TAO 7 itself cannot run the classifier of efficientvit_l0, which gets a map; here it gets the map's"
        " mean"
    ]


WRONG: Mapping[str, tuple[str, dict[str, Any], str]] = {
    "deeper": ("convnext_small", {**CONVNEXT, "depths": [1, 1, 3, 1]}, "9 missing (stages.2.blocks.2.gamma,"
               " stages.2.blocks.2.conv_dw.weight, stages.2.blocks.2.conv_dw.bias, ...)"),
    "with other classes": ("convnext_tiny", CONVNEXT, "2 of another shape (head.fc.weight [7, 32] for [5, 32],"
                           " head.fc.bias [7] for [5])"),
    "of the other version": ("convnextv2_tiny", CONVNEXT, "10 missing (stages.0.blocks.0.mlp.grn.weight,"
                             " stages.0.blocks.0.mlp.grn.bias, stages.1.blocks.0.mlp.grn.weight, ...), 5 unknown"
                             " (stages.0.blocks.0.gamma, stages.1.blocks.0.gamma, stages.2.blocks.0.gamma, ...)"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_another_network_of_the_family_does_not_fit(case: str, tmp_path: Path) -> None:
    name, args, what = WRONG[case]
    classes = 7 if case == "with other classes" else CLASSES
    path = saved(shuffled(ConvNeXt(DEPTHS, WIDTHS, classes)), tmp_path / "convnext.pth")
    with pytest.raises(TaoqError) as error:
        build(name, path, 64, args)
    assert str(error.value) == (
        f"{path}: does not fit the network: tensors {what}\n"
        "hint: check model.backbone.type, model.backbone.args and dataset.num_classes"
    )


FILTERS = {
    "convnext": (convnext, ConvNeXt(DEPTHS, WIDTHS, 5), "convnext_tiny", CONVNEXT),
    "convnext v2": (convnext, ConvNeXt(DEPTHS, WIDTHS, 5, grn=True), "convnextv2_atto", CONVNEXT),
    "edgenext": (edgenext, EdgeNeXt(DEPTHS, WIDTHS, 4, 5), "edgenext_small", CONVNEXT),
    "swin": (swin_transformer, Swin(8, SWIN["depths"], SWIN["num_heads"], 7, 5), "swin_tiny_patch4_window7_224", SWIN),
    "mit": (pvt_v2, MixTransformer(MIT["embed_dims"], MIT["depths"], MIT["num_heads"], 5), "pvt_v2_b5", MIT),
}


@pytest.mark.parametrize("case", FILTERS)
def test_the_tables_of_names_agree_with_the_functions_of_timm(case: str) -> None:
    module, theirs, entry, args = FILTERS[case]
    network = timm.create_model(entry, num_classes=5, **args)
    ours = from_tao(case.split()[0], theirs.state_dict(), network)
    converted: dict[str, Tensor] = module.checkpoint_filter_fn(dict(theirs.state_dict()), network)
    converted = {key: value for key, value in converted.items() if not (case == "swin" and key.startswith("norm"))}
    assert set(ours) == set(converted)
    assert all(torch.equal(value, converted[key]) for key, value in ours.items())
