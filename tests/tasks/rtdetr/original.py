"""A second implementation of RT-DETR, which taoq's reading of the authors' checkpoints is compared with.

Written after the paper (arXiv:2304.08069) and the names in the authors' checkpoints, without transformers: attention
projections are packed, norms and parallel branches are not fused.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def named(**modules: nn.Module) -> nn.Sequential:
    result = nn.Sequential()
    for name, module in modules.items():
        result.add_module(name, module)
    return result


class ConvNorm(nn.Module):
    def __init__(self, inside: int, outside: int, kernel: int, stride: int = 1, act: type[nn.Module] | None = None):
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, kernel, stride, (kernel - 1) // 2, bias=False)
        self.norm = nn.BatchNorm2d(outside)
        self.act = act() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class Block(nn.Module):
    """A residual block of ResNet-vd: it halves the shortcut by averaging."""

    def __init__(self, inside: int, width: int, stride: int, first: bool, bottleneck: bool):
        super().__init__()
        outside = width * 4 if bottleneck else width
        if bottleneck:
            self.branch2a = ConvNorm(inside, width, 1, act=nn.ReLU)
            self.branch2b = ConvNorm(width, width, 3, stride, act=nn.ReLU)
            self.branch2c = ConvNorm(width, outside, 1)
        else:
            self.branch2a = ConvNorm(inside, width, 3, stride, act=nn.ReLU)
            self.branch2b = ConvNorm(width, width, 3)
        self.branches = [self.branch2a, self.branch2b, *([self.branch2c] if bottleneck else [])]
        if first and stride == 2:
            self.short: nn.Module = named(pool=nn.AvgPool2d(2, 2, 0, ceil_mode=True), conv=ConvNorm(inside, outside, 1))
        elif first:
            self.short = ConvNorm(inside, outside, 1)
        else:
            self.short = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for branch in self.branches:
            out = branch(out)
        return functional.relu(out + self.short(x))


class Stage(nn.Module):
    def __init__(self, inside: int, width: int, depth: int, stride: int, bottleneck: bool):
        super().__init__()
        outside = width * 4 if bottleneck else width
        self.blocks = nn.Sequential(
            *[
                Block(inside if i == 0 else outside, width, stride if i == 0 else 1, i == 0, bottleneck)
                for i in range(depth)
            ]
        )

    def forward(self, x: Tensor) -> Any:
        return self.blocks(x)


class Backbone(nn.Module):
    def __init__(self, stem: int, widths: Sequence[int], depths: Sequence[int], bottleneck: bool):
        super().__init__()
        half = stem // 2
        self.conv1 = named(
            conv1_1=ConvNorm(3, half, 3, 2, nn.ReLU),
            conv1_2=ConvNorm(half, half, 3, 1, nn.ReLU),
            conv1_3=ConvNorm(half, stem, 3, 1, nn.ReLU),
        )
        factor = 4 if bottleneck else 1
        inputs = [stem, *[width * factor for width in widths]]
        self.res_layers = nn.ModuleList(
            [Stage(inputs[i], widths[i], depths[i], 1 if i == 0 else 2, bottleneck) for i in range(4)]
        )
        self.channels = inputs[2:]

    def forward(self, x: Tensor) -> list[Tensor]:
        x = functional.max_pool2d(self.conv1(x), 3, 2, 1)
        outputs = []
        for stage in self.res_layers:
            x = stage(x)
            outputs.append(x)
        return outputs[1:]


class RepVgg(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv1, self.conv2 = ConvNorm(width, width, 3), ConvNorm(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return functional.silu(self.conv1(x) + self.conv2(x))


class Fusion(nn.Module):
    def __init__(self, width: int, expansion: float):
        super().__init__()
        inner = int(width * expansion)
        self.conv1, self.conv2 = ConvNorm(2 * width, inner, 1, act=nn.SiLU), ConvNorm(2 * width, inner, 1, act=nn.SiLU)
        self.bottlenecks = nn.Sequential(*[RepVgg(inner) for _ in range(3)])
        self.conv3 = ConvNorm(inner, width, 1, act=nn.SiLU) if inner != width else nn.Identity()

    def forward(self, x: Tensor) -> Any:
        return self.conv3(self.bottlenecks(self.conv1(x)) + self.conv2(x))


class EncoderLayer(nn.Module):
    def __init__(self, width: int, heads: int, inner: int):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, position: Tensor) -> Any:
        query = x + position
        x = self.norm1(x + self.self_attn(query, query, x)[0])
        return self.norm2(x + self.linear2(functional.gelu(self.linear1(x))))


def position_embedding(width: int, height: int, channels: int) -> Tensor:
    """As in the authors' code, it runs down the columns, whatever the order of the features."""
    columns, rows = torch.meshgrid(torch.arange(float(width)), torch.arange(float(height)), indexing="ij")
    speed = 1.0 / 10000 ** (torch.arange(channels // 4, dtype=torch.float32) / (channels // 4))
    x, y = columns.flatten()[:, None] * speed, rows.flatten()[:, None] * speed
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], 1)[None]


class Encoder(nn.Module):
    def __init__(self, channels: Sequence[int], width: int, heads: int, inner: int, expansion: float):
        super().__init__()
        self.input_proj = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(c, width, 1, bias=False), nn.BatchNorm2d(width)) for c in channels]
        )
        self.encoder = nn.ModuleList([nn.ModuleDict({"layers": nn.ModuleList([EncoderLayer(width, heads, inner)])})])
        self.lateral_convs = nn.ModuleList([ConvNorm(width, width, 1, act=nn.SiLU) for _ in range(2)])
        self.fpn_blocks = nn.ModuleList([Fusion(width, expansion) for _ in range(2)])
        self.downsample_convs = nn.ModuleList([ConvNorm(width, width, 3, 2, nn.SiLU) for _ in range(2)])
        self.pan_blocks = nn.ModuleList([Fusion(width, expansion) for _ in range(2)])

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        low, middle, high = [project(x) for project, x in zip(self.input_proj, features, strict=True)]
        height, width = high.shape[2:]
        position = position_embedding(width, height, high.shape[1])
        tokens: Any = self.encoder[0]
        flat = tokens["layers"][0](high.flatten(2).transpose(1, 2), position)
        high = flat.transpose(1, 2).reshape(high.shape)
        high = self.lateral_convs[0](high)
        middle = self.fpn_blocks[0](torch.cat([functional.interpolate(high, scale_factor=2.0), middle], 1))
        middle = self.lateral_convs[1](middle)
        low = self.fpn_blocks[1](torch.cat([functional.interpolate(middle, scale_factor=2.0), low], 1))
        middle = self.pan_blocks[0](torch.cat([self.downsample_convs[0](low), middle], 1))
        high = self.pan_blocks[1](torch.cat([self.downsample_convs[1](middle), high], 1))
        return [low, middle, high]


class Mlp(nn.Module):
    def __init__(self, *widths: int):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(a, b) for a, b in itertools.pairwise(widths)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = functional.relu(layer(x))
        last: Tensor = self.layers[-1](x)
        return last


class DeformableAttention(nn.Module):
    """Reads some points a head and level, between pixels or at the nearest one; written out pixel by pixel."""

    def __init__(self, width: int, heads: int, points: int = 4, discrete: bool = False, levels: int = 3):
        super().__init__()
        self.heads, self.levels, self.points, self.discrete = heads, levels, points, discrete
        self.sampling_offsets = nn.Linear(width, heads * levels * points * 2)
        self.attention_weights = nn.Linear(width, heads * levels * points)
        self.value_proj, self.output_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, query: Tensor, boxes: Tensor, memory: Tensor, shapes: list[tuple[int, int]]) -> Any:
        n, q, width = query.shape
        value = self.value_proj(memory).reshape(n, -1, self.heads, width // self.heads)
        offsets = self.sampling_offsets(query).reshape(n, q, self.heads, self.levels, self.points, 2)
        weights = self.attention_weights(query).reshape(n, q, self.heads, -1).softmax(-1)
        weights = weights.reshape(n, q, self.heads, self.levels, self.points)
        center, size = boxes[:, :, None, None, None, :2], boxes[:, :, None, None, None, 2:]
        places = center + offsets / self.points * size * 0.5
        result = torch.zeros(n, q, self.heads, width // self.heads)
        start = 0
        for level, (height, columns) in enumerate(shapes):
            part = value[:, start : start + height * columns]
            start += height * columns
            x = places[:, :, :, level, :, 0] * columns - 0.5
            y = places[:, :, :, level, :, 1] * height - 0.5
            if self.discrete:  # Truncation, not floor: the authors convert to int64.
                x = (x + 1.0).trunc().clamp(0, columns - 1)
                y = (y + 1.0).trunc().clamp(0, height - 1)
            for dy in (0, 1):
                for dx in (0, 1):
                    row, column = y.floor() + dy, x.floor() + dx
                    share = (1 - (y - row).abs()) * (1 - (x - column).abs())
                    inside = (row >= 0) & (row < height) & (column >= 0) & (column < columns)
                    index = (row.clamp(0, height - 1) * columns + column.clamp(0, columns - 1)).long()
                    for sample in range(n):
                        for head in range(self.heads):
                            picked = part[sample, :, head][index[sample, :, head]]  # [q, points, channels]
                            factor = (share * inside * weights[:, :, :, level])[sample, :, head, :, None]
                            result[sample, :, head] += (picked * factor).sum(1)
        return self.output_proj(result.flatten(2))


class DecoderLayer(nn.Module):
    def __init__(self, width: int, heads: int, inner: int, points: int, discrete: bool):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.cross_attn = DeformableAttention(width, heads, points, discrete)
        self.linear1, self.linear2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, position: Tensor, boxes: Tensor, memory: Tensor, shapes: list[tuple[int, int]]) -> Any:
        x = self.norm1(x + self.self_attn(x + position, x + position, x)[0])
        x = self.norm2(x + self.cross_attn(x + position, boxes, memory, shapes))
        return self.norm3(x + self.linear2(functional.relu(self.linear1(x))))


class Decoder(nn.Module):
    def __init__(
        self, width: int, heads: int, inner: int, layers: int, queries: int, classes: int, points: int, discrete: bool
    ):
        super().__init__()
        self.queries = queries
        self.input_proj = nn.ModuleList(
            [named(conv=nn.Conv2d(width, width, 1, bias=False), norm=nn.BatchNorm2d(width)) for _ in range(3)]
        )
        self.decoder = nn.ModuleDict(
            {"layers": nn.ModuleList([DecoderLayer(width, heads, inner, points, discrete) for _ in range(layers)])}
        )
        self.denoising_class_embed = nn.Embedding(classes + 1, width, padding_idx=classes)
        self.query_pos_head = Mlp(4, 2 * width, width)
        self.enc_output = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))
        self.enc_score_head = nn.Linear(width, classes)
        self.enc_bbox_head = Mlp(width, width, width, 4)
        self.dec_score_head = nn.ModuleList([nn.Linear(width, classes) for _ in range(layers)])
        self.dec_bbox_head = nn.ModuleList([Mlp(width, width, width, 4) for _ in range(layers)])

    def forward(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        features = [project(x) for project, x in zip(self.input_proj, features, strict=True)]
        shapes = [(x.shape[2], x.shape[3]) for x in features]
        memory = torch.cat([x.flatten(2).transpose(1, 2) for x in features], 1)
        anchors = torch.cat([self.anchors(*shape, 0.05 * 2.0**level) for level, shape in enumerate(shapes)])
        valid = ((anchors > 0.01) & (anchors < 0.99)).all(-1, keepdim=True)
        anchors = torch.where(valid, (anchors / (1 - anchors)).log(), torch.inf)
        proposals = self.enc_output(memory * valid)
        best = self.enc_score_head(proposals).max(-1).values.topk(self.queries).indices[..., None]
        boxes = (self.enc_bbox_head(proposals) + anchors).gather(1, best.expand(-1, -1, 4)).sigmoid()
        x = proposals.gather(1, best.expand(-1, -1, proposals.shape[-1]))
        layers: Any = self.decoder["layers"]
        for layer, score_head, box_head in zip(layers, self.dec_score_head, self.dec_bbox_head, strict=True):
            x = layer(x, self.query_pos_head(boxes), boxes, memory, shapes)
            clipped = boxes.clamp(0, 1)
            logits = (clipped.clamp(min=1e-5) / (1 - clipped).clamp(min=1e-5)).log()
            boxes = (box_head(x) + logits).sigmoid()
            scores = score_head(x)
        return scores, boxes

    @staticmethod
    def anchors(height: int, width: int, side: float) -> Tensor:
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        centers = torch.stack([(x + 0.5) / width, (y + 0.5) / height], -1).reshape(-1, 2)
        return torch.cat([centers, torch.full_like(centers, side)], 1)


class Original(nn.Module):
    def __init__(
        self,
        *,
        stem: int = 64,
        widths: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int],
        bottleneck: bool,
        width: int = 256,
        heads: int = 8,
        inner: int = 1024,
        expansion: float,
        layers: int,
        queries: int = 300,
        classes: int = 80,
        points: int = 4,
        discrete: bool = False,
    ):
        super().__init__()
        self.backbone = Backbone(stem, widths, depths, bottleneck)
        self.encoder = Encoder(self.backbone.channels, width, heads, inner, expansion)
        self.decoder = Decoder(width, heads, inner, layers, queries, classes, points, discrete)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = self.decoder(self.encoder(self.backbone(x)))
        return result


def shuffled(network: nn.Module, seed: int = 0) -> nn.Module:
    """Give every tensor, norm statistics included, random values, so that a misplaced tensor changes the outputs."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in network.state_dict().items():
        if name.endswith("running_var") or (name.endswith("weight") and tensor.ndim == 1):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.is_floating_point():
            noise = torch.empty_like(tensor).normal_(0, 0.05, generator=generator)
            tensor.add_(noise if tensor.ndim < 2 else noise * tensor.std() * 2)
    return network.eval()
