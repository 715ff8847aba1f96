# SPDX-License-Identifier: Apache-2.0
"""Peak memory of `taoq quantize` with 2048 calibration images against 64, to check that calibration streams them."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import measure

NETWORK = "resnet18"
BATCH_SIZE, WORKERS = 32, 1
FEW = 64
TARGET = 1.10


def main() -> int:
    """Measure the algorithms `max` and `entropy`."""
    options = measure.options(__doc__)
    many, rounds = (128, 1) if options.quick else (2048, 1)
    rows = []
    with measure.workplace() as folder:
        images, checkpoint = folder / "images", folder / f"{NETWORK}.pth"
        measure.in_child(measure.make_images, images, many)
        measure.in_child(measure.make_checkpoint, NETWORK, checkpoint)
        for algorithm in ("max", "entropy"):
            case = f"{algorithm}, {NETWORK}, batches of {BATCH_SIZE}"
            run = functools.partial(_quantize, folder, images, checkpoint, algorithm)
            pairs = measure.interleave(rounds, functools.partial(run, many), functools.partial(run, FEW))
            peak, work = (measure.column(pairs, name, measure.MB) for name in ("peak", "work_peak"))
            rows += [
                measure.Row(case=case, what="peak, MB", pairs=peak, target=TARGET),
                measure.Row(case=case, what="peak beyond start-up, MB", pairs=work),
                measure.Row(case=case, what="seconds", pairs=measure.column(pairs, "seconds")),
            ]
    title = "taoq quantize, modelopt.pytorch int8: number of calibration images"
    return measure.report(title, f"{many} images", f"{FEW} images", rows, gate=not options.no_gate)


def _quantize(folder: Path, images: Path, checkpoint: Path, algorithm: str, count: int) -> measure.Figures:
    spec = folder / f"{algorithm}_{count}.yaml"
    scheme = {"weights": {"dtype": "int8"}, "activations": {"dtype": "int8"}}
    section = {
        "model_path": str(checkpoint),
        "backend": "modelopt.pytorch",
        "mode": "static_ptq",
        "algorithm": algorithm,
        "device": "cpu",
        "layers": [{"module_name": type_, **scheme} for type_ in ("Conv2d", "Linear")],
        "calibration": {"num_samples": count, "batch_size": BATCH_SIZE},
    }
    measure.write_spec(spec, NETWORK, images, BATCH_SIZE, WORKERS, quantize=section)
    return measure.in_child(measure.measured_taoq, "quantize", spec, "modelopt.pytorch")


if __name__ == "__main__":
    sys.exit(main())
