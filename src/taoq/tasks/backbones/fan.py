# SPDX-License-Identifier: Apache-2.0
"""FAN, the fully attentional network of Zhou et al. (arXiv:2204.12451), with the names of TAO's checkpoints.

No library that taoq uses has it. Tokens attend to each other as in a vision transformer; the MLP of each block is
replaced by an attention over channels, whose values pass through depthwise convolutions. Two blocks of class attention
(arXiv:2103.17239) end the network. Hybrid networks take their tokens from the first two stages of a ConvNeXt.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.layers import LayerNorm2d
from timm.models.convnext import ConvNeXtStage
from torch import Tensor, nn
from torch.nn import functional

from taoq.tasks.backbones.fan_blocks import Block, ClassBlock, Size, as_map, as_tokens, layer_norm, map_size


@dataclass(frozen=True, kw_only=True)
class FanConfig:
    """The shape of a FAN.

    Attributes:
        widths: Channels of each block. Where they change, height and width are halved.
        heads: Attention heads of each block.
        stem: Blocks of each stage of the ConvNeXt that makes the tokens; empty for four convolutions instead.
        stem_widths: Channels of these stages.
        squeeze: Whether blocks have a squeeze-and-excitation MLP in place of the attention over channels.
    """

    widths: tuple[int, ...]
    heads: tuple[int, ...]
    stem: tuple[int, ...] = ()
    stem_widths: tuple[int, ...] = (128, 256)
    squeeze: bool = False


def _same(depth: int, width: int, heads: int, stem: tuple[int, ...] = (), *, squeeze: bool = False) -> FanConfig:
    return FanConfig(widths=(width,) * depth, heads=(heads,) * depth, stem=stem, squeeze=squeeze)


FANS = {
    "fan_tiny_12_p16_224": _same(12, 192, 4),
    "fan_small_12_p16_224": _same(12, 384, 8),
    "fan_small_12_p16_224_se_attn": _same(12, 384, 8, squeeze=True),
    "fan_base_18_p16_224": _same(18, 448, 8),
    "fan_large_24_p16_224": _same(24, 480, 10),
    "fan_tiny_8_p4_hybrid": _same(8, 192, 8, (3, 3)),
    "fan_small_12_p4_hybrid": _same(10, 384, 8, (3, 3)),
    "fan_base_16_p4_hybrid": _same(16, 448, 8, (3, 3)),
    "fan_large_16_p4_hybrid": _same(22, 480, 10, (3, 5)),
    "fan_xlarge_16_p4_hybrid": FanConfig(widths=(528,) * 20 + (768,) * 3, heads=(11,) * 20 + (16,) * 3, stem=(3, 7)),
}
"""The networks of TAO by name. The first number in a name of a hybrid is not always its number of blocks."""


def create_fan(name: str, num_classes: int, **args: Any) -> Fan:
    """Build a FAN.

    Args:
        name: A key of `FANS`.
        num_classes: Number of classes; 0 for the features of the class token.
        **args: Attributes of `FanConfig` that replace those of the name.

    Raises:
        TypeError: If `FanConfig` has no such attribute.
        ValueError: If there are not as many heads as widths.
        AssertionError: If a number of channels is not a multiple of its heads.
    """
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in args.items()}
    return Fan(dataclasses.replace(FANS[name], **values), num_classes)


class Fan(nn.Module):
    """A FAN with a linear classifier.

    Attributes:
        config: Its shape.
    """

    def __init__(self, config: FanConfig, num_classes: int) -> None:
        """Build the network; with 0 classes, the output is the features of the class token."""
        super().__init__()
        self.config = config
        widths, last = config.widths, config.widths[-1]
        self.patch_embed = HybridPatches(config) if config.stem else ConvolutionPatches(widths[0])
        self.pos_embed = FourierPositions(widths[0])
        shapes = zip(widths, config.heads, (*widths[1:], last), strict=True)
        self.blocks = nn.ModuleList(Block(*shape, squeeze=config.squeeze) for shape in shapes)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, last))
        self.cls_attn_blocks = nn.ModuleList(ClassBlock(last, config.heads[-1]) for _ in range(2))
        self.norm = layer_norm(last)
        self.head = nn.Linear(last, num_classes) if num_classes else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [N, classes] of an image batch [N, 3, height, width]."""
        logits: Tensor = self.head(self.norm(self.with_class(self.forward_maps(images)[-1]))[:, 0])
        return logits

    def forward_maps(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps of each stage of the stem, if it has stages, and of each block, [N, C, H, W]."""
        maps, x = self.patch_embed(images)
        size = map_size(x)
        tokens = as_tokens(x) + as_tokens(self.pos_embed(size))
        for block in self.blocks:
            tokens, size = block(tokens, size)
            maps.append(as_map(tokens, size))
        return cast(list[Tensor], maps)

    def with_class(self, x: Tensor) -> Tensor:
        """Return the class token and the tokens of a map [N, C, H, W] after class attention, [N, 1 + H * W, C]."""
        tokens = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), as_tokens(x)], 1)
        for block in self.cls_attn_blocks:
            tokens = block(tokens)
        return tokens


class HybridPatches(nn.Module):
    """Two stages of a ConvNeXt, and a convolution that halves their map."""

    def __init__(self, config: FanConfig) -> None:
        """Build the stages, whose MLPs are convolutions."""
        super().__init__()
        widths = config.stem_widths
        stem = nn.Sequential(nn.Conv2d(3, widths[0], 4, 4), LayerNorm2d(widths[0]))
        shapes = zip((widths[0], *widths), widths, config.stem, strict=False)
        stages = [
            ConvNeXtStage(
                before, after, stride=1 if number == 0 else 2, depth=depth, conv_mlp=True, norm_layer=LayerNorm2d
            )
            for number, (before, after, depth) in enumerate(shapes)
        ]
        self.backbone = nn.ModuleDict({"stem": stem, "stages": nn.Sequential(*stages)})
        self.proj = nn.Conv2d(widths[-1], config.widths[0], 2, 2)

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the map of each stage, and the map of tokens."""
        maps = [self.backbone["stem"](images)]
        for stage in cast(nn.Sequential, self.backbone["stages"]):
            maps.append(stage(maps[-1]))
        return maps[1:], self.proj(maps[-1])


class ConvolutionPatches(nn.Module):
    """Four convolutions, each of which halves the map."""

    def __init__(self, width: int) -> None:
        """Build the convolutions, whose channels end at `width`."""
        super().__init__()
        widths = [3, width // 8, width // 4, width // 2, width]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Sequential(nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after)), nn.GELU()]
        self.proj = nn.Sequential(*layers[:-1])

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return no maps of stages, and the map of tokens."""
        return [], self.proj(images)


class FourierPositions(nn.Module):
    """Position embeddings: sines and cosines of the place in the map, and a learned projection of them.

    They depend on the size of the map alone. The projection is therefore no layer that could be quantized: it would be
    a constant in an exported graph.
    """

    def __init__(self, width: int, waves: int = 32) -> None:
        """Build the projection of 2 * `waves` values to `width` channels."""
        super().__init__()
        self.waves = waves
        weight = nn.init.trunc_normal_(torch.empty(width, 2 * waves, 1, 1), std=0.02)
        self.token_projection = nn.ParameterDict({"weight": weight, "bias": torch.zeros(width)})

    def forward(self, size: Size) -> Tensor:
        """Return the embeddings of a map, [1, channels, height, width]."""
        weight, bias = self.token_projection["weight"], self.token_projection["bias"]
        pairs = torch.arange(self.waves, device=weight.device) // 2
        periods = 10000 ** (2 * pairs.to(weight.dtype) / self.waves)
        rows, columns = (self._waves(length, periods) for length in size)
        grid = torch.cat([rows[:, None].expand(-1, size[1], -1), columns[None].expand(size[0], -1, -1)], 2)
        return functional.conv2d(grid.permute(2, 0, 1)[None], weight, bias)

    @staticmethod
    def _waves(length: int, periods: Tensor) -> Tensor:
        """Return sines and cosines in turns for the places 1 to `length`, [length, waves]."""
        places = torch.arange(1, length + 1, device=periods.device).to(periods.dtype)
        angles = places[:, None] / (length + 1e-6) * (2 * math.pi) / periods
        return torch.stack([angles[:, 0::2].sin(), angles[:, 1::2].cos()], 2).flatten(1)
