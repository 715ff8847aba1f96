# SPDX-License-Identifier: Apache-2.0
"""Train the network of segmentation.yaml on new scenes in each step."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional

from scenes import HERE, scenes
from taoq.spec.load import load_spec
from taoq.spec.source import read_spec
from taoq_segmentation.task import TASK, build_model, transform

BATCH_SIZE, LEARNING_RATE = 12, 2e-3
BACKGROUND_WEIGHT = 0.3  # Class weight in the loss; most pixels are background.


def main() -> None:
    """Train the network and write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--out", type=Path, default=HERE / "checkpoints" / "segformer_tiny.safetensors")
    arguments = parser.parse_args()
    spec = load_spec(read_spec(str(HERE / "segmentation.yaml"), []), TASK.spec, unused=TASK.unused)
    torch.manual_seed(0)
    model = build_model(spec, None).train()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=arguments.steps, pct_start=0.1)
    weights = torch.tensor([BACKGROUND_WEIGHT] + [1.0] * (spec.dataset.num_classes - 1))
    prepare = transform(spec.dataset.img_size)
    for step in range(arguments.steps):
        batch = scenes("train", BATCH_SIZE, f"{step}:")
        images = torch.stack([prepare(Image.fromarray(scene.pixels)) for scene in batch])
        masks = torch.stack([torch.from_numpy(scene.classes).long() for scene in batch])
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images)
        loss = functional.cross_entropy(logits.float(), masks, weights)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    arguments.out.parent.mkdir(exist_ok=True)
    # float16 halves the size of the file. taoq loads it as float32.
    state = model.state_dict()
    save_file(
        {name: value.half() if value.is_floating_point() else value for name, value in state.items()}, arguments.out
    )


if __name__ == "__main__":
    main()
