"""Build a classifier of taoq from a checkpoint of TAO, and compare it with the network that was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from torchvision.transforms.functional import to_tensor

from taoq.spec.load import spec_from_dict
from taoq.tasks.classification.model import build_model
from taoq.tasks.classification.spec import ClassificationSpec

CLASSES = 5


def spec(name: str, size: int = 224, args: dict[str, Any] | None = None, **backbone: Any) -> ClassificationSpec:
    data = {
        "model": {"backbone": {"type": name, "args": args or {}, **backbone}},
        "dataset": {"num_classes": CLASSES, "img_size": size},
    }
    return spec_from_dict(data, ClassificationSpec)


def build(name: str, checkpoint: Path | None, size: int, args: dict[str, Any], **backbone: Any) -> nn.Module:
    return build_model(spec(name, size, args, **backbone), checkpoint and str(checkpoint)).eval()


def photographs(size: int) -> Tensor:
    """Two real photographs, normalized."""
    images = [Image.fromarray(load_sample_image(name)).resize((size, size)) for name in ("flower.jpg", "china.jpg")]
    return torch.stack([to_tensor(image) for image in images]) * 4 - 2


def assert_same(ours: nn.Module, theirs: nn.Module, size: int) -> None:
    """Check that two networks give the same logits, within the rounding of float32, and that these are not trivial."""
    with torch.inference_mode():
        given, expected = ours(photographs(size)), theirs(photographs(size))
    assert given.shape == (2, CLASSES)
    largest = expected.abs().max()
    assert (expected[0] - expected[1]).abs().max() > 1e-3 * largest
    torch.testing.assert_close(given, expected, rtol=0, atol=float(1e-4 * largest))
