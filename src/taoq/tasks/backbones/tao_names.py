# SPDX-License-Identifier: Apache-2.0
"""The names of networks in TAO 7, and the networks of libraries that compute the same. Imports no library.

The names are those of TAO's registry (nvidia_tao_pytorch/cv/backbone_v2). `docs/tao-backbones.md` shows all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from taoq.plain import JsonMapping

OWN = "taoq"
"""The library of networks that taoq has itself."""


@dataclass(frozen=True, kw_only=True)
class TaoNetwork:
    """A network of TAO.

    Attributes:
        name: Its name in TAO.
        family: Networks of a family have the same names of tensors in TAO, and are built in the same way.
        base: The network of timm that it is made from; empty for a network of `fan.py`.
        args: Arguments of the constructor that differ from those of the network in timm.
        size: Width and height of the images that it is made for, pixels.
        refused: Why taoq does not build it; empty if it does.
        nearest: If it is refused, a network of TAO that taoq builds, of about the same size and kind.
    """

    name: str
    family: str
    base: str = ""
    args: JsonMapping = field(default_factory=dict)
    size: int = 224
    refused: str = ""
    nearest: str = ""

    @property
    def same_in_timm(self) -> bool:
        """Whether the network of timm that it is made from computes the same."""
        same = ("resnet", "vit", "hiera", "convnext", "edgenext", "gcvit")
        return self.family in same and not self.args and self.size == 224

    @property
    def two_variants(self) -> bool:
        """Whether timm has another network of the same name."""
        return self.family in ("swin", "efficientvit", "efficientvit_large") and self.name == self.base

    @property
    def library(self) -> str:
        """The library that has the network: timm or taoq itself; empty if it is refused."""
        return "" if self.refused else "timm" if self.base else OWN


def _same(family: str, *names: str, size: int = 224, **args: object) -> Iterator[TaoNetwork]:
    """Yield networks that have the same name in timm."""
    for name in names:
        yield TaoNetwork(name=name, family=family, base=name, args=args, size=size)


def _resnets() -> Iterator[TaoNetwork]:
    for depth in (18, 34, 50, 101, 152):
        for kind in ("", "d"):
            yield TaoNetwork(name=f"resnet_{depth}{kind}", family="resnet", base=f"resnet{depth}{kind}")


def _vits() -> Iterator[TaoNetwork]:
    mae = {"global_pool": "avg", "fc_norm": False, "final_norm": False}
    for name in ("vit_base_patch16", "vit_large_patch16", "vit_huge_patch14"):
        yield TaoNetwork(name=name, family="vit", base=f"{name}_224")
        yield TaoNetwork(name=f"{name}_mae", family="vit", base=f"{name}_224", args=mae)


def _convolutional() -> Iterator[TaoNetwork]:
    yield from _same("convnext", *(f"convnext_{size}" for size in ("tiny", "small", "base", "large", "xlarge")))
    sizes = ("atto", "femto", "pico", "nano", "tiny", "base", "large", "huge")
    yield from _same("convnext", *(f"convnextv2_{size}" for size in sizes))
    yield from _same("edgenext", *(f"edgenext_{size}" for size in ("xx_small", "x_small", "small", "base")))
    for size in ("xx_small", "x_small", "small"):
        yield TaoNetwork(
            name=f"edgenext_{size}_bn_hs",
            family="edgenext_bn_hs",
            refused="no library that it uses has EdgeNeXt with batch norms",
            nearest=f"edgenext_{size}",
        )
    yield from _same("efficientvit", *(f"efficientvit_b{size}" for size in range(4)))
    yield TaoNetwork(
        name="efficientvit_l0", family="efficientvit_large", base="efficientvit_l1", args={"depths": [1, 1, 1, 4, 4]}
    )
    yield from _same("efficientvit_large", *(f"efficientvit_l{size}" for size in (1, 2, 3)))


def _windowed() -> Iterator[TaoNetwork]:
    yield from _same(
        "hiera", *(f"hiera_{size}_224" for size in ("tiny", "small", "base", "base_plus", "large", "huge"))
    )
    for size in ("tiny", "small", "base", "large"):
        base = f"swin_{size}_patch4_window7_224"
        yield from _same("swin", base)
        yield TaoNetwork(name=f"fan_{base}", family="fan_swin", base=base)
    for size in ("base", "large"):
        yield from _same("swin", f"swin_{size}_patch4_window12_384", size=384)
    for size in ("xxtiny", "xtiny", "tiny", "small", "base"):
        yield TaoNetwork(name=f"gc_vit_{size}", family="gcvit", base=f"gcvit_{size}")
    middle = {"embed_dim": 128, "num_heads": [4, 8, 16, 32], "mlp_ratio": 2, "layer_scale": 1e-5}
    large = middle | {"embed_dim": 192, "num_heads": [6, 12, 24, 48]}
    for size, args, pixels in (("large", large, 224), ("base_384", middle, 384), ("large_384", large, 384)):
        yield TaoNetwork(name=f"gc_vit_{size}", family="gcvit", base="gcvit_base", args=args, size=pixels)
    for number in range(6):  # The encoder of SegFormer: PVTv2 with other widths inside its blocks.
        yield TaoNetwork(
            name=f"mit_b{number}", family="mit", base=f"pvt_v2_b{number}", args={"mlp_ratios": [4, 4, 4, 4]}
        )
    sizes = ("0_224", "1_224", "2_224", "3_224", "4_224", "5_224", "6_224",
             "4_21k_224", "4_21k_384", "4_21k_512", "4_21k_768")  # fmt: skip
    like = {"0": "tiny", "1": "small", "2": "base"}
    for size in sizes:
        yield TaoNetwork(
            name=f"faster_vit_{size}",
            family="fastervit",
            refused="no library that it uses has FasterViT",
            nearest=f"gc_vit_{like.get(size[0], 'large')}",
        )


def _foundation() -> Iterator[TaoNetwork]:
    for base, name in (("vit_large_patch14_dinov2", "vit_large_patch14_dinov2_swiglu"),
                       ("vit_large_patch14_dinov2", "vit_large_patch14_dinov2_swiglu_legacy"),
                       ("vit_giant_patch14_reg4_dinov2", "vit_giant_patch14_reg4_dinov2_swiglu")):  # fmt: skip
        hidden = {"mlp_ratio": 5472 / 1024} if "large" in name else {}
        yield TaoNetwork(name=name, family="dinov2", base=base, args=hidden)
    for name, base in (("vits16", "small"), ("vits16plus", "small_plus"), ("vitb16", "base"), ("vitl16", "large"),
                       ("vith16plus", "huge_plus"), ("vit7b16", "7b")):  # fmt: skip
        yield TaoNetwork(
            name=f"dinov3_{name}",
            family="dinov3",
            base=f"vit_{base}_patch16_dinov3",
            args={"global_pool": "token"},
        )
    # TAO gives each teacher of C-RADIO a class token, and fills them up to a multiple of 8 or 16 with registers.
    for number in ("p1", "p2", "p3"):
        yield _radio(f"c_radio_{number}_vit_huge_patch16_mlpnorm", "huge", reg_tokens=15, scale_mlp_norm=True)
    for size in ("base", "large", "huge"):
        yield _radio(f"c_radio_v2_vit_{size}_patch16", size)
        yield _radio(f"c_radio_v3_vit_{size}_patch16_reg4_dinov2", size, init_values=1e-5)
    pooled = {"global_pool": "avg"}
    for name, base, pixels in (("l", "large", 224), ("l", "large", 336), ("h", "huge", 224)):
        name, base = f"vit_{name}_14_siglip_clipa_{pixels}", f"vit_{base}_patch14_224"
        yield TaoNetwork(name=name, family="clip", base=base, args=pooled, size=pixels)


def _radio(name: str, size: str, **args: object) -> TaoNetwork:
    shape = {"base": (768, 12, 12), "large": (1024, 24, 16), "huge": (1280, 32, 16)}[size]
    args |= dict(zip(("embed_dim", "depth", "num_heads"), shape, strict=True))
    # Unlike those of the other sizes, this network of timm has no layer scale.
    return TaoNetwork(name=name, family="radio", base="vit_huge_patch16_radio_v3", args=args)


def _fans() -> Iterator[TaoNetwork]:
    for name in ("tiny_12_p16_224", "small_12_p16_224_se_attn", "small_12_p16_224", "base_18_p16_224",
                 "large_24_p16_224", "tiny_8_p4_hybrid", "small_12_p4_hybrid", "base_16_p4_hybrid",
                 "large_16_p4_hybrid", "xlarge_16_p4_hybrid"):  # fmt: skip
        yield TaoNetwork(name=f"fan_{name}", family="fan")


def _all() -> Iterator[TaoNetwork]:
    for networks in (_fans(), _resnets(), _convolutional(), _vits(), _windowed(), _foundation()):
        yield from networks


TAO_NETWORKS: Mapping[str, TaoNetwork] = {network.name: network for network in _all()}
"""Every network of TAO's registry by its name there."""
