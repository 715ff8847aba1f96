"""FAN as TAO has it, written after arXiv:2204.12451 and the names in TAO's checkpoints."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from support.tao import FirstNorm, named, scale
from support.tao.convolutional import Positions


class ConvBlock(nn.Module):
    """A block of ConvNeXt whose MLP is made of convolutions."""

    def __init__(self, width: int):
        super().__init__()
        self.conv_dw = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = FirstNorm(width, eps=1e-6)
        self.mlp = named(fc1=nn.Conv2d(width, 4 * width, 1), act=nn.GELU(), fc2=nn.Conv2d(4 * width, width, 1))
        self.gamma = scale(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(self.conv_dw(x))) * self.gamma.view(1, -1, 1, 1)


class Hybrid(nn.Module):
    def __init__(self, widths: Sequence[int], depths: Sequence[int], width: int):
        super().__init__()
        stages = []
        for number, (before, after, depth) in enumerate(zip((widths[0], *widths), widths, depths, strict=False)):
            down = (
                nn.Sequential(FirstNorm(before, eps=1e-6), nn.Conv2d(before, after, 2, 2)) if number else nn.Identity()
            )
            stages.append(named(downsample=down, blocks=nn.Sequential(*[ConvBlock(after) for _ in range(depth)])))
        stem = nn.Sequential(nn.Conv2d(3, widths[0], 4, 4), FirstNorm(widths[0], eps=1e-6))
        self.backbone = named(stem=stem, stages=nn.Sequential(*stages))
        self.proj = nn.Conv2d(widths[-1], width, 2, 2)

    def maps(self, x: Tensor) -> list[Tensor]:
        outputs = [self.backbone.stem(x)]
        for stage in self.backbone.stages:
            outputs.append(stage(outputs[-1]))
        return [*outputs[1:], self.proj(outputs[-1])]


class Convolutions(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Sequential()
        for before, after in itertools.pairwise((3, width // 8, width // 4, width // 2, width)):
            norm = nn.BatchNorm2d(after)
            self.proj.append(nn.Sequential(nn.Conv2d(before, after, 3, 2, 1, bias=False), norm))
            self.proj.append(nn.GELU())
        del self.proj[-1]

    def maps(self, x: Tensor) -> list[Tensor]:
        return [self.proj(x)]


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, count, width = x.shape
        q = self.q(x).reshape(batch, count, self.heads, -1).permute(0, 2, 1, 3)
        k, v = self.kv(x).reshape(batch, count, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        attention = (q * (width // self.heads) ** -0.5 @ k.mT).softmax(-1)
        result: Tensor = self.proj((attention @ v).transpose(1, 2).reshape(batch, count, width))
        return result


class Depthwise(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1, groups=width) for _ in range(2))
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x: Tensor, height: int) -> Tensor:
        maps = x.mT.unflatten(2, (height, -1))
        result: Tensor = self.conv2(self.bn(functional.gelu(self.conv1(maps))))
        return result.flatten(2).mT


class ValueMlp(nn.Module):
    """The MLP of the values. In FAN it adds its first layer, in Swin with the same blocks it does not."""

    def __init__(self, width: int, hidden: int, add: bool = True):
        super().__init__()
        self.fc1, self.fc2, self.dwconv = nn.Linear(width, hidden), nn.Linear(hidden, width), Depthwise(hidden)
        self.gamma = scale(hidden)
        self.add = add

    def forward(self, x: Tensor, height: int) -> Tensor:
        x = self.fc1(x)
        y = self.gamma * self.dwconv(x, height)
        result: Tensor = self.fc2(y + x if self.add else y)
        return result


class ChannelProcessing(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, add: bool = True):
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.mlp_v, self.norm_v, self.q = ValueMlp(width, hidden, add), nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor, height: int) -> Tensor:
        batch, count, width = x.shape
        q = self.q(x).reshape(batch, count, self.heads, -1).permute(0, 2, 1, 3).softmax(-2).mT
        k = x.reshape(batch, count, self.heads, -1).permute(0, 2, 1, 3).softmax(-2)
        k = functional.adaptive_avg_pool2d(k, (count, 1))
        attention = torch.sigmoid(q @ k) * self.temperature
        v = self.norm_v(self.mlp_v(x, height)).reshape(batch, count, self.heads, -1).transpose(1, 2)
        return (attention * v.mT).permute(0, 3, 1, 2).reshape(batch, count, width)


class SqueezeMlp(ValueMlp):
    def __init__(self, width: int, hidden: int):
        super().__init__(width, hidden)
        self.se = named(
            pool=nn.AdaptiveAvgPool2d(1), conv_reduce=nn.Conv2d(width, width // 4, 1), act=nn.ReLU(),
            conv_expand=nn.Conv2d(width // 4, width, 1), gate=nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x: Tensor, height: int) -> Tensor:
        maps = super().forward(x, height).mT.unflatten(2, (height, -1))
        return (maps * self.se(maps)).flatten(2).mT


class Halving(nn.Module):
    def __init__(self, before: int, after: int):
        super().__init__()
        self.proj, self.norm = nn.Conv2d(before, after, 3, 2, 1), nn.LayerNorm(after)

    def forward(self, x: Tensor, height: int) -> tuple[Tensor, int]:
        maps = self.proj(x.mT.unflatten(2, (height, -1)))
        return self.norm(maps.flatten(2).mT), maps.shape[2]


class Block(nn.Module):
    def __init__(self, width: int, heads: int, following: int, squeeze: bool):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = SelfAttention(width, heads)
        self.mlp = SqueezeMlp(width, 4 * width) if squeeze else ChannelProcessing(width, heads, 4 * width)
        self.gamma1, self.gamma2 = scale(width), scale(width)
        self.downsample = Halving(width, following) if following != width else None

    def forward(self, x: Tensor, height: int) -> tuple[Tensor, int]:
        x = x + self.gamma1 * self.attn(self.norm1(x))
        x = x + self.gamma2 * self.mlp(self.norm2(x), height)
        return self.downsample(x, height) if self.downsample else (x, height)


class ClassAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        batch, _, width = x.shape
        shape = (batch, -1, self.heads, width // self.heads)
        q, k, v = (y.reshape(shape).permute(0, 2, 1, 3) for y in (self.q(x[:, 0])[:, None], self.k(x), self.v(x)))
        attention = (q * (width // self.heads) ** -0.5 @ k.mT).softmax(-1)
        result: Tensor = self.proj((attention @ v).transpose(1, 2).reshape(batch, 1, width))
        return result


class ClassBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = ClassAttention(width, heads)
        self.mlp = named(fc1=nn.Linear(width, 4 * width), act=nn.GELU(), fc2=nn.Linear(4 * width, width))
        self.gamma1, self.gamma2 = scale(width), scale(width)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = self.norm2(x + self.gamma1 * torch.cat([self.attn(normed), normed[:, 1:]], 1))
        return x + torch.cat([self.gamma2 * self.mlp(x[:, :1]), x[:, 1:]], 1)


class Fan(nn.Module):
    """A FAN; with `pyramid`, the backbone of TAO's RT-DETR, which has no classifier."""

    def __init__(
        self, widths: Sequence[int], heads: Sequence[int], classes: int, stem: Sequence[int] = (),
        stem_widths: Sequence[int] = (16, 24), squeeze: bool = False, pyramid: Sequence[int] = (), last: int = -1,
    ):  # fmt: skip
        super().__init__()
        self.patch_embed = Hybrid(stem_widths, stem, widths[0]) if stem else Convolutions(widths[0])
        self.pos_embed = Positions(widths[0])
        self.blocks = nn.ModuleList(
            Block(width, count, following, squeeze)
            for width, count, following in zip(widths, heads, [*widths[1:], widths[-1]], strict=True)
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, widths[-1]))
        self.cls_attn_blocks = nn.ModuleList(ClassBlock(widths[-1], heads[-1]) for _ in range(2))
        self.norm = nn.LayerNorm(widths[-1], eps=1e-6)
        if not pyramid:
            self.head = nn.Linear(widths[-1], classes)
        for index in pyramid:
            self.add_module(f"out_norm{index}", nn.LayerNorm((*stem_widths, widths[-1], 768)[index]))
        if pyramid:
            self.learnable_downsample = nn.Conv2d(widths[-1], 768, 3, 2, 1)
        self.pyramid, self.last = pyramid, last % len(widths)

    def _run(self, x: Tensor) -> tuple[Tensor, int, list[Tensor]]:
        *maps, x = self.patch_embed.maps(x)
        height = x.shape[2]
        x = (x + self.pos_embed(*x.shape[2:])).flatten(2).mT
        for number, block in enumerate(self.blocks):
            x, height = block(x, height)
            if number == self.last:
                maps.append(x.mT.unflatten(2, (height, -1)))
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        for block in self.cls_attn_blocks:
            x = block(x)
        return x, height, maps

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self._run(x)[0])[:, 0])
        return logits

    def pyramid_maps(self, x: Tensor) -> list[Tensor]:
        tokens, height, maps = self._run(x)
        maps.append(self.learnable_downsample(tokens[:, 1:].mT.unflatten(2, (height, -1))))
        return [
            self.get_submodule(f"out_norm{index}")(maps[index].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            for index in self.pyramid
        ]
