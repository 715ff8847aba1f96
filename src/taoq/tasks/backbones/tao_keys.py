# SPDX-License-Identifier: Apache-2.0
"""Names of tensors in TAO's checkpoints, and their names in the network that taoq builds.

timm has such functions for some families (`checkpoint_filter_fn`). They fail on a checkpoint of another size, where the
message should name the tensors that do not fit, so taoq has tables of its own; tests compare the two.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from taoq.tasks.backbones.positions import clip_tensors, dinov2_tensors, radio_tensors

Replacement = str | Callable[[re.Match[str]], str]
State = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """How TAO names the tensors of a family of networks.

    Attributes:
        marker: Name in TAO of a tensor that each network of the family has.
        names: Patterns on TAO's names, applied in order, and the replacements that give the names in the library.
        unused: Pattern on TAO's names of tensors that a classifier does not need.
        computed: Pattern on TAO's names of tensors that the library computes.
        convert: Converts what is not a matter of names, for the given network.
    """

    marker: str
    names: Mapping[str, Replacement]
    unused: str = r"(?!)"
    computed: str = r"(?!)"
    convert: Callable[[State, nn.Module], State] | None = None


def _counted(offset: int, text: str) -> Replacement:
    """Return a replacement: `text`, with the number in the first group shifted by `offset`, and the other groups."""
    return lambda match: text.format(int(match[1]) + offset, *match.groups()[1:])


_INDEX = r"\.relative_position_index$"
_HEAD = {r"^head\.(weight|bias)$": r"head.fc.\1"}
"""timm keeps the linear classifier inside a head that also pools."""
_CONVNEXT = {
    r"^downsample_layers\.0\.": "stem.",
    r"^downsample_layers\.(\d+)\.": r"stages.\1.downsample.",
    r"^stages\.(\d+)\.(\d+)\.": r"stages.\1.blocks.\2.",
    r"\.dwconv\.": ".conv_dw.",
    r"\.pwconv(\d)\.": r".mlp.fc\1.",
    r"\.grn\.gamma$": ".mlp.grn.weight",
    r"\.grn\.beta$": ".mlp.grn.bias",
    r"^norm\.(weight|bias)$": r"head.norm.\1",
}
_SWIN = Layout(
    "norm3.weight",
    {r"^layers\.(\d+)\.downsample\.": _counted(1, "layers.{}.downsample."), **_HEAD},
    unused=r"^norm\d\.",
    computed=_INDEX,
)

LAYOUTS: Mapping[str, Layout] = {
    "convnext": Layout("downsample_layers.0.0.weight", {**_CONVNEXT, **_HEAD}),
    "edgenext": Layout("downsample_layers.0.0.weight", {**_CONVNEXT, **_HEAD}),
    "efficientvit": Layout(
        "input_stem.op_list.0.conv.weight",
        {
            r"^input_stem\.op_list\.0\.": "stem.in_conv.",
            r"^input_stem\.op_list\.(\d+)\.": _counted(-1, "stem.res{}."),
            r"^stages\.(\d+)\.op_list\.": r"stages.\1.blocks.",
            **_HEAD,
        },
    ),
    "efficientvit_large": Layout(
        "stages.0.op_list.0.conv.weight",
        {
            r"^stages\.0\.op_list\.0\.": "stem.in_conv.",
            r"^stages\.0\.op_list\.(\d+)\.": _counted(-1, "stem.res{}."),
            r"^stages\.(\d+)\.op_list\.": _counted(-1, "stages.{}.blocks."),
            **_HEAD,
        },
    ),
    "swin": _SWIN,
    "fan_swin": _SWIN,
    "gcvit": Layout(
        "levels.0.blocks.0.norm1.weight",
        {
            r"^patch_embed\.proj\.": "stem.conv1.",
            r"^patch_embed\.conv_down\.": "stem.down.",
            r"^levels\.(\d+)\.downsample\.": _counted(1, "stages.{}.downsample."),
            r"^levels\.(\d+)\.q_global_gen\.to_q_global\.(\d+)\.": (
                lambda match: f"stages.{match[1]}.global_block.blocks.conv{int(match[2]) + 1}."
            ),
            r"^levels\.(\d+)\.": r"stages.\1.",
            r"\.(down|downsample)\.conv\.": r".\1.conv_block.conv.",
            r"\.(conv_block|blocks\.conv\d+)\.conv\.0\.": r".\1.conv_dw.",
            r"\.(conv_block|blocks\.conv\d+)\.conv\.2\.fc\.0\.": r".\1.se.fc1.",
            r"\.(conv_block|blocks\.conv\d+)\.conv\.2\.fc\.2\.": r".\1.se.fc2.",
            r"\.(conv_block|blocks\.conv\d+)\.conv\.3\.": r".\1.conv_pw.",
            r"\.attn\.relative_position_bias_table$": ".attn.rel_pos.relative_position_bias_table",
            r"\.gamma(\d)$": r".ls\1.gamma",
            r"^norm\.": "stages.3.norm.",
            **_HEAD,
        },
        computed=_INDEX,
    ),
    "mit": Layout(
        "patch_embed1.proj.weight",
        {
            r"^patch_embed1\.": "patch_embed.",
            r"^patch_embed(\d)\.": _counted(-1, "stages.{}.downsample."),
            r"^block(\d)\.": _counted(-1, "stages.{}.blocks."),
            r"^norm(\d)\.": _counted(-1, "stages.{}.norm."),
            r"\.dwconv\.dwconv\.": ".dwconv.",
        },
    ),
    "dinov2": Layout("cls_token", {r"^register_tokens$": "reg_token"}, convert=dinov2_tensors),
    "dinov3": Layout("inner.cls_token", {r"^inner\.": ""}),
    "radio": Layout(
        "radio.radio.model.patch_generator.embedder.weight",
        {
            r"^radio\.radio\.model\.": "vit.",
            r"\.patch_generator\.embedder\.": ".patch_embed.proj.",
            r"\.patch_generator\.pos_embed$": ".pos_embed",
            r"\.patch_generator\.cls_token\.token$": ".cls_token",
        },
        convert=radio_tensors,
    ),
    "clip": Layout(
        "model.visual.class_embedding",
        {
            r"^model\.visual\.conv1\.": "patch_embed.proj.",
            r"^model\.visual\.class_embedding$": "cls_token",
            r"^model\.visual\.positional_embedding$": "pos_embed",
            r"^model\.visual\.ln_post\.": "fc_norm.",
            r"^model\.visual\.proj$": "head.proj.weight",
            r"^model\.visual\.transformer\.resblocks\.(\d+)\.": r"blocks.\1.",
            r"\.ln_(\d)\.": r".norm\1.",
            r"\.attn\.in_proj_(weight|bias)$": r".attn.qkv.\1",
            r"\.attn\.out_proj\.": ".attn.proj.",
            r"\.mlp\.c_fc\.": ".mlp.fc1.",
            r"\.mlp\.c_proj\.": ".mlp.fc2.",
            **_HEAD,
        },
        unused=r"^model\.(?!visual\.)",  # the text encoder
        convert=clip_tensors,
    ),
}
"""The layout of each family whose names differ between TAO and the library."""


def tao_prefix(family: str, names: Iterable[str]) -> str | None:
    """Return what stands in front of TAO's names in a checkpoint.

    Args:
        family: A key of `LAYOUTS`.
        names: Names of the tensors of the checkpoint.

    Returns:
        The prefix, `model.` in a checkpoint of classification_pyt; None if the names are not those of TAO.
    """
    marker = LAYOUTS[family].marker
    return next((key.removesuffix(marker) for key in names if key == marker or key.endswith(f".{marker}")), None)


def from_tao(family: str, state: Mapping[str, Tensor], network: nn.Module) -> State:
    """Return tensors of a network of TAO as the network that taoq builds has them.

    Args:
        family: A key of `LAYOUTS`.
        state: Tensors by TAO's names, without a prefix. Those that TAO's family does not have keep their names.
        network: The network that will load them.
    """
    layout = LAYOUTS[family]
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    left_out = re.compile(f"{layout.unused}|{layout.computed}")
    result = {}
    for key, value in state.items():
        if left_out.search(key):
            continue
        name = key
        for pattern, replacement in layout.names.items():
            name = re.sub(pattern, replacement, name)
        shape = shapes.get(name, value.shape)
        # A linear layer can be a 1x1 convolution in the library, and a vector can have dimensions of one.
        alike = [size for size in shape if size != 1] == [size for size in value.shape if size != 1]
        result[name] = value.reshape(shape) if alike else value
    return layout.convert(result, network) if layout.convert else result


def unused_in_classifier(family: str, state: Mapping[str, Tensor]) -> list[str]:
    """Return the names of trained tensors of a network of TAO that its classifier does not use."""
    return [key for key in state if re.search(LAYOUTS[family].unused, key)]
