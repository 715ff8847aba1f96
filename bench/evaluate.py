# SPDX-License-Identifier: Apache-2.0
"""Images per second of `taoq evaluate` against a hand-written loop of DataLoader, forward pass and top-1 accuracy."""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure

import taoq

BATCH_SIZE = 32
TARGET = 0.95


@dataclass(frozen=True)
class Case:
    """A network and its data.

    Attributes:
        network: Name of the network in timm.
        workers: Number of processes that read images.
        quantized: Whether to evaluate an int8 artifact of modelopt.pytorch instead of the float checkpoint.
        images: Number of images.
    """

    network: str
    workers: int
    quantized: bool
    images: int

    @property
    def name(self) -> str:
        """Name of the case in the table."""
        return f"{self.network} {'int8' if self.quantized else 'float'}, {self.workers} workers, {self.images} images"


def main() -> int:
    """Measure a float network, an artifact, and a network so small that reading the images dominates."""
    options = measure.options(__doc__)
    rounds, images = (1, 64) if options.quick else (9, 128)
    cases = [
        Case("resnet18", 2, False, images),
        Case("resnet18", 0, True, images),
        Case("mobilenetv3_small_050", 2, False, images * 4),
    ]
    rows: list[measure.Row] = []
    with measure.workplace() as folder:
        for case in cases:
            data, checkpoint = folder / f"images_{case.images}", folder / f"{case.network}.pth"
            if not data.exists():
                measure.in_child(measure.make_images, data, case.images)
            if not checkpoint.exists():
                measure.in_child(measure.make_checkpoint, case.network, checkpoint)
            pairs = measure.in_child(_turns, case, rounds, folder, data, checkpoint)
            rate = measure.column(pairs, "rate")
            rows += [
                measure.Row(case=case.name, what="images/s", pairs=rate, target=TARGET, at_least=True),
                measure.Row(case=case.name, what="whole command, s", pairs=measure.column(pairs, "seconds")),
            ]
    return measure.report("taoq evaluate / bare loop", "taoq", "bare", rows, gate=not options.no_gate)


def _turns(
    case: Case, rounds: int, folder: Path, images: Path, checkpoint: Path
) -> list[tuple[measure.Figures, measure.Figures]]:
    """Measure both sides in turns in this process, after a round for warming up."""
    measure.start_up("classification_pyt", "evaluate")
    spec = folder / "evaluate.yaml"
    scheme = {"weights": {"dtype": "int8"}, "activations": {"dtype": "int8"}}
    sections: dict[str, Any] = {
        "quantize": {
            "model_path": str(checkpoint),
            "results_dir": str(folder / "artifact"),
            "backend": "modelopt.pytorch",
            "mode": "static_ptq",
            "device": "cpu",
            "layers": [{"module_name": type_, **scheme} for type_ in ("Conv2d", "Linear")],
            "calibration": {"num_samples": BATCH_SIZE, "batch_size": BATCH_SIZE},
        },
        "evaluate": {"checkpoint": str(folder / "artifact" if case.quantized else checkpoint), "device": "cpu"},
    }
    measure.write_spec(spec, case.network, images, BATCH_SIZE, case.workers, **sections)
    if case.quantized:
        taoq.run("classification_pyt", "quantize", spec)
    model_file = next((folder / "artifact").glob("*.pth")) if case.quantized else checkpoint
    pairs = measure.interleave(rounds + 1, lambda: _taoq(spec), lambda: _bare(case, model_file, images))
    for ours, other in pairs:
        if abs(ours["accuracy"] - other["accuracy"]) > 1e-6:
            raise RuntimeError(f"taoq and the bare loop differ: top-1 {ours['accuracy']}, {other['accuracy']}")
    return pairs[1:]


def _taoq(spec: Path) -> measure.Figures:
    results = spec.with_suffix("") / "evaluate"
    shutil.rmtree(results, ignore_errors=True)
    started = time.perf_counter()
    result: taoq.EvaluateResult = taoq.run("classification_pyt", "evaluate", spec)
    seconds = time.perf_counter() - started
    rate = result.num_images / result.seconds
    return {"rate": rate, "seconds": seconds, "accuracy": result.metrics["val_acc_1"]}


def _bare(case: Case, model_file: Path, images: Path) -> measure.Figures:
    import torch

    started = time.perf_counter()
    if case.quantized:
        import modelopt.torch.opt as mto
        import timm

        model = mto.restore(timm.create_model(case.network, num_classes=measure.CLASSES), model_file).eval()
    else:
        model = measure.raw_model(case.network, model_file)
    loop = time.perf_counter()
    correct = total = 0
    with torch.inference_mode():
        for batch, labels in measure.raw_loader(images, BATCH_SIZE, case.workers):
            correct += int((model(batch).argmax(1) == labels).sum())
            total += len(labels)
    ended = time.perf_counter()
    return {"rate": total / (ended - loop), "seconds": ended - started, "accuracy": correct / total}


if __name__ == "__main__":
    sys.exit(main())
