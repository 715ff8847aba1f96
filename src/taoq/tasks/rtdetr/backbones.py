# SPDX-License-Identifier: Apache-2.0
"""The backbones of TAO's RT-DETR: networks whose stages give the feature maps, with TAO's layers after them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from timm.layers import LayerNorm2d
from timm.models.resnet import ResNet
from torch import Tensor, nn
from transformers.modeling_outputs import BackboneOutput
from transformers.models.rt_detr.modeling_rt_detr import replace_batch_norm

from taoq.errors import Fault, SpecError, first_line
from taoq.tasks.backbones.fan import Fan
from taoq.tasks.backbones.networks import create_network
from taoq.tasks.backbones.tao_keys import LAYOUTS, from_tao
from taoq.tasks.backbones.tao_names import TaoNetwork
from taoq.tasks.rtdetr.spec import UPSAMPLE, ModelSpec, tao_network

_WIDENED = (512, 1024, 2048)
"""Channels of the convolutions after the stages of a ConvNeXt, `conv_512` and so on in TAO."""
_FAN_DOWNSAMPLED = 768
"""Channels of the map of stride 32 that TAO makes of a FAN's last tokens."""
_FAN_LARGE_MAP = 18
"""Index of the block of the large FAN whose output is the map of stride 16; in smaller ones it is the last block."""


class TaoBackbone(nn.Module):
    """A network that returns the outputs of some of its stages.

    Attributes:
        channels: Channels of each output.
        not_needed: Names of the network's tensors in a checkpoint that these outputs do not depend on.
    """

    def __init__(self, network: nn.Module, family: str, indices: Sequence[int]) -> None:
        """Remove the layers of a network that come after its stages.

        Args:
            network: A network of timm that has `forward_intermediates`, or a FAN.
            family: Family of the network; see `TaoNetwork`.
            indices: Indices (from 0) of the stages to return.
        """
        super().__init__()
        self._family = family
        self._indices = list(indices)
        self.network = network
        self.after = nn.ModuleDict()
        names = set(network.state_dict())
        if isinstance(network, Fan):
            cast(Any, network).norm = nn.Identity()
            last = network.config.widths[-1]
            self.learnable_downsample = nn.Conv2d(last, _FAN_DOWNSAMPLED, 3, 2, 1)
            widths = [*network.config.stem_widths, last, _FAN_DOWNSAMPLED]
            self.channels = [widths[index] for index in indices]
        else:
            # timm counts the stem of a ResNet as a stage.
            self._indices = [index + isinstance(network, ResNet) for index in indices]
            parts = cast(Any, network)
            parts.prune_intermediate_layers(self._indices, prune_norm=True, prune_head=True)
            self.channels = [int(parts.feature_info[index]["num_chs"]) for index in self._indices]
        self.not_needed = frozenset(names - set(network.state_dict()))

    def add_after(self, layers: Mapping[str, nn.Module], channels: Sequence[int]) -> None:
        """Apply a layer to each output.

        Args:
            layers: The layers, by their names in TAO.
            channels: Channels of their outputs.
        """
        self.after.update(layers)
        self.channels = list(channels)

    def from_tao(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of TAO's backbone under the names that they have in the network, and in `after`.

        Args:
            state: Tensors by TAO's names, without a prefix.
        """
        if self._family not in LAYOUTS:
            return dict(state)
        own = {name for name in state if name.partition(".")[0] in self.after}
        network = from_tao(self._family, {name: state[name] for name in state if name not in own}, self.network)
        return network | {name: state[name] for name in own}

    def forward(self, pixel_values: Tensor) -> BackboneOutput:
        """Return the feature maps of an image batch [N, 3, height, width]."""
        if isinstance(self.network, Fan):
            maps = self._fan_maps(self.network, pixel_values)
        else:
            maps = cast(Any, self.network).forward_intermediates(
                pixel_values, indices=self._indices, stop_early=True, intermediates_only=True
            )
        if self.after:
            maps = [layer(x) for layer, x in zip(self.after.values(), maps, strict=True)]
        return BackboneOutput(feature_maps=cast(Any, tuple(maps)))

    def _fan_maps(self, network: Fan, pixel_values: Tensor) -> list[Tensor]:
        """Return maps of the two stages of the stem, of a block, and of the tokens after class attention."""
        stem = len(network.config.stem)
        maps = network.forward_maps(pixel_values)
        blocks, last = maps[stem:], maps[-1]
        tokens = network.with_class(last)[:, 1:]
        smallest = self.learnable_downsample(tokens.transpose(1, 2).reshape(last.shape))
        block = _FAN_LARGE_MAP if len(blocks) > _FAN_LARGE_MAP else -1
        every = [*maps[:stem], blocks[block], smallest]
        return [every[index] for index in self._indices]


def create_backbone(model: ModelSpec) -> TaoBackbone:
    """Build the backbone of a network of TAO, with frozen batch norms.

    Raises:
        SpecError: If the library cannot build it with the arguments in `backbone_args`.
    """
    network = tao_network(model)
    args = dict(model.backbone_args)
    widened = args.pop(UPSAMPLE, network.name.startswith("convnext_"))
    try:
        built = create_network(network, 0, network.size, args)
        backbone = TaoBackbone(built, network.family, model.return_interm_indices)
    except (TypeError, ValueError, AssertionError, RuntimeError, KeyError) as error:
        what = f"{network.library} cannot build {network.name}: {first_line(error)}"
        raise SpecError(Fault("model.backbone_args", what, f"see the constructor of {network.base}")) from error
    _add_layers(backbone, network, model.return_interm_indices, widened=widened)
    replace_batch_norm(backbone)  # type: ignore[no-untyped-call]
    return backbone


def _add_layers(backbone: TaoBackbone, network: TaoNetwork, indices: Sequence[int], *, widened: bool) -> None:
    """Add TAO's layers after the stages: norms, or the convolutions after a ConvNeXt."""
    channels = backbone.channels
    if network.family == "convnext" and widened:
        pairs = zip(channels, _WIDENED, strict=False)
        layers: dict[str, nn.Module] = {f"conv_{after}": nn.Conv2d(before, after, 3, 1, 1) for before, after in pairs}
        backbone.add_after(layers, _WIDENED)
    elif network.family.startswith("efficientvit"):
        backbone.add_after(_norms("norm", indices, channels), channels)
    elif network.family == "fan":
        backbone.add_after(_norms("out_norm", indices, channels), channels)


def _norms(prefix: str, indices: Sequence[int], channels: Sequence[int]) -> dict[str, nn.Module]:
    pairs = zip(indices, channels, strict=True)
    return {f"{prefix}{index}": LayerNorm2d(width, eps=1e-5) for index, width in pairs}
