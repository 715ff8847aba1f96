# SPDX-License-Identifier: Apache-2.0
"""Build the networks of TAO from those of timm: where TAO computes something else, this changes the network."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import timm
from timm.layers import SelectAdaptivePool2d, SwiGLUPacked
from timm.models.gcvit import GlobalContextVit
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn
from torch.nn import functional

from taoq.plain import JsonMapping, JsonObject
from taoq.tasks.backbones.fan import create_fan
from taoq.tasks.backbones.fan_blocks import ChannelAttention
from taoq.tasks.backbones.tao_names import OWN, TaoNetwork

_CLIP_WIDTHS = {"vit_l_14_siglip_clipa_224": 768, "vit_l_14_siglip_clipa_336": 768, "vit_h_14_siglip_clipa_224": 1024}
"""Width of the joint space of images and texts, to which the image encoder projects."""


def create_network(network: TaoNetwork, num_classes: int, image_size: int, args: JsonMapping) -> nn.Module:
    """Build a network that computes what TAO's computes.

    Args:
        network: The network; one that is not refused.
        num_classes: Number of classes; 0 for a network of timm without a classifier, for its feature maps.
        image_size: Width and height of the input, pixels.
        args: Arguments for the constructor of the network in its library; they override those of `network`.

    Raises:
        TypeError, ValueError, AssertionError, RuntimeError, KeyError: If the library cannot build it.
    """
    if network.library == OWN:
        return create_fan(network.name, num_classes, **args)
    arguments = {**network.args, **_sized(network, image_size), **_LIBRARY_ARGS.get(network.family, {}), **args}
    if network.family == "gcvit":  # The functions of timm allow no other widths.
        return GlobalContextVit(num_classes=num_classes, **arguments)  # type: ignore[no-any-return]
    classes = 0 if network.family in ("radio", "clip") else num_classes
    model: nn.Module = timm.create_model(network.base, pretrained=False, num_classes=classes, **arguments)
    change = _CHANGES.get(network.family)
    return change(network, model, num_classes) if change else model


def _sized(network: TaoNetwork, image_size: int) -> JsonObject:
    """Return the argument for the size of images: TAO adapts some networks to it, others have a size of their own."""
    if network.family in ("swin", "fan_swin", "dinov2", "radio", "clip"):
        return {"img_size": image_size}
    return {"img_size": network.size} if network.family == "gcvit" else {}


_LIBRARY_ARGS: Mapping[str, Mapping[str, Any]] = {
    "efficientvit_large": {"norm_eps": 1e-5},
    "swin": {"always_partition": True},
    "fan_swin": {"always_partition": True},
    "dinov2": {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU},
    "clip": {"norm_layer": nn.LayerNorm},
}
"""Arguments that all networks of a family have in TAO, and not in timm."""


def _efficientvit(_: TaoNetwork, model: Any, num_classes: int) -> nn.Module:
    """Replace the classifier of MIT's EfficientViT by a linear one, and its epsilon in attention."""
    for module in model.modules():
        if type(module).__name__ == "LiteMLA":
            module.eps = 1e-15
    if num_classes:
        model.head = _named(
            global_pool=SelectAdaptivePool2d(pool_type="avg", flatten=True),
            fc=nn.Linear(model.num_features, num_classes),
        )
    return model  # type: ignore[no-any-return]


class _PaddedFirst(SwinTransformerBlock):  # type: ignore[misc]
    """A block of Swin that pads the map to whole windows before it shifts it; timm's shifts it first."""

    def _attn(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        rows, columns = -height % self.window_size[0], -width % self.window_size[1]
        padded = functional.pad(x, (0, 0, 0, columns, 0, rows))
        result: Tensor = super()._attn(padded)
        return result[:, :height, :width]


def _swin(network: TaoNetwork, model: Any, _: int) -> nn.Module:
    """Take the norm before the classifier out: TAO has one norm for each feature map, which its classifier skips."""
    model.norm = nn.Identity()
    for layer in model.layers:
        for block in layer.blocks:
            block.__class__ = _PaddedFirst
    if network.family == "fan_swin":
        for layer in model.layers[:-1]:
            for block in layer.blocks:
                hidden, heads = block.mlp.fc1.out_features, block.attn.num_heads
                block.mlp = ChannelAttention(
                    block.dim, heads, hidden, residual=False, fixed_size=tuple(block.input_resolution)
                )
    return model  # type: ignore[no-any-return]


class RadioClassifier(nn.Module):
    """A C-RADIO with a linear classifier on the class tokens of several teachers."""

    def __init__(self, vit: Any, tokens: int, num_classes: int) -> None:
        """Take the network, the number of class tokens to use, and the number of classes."""
        super().__init__()
        self.vit = vit
        self.tokens = tokens
        self.head = nn.Linear(tokens * vit.embed_dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [N, classes] of an image batch [N, 3, height, width]."""
        tokens: Tensor = self.vit.forward_features(images)
        logits: Tensor = self.head(tokens[:, : self.tokens].flatten(1))
        return logits


def _radio(network: TaoNetwork, model: Any, num_classes: int) -> nn.Module:
    for block in model.blocks:
        if isinstance(block.mlp.norm, nn.LayerNorm):
            block.mlp.norm.eps = 1e-5
    return RadioClassifier(model, 4 if "_p2_" in network.name else 3, num_classes)


def _clip(network: TaoNetwork, model: Any, num_classes: int) -> nn.Module:
    width = _CLIP_WIDTHS[network.name]
    model.head = _named(proj=nn.Linear(model.embed_dim, width, bias=False), fc=nn.Linear(width, num_classes))
    return model  # type: ignore[no-any-return]


def _named(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def _dinov3(_: TaoNetwork, model: Any, __: int) -> nn.Module:
    """Compute attention step by step: torch's exporter to ONNX cannot trace timm's call of the fused one."""
    for block in model.blocks:
        block.attn.fused_attn = False
    return model  # type: ignore[no-any-return]


_CHANGES: Mapping[str, Callable[[TaoNetwork, Any, int], nn.Module]] = {
    "efficientvit": _efficientvit,
    "efficientvit_large": _efficientvit,
    "swin": _swin,
    "fan_swin": _swin,
    "dinov3": _dinov3,
    "radio": _radio,
    "clip": _clip,
}
"""What to change in the network of timm, by family."""
