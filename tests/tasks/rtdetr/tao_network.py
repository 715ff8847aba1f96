"""A second implementation of TAO's RT-DETR, which taoq's reading of TAO's checkpoints is compared with.

Encoder and decoder are those of the authors' code, whose names TAO has, too. The backbone is written after the names in
TAO's checkpoints, without timm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from original import Decoder, Encoder
from torch import Tensor, nn
from torch.nn import functional

from support.tao.attentional import Fan
from support.tao.convolutional import ConvNeXt


class Block(nn.Module):
    """A residual block of the first ResNet: a convolution with a stride makes the shortcut."""

    def __init__(self, inside: int, width: int, stride: int, bottleneck: bool):
        super().__init__()
        outside = width * 4 if bottleneck else width
        widths = [(inside, width, 1), (width, width, 3), (width, outside, 1)]
        if not bottleneck:
            widths = [(inside, width, 3), (width, width, 3)]
        self.count = len(widths)
        for number, (a, b, kernel) in enumerate(widths, 1):
            # The stride is in the 3x3 convolution of a bottleneck, in the first one of a basic block.
            step = stride if number == (2 if bottleneck else 1) else 1
            self.add_module(f"conv{number}", nn.Conv2d(a, b, kernel, step, kernel // 2, bias=False))
            self.add_module(f"bn{number}", nn.BatchNorm2d(b))
        if stride != 1 or inside != outside:
            self.downsample: nn.Module | None = nn.Sequential(
                nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside)
            )
        else:
            self.downsample = None

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for number in range(1, self.count + 1):
            out = self.get_submodule(f"bn{number}")(self.get_submodule(f"conv{number}")(out))
            if number < self.count:
                out = functional.relu(out)
        return functional.relu(out + (self.downsample(x) if self.downsample else x))


class ResNet(nn.Module):
    def __init__(
        self, stem: int, widths: Sequence[int], depths: Sequence[int], bottleneck: bool, indices: Sequence[int]
    ):
        super().__init__()
        factor = 4 if bottleneck else 1
        self.conv1, self.bn1 = nn.Conv2d(3, stem, 7, 2, 3, bias=False), nn.BatchNorm2d(stem)
        inside = stem
        for number, (width, depth) in enumerate(zip(widths, depths, strict=True), 1):
            blocks = [Block(inside, width, 1 if number == 1 else 2, bottleneck)]
            blocks += [Block(width * factor, width, 1, bottleneck) for _ in range(depth - 1)]
            inside = width * factor
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
        self.indices = indices
        self.channels = [widths[index] * factor for index in indices]

    def forward(self, x: Tensor) -> list[Tensor]:
        x = functional.max_pool2d(functional.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        outputs = []
        for number in range(1, 5):
            x = self.get_submodule(f"layer{number}")(x)
            outputs.append(x)
        return [outputs[index] for index in self.indices]


class WidenedConvNeXt(ConvNeXt):
    """ConvNeXt as a backbone: a convolution after each stage, called after its channels."""

    def __init__(self, depths: Sequence[int], widths: Sequence[int], grn: bool = False):
        super().__init__(depths, widths, 1, grn)
        self.head = nn.Identity()
        self.channels = [512, 1024, 2048]
        for width, channels in zip(widths[1:], self.channels, strict=True):
            self.add_module(f"conv_{channels}", nn.Conv2d(width, channels, 3, padding=1))

    def forward(self, x: Tensor) -> Any:
        maps = self.maps(x)[1:]
        return [self.get_submodule(f"conv_{channels}")(x) for channels, x in zip(self.channels, maps, strict=True)]


def backbone_of(network: Any, channels: Sequence[int], norms: str = "") -> Any:
    """Turn a classifier into a backbone that returns its last three maps; `norms` is what its norms are called."""
    classifier = type(network)

    class Backbone(classifier):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor) -> Any:
            maps = self.maps(x)[-3:]
            if not norms:
                return maps
            return [
                self.get_submodule(f"{norms}{index}")(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
                for index, x in enumerate(maps, 1)
            ]

    network.__class__ = Backbone
    network.head = nn.Identity()
    network.channels = channels
    for index, width in enumerate(channels, 1):
        if norms:
            network.add_module(f"{norms}{index}", nn.LayerNorm(width))
    return network


class FanBackbone(Fan):
    """A FAN whose third map is the output of one of its blocks, and whose fourth that of all of them, halved."""

    def __init__(self, widths: Sequence[int], heads: Sequence[int], stem: Sequence[int], last: int):
        super().__init__(widths, heads, 0, stem, pyramid=(1, 2, 3), last=last)
        self.channels = [24, widths[-1], 768]

    def forward(self, x: Tensor) -> Any:
        return self.pyramid_maps(x)


class TaoRtdetr(nn.Module):
    """TAO's network. Its decoder has 8 heads and 1024 hidden channels, whatever the spec says."""

    def __init__(
        self, backbone: Any, *, width: int, heads: int, inner: int, expansion: float, layers: int, queries: int,
        classes: int,
    ):  # fmt: skip
        super().__init__()
        self.backbone = backbone
        self.encoder = Encoder(backbone.channels, width, heads, inner, expansion)
        self.decoder = Decoder(width, 8, 1024, layers, queries, classes, 4, False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = self.decoder(self.encoder(self.backbone(x)))
        return result


def lightning(network: nn.Module) -> dict[str, Any]:
    """The checkpoint that TAO's training writes: the network is `model.model` of a Lightning module."""
    state = {f"model.model.{name}": value for name, value in network.state_dict().items()}
    return {
        "epoch": 71, "global_step": 9, "pytorch-lightning_version": "2.4.0", "state_dict": state, "loops": {},
        "callbacks": {"ModelCheckpoint": {"last_model_path": "model.pth"}}, "optimizer_states": [], "lr_schedulers": [],
        "tao_version": "7.0.1", "model": "rtdetr",
    }  # fmt: skip
