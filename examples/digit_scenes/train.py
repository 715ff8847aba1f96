# SPDX-License-Identifier: Apache-2.0
"""Train a small RT-DETR on digit scenes and save it as float16 safetensors.

A DETR without pretraining learns slowly, because each digit is matched to only one query. Therefore training has two
stages. The first trains backbone and encoder like a one-stage detector: each encoder position near a digit predicts its
class and box. The second trains the whole network with its own loss, starting from good proposals.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import box_convert, box_iou, generalized_box_iou_loss
from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

from make_data import SIDE, Chance, Source, load_source, make_scene

HERE = Path(__file__).resolve().parent
SEED = 0
CLASSES = tuple(str(digit) for digit in range(10))
BATCH_SIZE = {"proposals": 16, "detector": 8}
LEARNING_RATE = {"proposals": 1.5e-3, "detector": 6e-4}
WEIGHT_DECAY = 1e-3
WARMUP = 300  # Iterations.
MAX_GRADIENT = 5.0
AVERAGING = 0.999  # Decay of the averaged weights, which are saved.
CANDIDATES = 8  # Positions per digit in the loss of the first stage.
Labels = list[dict[str, Tensor]]
"""Classes and boxes (center, size, relative to the image) of each image."""


def make_config() -> RTDetrConfig:
    """Return the config of a narrow RT-DETR with less than four million parameters."""
    width = 96
    sizes = [32, 64, 128, 256]
    backbone = RTDetrResNetConfig(
        embedding_size=32,
        hidden_sizes=sizes,
        depths=[1, 2, 2, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    return RTDetrConfig(
        backbone_config=backbone,
        freeze_backbone_batch_norms=False,  # There are no pretrained statistics to keep.
        encoder_in_channels=sizes[1:],
        encoder_hidden_dim=width,
        encoder_ffn_dim=256,
        encoder_attention_heads=6,
        d_model=width,
        decoder_in_channels=[width] * 3,
        decoder_ffn_dim=256,
        decoder_attention_heads=6,
        decoder_layers=3,
        num_queries=30,
        # Few, because the loss compares all denoising boxes of a batch pairwise, and uses only the diagonal.
        num_denoising=20,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: index for index, name in enumerate(CLASSES)},
    )


def use_bfloat16(module: nn.Module) -> None:
    """Let a module compute in bfloat16 during training, and return its outputs in float32.

    Only for backbone and encoder: in bfloat16, boxes would be off by up to half a pixel.
    """
    forward = module.forward

    def convert(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.float() if value.is_floating_point() else value
        if isinstance(value, dict):
            for key in value:
                value[key] = convert(value[key])
            return value
        return type(value)(convert(part) for part in value) if isinstance(value, list | tuple) else value

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=module.training):
            output = forward(*args, **kwargs)
        return convert(output)

    module.forward = wrapped  # type: ignore[method-assign]


def make_batch(source: Source, stage: str, iteration: int) -> tuple[Tensor, Labels]:
    """Make a batch of new scenes. The same stage and iteration give the same scenes."""
    images, labels = [], []
    for number in range(BATCH_SIZE[stage]):
        scene = make_scene(source, Chance(f"train:{stage}:{iteration}:{number}"))
        corners = torch.tensor([[box.x, box.y, box.width, box.height] for box in scene.boxes], dtype=torch.float32)
        labels.append({
            "class_labels": torch.tensor([box.label for box in scene.boxes]),
            "boxes": box_convert(corners / SIDE, "xywh", "cxcywh"),
        })  # fmt: skip
        images.append(torch.from_numpy(scene.pixels))
    batch = torch.stack(images).permute(0, 3, 1, 2)  # Channels last in memory, which is faster here.
    return batch.float() / 255, labels


def proposals(network: RTDetrForObjectDetection, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return class logits and boxes (center, size) of all encoder positions: the forward pass without the decoder."""
    core = network.model
    features = core.backbone(pixels, torch.ones(pixels.shape[0], *pixels.shape[2:]))
    projected = [core.encoder_input_proj[level](feature) for level, (feature, _) in enumerate(features)]
    encoded = core.encoder(projected).last_hidden_state
    sources = [core.decoder_input_proj[level](feature) for level, feature in enumerate(encoded)]
    anchors, _ = core.generate_anchors(tuple(tuple(source.shape[-2:]) for source in sources))
    memory = core.enc_output(torch.cat([source.flatten(2).transpose(1, 2) for source in sources], 1))
    return core.enc_score_head(memory), (core.enc_bbox_head(memory) + anchors).sigmoid()


def proposal_loss(logits: Tensor, boxes: Tensor, labels: Labels) -> Tensor:
    """Return the loss of the proposals, with the task-aligned assignment of TOOD (arXiv:2108.07755).

    Each digit is assigned to the positions inside of it that predict it best, by score and overlap together.
    """
    targets = torch.zeros_like(logits)
    weights, predicted_boxes, target_boxes, class_logits, classes = [], [], [], [], []
    corners = box_convert(boxes, "cxcywh", "xyxy")
    with torch.no_grad():
        scores = logits.sigmoid()
    for index, label in enumerate(labels):
        real = box_convert(label["boxes"], "cxcywh", "xyxy")
        with torch.no_grad():
            overlap = box_iou(real, corners[index])
            centers = boxes[index, :, :2]
            inside = ((centers[None] > real[:, None, :2]) & (centers[None] < real[:, None, 2:])).all(-1)
            metric = scores[index][:, label["class_labels"]].T.sqrt() * overlap**4 * inside
            best = metric.topk(CANDIDATES, dim=1)
            chosen = torch.zeros_like(metric).scatter_(1, best.indices, 1.0) * (metric > 0)
            owner = (overlap * chosen).argmax(
                0
            )  # A position inside two digits is assigned to the one it overlaps more.
            positions = chosen.any(0).nonzero()[:, 0]
            owners = owner[positions]
            # The target score of the best position is its overlap; all other positions get less.
            scale = (overlap * chosen).amax(1) / metric.amax(1).clamp(min=1e-9)
            target = (metric[owners, positions] * scale[owners]).clamp(max=1)
            targets[index, positions, label["class_labels"][owners]] = target
        weights.append(target)
        predicted_boxes.append(corners[index, positions])
        target_boxes.append(real[owners])
        class_logits.append(logits[index, positions])
        classes.append(label["class_labels"][owners])
    weight, predicted, target_box = torch.cat(weights), torch.cat(predicted_boxes), torch.cat(target_boxes)
    total = weight.sum().clamp(min=1)
    focus = torch.where(targets > 0, targets, 0.75 * scores**2)
    score_loss = functional.binary_cross_entropy_with_logits(logits, targets, focus, reduction="sum")
    box_loss = 2 * generalized_box_iou_loss(predicted, target_box) + 5 * (predicted - target_box).abs().sum(1)
    # With the score loss alone, the network finds digits long before it can classify them.
    class_loss = functional.cross_entropy(torch.cat(class_logits), torch.cat(classes))
    return (score_loss + (weight * box_loss).sum()) / total + class_loss


def make_optimizer(network: nn.Module, stage: str) -> torch.optim.AdamW:
    """Return AdamW, with no weight decay for norms and biases."""
    decayed = [parameter for parameter in network.parameters() if parameter.ndim > 1]
    not_decayed = [parameter for parameter in network.parameters() if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": not_decayed, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE[stage], fused=True)


def learning_rate(stage: str, iteration: int, iterations: int) -> float:
    """Return the learning rate: a linear warm-up, then a cosine decay to 0, or to a fifth in the first stage."""
    if iteration < WARMUP:
        return LEARNING_RATE[stage] * (iteration + 1) / WARMUP
    floor = 0.2 if stage == "proposals" else 0.0
    progress = (iteration - WARMUP) / max(1, iterations - WARMUP)
    return LEARNING_RATE[stage] * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


@torch.no_grad()
def average(averaged: dict[str, Tensor], network: nn.Module, iteration: int) -> None:
    """Update the moving average of the weights. The decay is smaller at first, when the weights change fast."""
    decay = min(AVERAGING, (1 + iteration) / (20 + iteration))
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            averaged[name].lerp_(tensor, 1 - decay)
        else:
            averaged[name].copy_(tensor)


def batches(count: int, size: int) -> Iterator[range]:
    """Yield consecutive ranges of at most `size` numbers below `count`."""
    return (range(start, min(start + size, count)) for start in range(0, count, size))


@torch.inference_mode()
def evaluate(state: dict[str, Tensor], config: RTDetrConfig, data: Path) -> tuple[float, float]:
    """Return AP and AP50 on the val scenes, for float16 weights loaded as float32."""
    network = RTDetrForObjectDetection(config)
    network.load_state_dict(state)
    network.eval()
    results = []
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(data / "val.json"))
    images = coco.loadImgs(coco.getImgIds())
    for numbers in batches(len(images), 20):
        files = [data / "val" / images[number]["file_name"] for number in numbers]
        pixels = torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files])
        output = network(pixel_values=pixels.float() / 255)
        scores, places = output.logits.sigmoid().flatten(1).topk(config.num_queries)
        queries, classes = places // len(CLASSES), places % len(CLASSES)
        boxes = output.pred_boxes.gather(1, queries[..., None].expand(-1, -1, 4))
        boxes = box_convert(boxes, "cxcywh", "xywh") * SIDE
        for row, number in enumerate(numbers):
            for score, name, box in zip(scores[row], classes[row], boxes[row], strict=True):
                results.append({
                    "image_id": images[number]["id"], "category_id": name.item() + 1, "score": score.item(),
                    "bbox": box.tolist(),
                })  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        scorer = COCOeval(coco, coco.loadRes(results), "bbox")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return float(scorer.stats[0]), float(scorer.stats[1])


def to_half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Round the floating-point tensors of a state dict to float16."""
    half = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous() for name, tensor in state.items()
    }
    for name, tensor in half.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} does not fit into float16")
    return half


def replace(path: Path, content: bytes) -> None:
    """Write a temporary file and rename it, so that `path` is always complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class Training:
    """State of the training: network, averaged weights, optimizer and progress, stored in a file to resume from."""

    def __init__(self, out: Path, resume_file: Path, data: Path) -> None:
        self.out = out
        self.resume_file = resume_file
        self.data = data
        self.config = make_config()
        self.network = RTDetrForObjectDetection(self.config)
        self.network.set_attn_implementation("eager")  # Its backward pass is faster at this size.
        self.network.to(memory_format=torch.channels_last)
        use_bfloat16(self.network.model.backbone)
        use_bfloat16(self.network.model.encoder)
        self.averaged = {name: tensor.clone() for name, tensor in self.network.state_dict().items()}
        self.stage = "proposals"
        self.iteration = 0
        self.seconds = 0.0
        self.optimizer = make_optimizer(self.network, self.stage)

    def save(self) -> None:
        """Write the state to the resume file."""
        buffer = io.BytesIO()
        torch.save(
            {
                "network": self.network.state_dict(),
                "averaged": self.averaged,
                "optimizer": self.optimizer.state_dict(),
                "stage": self.stage,
                "iteration": self.iteration,
                "seconds": self.seconds,
            },
            buffer,
        )
        replace(self.resume_file, buffer.getvalue())

    def resume(self) -> None:
        """Restore the state from the resume file."""
        saved = torch.load(self.resume_file, weights_only=True)
        self.network.load_state_dict(saved["network"])
        self.averaged = saved["averaged"]
        self.stage, self.iteration, self.seconds = saved["stage"], saved["iteration"], saved["seconds"]
        self.optimizer = make_optimizer(self.network, self.stage)
        self.optimizer.load_state_dict(saved["optimizer"])

    def export(self) -> str:
        """Evaluate the averaged weights and write them as a Hugging Face checkpoint. Return the scores as text."""
        state = to_half(self.averaged)
        precision, precision50 = evaluate(state, self.config, self.data)
        metadata = {
            "classes": ",".join(CLASSES),
            "input_size": f"{SIDE}x{SIDE}",
            "stage": self.stage,
            "iterations": str(self.iteration),
            "AP": f"{precision:.4f}",
            "AP50": f"{precision50:.4f}",
        }
        replace(self.out / "model.safetensors", to_safetensors(state, metadata))
        text = json.dumps(self.config.to_dict(), indent=2, sort_keys=True)
        replace(self.out / "config.json", f"{text}\n".encode())
        return f"AP {precision:.4f} AP50 {precision50:.4f}"

    def loss(self, source: Source) -> Tensor:
        """Return the loss of the current stage on new scenes."""
        pixels, labels = make_batch(source, self.stage, self.iteration)
        torch.manual_seed(1_000_000 * (self.stage == "detector") + self.iteration)  # For the denoising queries.
        if self.stage == "proposals":
            return proposal_loss(*proposals(self.network, pixels), labels)
        loss: Tensor = self.network(pixel_values=pixels, labels=labels).loss
        return loss

    def run(self, source: Source, stage: str, iterations: int, every: int) -> None:
        """Train a stage to its end. Save the state every `every` iterations, and evaluate in the second stage."""
        if self.stage != stage:
            self.stage, self.iteration = stage, 0
            self.optimizer = make_optimizer(self.network, stage)
        self.network.train()
        total = 0.0
        started = time.perf_counter()
        while self.iteration < iterations:
            rate = learning_rate(stage, self.iteration, iterations)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            loss = self.loss(source)
            self.optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(self.network.parameters(), MAX_GRADIENT)
            self.optimizer.step()
            average(self.averaged, self.network, self.iteration)
            self.iteration += 1
            total += loss.item()
            if self.iteration % 100 == 0:
                seconds = self.seconds + time.perf_counter() - started
                print(f"{stage} {self.iteration}/{iterations}: loss {total / 100:.3f}, {seconds:.0f} s", flush=True)
                total = 0.0
            if self.iteration % every == 0 or self.iteration == iterations:
                self.seconds += time.perf_counter() - started
                self.save()
                if stage == "detector":
                    print(f"{stage} {self.iteration}/{iterations}: {self.export()}", flush=True)
                started = time.perf_counter()  # Training time excludes evaluation.


def main() -> int:
    """Train both stages, with regular saving and evaluation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--proposals", type=int, default=2200, help="iterations of the first stage (default 2200)")
    parser.add_argument("--iterations", type=int, default=4000, help="iterations of the second stage (default 4000)")
    parser.add_argument("--every", type=int, default=500, help="iterations between saves (default 500)")
    parser.add_argument("--data", type=Path, default=HERE / "data", help="folder that make_data.py wrote")
    parser.add_argument("--out", type=Path, default=HERE / "checkpoints" / "rtdetr_small")
    parser.add_argument("--resume-file", type=Path, default=HERE / "training" / "state.pt")
    parser.add_argument("--resume", action="store_true", help="continue from the resume file")
    arguments = parser.parse_args()
    if not (arguments.data / "val.json").is_file():
        parser.error(f"no {arguments.data}: run make_data.py first")

    torch.manual_seed(SEED)
    # With one thread, sums do not depend on the number of cores.
    torch.set_num_threads(1)
    training = Training(arguments.out, arguments.resume_file, arguments.data)
    if arguments.resume:
        training.resume()
        print(f"resumed at {training.stage} {training.iteration}")
    print(f"{sum(parameter.numel() for parameter in training.network.parameters())} parameters")
    source = load_source("train")
    if training.stage == "proposals":
        training.run(source, "proposals", arguments.proposals, arguments.every)
    training.run(source, "detector", arguments.iterations, arguments.every)
    print(f"trained in {training.seconds:.0f} s; wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
