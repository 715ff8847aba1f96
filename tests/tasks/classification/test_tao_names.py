"""The names of TAO's registry: each is built or refused, and a wrong one is answered with names of its family."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models.hiera import Hiera
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.vision_transformer import VisionTransformer

from support.tao.classifiers import CLASSES, spec
from taoq.checkpoint import WithoutInitialisation
from taoq.errors import SpecError
from taoq.tasks.backbones.tao_keys import LAYOUTS
from taoq.tasks.backbones.tao_names import TAO_NETWORKS
from taoq.tasks.classification.model import build_model
from taoq.tasks.classification.names import check_size, find_network
from taoq.tasks.classification.spec import BackboneSpec

REFUSED = [name for name, network in TAO_NETWORKS.items() if network.refused]
BUILT = [name for name in TAO_NETWORKS if name not in REFUSED]
VIT = {"mlp_ratio": 4, "qkv_bias": True, "final_norm": True, "num_classes": CLASSES}


def test_the_table_has_every_name_of_tao() -> None:
    sizes = {}
    for network in TAO_NETWORKS.values():
        sizes[network.family] = sizes.get(network.family, 0) + 1
    assert sizes == {
        "fan": 10, "resnet": 10, "convnext": 13, "edgenext": 4, "edgenext_bn_hs": 3, "efficientvit": 4,
        "efficientvit_large": 4, "vit": 6, "hiera": 6, "swin": 6, "fan_swin": 4, "gcvit": 8, "mit": 6,
        "fastervit": 11, "dinov2": 3, "dinov3": 6, "radio": 9, "clip": 3,
    }  # fmt: skip
    # Of these, TAO 7.0.1 has all but dinov3, and does not list the three vit_*_mae that it registers.
    assert len(TAO_NETWORKS) - 6 - 3 == 107
    assert len(BUILT) == 102


@pytest.mark.parametrize("name", BUILT)
def test_every_name_is_built(name: str) -> None:
    with torch.device("meta"), WithoutInitialisation():
        network = build_model(spec(name, TAO_NETWORKS[name].size), None)
    classifier = [tensor for key, tensor in network.state_dict().items() if key.startswith(("head.", "fc."))]
    assert classifier[-1].shape == (CLASSES,)


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_name_says_why_and_what_is_near(name: str) -> None:
    network = TAO_NETWORKS[name]
    assert network.nearest in BUILT
    assert name not in timm.list_models()
    with pytest.raises(SpecError) as error:
        build_model(spec(name), None)
    assert str(error.value) == (
        f"model.backbone.type: taoq does not build {name}: no library that it uses has"
        f" {'FasterViT' if name.startswith('faster') else 'EdgeNeXt with batch norms'}\n"
        f"hint: the nearest one that it builds is {network.nearest}"
    )


# TAO builds these with the classes of timm, and calls their forward pass.
TAOS_OWN = {
    "resnet_18": lambda: ResNet(BasicBlock, [2, 2, 2, 2], num_classes=CLASSES),
    "resnet_34d": lambda: ResNet(
        BasicBlock, [3, 4, 6, 3], num_classes=CLASSES, stem_width=32, stem_type="deep", avg_down=True
    ),
    "resnet_50": lambda: ResNet(Bottleneck, [3, 4, 6, 3], num_classes=CLASSES),
    "resnet_152d": lambda: ResNet(
        Bottleneck, [3, 8, 36, 3], num_classes=CLASSES, stem_width=32, stem_type="deep", avg_down=True
    ),
    "vit_base_patch16": lambda: VisionTransformer(patch_size=16, embed_dim=768, depth=12, num_heads=12, **VIT),
    "vit_large_patch16": lambda: VisionTransformer(patch_size=16, embed_dim=1024, depth=24, num_heads=16, **VIT),
    "vit_huge_patch14": lambda: VisionTransformer(patch_size=14, embed_dim=1280, depth=32, num_heads=16, **VIT),
    "hiera_tiny_224": lambda: Hiera(embed_dim=96, num_heads=1, stages=(1, 2, 7, 2), num_classes=CLASSES),
    "hiera_base_plus_224": lambda: Hiera(embed_dim=112, num_heads=2, stages=(2, 3, 16, 3), num_classes=CLASSES),
    "hiera_huge_224": lambda: Hiera(embed_dim=256, num_heads=4, stages=(2, 6, 36, 4), num_classes=CLASSES),
}


@pytest.mark.parametrize("name", TAOS_OWN)
def test_a_network_that_tao_takes_from_timm_is_the_same(name: str) -> None:
    with torch.device("meta"), WithoutInitialisation():
        ours, theirs = build_model(spec(name), None), TAOS_OWN[name]()
    assert repr(ours) == repr(theirs)  # layers, their sizes and epsilons
    assert {key: tensor.shape for key, tensor in ours.state_dict().items()} == {
        key: tensor.shape for key, tensor in theirs.state_dict().items()
    }
    assert TAO_NETWORKS[name].family not in LAYOUTS


def refusal(type_: str, variant: str = "auto") -> str:
    with pytest.raises(SpecError) as error:
        find_network(BackboneSpec(type=type_, variant=variant))
    return str(error.value).removeprefix("model.backbone.type: ")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resnet_5o", "'resnet_50' or 'resnet_50d'"),
        ("resent50", "'resnet50' or 'resnet50c' or 'resnet50d'"),
        ("resnext_50", "'resnext50_32x4d' or 'resnext50d_32x4d' or 'resnext101_32x4d'"),
        ("fan_small_12_p4", "'fan_small_12_p4_hybrid'"),
        ("fan_Xlarge_16_p4_hybrid", "'fan_xlarge_16_p4_hybrid'"),  # TAO before 7
        ("ViT-L-14-SigLIP-CLIPA-336", "'vit_l_14_siglip_clipa_336'"),  # TAO before 7
        ("swin_tiny", "'swin_tiny_patch4_window7_224'"),
        ("efficientvit_b4", "'efficientvit_b0' or 'efficientvit_b1' or 'efficientvit_b2'"),  # not those with m
        ("efficientvit_m9", "'efficientvit_m0' or 'efficientvit_m1' or 'efficientvit_m2'"),  # not those with b
        ("gc_vit_tiny2", "'gc_vit_tiny'"),
        ("radio_v2-l", "'c_radio_v2_vit_large_patch16' or 'c_radio_v2_vit_base_patch16' or"
         " 'c_radio_v2_vit_huge_patch16'"),
        ("torchvision/resnt18", "'resnet18'"),
    ],
)  # fmt: skip
def test_a_wrong_name_is_answered_with_names_of_the_same_family(name: str, near: str) -> None:
    assert refusal(name) == f"no library has a network '{name}'\nhint: did you mean {near}?"


@pytest.mark.parametrize("name", ["segformer_b0", "dinov2_vitb14", "siglip2_so400m", "nothing"])
def test_a_family_that_no_library_has_is_not_mistaken_for_another(name: str) -> None:
    otherwise = "any timm or torchvision name works, and those of TAO in docs/tao-backbones.md"
    assert refusal(name) == f"no library has a network '{name}'\nhint: {otherwise}"


@pytest.mark.parametrize("name", ["faster_vit_9", "FasterViT", "faster-vit-0-224"])
def test_other_spellings_of_a_refused_family_are_refused_with_its_reason(name: str) -> None:
    message = f"taoq does not build {name}: no library that it uses has FasterViT\n"
    assert refusal(name).startswith(message)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("vit_base_patch16", 256, "is 256, but vit_base_patch16 takes images of 224 pixels\nhint: write 224, which TAO"
         " uses too"),
        ("gc_vit_base_384", 224, "is 224, but gc_vit_base_384 takes images of 384 pixels\nhint: write 384, which TAO"
         " uses too"),
        ("c_radio_v2_vit_base_patch16", 230, "is 230, but c_radio_v2_vit_base_patch16 takes multiples of 16 pixels\n"
         "hint: write 224"),
    ],
)  # fmt: skip
def test_a_size_that_tao_does_not_run_is_refused(name: str, size: int, message: str) -> None:
    with pytest.raises(SpecError) as error:
        build_model(spec(name, size), None)
    assert str(error.value) == f"dataset.img_size: {message}"
    check_size(BackboneSpec(type=name, args={"img_size": size}), size, "dataset.img_size")  # the user says so


def test_pretrained_weights_of_a_network_that_only_tao_has_cannot_be_asked_for() -> None:
    with pytest.raises(SpecError) as error:
        build_model(spec("fan_tiny_8_p4_hybrid", pretrained=True), "")
    assert str(error.value) == (
        "model.backbone.pretrained: no library has pretrained weights of TAO's fan_tiny_8_p4_hybrid\n"
        "hint: give TAO's checkpoint in the action's section"
    )


@pytest.mark.parametrize(
    ("name", "variant", "message"),
    [
        ("resnet50", "tao", "is tao, but TAO has no network 'resnet50'"),
        ("mit_b0", "library", "is library, but no library has the network 'mit_b0'"),
    ],
)
def test_a_variant_that_does_not_exist_is_refused(name: str, variant: str, message: str) -> None:
    assert refusal(name, variant) == (
        f"model.backbone.variant: {message}\nhint: leave it out: it is seen from the checkpoint"
    )
