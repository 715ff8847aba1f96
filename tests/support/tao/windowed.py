"""Swin, FAN-Swin, GC ViT and the Mix Transformer as TAO has them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from support.tao import named, scale
from support.tao.attentional import ChannelProcessing


def relative_index(window: int) -> Tensor:
    """For each pair of places in a window, the row of the table of biases."""
    rows, columns = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()
    down, right = rows[:, None] - rows[None], columns[:, None] - columns[None]
    return (down + window - 1) * (2 * window - 1) + right + window - 1


def windows(x: Tensor, size: int) -> Tensor:
    """Cut a map [N, H, W, C] into windows [N * count, size * size, C], image by image."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // size, size, width // size, size, channels)
    return x.transpose(2, 3).reshape(-1, size * size, channels)


def whole(x: Tensor, size: int, height: int, width: int) -> Tensor:
    x = x.reshape(-1, height // size, width // size, size, size, x.shape[-1])
    return x.transpose(2, 3).reshape(-1, height, width, x.shape[-1])


class WindowAttention(nn.Module):
    """Attention in windows. With `parts` 2, the queries are given."""

    def __init__(self, width: int, heads: int, window: int, parts: int = 3):
        super().__init__()
        self.heads, self.parts = heads, parts
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.register_buffer("relative_position_index", relative_index(window))
        self.qkv, self.proj = nn.Linear(width, parts * width), nn.Linear(width, width)

    def forward(self, x: Tensor, queries: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        count, places, width = x.shape
        parts = self.qkv(x).reshape(count, places, self.parts, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = (queries, *parts) if queries is not None else parts
        attention = (q * (width // self.heads) ** -0.5) @ k.mT
        attention = attention + self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        if mask is not None:
            attention = (attention.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        result: Tensor = self.proj((attention.softmax(-1) @ v).transpose(1, 2).reshape(count, places, width))
        return result


def mlp(width: int, ratio: float = 4) -> nn.Module:
    hidden = int(width * ratio)
    return named(fc1=nn.Linear(width, hidden), act=nn.GELU(), fc2=nn.Linear(hidden, width))


class SwinBlock(nn.Module):
    def __init__(self, width: int, heads: int, window: int, shift: int, fan: bool):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads, window)
        self.mlp = ChannelProcessing(width, heads, 4 * width, add=False) if fan else mlp(width)
        self.window, self.shift, self.fan = window, shift, fan

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        y = functional.pad(self.norm1(x), (0, 0, 0, -width % self.window, 0, -height % self.window))
        rows, columns = y.shape[1:3]
        mask = None
        if self.shift:
            y = y.roll((-self.shift, -self.shift), (1, 2))
            region = torch.zeros(1, rows, columns, 1)
            edges = (slice(-self.window), slice(-self.window, -self.shift), slice(-self.shift, None))
            for number, (vertical, horizontal) in enumerate((a, b) for a in edges for b in edges):
                region[:, vertical, horizontal] = number
            labels = windows(region, self.window)[..., 0]
            mask = torch.where(labels[:, :, None] == labels[:, None], 0.0, -100.0)
        y = whole(self.attn(windows(y, self.window), mask=mask), self.window, rows, columns)
        y = y.roll((self.shift, self.shift), (1, 2))[:, :height, :width]
        tokens = (x + y).reshape(batch, height * width, channels)
        normed = self.norm2(tokens)
        tokens = tokens + (self.mlp(normed, height) if self.fan else self.mlp(normed))
        return tokens.reshape(batch, height, width, channels)


class Merging(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        four = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
        result: Tensor = self.reduction(self.norm(torch.cat(four, -1)))
        return result


class Swin(nn.Module):
    """TAO's Swin. Its four norms belong to feature maps, so its classifier has none."""

    def __init__(
        self, width: int, depths: Sequence[int], heads: Sequence[int], window: int, classes: int, fan: bool = False
    ):  # fmt: skip
        super().__init__()
        embed = nn.Sequential()
        embed.add_module("proj", nn.Conv2d(3, width, 4, 4))
        embed.add_module("norm", nn.LayerNorm(width))
        self.patch_embed = embed
        self.layers = nn.ModuleList()
        for number, (depth, count) in enumerate(zip(depths, heads, strict=True)):
            wide, last = width * 2**number, number == len(depths) - 1
            blocks = [
                SwinBlock(wide, count, window, window // 2 if index % 2 else 0, fan and not last)
                for index in range(depth)
            ]
            layer = nn.ModuleDict({"blocks": nn.ModuleList(blocks)})
            if not last:
                layer["downsample"] = Merging(wide)
            self.layers.append(layer)
            self.add_module(f"norm{number}", nn.LayerNorm(wide))
        self.head = nn.Linear(width * 2 ** (len(depths) - 1), classes)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        x = functional.pad(x, (0, -width % 4, 0, -height % 4))
        x = self.patch_embed.norm(self.patch_embed.proj(x).permute(0, 2, 3, 1))
        for layer in self.layers:
            for block in layer["blocks"]:
                x = block(x)
            x = layer["downsample"](x) if "downsample" in layer else x
        logits: Tensor = self.head(x.mean((1, 2)))
        return logits


class Squeeze(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(width, width // 4, bias=False), nn.GELU(), nn.Linear(width // 4, width, bias=False), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean((2, 3)))[:, :, None, None]


def _fused(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False), nn.GELU(), Squeeze(width),
        nn.Conv2d(width, width, 1, bias=False),
    )  # fmt: skip


class ReduceSize(nn.Module):
    def __init__(self, width: int, outside: int):
        super().__init__()
        self.conv = _fused(width)
        self.reduction = nn.Conv2d(width, outside, 3, 2, 1, bias=False)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(outside)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x).permute(0, 3, 1, 2)
        result: Tensor = self.norm2(self.reduction(x + self.conv(x)).permute(0, 2, 3, 1))
        return result


class FeatureExtraction(nn.Module):
    def __init__(self, width: int, keep: bool):
        super().__init__()
        self.conv, self.keep = _fused(width), keep

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.conv(x)
        return x if self.keep else functional.max_pool2d(x, 3, 2, 1)


class GlobalBlock(nn.Module):
    def __init__(self, width: int, heads: int, window: int, ratio: float, own_queries: bool, scaled: bool):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads, window, 3 if own_queries else 2)
        self.mlp = mlp(width, ratio)
        if scaled:
            self.gamma1, self.gamma2 = scale(width), scale(width)
        self.window, self.own_queries, self.scaled = window, own_queries, scaled

    def forward(self, x: Tensor, queries: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        parts = windows(self.norm1(x), self.window)
        repeated = queries.repeat_interleave(len(parts) // len(queries), 0)
        y = whole(self.attn(parts, None if self.own_queries else repeated), self.window, height, width)
        x = x + (self.gamma1 * y if self.scaled else y)
        y = self.mlp(self.norm2(x))
        return x + (self.gamma2 * y if self.scaled else y)


class GcVit(nn.Module):
    def __init__(
        self, width: int, depths: Sequence[int], heads: Sequence[int], size: int, ratio: float, scaled: bool,
        classes: int,
    ):  # fmt: skip
        super().__init__()
        self.patch_embed = named(proj=nn.Conv2d(3, width, 3, 2, 1), conv_down=ReduceSize(width, width))
        self.levels = nn.ModuleList()
        self.heads = heads
        for level, (depth, count) in enumerate(zip(depths, heads, strict=True)):
            wide, window = width * 2**level, size // (16 if level == 2 else 32)
            pools = (3, 2, 0, 0)[level]  # as many as bring the map to the size of a window
            extract = [FeatureExtraction(wide, keep=False) for _ in range(pools)] or [
                FeatureExtraction(wide, keep=True)
            ]
            blocks = [GlobalBlock(wide, count, window, ratio, index % 2 == 0, scaled) for index in range(depth)]
            modules: dict[str, nn.Module] = {"blocks": nn.ModuleList(blocks)}
            if level < len(depths) - 1:
                modules["downsample"] = ReduceSize(wide, 2 * wide)
            modules["q_global_gen"] = named(to_q_global=nn.Sequential(*extract))
            self.levels.append(nn.ModuleDict(modules))
        self.norm = nn.LayerNorm(width * 2 ** (len(depths) - 1))
        self.head = nn.Linear(width * 2 ** (len(depths) - 1), classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed.conv_down(self.patch_embed.proj(x).permute(0, 2, 3, 1))
        for level, heads in zip(self.levels, self.heads, strict=True):
            queries = level["q_global_gen"](x.permute(0, 3, 1, 2))
            queries = queries.flatten(2).unflatten(1, (heads, -1)).mT
            for block in level["blocks"]:
                x = block(x, queries)
            x = level["downsample"](x) if "downsample" in level else x
        logits: Tensor = self.head(self.norm(x).mean((1, 2)))
        return logits


class Overlapping(nn.Module):
    def __init__(self, inside: int, outside: int, kernel: int, stride: int):
        super().__init__()
        self.proj, self.norm = nn.Conv2d(inside, outside, kernel, stride, kernel // 2), nn.LayerNorm(outside)

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        x = self.proj(x)
        return self.norm(x.flatten(2).mT), x.shape[2]


class ReducedAttention(nn.Module):
    def __init__(self, width: int, heads: int, ratio: int):
        super().__init__()
        self.heads, self.ratio = heads, ratio
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        if ratio > 1:
            self.sr, self.norm = nn.Conv2d(width, width, ratio, ratio), nn.LayerNorm(width)

    def forward(self, x: Tensor, height: int) -> Tensor:
        batch, count, width = x.shape
        q = self.q(x).reshape(batch, count, self.heads, -1).transpose(1, 2)
        if self.ratio > 1:
            x = self.norm(self.sr(x.mT.unflatten(2, (height, -1))).flatten(2).mT)
        k, v = self.kv(x).reshape(batch, -1, 2, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attention = (q @ k.mT * (width // self.heads) ** -0.5).softmax(-1)
        result: Tensor = self.proj((attention @ v).transpose(1, 2).reshape(batch, count, width))
        return result


class MixBlock(nn.Module):
    def __init__(self, width: int, heads: int, ratio: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = ReducedAttention(width, heads, ratio)
        convolution = named(dwconv=nn.Conv2d(4 * width, 4 * width, 3, padding=1, groups=4 * width))
        self.mlp = named(fc1=nn.Linear(width, 4 * width), dwconv=convolution, fc2=nn.Linear(4 * width, width))

    def forward(self, x: Tensor, height: int) -> Tensor:
        x = x + self.attn(self.norm1(x), height)
        y = self.mlp.fc1(self.norm2(x)).mT.unflatten(2, (height, -1))
        result: Tensor = x + self.mlp.fc2(functional.gelu(self.mlp.dwconv(y).flatten(2).mT))
        return result


class MixTransformer(nn.Module):
    def __init__(self, widths: Sequence[int], depths: Sequence[int], heads: Sequence[int], classes: int):
        super().__init__()
        for number, (before, width) in enumerate(zip((3, *widths), widths, strict=False), 1):
            embed = Overlapping(before, width, 7 if number == 1 else 3, 4 if number == 1 else 2)
            blocks = [MixBlock(width, heads[number - 1], 2 ** (4 - number)) for _ in range(depths[number - 1])]
            self.add_module(f"patch_embed{number}", embed)
            self.add_module(f"block{number}", nn.ModuleList(blocks))
            self.add_module(f"norm{number}", nn.LayerNorm(width, eps=1e-6))
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        for number in range(1, 5):
            x, height = self.get_submodule(f"patch_embed{number}")(x)
            for block in self.get_submodule(f"block{number}").children():
                x = block(x, height)
            x = self.get_submodule(f"norm{number}")(x).mT.unflatten(2, (height, -1))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits
