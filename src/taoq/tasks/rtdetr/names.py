# SPDX-License-Identifier: Apache-2.0
"""Translate between transformers' names of layers and tensors, which taoq uses, and those of the original RT-DETR code.

TAO uses the original names, too. The table loads checkpoints of the original code, and gives each layer its original
name as an alias for patterns. Original names: github.com/lyuwenyu/RT-DETR, rtdetr_pytorch and rtdetrv2_pytorch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

_TAO_BACKBONE = re.compile(r"^model\.backbone\.model\.(?:network\.|after\.|(?=learnable_downsample\.))")
"""Matches the prefix of the names in a backbone of TAO; the names after it are those of its library."""
_BLOCK = r"^backbone\.model\.encoder\.stages\.(\d+)\.layers\.(\d+)"
_TABLE = {
    r"^model\.": "",
    # The backbone, a ResNet-vd.
    r"^backbone\.model\.embedder\.embedder\.0": "backbone.conv1.conv1_1",
    r"^backbone\.model\.embedder\.embedder\.1": "backbone.conv1.conv1_2",
    r"^backbone\.model\.embedder\.embedder\.2": "backbone.conv1.conv1_3",
    rf"{_BLOCK}\.layer\.0": r"backbone.res_layers.\1.blocks.\2.branch2a",
    rf"{_BLOCK}\.layer\.1": r"backbone.res_layers.\1.blocks.\2.branch2b",
    rf"{_BLOCK}\.layer\.2": r"backbone.res_layers.\1.blocks.\2.branch2c",
    rf"{_BLOCK}\.shortcut\.1": r"backbone.res_layers.\1.blocks.\2.short.conv",
    rf"{_BLOCK}\.shortcut": r"backbone.res_layers.\1.blocks.\2.short",
    r"\.convolution(\.|$)": r".conv\1",
    r"\.normalization(\.|$)": r".norm\1",
    # The encoder.
    r"^encoder_input_proj": "encoder.input_proj",
    r"^encoder\.aifi": "encoder.encoder",
    r"^(encoder\..*)\.final_layer_norm": r"\1.norm2",
    # The decoder; in the original code its layers are one level deeper.
    r"^decoder\.layers": "decoder.decoder.layers",
    r"^decoder_input_proj\.(\d+)\.0": r"decoder.input_proj.\1.conv",
    r"^decoder_input_proj\.(\d+)\.1": r"decoder.input_proj.\1.norm",
    r"^decoder\.class_embed": "decoder.dec_score_head",
    r"^decoder\.bbox_embed": "decoder.dec_bbox_head",
    r"^weight_embedding": "decoder.tgt_embed",
    r"^(enc_output|enc_score_head|enc_bbox_head|denoising_class_embed)": r"decoder.\1",
    r"\.encoder_attn_layer_norm": ".norm2",
    r"\.encoder_attn": ".cross_attn",
    r"\.final_layer_norm": ".norm3",
    # Encoder and decoder.
    r"\.self_attn_layer_norm": ".norm1",
    r"\.self_attn\.o_proj": ".self_attn.out_proj",
    r"\.self_attn\.[qkv]_proj": ".self_attn.in_proj",
    r"\.mlp\.fc1": ".linear1",
    r"\.mlp\.fc2": ".linear2",
    r"\.n_points_scale": ".num_points_scale",
}
"""Regular expressions on names of transformers, with their replacements in the original code; applied in order."""

_VERSION_2 = (
    (r"^encoder\.input_proj\.(\d+)\.0", r"encoder.input_proj.\1.conv"),
    (r"^encoder\.input_proj\.(\d+)\.1", r"encoder.input_proj.\1.norm"),
    (r"^decoder\.enc_output\.0", "decoder.enc_output.proj"),
    (r"^decoder\.enc_output\.1", "decoder.enc_output.norm"),
)
"""Replacements in names of rtdetr_pytorch that give those of rtdetrv2_pytorch."""

_HUB = {
    r"\.out_proj\.": ".o_proj.",
    r"\.layers\.(\d+)\.(fc[12])\.": r".layers.\1.mlp.\2.",
    r"\.encoder\.encoder\.(\d+)\.layers\.": r".encoder.aifi.\1.layers.",
    r"^(class_embed|bbox_embed)\.": r"model.decoder.\1.",
}
"""Replacements in names of Hugging Face files that give those of the layers in transformers."""

_ATTENTION = re.compile(r"\.self_attn\.([qkv])_proj\.")
_NOT_LOADED = re.compile(r"denoising_class_embed\.|^decoder\.(anchors|valid_mask)$|^encoder\.pos_embed\d+$")
"""Original names of tensors that only training needs, or that the network computes itself for its input size."""

SENSITIVE = {
    "*.sampling_offsets": "sampling offsets",
    "*.attention_weights": "attention weights of the deformable attention",
    "*.dec_bbox_head.*": "box heads",
    "*.enc_bbox_head.*": "box heads",
    "*.dec_score_head.*": "class heads",
    "*.enc_score_head": "class heads",
    "*.query_pos_head.*": "reference points",
}
"""Patterns on original names of layers that are known to lose accuracy in INT8, with a description.

Published INT8 detectors keep the decoder float: PaddleSlim's RT-DETR, NVIDIA's FAR3D and PETRv2 examples, Ultralytics.
"""


def original_name(name: str) -> str:
    """Return the original name of a layer or tensor. Query, key and value projections are one `in_proj` there."""
    if _TAO_BACKBONE.match(name):
        return _TAO_BACKBONE.sub("backbone.", name)
    for pattern, replacement in _TABLE.items():
        name = re.sub(pattern, replacement, name)
    return name


def from_hub(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a Hugging Face file, which has older names, like transformers' `conversion_mapping`.

    Some files have the heads twice, the second time at the top level; those are left out.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        renamed = name
        for pattern, replacement in _HUB.items():
            renamed = re.sub(pattern, replacement, renamed)
        if renamed == name or renamed not in state:
            result[renamed] = tensor
    return result


def is_original(names: Iterable[str]) -> bool:
    """Return whether a checkpoint has original names, with any prefix."""
    return any(name.endswith("decoder.dec_score_head.0.weight") for name in names)


def from_original(state: Mapping[str, Tensor], network: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Rename the tensors of an original checkpoint.

    Args:
        state: The checkpoint, with original names without a prefix.
        network: The state dict of the network.

    Returns:
        The renamed tensors, with those that the network does not have under their original names; and the names of
        tensors that are left out, because inference does not need them.
    """
    left = dict.fromkeys(state)
    renamed: dict[str, Tensor] = {}
    for name in network:
        original = original_name(name)
        # In nn.MultiheadAttention, the packed projection is not a layer but two parameters.
        original = re.sub(r"\.in_proj\.(weight|bias)$", r".in_proj_\1", original)
        if original not in state:
            for pattern, replacement in _VERSION_2:
                original = re.sub(pattern, replacement, original)
        if original in state:
            packed = _ATTENTION.search(name)
            renamed[name] = torch.chunk(state[original], 3)["qkv".index(packed[1])] if packed else state[original]
            left.pop(original, None)
    unused = [name for name in left if _NOT_LOADED.search(name)]
    return renamed | {name: state[name] for name in left if name not in unused}, unused
