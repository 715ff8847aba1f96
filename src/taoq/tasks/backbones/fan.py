# SPDX-License-Identifier: Apache-2.0
"""FAN, the fully attentional network of Zhou et al. (arXiv:2204.12451), with the names of TAO's checkpoints.

No library that taoq uses has it. Tokens attend to each other as in a vision transformer; the MLP of each block is
replaced by an attention over channels, whose values pass through depthwise convolutions. Two blocks of class attention
(arXiv:2103.17239) end the network. Hybrid networks take their tokens from the first two stages of a ConvNeXt.

Tokens are [N, height * width, channels]; their map's height and width are passed along as `Size`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from timm.layers import LayerNorm2d, Mlp
from timm.models.convnext import ConvNeXtStage
from torch import Tensor, nn
from torch.nn import functional

Size = tuple[int, int]
_norm = partial(nn.LayerNorm, eps=1e-6)


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
        self.norm = _norm(last)
        self.head = nn.Linear(last, num_classes) if num_classes else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [N, classes] of an image batch [N, 3, height, width]."""
        logits: Tensor = self.head(self.norm(self.with_class(self.forward_maps(images)[-1]))[:, 0])
        return logits

    def forward_maps(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps of each stage of the stem, if it has stages, and of each block, [N, C, H, W]."""
        maps, x = self.patch_embed(images)
        size = x.shape[-2:]
        tokens = _tokens(x) + _tokens(self.pos_embed(size))
        for block in self.blocks:
            tokens, size = block(tokens, size)
            maps.append(_map(tokens, size))
        return cast(list[Tensor], maps)

    def with_class(self, x: Tensor) -> Tensor:
        """Return the class token and the tokens of a map [N, C, H, W] after class attention, [N, 1 + H * W, C]."""
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), _tokens(x)], 1)
        for block in self.cls_attn_blocks:
            tokens = block(tokens)
        return tokens


def _tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def _map(tokens: Tensor, size: Size) -> Tensor:
    return tokens.transpose(1, 2).reshape(len(tokens), tokens.shape[2], *size)


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
    """Position embeddings: sines and cosines of the place in the map, and a learned projection of them."""

    def __init__(self, width: int, waves: int = 32) -> None:
        """Build the projection of 2 * `waves` values to `width` channels."""
        super().__init__()
        self.waves = waves
        self.token_projection = nn.Conv2d(2 * waves, width, 1)

    def forward(self, size: Size) -> Tensor:
        """Return the embeddings of a map, [1, channels, height, width]."""
        weight = self.token_projection.weight
        pairs = torch.arange(self.waves, device=weight.device) // 2
        periods = 10000 ** (2 * pairs.to(weight.dtype) / self.waves)
        rows, columns = (self._waves(length, periods) for length in size)
        grid = torch.cat([rows[:, None].expand(-1, size[1], -1), columns[None].expand(size[0], -1, -1)], 2)
        result: Tensor = self.token_projection(grid.permute(2, 0, 1)[None])
        return result

    @staticmethod
    def _waves(length: int, periods: Tensor) -> Tensor:
        """Return sines and cosines in turns for the places 1 to `length`, [length, waves]."""
        places = torch.arange(1, length + 1, device=periods.device).to(periods.dtype)
        angles = places[:, None] / (length + 1e-6) * (2 * math.pi) / periods
        return torch.stack([angles[:, 0::2].sin(), angles[:, 1::2].cos()], 2).flatten(1)


class Block(nn.Module):
    """Attention over tokens, then attention over channels or a squeeze-and-excitation MLP."""

    def __init__(self, width: int, heads: int, next_width: int, *, squeeze: bool) -> None:
        """Build a block; if the next block has another width, this one ends by halving the map."""
        super().__init__()
        self.norm1, self.norm2 = _norm(width), _norm(width)
        self.attn = TokenAttention(width, heads)
        self.mlp: nn.Module = SqueezeMlp(width, 4 * width) if squeeze else ChannelAttention(width, heads, 4 * width)
        self.gamma1, self.gamma2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))
        self.downsample = Downsample(width, next_width) if next_width != width else None

    def forward(self, x: Tensor, size: Size) -> tuple[Tensor, Size]:
        """Return the tokens after the block, and the size of their map."""
        x = x + self.gamma1 * self.attn(self.norm1(x))
        x = x + self.gamma2 * self.mlp(self.norm2(x), size)
        return self.downsample(x, size) if self.downsample else (x, size)


def _heads(x: Tensor, heads: int) -> Tensor:
    """Split the channels of tokens [N, L, C] into heads, [N, heads, L, C / heads]."""
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads).transpose(1, 2)


class TokenAttention(nn.Module):
    """Self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        """Build the projections."""
        super().__init__()
        assert width % heads == 0, f"{width} channels are not a multiple of {heads} heads"
        self.heads = heads
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens [N, L, C] that each token attends to."""
        keys, values = self.kv(x).chunk(2, 2)
        queries, keys, values = (_heads(y, self.heads) for y in (self.q(x), keys, values))
        attended = functional.scaled_dot_product_attention(queries, keys, values)
        result: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return result


class ChannelAttention(nn.Module):
    """Attention over channels: each channel of the values gets a factor, from how alike it is to its head's mean."""

    def __init__(
        self, width: int, heads: int, hidden: int, *, residual: bool = True, fixed_size: Size | None = None
    ) -> None:
        """Build the layers.

        Args:
            width: Channels.
            heads: Attention heads.
            hidden: Channels inside the MLP that makes the values.
            residual: Whether this MLP adds its first layer to its convolutions; it does not in Swin.
            fixed_size: Height and width of all maps, if they are not passed to `forward`.
        """
        super().__init__()
        self.heads, self.fixed_size = heads, fixed_size
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.mlp_v = ConvolutionMlp(width, hidden, residual=residual)
        self.norm_v = nn.LayerNorm(width)
        self.q = nn.Linear(width, width)

    def forward(self, x: Tensor, size: Size | None = None) -> Tensor:
        """Return tokens [N, L, C]."""
        queries = _heads(self.q(x), self.heads).transpose(2, 3).softmax(3)
        keys = _heads(x, self.heads).transpose(2, 3).softmax(3).mean(2, keepdim=True)
        factors = (queries @ keys.transpose(2, 3)).sigmoid() * self.temperature  # [N, heads, C / heads, 1]
        values = self.norm_v(self.mlp_v(x, size or self.fixed_size))
        result: Tensor = values * factors.flatten(1)[:, None]
        return result


class ConvolutionMlp(nn.Module):
    """An MLP with two depthwise convolutions between its layers."""

    def __init__(self, width: int, hidden: int, *, residual: bool) -> None:
        """Build the layers; see `ChannelAttention` for `residual`."""
        super().__init__()
        self.residual = residual
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.gamma = nn.Parameter(torch.ones(hidden))
        self.dwconv = Depthwise(hidden)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        """Return tokens [N, L, C]."""
        x = self.fc1(x)
        convolved = self.gamma * _tokens(self.dwconv(_map(x, size)))
        result: Tensor = self.fc2(convolved + x if self.residual else convolved)
        return result


class Depthwise(nn.Module):
    """Two depthwise convolutions with a GELU and a batch norm between them."""

    def __init__(self, width: int) -> None:
        """Build the layers."""
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.bn = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape, [N, C, H, W]."""
        result: Tensor = self.conv2(self.bn(functional.gelu(self.conv1(x))))
        return result


class SqueezeMlp(nn.Module):
    """A `ConvolutionMlp` that scales each channel of its output by squeeze and excitation."""

    def __init__(self, width: int, hidden: int) -> None:
        """Build the layers."""
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.gamma = nn.Parameter(torch.ones(hidden))
        self.dwconv = Depthwise(hidden)
        self.se = nn.ModuleDict(
            {"conv_reduce": nn.Conv2d(width, width // 4, 1), "conv_expand": nn.Conv2d(width // 4, width, 1)}
        )

    def forward(self, x: Tensor, size: Size) -> Tensor:
        """Return tokens [N, L, C]."""
        x = self.fc1(x)
        x = self.fc2(self.gamma * _tokens(self.dwconv(_map(x, size))) + x)
        mean = x.mean(1)[:, :, None, None]
        factors = self.se["conv_expand"](self.se["conv_reduce"](mean).relu()).sigmoid()
        result: Tensor = x * factors.flatten(1)[:, None]
        return result


class Downsample(nn.Module):
    """A convolution that halves the map of the tokens, and a norm."""

    def __init__(self, width: int, next_width: int) -> None:
        """Build the layers."""
        super().__init__()
        self.proj = nn.Conv2d(width, next_width, 3, 2, 1)
        self.norm = nn.LayerNorm(next_width)

    def forward(self, x: Tensor, size: Size) -> tuple[Tensor, Size]:
        """Return the tokens of the smaller map, and its size."""
        smaller = self.proj(_map(x, size))
        return self.norm(_tokens(smaller)), smaller.shape[-2:]


class ClassBlock(nn.Module):
    """A block in which only the class token attends to the others."""

    def __init__(self, width: int, heads: int) -> None:
        """Build the layers."""
        super().__init__()
        self.norm1, self.norm2 = _norm(width), _norm(width)
        self.attn = ClassAttention(width, heads)
        self.mlp = Mlp(width, 4 * width)
        self.gamma1, self.gamma2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens [N, L, C], of which the first is the class token."""
        normed = self.norm1(x)
        x = self.norm2(x + self.gamma1 * torch.cat([self.attn(normed), normed[:, 1:]], 1))
        first, others = x[:, :1], x[:, 1:]
        return torch.cat([first + self.gamma2 * self.mlp(first), 2 * others], 1)


class ClassAttention(nn.Module):
    """Attention of the class token to all tokens."""

    def __init__(self, width: int, heads: int) -> None:
        """Build the projections."""
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class token [N, 1, C] for tokens [N, L, C]."""
        queries, keys, values = (_heads(y, self.heads) for y in (self.q(x[:, :1]), self.k(x), self.v(x)))
        attended = functional.scaled_dot_product_attention(queries, keys, values)
        result: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return result
