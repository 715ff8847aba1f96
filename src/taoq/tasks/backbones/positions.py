# SPDX-License-Identifier: Apache-2.0
"""Conversion of what TAO computes in each forward pass from the weights: position embeddings of another image size.

TAO resizes the position embeddings of these transformers to the size of each batch; taoq resizes them once, when they
are loaded, with the same operation, because the size of the input is fixed.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional


def dinov2_tensors(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Convert the tokens and positions of TAO's DINOv2.

    timm gives no position to the class token of a network with registers; TAO adds one.
    """
    result = dict(state)
    positions, registers = result.get("pos_embed"), result.get("reg_token")
    if positions is None:
        return result
    side = cast(Any, network).patch_embed.grid_size[0]
    first, rest = positions[:, :1], _nearly_resized(positions[:, 1:], side)
    if registers is None:
        result["pos_embed"] = torch.cat([first, rest], 1)
    elif _side(positions[:, 1:]):  # Positions of timm have no entry for the class token.
        result["cls_token"] = result["cls_token"] + first
        result["pos_embed"] = rest
    return result


def clip_tensors(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Convert the positions of OpenCLIP's image encoder, its projection, and its patches, which have no bias there."""
    result = dict(state)
    if (positions := result.get("pos_embed")) is not None and positions.ndim == 2:
        positions = positions[None]
    if positions is not None and positions.ndim == 3:
        side = cast(Any, network).patch_embed.grid_size[0]
        result["pos_embed"] = torch.cat([positions[:, :1], _nearly_resized(positions[:, 1:], side)], 1)
    if (projection := result.get("head.proj.weight")) is not None:
        result["head.proj.weight"] = projection.T.contiguous()
    return _with_patch_bias(result, "patch_embed.proj")


def radio_tensors(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Convert the tokens, positions and patches of C-RADIO: patches are flattened before a linear layer there."""
    result = dict(state)
    embed = cast(Any, network).vit.patch_embed
    if (weight := result.get("vit.patch_embed.proj.weight")) is not None and weight.ndim == 2:
        result["vit.patch_embed.proj.weight"] = weight.reshape(len(weight), -1, *embed.patch_size)
    if (tokens := result.get("vit.cls_token")) is not None and tokens.ndim == 2:
        result["vit.cls_token"], result["vit.reg_token"] = tokens[None, :1], tokens[None, 1:]
    if (positions := result.get("vit.pos_embed")) is not None and (side := _side(positions)):
        grid = positions.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        if embed.grid_size != (side, side):
            grid = functional.interpolate(grid.float(), size=embed.grid_size, mode="bilinear", align_corners=True)
        result["vit.pos_embed"] = grid.flatten(2).transpose(1, 2).to(positions.dtype)
    return _with_patch_bias(result, "vit.patch_embed.proj")


def _with_patch_bias(state: dict[str, Tensor], layer: str) -> dict[str, Tensor]:
    """Add a bias of zeros to the layer that makes patches: timm's has a bias."""
    weight = state.get(f"{layer}.weight")
    return state if weight is None else {f"{layer}.bias": weight.new_zeros(len(weight)), **state}


def _side(positions: Tensor) -> int:
    """Return the side of a square grid of positions [1, side * side, channels]; 0 if it is not square."""
    side = math.isqrt(positions.shape[1])
    return side if side * side == positions.shape[1] else 0


def _nearly_resized(positions: Tensor, side: int) -> Tensor:
    """Resize a grid of positions [1, N, channels] as TAO does, by a factor that is a little too large.

    The addition of 0.1 is DINO's (facebookresearch/dino, issue 8). It moves the sampling points, so it must be kept.
    """
    old = _side(positions)
    if old in (0, side):
        return positions
    grid = positions.reshape(1, old, old, -1).permute(0, 3, 1, 2).float()
    factor = (side + 0.1) / math.sqrt(positions.shape[1])
    resized = functional.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
    return resized.flatten(2).transpose(1, 2).to(positions.dtype)
