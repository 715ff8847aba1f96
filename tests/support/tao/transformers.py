"""Vision transformers as TAO has them: ViT pretrained with MAE, DINOv2, C-RADIO, and OpenCLIP's image encoder."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from support.tao import named, scale
from support.tao.windowed import mlp


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, count, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, count, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attention = (q @ k.mT * (width // self.heads) ** -0.5).softmax(-1)
        result: Tensor = self.proj((attention @ v).transpose(1, 2).reshape(batch, count, width))
        return result


class GatedMlp(nn.Module):
    """SwiGLU with both of its first layers in one."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden // 2, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, -1)
        result: Tensor = self.fc2(functional.silu(gate) * value)
        return result


class NormedMlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.norm, self.fc2 = (
            nn.Linear(width, 4 * width),
            nn.LayerNorm(4 * width),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc2(self.norm(functional.gelu(self.fc1(x))))
        return result


class Scale(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.gamma = scale(width)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, width: int, heads: int, inner: nn.Module, scaled: bool):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = Attention(width, heads), inner
        self.ls1, self.ls2 = (Scale(width) if scaled else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        result: Tensor = x + self.ls2(self.mlp(self.norm2(x)))
        return result


def _nearly(positions: Tensor, side: int) -> Tensor:
    """Positions [1, 1 + N, C] for a map of another size, as TAO's DINOv2 and OpenCLIP compute them for each batch."""
    count = positions.shape[1] - 1
    if side * side == count:
        return positions
    old = math.isqrt(count)
    grid = positions[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    factor = (side + 0.1) / math.sqrt(count)
    grid = functional.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
    return torch.cat([positions[:, :1], grid.permute(0, 2, 3, 1).reshape(1, -1, grid.shape[1])], 1)


class MaeVit(nn.Module):
    """A ViT whose classifier sees the mean of all patches, without a norm."""

    def __init__(self, width: int, depth: int, heads: int, patch: int, classes: int):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (224 // patch) ** 2, width))
        self.patch_embed = named(proj=nn.Conv2d(3, width, patch, patch))
        self.blocks = nn.Sequential(*[Block(width, heads, mlp(width), scaled=False) for _ in range(depth)])
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        logits: Tensor = self.head(self.blocks(x)[:, 1:].mean(1))
        return logits


class DinoV2(nn.Module):
    """A DINOv2 with registers behind the patches. Its positions are those of images of `size` pixels."""

    def __init__(self, width: int, depth: int, heads: int, hidden: int, registers: int, size: int, classes: int):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (size // 14) ** 2, width))
        self.patch_embed = named(proj=nn.Conv2d(3, width, 14, 14))
        blocks = [Block(width, heads, GatedMlp(width, hidden), scaled=True) for _ in range(depth)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)
        if registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, registers, width))
        self.registers = registers

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).mT
        positions = _nearly(self.pos_embed, math.isqrt(x.shape[1]))
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + positions
        if self.registers:
            x = torch.cat([x, self.register_tokens.expand(len(x), -1, -1)], 1)
        logits: Tensor = self.head(self.norm(self.blocks(x))[:, 0])
        return logits


class Embedder(nn.Module):
    """Patches of C-RADIO: class tokens of teachers and registers without positions, flattened patches with them."""

    def __init__(self, width: int, tokens: int):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 128**2, width))
        self.embedder = nn.Linear(3 * 16 * 16, width, bias=False)
        self.cls_token = nn.ParameterDict({"token": nn.Parameter(torch.zeros(tokens, width))})

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = x.shape[2] // 16, x.shape[3] // 16
        patches = (
            x.reshape(len(x), 3, rows, 16, columns, 16).permute(0, 2, 4, 1, 3, 5).reshape(len(x), rows * columns, -1)
        )
        grid = self.pos_embed.reshape(1, 128, 128, -1).permute(0, 3, 1, 2)
        grid = functional.interpolate(grid, size=(rows, columns), mode="bilinear", align_corners=True)
        patches = self.embedder(patches) + grid.flatten(2).mT
        return torch.cat([self.cls_token["token"].expand(len(x), -1, -1), patches], 1)


class Radio(nn.Module):
    def __init__(
        self, width: int, depth: int, heads: int, teachers: int, summary: int, multiple: int, classes: int,
        normed: bool = False, scaled: bool = False,
    ):  # fmt: skip
        super().__init__()
        tokens = teachers + multiple - teachers % multiple
        blocks = [
            Block(width, heads, NormedMlp(width) if normed else mlp(width), scaled) for _ in range(depth)
        ]  # fmt: skip
        model = named(patch_generator=Embedder(width, tokens), blocks=nn.Sequential(*blocks))
        self.radio = named(radio=named(model=model))
        self.head = nn.Linear(summary * width, classes)
        self.summary = summary

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.radio(x)[:, : self.summary].flatten(1))
        return logits


class ClipBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = named(c_fc=nn.Linear(width, 4 * width), gelu=nn.GELU(), c_proj=nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        result: Tensor = x + self.mlp(self.ln_2(x))
        return result


class ImageEncoder(nn.Module):
    def __init__(self, width: int, depth: int, heads: int, size: int, outside: int):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(1 + (size // 14) ** 2, width))
        self.proj = nn.Parameter(torch.zeros(width, outside))
        self.conv1 = nn.Conv2d(3, width, 14, 14, bias=False)
        blocks = nn.Sequential(*[ClipBlock(width, heads) for _ in range(depth)])
        self.transformer = named(resblocks=blocks)
        self.ln_post = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).flatten(2).mT
        positions = _nearly(self.positional_embedding[None], math.isqrt(x.shape[1]))
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + positions
        result: Tensor = self.ln_post(self.transformer(x)[:, 1:].mean(1)) @ self.proj
        return result


class Clip(nn.Module):
    """OpenCLIP's model in TAO: the checkpoint has its text encoder, too."""

    def __init__(self, width: int, depth: int, heads: int, size: int, outside: int, classes: int):
        super().__init__()
        text = {
            "visual": ImageEncoder(width, depth, heads, size, outside),
            "transformer": named(resblocks=nn.Sequential(ClipBlock(8, 2))),
            "token_embedding": nn.Embedding(11, 8), "ln_final": nn.LayerNorm(8),
        }  # fmt: skip
        self.model = nn.ModuleDict(text)
        self.model.register_parameter("positional_embedding", nn.Parameter(torch.zeros(7, 8)))
        self.model.register_parameter("text_projection", nn.Parameter(torch.zeros(8, outside)))
        self.model.register_parameter("logit_scale", nn.Parameter(torch.zeros(())))
        self.head = nn.Linear(outside, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.model["visual"](x))
        return logits


class DinoV3(nn.Module):
    """A DINOv3, which TAO takes from timm, with a classifier on its class token."""

    def __init__(self, inner: nn.Module, width: int, classes: int):
        super().__init__()
        self.inner, self.head = inner, nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.inner.forward_features(x)[:, 0])  # type: ignore[operator]
        return logits
