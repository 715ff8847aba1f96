# SPDX-License-Identifier: Apache-2.0
"""The blocks of FAN (see `fan.py`).

Tokens are [N, height * width, channels]; height and width of their map are passed along as `Size`.
"""

from __future__ import annotations

import warnings
from functools import partial

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.jit._trace import TracerWarning
from torch.nn import functional

Size = tuple[int, int]
layer_norm = partial(nn.LayerNorm, eps=1e-6)


def constants(*sizes: int) -> tuple[int, ...]:
    """Return sizes as constants of an exported graph, whose images have one size; tracing would compute them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracerWarning)
        return tuple(int(size) for size in sizes)


def as_tokens(x: Tensor) -> Tensor:
    """Return a map [N, C, H, W] as tokens [N, H * W, C]."""
    channels, height, width = constants(*x.shape[1:])
    return x.reshape(-1, channels, height * width).transpose(1, 2)


def as_map(tokens: Tensor, size: Size) -> Tensor:
    """Return tokens as a map [N, C, H, W]."""
    return tokens.transpose(1, 2).reshape(-1, *constants(tokens.shape[2]), *size)


def map_size(x: Tensor) -> Size:
    """Return height and width of a map."""
    height, width = constants(*x.shape[2:])
    return height, width


def _heads(x: Tensor, heads: int) -> Tensor:
    """Split the channels of tokens [N, L, C] into heads, [N, heads, L, C / heads]."""
    count, width = constants(*x.shape[1:])
    return x.reshape(-1, count, heads, width // heads).transpose(1, 2)


def _joined(x: Tensor) -> Tensor:
    """Join the heads of tokens again."""
    heads, count, width = constants(*x.shape[1:])
    return x.transpose(1, 2).reshape(-1, count, heads * width)


class Block(nn.Module):
    """Attention over tokens, then attention over channels or a squeeze-and-excitation MLP."""

    def __init__(self, width: int, heads: int, next_width: int, *, squeeze: bool) -> None:
        """Build a block; if the next block has another width, this one ends by halving the map."""
        super().__init__()
        self.norm1, self.norm2 = layer_norm(width), layer_norm(width)
        self.attn = TokenAttention(width, heads)
        self.mlp: nn.Module = SqueezeMlp(width, 4 * width) if squeeze else ChannelAttention(width, heads, 4 * width)
        self.gamma1, self.gamma2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))
        self.downsample = Downsample(width, next_width) if next_width != width else None

    def forward(self, x: Tensor, size: Size) -> tuple[Tensor, Size]:
        """Return the tokens after the block, and the size of their map."""
        x = x + self.gamma1 * self.attn(self.norm1(x))
        x = x + self.gamma2 * self.mlp(self.norm2(x), size)
        return self.downsample(x, size) if self.downsample else (x, size)


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
        result: Tensor = self.proj(_joined(attended))
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
        result: Tensor = values * _joined(factors.transpose(2, 3))
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
        convolved = self.gamma * as_tokens(self.dwconv(as_map(x, size)))
        result: Tensor = self.fc2(convolved + x if self.residual else convolved)
        return result


class Depthwise(nn.Module):
    """Two depthwise convolutions with a GELU and a batch norm between them."""

    def __init__(self, width: int) -> None:
        """Build the layers."""
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.act = nn.GELU()  # between convolution and norm also by name, so that nobody folds the two
        self.bn = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape, [N, C, H, W]."""
        result: Tensor = self.conv2(self.bn(self.act(self.conv1(x))))
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
        x = self.fc2(self.gamma * as_tokens(self.dwconv(as_map(x, size))) + x)
        mean = x.mean(1)[:, :, None, None]
        factors = self.se["conv_expand"](self.se["conv_reduce"](mean).relu()).sigmoid()
        result: Tensor = x * as_tokens(factors)
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
        smaller = self.proj(as_map(x, size))
        return self.norm(as_tokens(smaller)), map_size(smaller)


class ClassBlock(nn.Module):
    """A block in which only the class token attends to the others."""

    def __init__(self, width: int, heads: int) -> None:
        """Build the layers."""
        super().__init__()
        self.norm1, self.norm2 = layer_norm(width), layer_norm(width)
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
        result: Tensor = self.proj(_joined(attended))
        return result
