# SPDX-License-Identifier: Apache-2.0
"""Train a small RT-DETR on digit scenes and save it as float16 safetensors.

A DETR learns slowly from nothing: each digit teaches one query only. So training has two stages. In the first, every
position of the encoder near a digit learns to name and box it, as in a one-stage detector, and the decoder is left
out. The second trains the whole network with its own loss, which then starts from proposals that are already good.
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
WARMUP = 300  # iterations
MAX_GRADIENT = 5.0
AVERAGING = 0.999  # decay of the averaged weights, which are the ones that are saved
CANDIDATES = 8  # positions that learn a digit in the first stage
Labels = list[dict[str, Tensor]]


def make_config() -> RTDetrConfig:
    """RT-DETR, narrowed until it has under four million parameters."""
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
        freeze_backbone_batch_norms=False,  # there are no pre-trained statistics to keep
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
        # Few, because the loss compares all denoising boxes of a batch with each other to use the diagonal.
        num_denoising=20,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: index for index, name in enumerate(CLASSES)},
    )


def use_bfloat16(module: nn.Module) -> None:
    """Let a module compute in bfloat16 while it trains, with its tensors returned in float32.

    For backbone and encoder only: a box in bfloat16 is off by up to half a pixel.
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
    """New scenes, the same ones whenever this iteration of this stage is run."""
    images, labels = [], []
    for number in range(BATCH_SIZE[stage]):
        scene = make_scene(source, Chance(f"train:{stage}:{iteration}:{number}"))
        corners = torch.tensor([[box.x, box.y, box.width, box.height] for box in scene.boxes], dtype=torch.float32)
        labels.append({
            "class_labels": torch.tensor([box.label for box in scene.boxes]),
            "boxes": box_convert(corners / SIDE, "xywh", "cxcywh"),
        })  # fmt: skip
        images.append(torch.from_numpy(scene.pixels))
    batch = torch.stack(images).permute(0, 3, 1, 2)  # of images with channels last, which is faster here
    return batch.float() / 255, labels


def proposals(network: RTDetrForObjectDetection, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Class logits and boxes (center, size) of every position of the encoder: the model's forward without decoder."""
    core = network.model
    features = core.backbone(pixels, torch.ones(pixels.shape[0], *pixels.shape[2:]))
    projected = [core.encoder_input_proj[level](feature) for level, (feature, _) in enumerate(features)]
    encoded = core.encoder(projected).last_hidden_state
    sources = [core.decoder_input_proj[level](feature) for level, feature in enumerate(encoded)]
    anchors, _ = core.generate_anchors(tuple(tuple(source.shape[-2:]) for source in sources))
    memory = core.enc_output(torch.cat([source.flatten(2).transpose(1, 2) for source in sources], 1))
    return core.enc_score_head(memory), (core.enc_bbox_head(memory) + anchors).sigmoid()


def proposal_loss(logits: Tensor, boxes: Tensor, labels: Labels) -> Tensor:
    """Teach each digit to the positions in it that already know it best, judged by score and overlap together.

    The assignment of TOOD (arXiv:2108.07755): many positions for each digit, chosen anew at every iteration.
    """
    targets = torch.zeros_like(logits)
    weights, found, wanted, guesses, classes = [], [], [], [], []
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
            owner = (overlap * chosen).argmax(0)  # a position between two digits learns the one it covers more
            positions = chosen.any(0).nonzero()[:, 0]
            owners = owner[positions]
            # The best position of a digit aims at its overlap, the others at less.
            top = (overlap * chosen).amax(1) / metric.amax(1).clamp(min=1e-9)
            aim = (metric[owners, positions] * top[owners]).clamp(max=1)
            targets[index, positions, label["class_labels"][owners]] = aim
        weights.append(aim)
        found.append(corners[index, positions])
        wanted.append(real[owners])
        guesses.append(logits[index, positions])
        classes.append(label["class_labels"][owners])
    weight, here, there = torch.cat(weights), torch.cat(found), torch.cat(wanted)
    total = weight.sum().clamp(min=1)
    focus = torch.where(targets > 0, targets, 0.75 * scores**2)
    named = functional.binary_cross_entropy_with_logits(logits, targets, focus, reduction="sum")
    shape = 2 * generalized_box_iou_loss(here, there) + 5 * (here - there).abs().sum(1)
    # The scores above learn where a digit is long before which one it is: this compares the classes directly.
    told_apart = functional.cross_entropy(torch.cat(guesses), torch.cat(classes))
    return (named + (weight * shape).sum()) / total + told_apart


def make_optimizer(network: nn.Module, stage: str) -> torch.optim.AdamW:
    """AdamW; norms and biases only lose from being pulled towards zero."""
    decayed = [parameter for parameter in network.parameters() if parameter.ndim > 1]
    free = [parameter for parameter in network.parameters() if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE[stage], fused=True)


def learning_rate(stage: str, iteration: int, iterations: int) -> float:
    """A linear warm-up and a cosine decay to nothing, or to a fifth where another stage follows."""
    if iteration < WARMUP:
        return LEARNING_RATE[stage] * (iteration + 1) / WARMUP
    floor = 0.2 if stage == "proposals" else 0.0
    progress = (iteration - WARMUP) / max(1, iterations - WARMUP)
    return LEARNING_RATE[stage] * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


@torch.no_grad()
def average(averaged: dict[str, Tensor], network: nn.Module, iteration: int) -> None:
    """Move the averaged weights a step towards the network's; faster at first, when they are far off."""
    decay = min(AVERAGING, (1 + iteration) / (20 + iteration))
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            averaged[name].lerp_(tensor, 1 - decay)
        else:
            averaged[name].copy_(tensor)


def batches(count: int, size: int) -> Iterator[range]:
    """Consecutive numbers below count."""
    return (range(start, min(start + size, count)) for start in range(0, count, size))


@torch.inference_mode()
def evaluate(state: dict[str, Tensor], config: RTDetrConfig, data: Path) -> tuple[float, float]:
    """AP and AP50 on the val scenes, of weights as they are in the file: float16, loaded in float32."""
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
    """Write a file so that it is never seen half-written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class Training:
    """The network, its averaged weights, and where the training stands; all of it in one file to resume from."""

    def __init__(self, out: Path, resume_file: Path, data: Path) -> None:
        self.out = out
        self.resume_file = resume_file
        self.data = data
        self.config = make_config()
        self.network = RTDetrForObjectDetection(self.config)
        self.network.set_attn_implementation("eager")  # its gradient is faster than the fused one's at this size
        self.network.to(memory_format=torch.channels_last)
        use_bfloat16(self.network.model.backbone)
        use_bfloat16(self.network.model.encoder)
        self.averaged = {name: tensor.clone() for name, tensor in self.network.state_dict().items()}
        self.stage = "proposals"
        self.iteration = 0
        self.seconds = 0.0
        self.optimizer = make_optimizer(self.network, self.stage)

    def save(self) -> None:
        """Write everything that resuming needs."""
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
        """Go on from the file."""
        saved = torch.load(self.resume_file, weights_only=True)
        self.network.load_state_dict(saved["network"])
        self.averaged = saved["averaged"]
        self.stage, self.iteration, self.seconds = saved["stage"], saved["iteration"], saved["seconds"]
        self.optimizer = make_optimizer(self.network, self.stage)
        self.optimizer.load_state_dict(saved["optimizer"])

    def export(self) -> str:
        """Score the averaged weights and write them with their config, as Hugging Face does; what the score is."""
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
        """The stage's loss on new scenes."""
        pixels, labels = make_batch(source, self.stage, self.iteration)
        torch.manual_seed(1_000_000 * (self.stage == "detector") + self.iteration)  # for the denoising queries
        if self.stage == "proposals":
            return proposal_loss(*proposals(self.network, pixels), labels)
        loss: Tensor = self.network(pixel_values=pixels, labels=labels).loss
        return loss

    def run(self, source: Source, stage: str, iterations: int, every: int) -> None:
        """Train a stage to its end; save, and in the second stage score, every so many iterations."""
        if self.stage != stage:
            self.stage, self.iteration = stage, 0
            self.optimizer = make_optimizer(self.network, stage)
        self.network.train()
        total = 0.0
        began = time.perf_counter()
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
                seconds = self.seconds + time.perf_counter() - began
                print(f"{stage} {self.iteration}/{iterations}: loss {total / 100:.3f}, {seconds:.0f} s", flush=True)
                total = 0.0
            if self.iteration % every == 0 or self.iteration == iterations:
                self.seconds += time.perf_counter() - began
                self.save()
                if stage == "detector":
                    print(f"{stage} {self.iteration}/{iterations}: {self.export()}", flush=True)
                began = time.perf_counter()  # scoring is no part of the training time


def main() -> int:
    """Train, saving and scoring as it goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--proposals", type=int, default=2200, help="iterations of the first stage (default 2200)")
    parser.add_argument("--iterations", type=int, default=4000, help="iterations of the second stage (default 4000)")
    parser.add_argument("--every", type=int, default=500, help="save after so many iterations (default 500)")
    parser.add_argument("--data", type=Path, default=HERE / "data", help="what make_data.py wrote")
    parser.add_argument("--out", type=Path, default=HERE / "checkpoints" / "rtdetr_small")
    parser.add_argument("--resume-file", type=Path, default=HERE / "training" / "state.pt")
    parser.add_argument("--resume", action="store_true", help="go on from the resume file")
    arguments = parser.parse_args()
    if not (arguments.data / "val.json").is_file():
        parser.error(f"no {arguments.data}: run make_data.py first")

    torch.manual_seed(SEED)
    # With one thread the sums are always taken in the same order, however many cores there are.
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
