# SPDX-License-Identifier: Apache-2.0
"""One table of names: those of transformers, which are ours, and those of the original RT-DETR code, which TAO has too.

It maps checkpoints of the original code, and gives every layer its original name as an alias for patterns.
Original names: github.com/lyuwenyu/RT-DETR, rtdetr_pytorch and rtdetrv2_pytorch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_BLOCK = r"^backbone\.model\.encoder\.stages\.(\d+)\.layers\.(\d+)"
_TABLE = {
    r"^model\.": "",
    # the backbone, a ResNet-vd
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
    # the encoder
    r"^encoder_input_proj": "encoder.input_proj",
    r"^encoder\.aifi": "encoder.encoder",
    r"^(encoder\..*)\.final_layer_norm": r"\1.norm2",
    # the decoder; its own layers are one level deeper there
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
    # both
    r"\.self_attn_layer_norm": ".norm1",
    r"\.self_attn\.o_proj": ".self_attn.out_proj",
    r"\.self_attn\.[qkv]_proj": ".self_attn.in_proj",
    r"\.mlp\.fc1": ".linear1",
    r"\.mlp\.fc2": ".linear2",
    r"\.n_points_scale": ".num_points_scale",
}
"""Patterns on a name of ours, applied in order, and what the original code has in their place."""

_VERSION_2 = (
    (r"^encoder\.input_proj\.(\d+)\.0", r"encoder.input_proj.\1.conv"),
    (r"^encoder\.input_proj\.(\d+)\.1", r"encoder.input_proj.\1.norm"),
    (r"^decoder\.enc_output\.0", "decoder.enc_output.proj"),
    (r"^decoder\.enc_output\.1", "decoder.enc_output.norm"),
)
"""Where rtdetrv2_pytorch has other names than rtdetr_pytorch."""

_HUB = {
    r"\.out_proj\.": ".o_proj.",
    r"\.layers\.(\d+)\.(fc[12])\.": r".layers.\1.mlp.\2.",
    r"\.encoder\.encoder\.(\d+)\.layers\.": r".encoder.aifi.\1.layers.",
    r"^(class_embed|bbox_embed)\.": r"model.decoder.\1.",
}
"""What stands in files of Hugging Face for a part of our names."""

_ATTENTION = re.compile(r"\.self_attn\.([qkv])_proj\.")
TRAINING_ONLY = re.compile(r"denoising_class_embed\.|^decoder\.(anchors|valid_mask)$|^encoder\.pos_embed\d+$")
"""Tensors of the original code, by their name there, that a network for one input size computes or does not need."""

SENSITIVE = {
    "*.sampling_offsets": "sampling offsets",
    "*.attention_weights": "attention weights of the deformable attention",
    "*.dec_bbox_head.*": "box heads",
    "*.enc_bbox_head.*": "box heads",
    "*.dec_score_head.*": "class heads",
    "*.enc_score_head": "class heads",
    "*.query_pos_head.*": "reference points",
}
"""Layers that INT8 is known to hurt, by their original name, and what they are: published INT8 detectors keep the
decoder float (PaddleSlim's RT-DETR, NVIDIA's FAR3D and PETRv2 examples, Ultralytics)."""


def original_name(name: str) -> str:
    """The original code's name of a layer or tensor of ours; q, k and v are one `in_proj` there."""
    for pattern, replacement in _TABLE.items():
        name = re.sub(pattern, replacement, name)
    return name


def from_hub(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the tensors of a Hugging Face file the names of the layers: files keep older ones.

    As transformers' own `conversion_mapping` does it; the heads stand in some files a second time at the top.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        renamed = name
        for pattern, replacement in _HUB.items():
            renamed = re.sub(pattern, replacement, renamed)
        if renamed == name or renamed not in state:
            found[renamed] = tensor
    return found


def is_original(names: Mapping[str, Tensor]) -> bool:
    """Whether a checkpoint has the names of the original code, behind any prefix."""
    return any(name.endswith("decoder.dec_score_head.0.weight") for name in names)


def from_original(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Give the tensors of an original checkpoint our names.

    Args:
        state: The checkpoint, under the original names without a prefix.
        own: The state dict of our network.

    Returns:
        The tensors under our names, where the checkpoint has them, with those it has besides under their own name;
        and the names of the checkpoint that a network for inference does not need.
    """
    left = dict.fromkeys(state)
    found: dict[str, Tensor] = {}
    for name in own:
        original = original_name(name)
        # attention's packed weight and bias have an underscore where a layer has a dot
        original = re.sub(r"\.in_proj\.(weight|bias)$", r".in_proj_\1", original)
        if original not in state:
            for pattern, replacement in _VERSION_2:
                original = re.sub(pattern, replacement, original)
        if original in state:
            packed = _ATTENTION.search(name)
            found[name] = torch.chunk(state[original], 3)["qkv".index(packed[1])] if packed else state[original]
            left.pop(original, None)
    unused = [name for name in left if TRAINING_ONLY.search(name)]
    return found | {name: state[name] for name in left if name not in unused}, unused
