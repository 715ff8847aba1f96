# SPDX-License-Identifier: Apache-2.0
"""RT-DETR for one input size, ready to be quantized and exported, on the layers of transformers' RT-DETR.

Position embeddings and anchors depend only on the input size, so they are constants here, float32 and finite. The parts
that only training uses are left out: denoising, and the heads of all decoder layers except the last one in use.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_weights
from transformers.models.rt_detr.modeling_rt_detr import RTDetrFrozenBatchNorm2d, RTDetrRepVggBlock
from transformers.models.rt_detr_v2.modeling_rt_detr_v2 import (
    RTDetrV2FrozenBatchNorm2d,
    RTDetrV2RepVggBlock,
)

_FAR = 32.0
"""Logit of anchors too close to the border; sigmoid(32) is 1. The original code has inf there and transformers
finfo.max, either of which would ruin the calibrated ranges of the layers that follow."""
_MARGIN = 1e-2
"""Anchors nearer than this to the border are invalid; a fraction of the image's side."""
_SMALLEST = 0.05
"""Side of the anchors of the finest feature map; a fraction of the image's side."""
_EPSILON = 1e-5
"""Least probability in the inverse sigmoid."""
_NORMS = (nn.BatchNorm2d, RTDetrFrozenBatchNorm2d, RTDetrV2FrozenBatchNorm2d)


class Detector(nn.Module):
    """RT-DETR: pixel_values [N, 3, height, width] to pred_logits [N, queries, classes] and pred_boxes [N, queries, 4].

    Pixels are in 0..1. Boxes are center x, center y, width and height, as fractions of the input's width and height.
    """

    anchors: Tensor
    valid: Tensor

    def __init__(
        self, model: nn.Module, size: tuple[int, int], strides: Sequence[int], num_layers: int, *, columns_first: bool
    ) -> None:
        """Use the layers of a transformers model. The model is modified.

        Args:
            model: `RTDetrForObjectDetection.model`, with its heads, or that of RT-DETRv2.
            size: Height and width of the input in pixels, multiples of every stride.
            strides: Strides of the feature maps in pixels, the finest first.
            num_layers: Number of decoder layers to use.
            columns_first: Whether to order the position embeddings as the original code does; see `position_embedding`.
        """
        super().__init__()
        self.model = model
        parts = cast(Any, model)
        config = parts.config
        self.num_queries = int(config.num_queries)
        decoder = parts.decoder
        decoder.layers = decoder.layers[:num_layers]
        decoder.bbox_embed = decoder.bbox_embed[:num_layers]
        last = str(num_layers - 1)
        decoder.class_embed = nn.ModuleDict({last: decoder.class_embed[num_layers - 1]})  # keeps its name
        if hasattr(parts, "denoising_class_embed"):
            del parts.denoising_class_embed
        shapes = [(size[0] // stride, size[1] // stride) for stride in strides]
        for layer, level in zip(parts.encoder.aifi, config.encode_proj_layers, strict=True):
            embedding = position_embedding(
                shapes[level],
                config.encoder_hidden_dim,
                config.positional_encoding_temperature,
                columns_first=columns_first,
            )
            layer.position_embedding = _Constant(embedding)
        anchors, valid = make_anchors(shapes)
        self._shapes = shapes
        self.register_buffer("anchors", anchors, persistent=False)
        self.register_buffer("valid", valid, persistent=False)
        self.register_buffer("spatial_shapes", torch.tensor(shapes), persistent=False)
        starts = [0, *itertools.accumulate(height * width for height, width in shapes)][:-1]
        self.register_buffer("level_start_index", torch.tensor(starts), persistent=False)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Detect objects: `RTDetrModel.forward` of transformers without the parts for training."""
        parts = cast(Any, self.model)
        features = parts.backbone.model(pixel_values).feature_maps
        projected = [project(feature) for project, feature in zip(parts.encoder_input_proj, features, strict=True)]
        encoded = parts.encoder(projected).last_hidden_state
        sources = [project(encoded[min(level, len(encoded) - 1)]) for level, project in
                   enumerate(parts.decoder_input_proj)]  # fmt: skip
        memory = torch.cat([source.flatten(2).transpose(1, 2) for source in sources], 1)
        # The positions with the best scores become the queries.
        proposals = parts.enc_output(memory * self.valid)
        scores = parts.enc_score_head(proposals).amax(-1)
        best = torch.topk(scores, self.num_queries, dim=1).indices.unsqueeze(-1)
        boxes = parts.enc_bbox_head(proposals) + self.anchors
        reference = boxes.gather(1, best.expand(-1, -1, 4)).sigmoid()
        if parts.config.learn_initial_query:
            hidden = parts.weight_embedding.weight.expand(memory.shape[0], -1, -1)
        else:
            hidden = proposals.gather(1, best.expand(-1, -1, proposals.shape[-1]))
        decoder = parts.decoder
        for layer, head in zip(decoder.layers, decoder.bbox_embed, strict=True):
            hidden = layer(
                hidden,
                object_queries_position_embeddings=decoder.query_pos_head(reference),
                reference_points=reference.unsqueeze(2),
                spatial_shapes=self.spatial_shapes,
                spatial_shapes_list=self._shapes,
                level_start_index=self.level_start_index,
                encoder_hidden_states=memory,
            )
            reference = (head(hidden) + _inverse_sigmoid(reference)).sigmoid()
        (score_head,) = decoder.class_embed.values()
        return score_head(hidden), reference


class _Constant(nn.Module):
    """Returns a constant. It is a buffer of the state dict because its order depends on the checkpoint."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def forward(self, *args: object, **kwargs: object) -> Tensor:  # noqa: ARG002
        return cast(Tensor, self.value)


def position_embedding(shape: tuple[int, int], channels: int, temperature: float, *, columns_first: bool) -> Tensor:
    """Return the sine and cosine of row and column at several frequencies, [1, height * width, channels].

    Args:
        shape: Height and width of the feature map.
        channels: A multiple of 4.
        temperature: The frequencies are spaced from 1 towards 1 / temperature (arXiv:1706.03762, section 3.5).
        columns_first: Whether to list the positions column by column, as the original code does although its features
            are listed row by row. In a square map this only exchanges the meaning of row and column.
    """
    frequencies = temperature ** -(torch.arange(channels // 4, dtype=torch.float64) / (channels // 4))
    height, width = shape
    outer, inner = (width, height) if columns_first else (height, width)
    first, second = torch.meshgrid(torch.arange(outer).double(), torch.arange(inner).double(), indexing="ij")
    angles = [first.flatten().outer(frequencies), second.flatten().outer(frequencies)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], 1).float().unsqueeze(0)


def make_anchors(shapes: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Make one anchor for each position of each feature map.

    Args:
        shapes: Height and width of each feature map, the finest first.

    Returns:
        Logits of the boxes (center x, center y, width, height), [1, positions, 4]; and whether each anchor is valid,
        1.0 or 0.0, [1, positions, 1].
    """
    anchors = []
    for level, (height, width) in enumerate(shapes):
        y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
        side = torch.full_like(x, _SMALLEST * 2.0**level)
        anchors.append(torch.stack([x, y, side, side], -1).reshape(-1, 4))
    boxes = torch.cat(anchors).unsqueeze(0)
    valid = ((boxes > _MARGIN) & (boxes < 1 - _MARGIN)).all(-1, keepdim=True)
    return torch.where(valid, torch.logit(boxes), _FAR), valid.float()


def fuse(model: nn.Module) -> None:
    """Fold batch norms into the preceding convolutions, and the two branches of RepVGG blocks into one, in place.

    The outputs stay the same up to rounding (RepVGG: arXiv:2101.03697, section 3.3). A norm follows a convolution if it
    is the next submodule of the same module: modules define their layers in the order in which they call them.
    """
    for module in list(model.modules()):
        children = list(module.named_children())
        for (_, conv), (name, norm) in itertools.pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, _NORMS):
                _fold(conv, norm)
                setattr(module, name, nn.Identity())
    for module in list(model.modules()):
        for name, block in module.named_children():
            if isinstance(block, RTDetrRepVggBlock | RTDetrV2RepVggBlock):
                setattr(module, name, _one_branch(block))


def _fold(conv: nn.Conv2d, norm: Any) -> None:
    epsilon = getattr(norm, "eps", 1e-5)  # The frozen batch norm has it as a constant in its forward.
    weight, bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, epsilon, norm.weight, norm.bias
    )
    conv.weight, conv.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())


def _one_branch(block: Any) -> nn.Module:
    """Return a RepVGG block with folded norms as one convolution, named `conv` as in the original's deploy form."""
    wide, narrow = block.conv1.conv, block.conv2.conv
    wide.weight = nn.Parameter((wide.weight + functional.pad(narrow.weight, [1, 1, 1, 1])).detach())
    wide.bias = nn.Parameter((wide.bias + narrow.bias).detach())
    result = nn.Sequential()
    result.add_module("conv", wide)
    result.add_module("activation", block.activation)
    return result


def _inverse_sigmoid(x: Tensor) -> Tensor:
    return torch.log(x.clamp(min=_EPSILON) / (1 - x).clamp(min=_EPSILON))
