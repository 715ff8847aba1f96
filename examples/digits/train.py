# SPDX-License-Identifier: Apache-2.0
"""Train the network of a spec on the digits and save it as float16 safetensors."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from torch.nn import functional
from torchvision import transforms
from torchvision.datasets import ImageFolder

from taoq.spec.load import load_spec
from taoq.spec.source import read_spec
from taoq.tasks.classification.model import build_model
from taoq.tasks.classification.spec import UNUSED, ClassificationSpec

SEED = 0
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.05
WARMUP = 0.1  # Fraction of all steps.
LABEL_SMOOTHING = 0.1
MAX_SHIFT = 0.1  # Fraction of the image size.
MAX_TURN = math.radians(12)
MAX_SCALE = 0.1


def load_images(folder: Path, side: int) -> tuple[Tensor, Tensor, list[str]]:
    """Load an image folder.

    Returns:
        Pixels in 0..1, labels and class names. The pixels are not normalized: the augmentation of training comes first
        and fills the borders with zeros, which must be black like the background of the digits.
    """
    resize = transforms.Resize((side, side), transforms.InterpolationMode.BILINEAR)
    images = ImageFolder(str(folder), transforms.Compose([resize, transforms.ToTensor()]))
    pixels, labels = zip(*images, strict=True)
    return torch.stack(pixels), torch.tensor(labels), images.classes


def jitter(pixels: Tensor) -> Tensor:
    """Randomly shift, rotate and scale each image."""
    count = len(pixels)

    def uniform(limit: float) -> Tensor:
        return (torch.rand(count) * 2 - 1) * limit

    turn, scale = uniform(MAX_TURN), 1 + uniform(MAX_SCALE)
    # grid_sample uses coordinates from -1 to 1, so the image size is 2.
    shift_x, shift_y = uniform(2 * MAX_SHIFT), uniform(2 * MAX_SHIFT)
    cos, sin = scale * turn.cos(), scale * turn.sin()
    matrix = torch.stack([cos, -sin, shift_x, sin, cos, shift_y], dim=1).view(count, 2, 3)
    grid = functional.affine_grid(matrix, list(pixels.shape), align_corners=False)
    return functional.grid_sample(pixels, grid, mode="bilinear", align_corners=False)


def train(
    network: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    normalize: transforms.Normalize,
    epochs: int,
    batch_size: int,
) -> None:
    """Train in place with AdamW, a linear warm-up and a cosine decay to zero."""
    # No weight decay for norms, biases and embeddings, as usual.
    decayed: list[nn.Parameter] = []
    not_decayed: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        exempt = parameter.ndim < 2 or name.endswith(("pos_embed", "cls_token"))
        (not_decayed if exempt else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": WEIGHT_DECAY},
        {"params": not_decayed, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE)
    steps_per_epoch = len(pixels) // batch_size  # Drop a smaller last batch: its batch-norm statistics would be noisy.
    steps = epochs * steps_per_epoch
    warmup = max(1, round(WARMUP * steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    network.train()
    for epoch in range(1, epochs + 1):
        total = 0.0
        for batch in torch.split(torch.randperm(len(pixels)), batch_size)[:steps_per_epoch]:
            output = network(normalize(jitter(pixels[batch])))
            loss = functional.cross_entropy(output, labels[batch], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        if epoch % 10 == 0 or epoch == epochs:
            print(f"epoch {epoch}/{epochs}: loss {total / steps_per_epoch:.4f}", flush=True)


@torch.inference_mode()
def top1(network: nn.Module, inputs: Tensor, labels: Tensor, batch_size: int) -> float:
    """Return the top-1 accuracy, 0..1."""
    network.eval()
    outputs = torch.cat([network(batch) for batch in torch.split(inputs, batch_size)])
    return (outputs.argmax(dim=1) == labels).double().mean().item()


def to_half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Round the floating-point tensors of a state dict to float16."""
    half = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous() for name, tensor in state.items()
    }
    for name, tensor in half.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} does not fit into float16")
    return half


def save(state: dict[str, Tensor], out: Path, metadata: dict[str, str]) -> None:
    """Write a state dict to a temporary file and rename it, so that `out` is always complete."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        # Not save_file: its files are readable only by their owner.
        temporary.write_bytes(to_safetensors(state, metadata))
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)


def main() -> int:
    """Train the network, evaluate it as it will be saved, and save it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("spec", type=Path, metavar="SPEC", help="YAML file of the network")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--out", type=Path, help="default: the spec's quantize.model_path")
    arguments = parser.parse_args()
    if arguments.epochs < 1:
        parser.error("--epochs must be at least 1")

    spec = load_spec(read_spec(str(arguments.spec), []), ClassificationSpec, unused=UNUSED)
    dataset = spec.dataset
    out: Path = arguments.out or Path(spec.quantize.model_path)
    train_dir = Path(dataset.root_dir) / "train"
    val_dir = Path(dataset.val_dataset.images_dir)
    for folder in (train_dir, val_dir):
        if not folder.is_dir():
            parser.error(f"no {folder}: run make_data.py first, and this from the repository root")

    torch.manual_seed(SEED)
    # With one thread, sums do not depend on the number of cores.
    torch.set_num_threads(1)
    augmentation = dataset.augmentation
    normalize = transforms.Normalize(augmentation.mean, augmentation.std)
    batch_size = dataset.batch_size
    network = build_model(spec, None)
    print(f"{sum(p.numel() for p in network.parameters())} parameters")
    pixels, labels, classes = load_images(train_dir, dataset.img_size)
    start = time.perf_counter()
    train(network, pixels, labels, normalize, arguments.epochs, batch_size)
    print(f"trained in {time.perf_counter() - start:.0f} s")

    # Evaluate the weights as in the file: rounded to float16, then loaded as float32.
    state = to_half(network.state_dict())
    network = build_model(spec, None)
    network.load_state_dict(state)
    val_pixels, val_labels, val_classes = load_images(val_dir, dataset.img_size)
    if val_classes != classes:
        raise ValueError(f"{val_dir} has other classes than {train_dir}")
    score = top1(network, normalize(val_pixels), val_labels, batch_size)
    metadata = {
        "classes": ",".join(classes),
        "epochs": str(arguments.epochs),
        "top1": f"{score:.4f}",
    }
    save(state, out, metadata)
    print(f"{out}: top-1 {score:.4f} on {len(val_labels)} images, {out.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
