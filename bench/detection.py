# SPDX-License-Identifier: Apache-2.0
"""`taoq rtdetr evaluate` and a forward pass against transformers, and the memory of the COCO metric.

On both sides an evaluation includes everything after start-up: loading the model, reading the images and computing the
COCO metric. taoq also writes its results.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure

import taoq
from taoq.pipeline.memory import peak_resident

SCENES = Path(__file__).resolve().parent.parent / "examples" / "digit_scenes"
CHECKPOINT = SCENES / "checkpoints" / "rtdetr_small"
BATCH_SIZE = 20
EVALUATION, FORWARD = 0.90, 1.0
MEMORY, SLOWING = 2000.0, 1.2
"""Limits of the metric: memory of its process in MB, and time of the last updates relative to the first."""


def main() -> int:
    """Measure the evaluation, the forward pass and the metric."""
    options = measure.options(__doc__)
    rounds = 1 if options.quick else 5
    rows: list[measure.Row] = []
    with measure.workplace() as folder:
        data = folder / "data"
        subprocess.run([sys.executable, SCENES / "make_data.py", "--out", data], check=True, capture_output=True)
        pairs = measure.in_child(_evaluations, rounds, folder, data)
        case = "evaluate, small RT-DETR at 160, 300 scenes"
        rate = measure.column(pairs, "rate")
        rows.append(measure.Row(case=case, what="images/s", pairs=rate, target=EVALUATION, at_least=True))
        for name, runs in (("small RT-DETR at 160, batch 8", 10), ("R18 at 640, batch 1", 3)):
            pairs = measure.in_child(_forwards, name, rounds, 1 if options.quick else runs)
            seconds = measure.column(pairs, "seconds")
            rows.append(measure.Row(case=f"forward, {name}", what="seconds", pairs=seconds, target=FORWARD))
        images = 500 if options.quick else 5000
        peak, first, last = measure.in_child(_metric, folder, images)
    code = measure.report("taoq / transformers", "taoq", "transformers", rows, gate=not options.no_gate)
    missed = peak > MEMORY or last / first > SLOWING
    print(
        f"COCO metric, {images} images x 300 detections, 80 classes: peak {peak:.0f} MB (<= {MEMORY:.0f});"
        f" last tenth of the updates takes {last / first:.2f} times the first (<= {SLOWING}):"
        f" {'MISSED' if missed else 'met'}"
    )
    return code or int(missed and not options.no_gate)


def _evaluations(rounds: int, folder: Path, data: Path) -> list[tuple[measure.Figures, measure.Figures]]:
    """Measure both sides in turns in this process, after a round for warming up."""
    import transformers  # noqa: F401 (part of the start-up)

    measure.start_up("rtdetr", "evaluate")
    pairs = measure.interleave(rounds + 1, lambda: _taoq(folder, data), lambda: _transformers(data))
    for ours, other in pairs:
        if abs(ours["AP"] - other["AP"]) > 2e-3:
            raise RuntimeError(f"taoq and transformers differ: AP {ours['AP']}, {other['AP']}")
    return pairs[1:]


def _taoq(folder: Path, data: Path) -> measure.Figures:
    results = folder / "results"
    shutil.rmtree(results, ignore_errors=True)
    source = f"{{image_dir: {data / 'val'}, json_file: {data / 'val.json'}}}"
    overrides = [
        f"dataset.test_data_sources={source}",
        f"evaluate.checkpoint={CHECKPOINT}",
        "evaluate.device=cpu",
        f"evaluate.results_dir={results}",
        f"evaluate.batch_size={BATCH_SIZE}",
    ]
    started = time.perf_counter()
    result: taoq.EvaluateResult = taoq.run("rtdetr", "evaluate", SCENES / "rtdetr.yaml", overrides)
    seconds = time.perf_counter() - started
    return {"rate": result.num_images / seconds, "AP": result.metrics["val_mAP"]}


def _small() -> Any:
    """Load the example's network with transformers."""
    import torch
    from transformers import RTDetrForObjectDetection

    return RTDetrForObjectDetection.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


def _transformers(data: Path) -> measure.Figures:
    """Evaluate without taoq: image processor, model, post-processing, pycocotools."""
    import torch
    from PIL import Image
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    from transformers import RTDetrImageProcessor

    started = time.perf_counter()
    processor = RTDetrImageProcessor(size={"height": 160, "width": 160})
    network = _small()
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(data / "val.json"))
        images = truth.loadImgs(truth.getImgIds())
        results = []
        for start in range(0, len(images), BATCH_SIZE):
            batch = images[start : start + BATCH_SIZE]
            pictures = [Image.open(data / "val" / image["file_name"]).convert("RGB") for image in batch]
            sizes = torch.tensor([picture.size[::-1] for picture in pictures])
            with torch.inference_mode():
                outputs = network(**processor(images=pictures, return_tensors="pt"))
            detected = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)
            for image, detections in zip(batch, detected, strict=True):
                for score, label, box in zip(
                    detections["scores"].tolist(),
                    detections["labels"].tolist(),
                    detections["boxes"].tolist(),
                    strict=True,
                ):
                    x, y, right, bottom = box
                    results.append(
                        {
                            "image_id": image["id"],
                            "category_id": label + 1,
                            "score": score,
                            "bbox": [x, y, right - x, bottom - y],
                        }
                    )
        run = COCOeval(truth, truth.loadRes(results), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return {"rate": len(images) / (time.perf_counter() - started), "AP": float(run.stats[0])}


def _forwards(name: str, rounds: int, runs: int) -> list[tuple[measure.Figures, measure.Figures]]:
    import torch
    from transformers import RTDetrForObjectDetection

    from taoq.spec.load import load_spec
    from taoq.spec.source import read_spec
    from taoq.tasks.rtdetr.model import build_model, make_config
    from taoq.tasks.rtdetr.spec import UNUSED, RtdetrSpec

    torch.manual_seed(0)
    if name.startswith("small"):
        spec = load_spec(read_spec(str(SCENES / "rtdetr.yaml"), []), RtdetrSpec, unused=UNUSED)
        ours, other, images = build_model(spec, str(CHECKPOINT)), _small(), torch.rand(8, 3, 160, 160)
    else:
        overrides = ["model.backbone=resnet_18", "model.expansion=0.5", "model.dec_layers=3"]
        spec = load_spec(read_spec(None, overrides), RtdetrSpec, unused=UNUSED)
        ours, images = build_model(spec, None), torch.rand(1, 3, 640, 640)
        torch.manual_seed(0)
        other = RTDetrForObjectDetection(make_config(spec)).eval()
    run = functools.partial(_forward, images=images, runs=runs)
    return measure.interleave(rounds + 1, lambda: run(ours), lambda: run(other))[1:]


def _forward(network: Callable[[Any], Any], images: Any, runs: int) -> measure.Figures:
    import torch

    started = time.perf_counter()
    with torch.inference_mode():
        for _ in range(runs):
            network(images)
    return {"seconds": (time.perf_counter() - started) / runs}


def _metric(folder: Path, images: int) -> tuple[float, float, float]:
    """Return the peak memory of the process in MB, and the median seconds of the first and last tenth of updates."""
    import torch

    from taoq.spec.load import spec_from_dict
    from taoq.tasks.rtdetr.data import Targets
    from taoq.tasks.rtdetr.metric import CocoMetric
    from taoq.tasks.rtdetr.spec import RtdetrSpec

    data = {
        "images": [{"id": number + 1, "file_name": "none.jpg"} for number in range(images)],
        "categories": [{"id": number + 1, "name": str(number)} for number in range(80)],
        "annotations": [
            {"id": number + 1, "image_id": number % images + 1, "category_id": number % 80 + 1, "bbox": [9, 9, 40, 40]}
            for number in range(7 * images)
        ],
    }
    (folder / "many.json").write_text(json.dumps(data), encoding="utf-8")
    source = {"image_dir": str(folder), "json_file": str(folder / "many.json")}
    metric = CocoMetric(spec_from_dict({"dataset": {"test_data_sources": source}}, RtdetrSpec))
    generator = torch.Generator().manual_seed(0)
    seconds = []
    for start in range(0, images, 50):
        outputs = {
            "pred_logits": torch.randn(50, 300, 80, generator=generator),
            "pred_boxes": torch.rand(50, 300, 4, generator=generator),
        }
        targets = Targets(tuple(range(start + 1, start + 51)), torch.full((50, 2), 640.0))
        started = time.perf_counter()
        metric.update(outputs, targets)
        seconds.append(time.perf_counter() - started)
    seconds = seconds[1:]  # The first update includes the set-up of torch.
    metric.compute()
    (folder / "metric").mkdir()
    metric.write(folder / "metric")
    tenth = max(1, len(seconds) // 10)
    peak = peak_resident() / measure.MB
    return peak, statistics.median(seconds[:tenth]), statistics.median(seconds[-tenth:])


if __name__ == "__main__":
    sys.exit(main())
