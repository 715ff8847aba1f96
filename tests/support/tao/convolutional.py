"""ConvNeXt, ConvNeXt V2, EdgeNeXt and EfficientViT as TAO has them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from support.tao import FirstNorm, Residual, named, scale


class ResponseNorm(nn.Module):
    """Global response normalization of maps [N, H, W, C]."""

    def __init__(self, width: int):
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(1, 1, 1, width)), nn.Parameter(torch.ones(1, 1, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        norm = (x**2).sum((1, 2), keepdim=True).sqrt()
        return self.gamma * (x * norm / (norm.mean(-1, keepdim=True) + 1e-6)) + self.beta + x


class ConvBlock(nn.Module):
    """A block of ConvNeXt, with a layer scale or with global response normalization."""

    def __init__(self, width: int, kernel: int = 7, grn: bool = False):
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        if grn:
            self.grn = ResponseNorm(4 * width)
        else:
            self.gamma = scale(width)
        self.has_grn = grn

    def forward(self, x: Tensor) -> Tensor:
        y = functional.gelu(self.pwconv1(self.norm(self.dwconv(x).permute(0, 2, 3, 1))))
        y = self.pwconv2(self.grn(y)) if self.has_grn else self.gamma * self.pwconv2(y)
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    def __init__(self, depths: Sequence[int], widths: Sequence[int], classes: int, grn: bool = False):
        super().__init__()
        self.downsample_layers = _downsample_layers(widths)
        self.stages = nn.ModuleList(
            nn.Sequential(*[ConvBlock(width, grn=grn) for _ in range(depth)])
            for width, depth in zip(widths, depths, strict=True)
        )
        self.norm = nn.LayerNorm(widths[-1], eps=1e-6)
        self.head = nn.Linear(widths[-1], classes)

    def maps(self, x: Tensor) -> list[Tensor]:
        outputs = []
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
            outputs.append(x)
        return outputs

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.maps(x)[-1].mean((2, 3))))
        return logits


def _downsample_layers(widths: Sequence[int]) -> nn.ModuleList:
    layers = [nn.Sequential(nn.Conv2d(3, widths[0], 4, 4), FirstNorm(widths[0], eps=1e-6))]
    for before, after in itertools.pairwise(widths):
        layers.append(nn.Sequential(FirstNorm(before, eps=1e-6), nn.Conv2d(before, after, 2, 2)))
    return nn.ModuleList(layers)


class Positions(nn.Module):
    """Fourier features of the place in a map, projected."""

    def __init__(self, width: int):
        super().__init__()
        self.token_projection = nn.Conv2d(64, width, 1)

    def forward(self, height: int, width: int) -> Tensor:
        values = []
        for wave in range(32):
            period = 10000 ** (2 * (wave // 2) / 32)
            function = torch.sin if wave % 2 == 0 else torch.cos
            row = function(torch.arange(1, height + 1) / (height + 1e-6) * 2 * math.pi / period)
            column = function(torch.arange(1, width + 1) / (width + 1e-6) * 2 * math.pi / period)
            values.append((row[:, None].expand(height, width), column[None].expand(height, width)))
        planes = [row for row, _ in values] + [column for _, column in values]
        result: Tensor = self.token_projection(torch.stack(planes)[None])
        return result


class CrossCovariance(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, count, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, count, 3, self.heads, width // self.heads).permute(2, 0, 3, 4, 1)
        attention = (functional.normalize(q, dim=-1) @ functional.normalize(k, dim=-1).mT * self.temperature).softmax(
            -1
        )
        result: Tensor = self.proj((attention @ v).permute(0, 3, 1, 2).reshape(batch, count, width))
        return result


class SplitBlock(nn.Module):
    """EdgeNeXt's block of split depthwise convolutions and attention over channels."""

    def __init__(self, width: int, scales: int, heads: int, positions: bool):
        super().__init__()
        self.part = math.ceil(width / scales)
        self.convs = nn.ModuleList(
            nn.Conv2d(self.part, self.part, 3, padding=1, groups=self.part) for _ in range(max(1, scales - 1))
        )
        self.pos_embd = Positions(width) if positions else None
        self.norm_xca, self.norm = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.gamma_xca, self.gamma = scale(width), scale(width)
        self.xca = CrossCovariance(width, heads)
        self.pwconv1, self.pwconv2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(x, self.part, 1)
        outputs: list[Tensor] = []
        for conv, part in zip(self.convs, parts, strict=False):
            outputs.append(conv(outputs[-1] + part if outputs else part))
        y = torch.cat([*outputs, parts[len(self.convs)]], 1)
        height, width = y.shape[2:]
        y = y.flatten(2).mT
        if self.pos_embd is not None:
            y = y + self.pos_embd(height, width).flatten(2).mT
        y = y + self.gamma_xca * self.xca(self.norm_xca(y))
        y = self.gamma * self.pwconv2(functional.gelu(self.pwconv1(self.norm(y))))
        return x + y.mT.unflatten(2, (height, width))


class EdgeNeXt(nn.Module):
    def __init__(self, depths: Sequence[int], widths: Sequence[int], heads: int, classes: int):
        super().__init__()
        self.downsample_layers = _downsample_layers(widths)
        self.stages = nn.ModuleList()
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            blocks: list[nn.Module] = [ConvBlock(width, 3 + 2 * stage) for _ in range(depth - (stage > 0))]
            if stage:
                blocks.append(SplitBlock(width, (2, 2, 3, 4)[stage], heads, positions=stage == 1))
            self.stages.append(nn.Sequential(*blocks))
        self.norm = nn.LayerNorm(widths[-1], eps=1e-6)
        self.head = nn.Linear(widths[-1], classes)

    maps = ConvNeXt.maps
    forward = ConvNeXt.forward


class ConvLayer(nn.Module):
    """A convolution of EfficientViT; without a norm it has a bias."""

    def __init__(
        self, inside: int, outside: int, kernel: int = 3, stride: int = 1, groups: int = 1, norm: bool = True,
        act: nn.Module | None = None, bias: bool | None = None,
    ):  # fmt: skip
        super().__init__()
        bias = not norm if bias is None else bias
        self.conv = nn.Conv2d(inside, outside, kernel, stride, kernel // 2, groups=groups, bias=bias)
        self.norm = nn.BatchNorm2d(outside) if norm else None
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.norm(x) if self.norm else x
        return self.act(x) if self.act else x


def _inverted(inside: int, outside: int, stride: int, ratio: int, act: nn.Module, fewer: bool = False) -> nn.Module:
    hidden = inside * ratio
    return named(
        inverted_conv=ConvLayer(inside, hidden, 1, norm=not fewer, act=act),
        depth_conv=ConvLayer(hidden, hidden, 3, stride, hidden, norm=not fewer, act=act),
        point_conv=ConvLayer(hidden, outside, 1),
    )


class LinearAttention(nn.Module):
    """Multi-scale linear attention with ReLU."""

    def __init__(self, width: int, dim: int):
        super().__init__()
        self.dim, total = dim, width // dim * dim
        self.qkv = ConvLayer(width, 3 * total, 1, norm=False, bias=False)
        heads = width // dim
        self.aggreg = nn.ModuleList(
            [
                nn.Sequential(
                    nn.Conv2d(3 * total, 3 * total, 5, padding=2, groups=3 * total, bias=False),
                    nn.Conv2d(3 * total, 3 * total, 1, groups=3 * heads, bias=False),
                )
            ]
        )
        self.proj = ConvLayer(2 * total, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.qkv(x)
        both = torch.cat([first, self.aggreg[0](first)], 1)
        height, width = both.shape[2:]
        q, k, v = both.reshape(len(x), -1, 3 * self.dim, height * width).split(self.dim, 2)
        q, k = q.relu(), k.relu()
        # The form that TAO uses for small maps; the one for large maps is the same in exact arithmetic.
        weights = k.mT @ q
        out = v @ (weights / (weights.sum(2, keepdim=True) + 1e-15))
        result: Tensor = self.proj(out.reshape(len(x), -1, height, width))
        return result


def _attention_block(width: int, dim: int, ratio: int, act: nn.Module) -> nn.Module:
    return named(
        context_module=Residual(LinearAttention(width, dim)),
        local_module=Residual(_inverted(width, width, 1, ratio, act, fewer=True)),
    )


def _ops(*blocks: nn.Module) -> nn.Sequential:
    return named(op_list=nn.Sequential(*blocks))


class EfficientVit(nn.Module):
    """EfficientViT-B."""

    def __init__(self, widths: Sequence[int], depths: Sequence[int], dim: int, classes: int):
        super().__init__()
        act = nn.Hardswish()
        depthwise = named(
            depth_conv=ConvLayer(widths[0], widths[0], 3, 1, widths[0], act=act),
            point_conv=ConvLayer(widths[0], widths[0], 1),
        )
        self.input_stem = _ops(ConvLayer(3, widths[0], 3, 2, act=act), Residual(depthwise))
        self.stages = nn.ModuleList()
        for stage, (before, after, depth) in enumerate(zip(widths, widths[1:], depths[1:], strict=False)):
            blocks = [Residual(_inverted(before, after, 2, 4, act, fewer=stage > 1), skip=False)]
            if stage < 2:
                blocks += [Residual(_inverted(after, after, 1, 4, act)) for _ in range(depth - 1)]
            else:
                blocks += [_attention_block(after, dim, 4, act) for _ in range(depth)]
            self.stages.append(_ops(*blocks))
        self.head = nn.Linear(widths[-1], classes)

    def maps(self, x: Tensor) -> list[Tensor]:
        x = self.input_stem(x)
        outputs = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.maps(x)[-1].mean((2, 3)))
        return logits


class EfficientVitLarge(nn.Module):
    """EfficientViT-L, whose stem is the first stage. TAO forgets to average the last map before the classifier."""

    def __init__(self, widths: Sequence[int], depths: Sequence[int], dim: int, classes: int):
        super().__init__()
        act = nn.GELU(approximate="tanh")

        def fused(before: int, after: int, stride: int, ratio: int) -> nn.Module:
            return named(
                spatial_conv=ConvLayer(before, before * ratio, 3, stride, act=act),
                point_conv=ConvLayer(before * ratio, after, 1),
            )

        plain = named(conv1=ConvLayer(widths[0], widths[0], act=act), conv2=ConvLayer(widths[0], widths[0]))
        self.stages = nn.ModuleList([_ops(ConvLayer(3, widths[0], 3, 2, act=act), Residual(plain))])
        for stage, (before, after, depth) in enumerate(zip(widths, widths[1:], depths[1:], strict=False), 1):
            if stage <= 2:
                blocks = [Residual(fused(before, after, 2, 16), skip=False)]
                blocks += [Residual(fused(after, after, 1, 4)) for _ in range(depth)]
            elif stage == 3:
                blocks = [Residual(_inverted(before, after, 2, 16, act, fewer=True), skip=False)]
                blocks += [Residual(_inverted(after, after, 1, 4, act, fewer=True)) for _ in range(depth)]
            else:
                blocks = [Residual(_inverted(before, after, 2, 24, act, fewer=True), skip=False)]
                blocks += [_attention_block(after, dim, 6, act) for _ in range(depth)]
            self.stages.append(_ops(*blocks))
        self.head = nn.Linear(widths[-1], classes)

    def maps(self, x: Tensor) -> list[Tensor]:
        outputs = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs[1:]

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.maps(x)[-1].mean((2, 3)))
        return logits
