# SPDX-License-Identifier: Apache-2.0
"""The backbones of TAO's RT-DETR: networks of timm whose stages give the feature maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import timm
from timm.models.resnet import ResNet
from torch import Tensor, nn
from transformers.modeling_outputs import BackboneOutput
from transformers.models.rt_detr.modeling_rt_detr import replace_batch_norm

from taoq.errors import Fault, SpecError, first_line
from taoq.tasks.rtdetr.spec import ModelSpec

_TIMM = {"resnet_18": "resnet18", "resnet_34": "resnet34", "resnet_50": "resnet50", "resnet_101": "resnet101"}
"""The name in timm of each backbone of TAO."""


class TaoBackbone(nn.Module):
    """A network of timm that returns the outputs of some of its stages.

    Attributes:
        channels: Channels of each output.
        not_needed: Names of the tensors of the whole network that these outputs do not depend on.
    """

    def __init__(self, network: Any, indices: Sequence[int]) -> None:
        """Take the network without its classifier.

        Args:
            network: A network of timm that has `forward_intermediates`.
            indices: Indices (from 0) of the stages to return.
        """
        super().__init__()
        first = 1 if isinstance(network, ResNet) else 0  # timm counts the stem of a ResNet as a stage.
        self._indices = [first + index for index in indices]
        names = set(network.state_dict())
        network.prune_intermediate_layers(self._indices, prune_norm=True, prune_head=True)
        self.network = network
        self.not_needed = frozenset(names - set(network.state_dict()))
        self.channels = [int(network.feature_info[index]["num_chs"]) for index in self._indices]

    def forward(self, pixel_values: Tensor) -> BackboneOutput:
        """Return the feature maps of an image batch [N, 3, height, width]."""
        features = cast(Any, self.network).forward_intermediates(
            pixel_values, indices=self._indices, stop_early=True, intermediates_only=True
        )
        return BackboneOutput(feature_maps=tuple(features))


def create_backbone(model: ModelSpec) -> TaoBackbone:
    """Build the backbone of a network of TAO, with frozen batch norms.

    Raises:
        SpecError: If timm cannot build it with the arguments in `backbone_args`.
    """
    name = _TIMM[model.backbone]
    try:
        network = timm.create_model(name, pretrained=False, num_classes=0, **model.backbone_args)
    except (TypeError, ValueError, AssertionError, RuntimeError, KeyError) as error:
        what = f"timm cannot build {name}: {first_line(error)}"
        raise SpecError(Fault("model.backbone_args", what, f"see the constructor of {name} in timm")) from error
    backbone = TaoBackbone(network, model.return_interm_indices)
    replace_batch_norm(backbone)  # type: ignore[no-untyped-call]
    return backbone
