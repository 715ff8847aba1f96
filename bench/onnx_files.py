# SPDX-License-Identifier: Apache-2.0
"""ONNX: `taoq quantize` against bare ModelOpt, the memory of calibration, and the speed of the graphs on this CPU."""

from __future__ import annotations

import functools
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import measure

NETWORK = "resnet18"
BATCH_SIZE, WORKERS = 32, 1
FEW = 32
TARGET = 1.10
FASTER = 1.5
"""Least speed-up over float of a graph of backend onnxruntime on a CPU."""


def main() -> int:
    """Measure quantize, the memory of calibration, and the speed of the graphs."""
    options = measure.options(__doc__)
    images_of, many, rounds, runs = (32, 64, 1, 5) if options.quick else (128, 512, 5, 40)
    rows: list[measure.Row] = []
    with measure.workplace() as folder:
        images = folder / "images"
        measure.in_child(measure.make_images, images, many)
        measure.in_child(measure.make_checkpoint, NETWORK, folder / f"{NETWORK}.pth")
        measure.in_child(measure.make_onnx, NETWORK, folder / f"{NETWORK}.pth", images, folder / "float.onnx")
        rows += _against_modelopt(folder, images, images_of, rounds)
        for algorithm in ("max", "entropy"):
            rows += _memory(folder, images, algorithm, many)
        rows += _speed(folder, images, runs)
    return measure.report("ONNX", "taoq", "other", rows, gate=not options.no_gate)


def _against_modelopt(folder: Path, images: Path, count: int, rounds: int) -> list[measure.Row]:
    ours = functools.partial(_quantize, folder, images, "modelopt.onnx", "max", count)
    other = functools.partial(measure.in_child, _bare, folder, images, count)
    pairs = measure.interleave(rounds, ours, other)
    case = f"quantize, modelopt.onnx int8, {NETWORK}, {count} images / bare ModelOpt"
    return [
        measure.Row(case=case, what="seconds", pairs=measure.column(pairs, "seconds"), target=TARGET),
        measure.Row(case=case, what="peak, MB", pairs=measure.column(pairs, "peak", measure.MB), target=TARGET),
    ]


def _memory(folder: Path, images: Path, algorithm: str, many: int) -> list[measure.Row]:
    rows = []
    for backend in ("modelopt.onnx", "onnxruntime"):
        run = functools.partial(_quantize, folder, images, backend, algorithm)
        pairs = measure.interleave(1, functools.partial(run, many), functools.partial(run, FEW))
        case = f"calibration, {backend}, {algorithm}, {many} / {FEW} images"
        peak = measure.column(pairs, "peak", measure.MB)
        rows.append(measure.Row(case=case, what="peak, MB", pairs=peak, target=TARGET))
    return rows


def _speed(folder: Path, images: Path, runs: int) -> list[measure.Row]:
    for backend in ("modelopt.onnx", "onnxruntime"):
        _quantize(folder, images, backend, "max", FEW)
    rows = []
    for batch in (1, 8):
        seconds = measure.in_child(_run_graphs, folder, batch, runs)
        for backend, target in (("modelopt.onnx", None), ("onnxruntime", FASTER)):
            rows.append(
                measure.Row(
                    case=f"speed, {backend} int8 / float, {NETWORK} at {measure.SIZE}, batch {batch}",
                    what="images/s",
                    pairs=[(batch / a, batch / b) for a, b in zip(seconds[backend], seconds["float"], strict=True)],
                    target=target,
                    at_least=True,
                )
            )
    return rows


def _quantize(folder: Path, images: Path, backend: str, algorithm: str, count: int) -> measure.Figures:
    artifact = folder / f"artifact_{backend}"
    shutil.rmtree(artifact, ignore_errors=True)
    scheme = {"weights": {"dtype": "int8"}, "activations": {"dtype": "int8"}}
    section = {
        "model_path": str(folder / "float.onnx"),
        "results_dir": str(artifact),
        "backend": backend,
        "mode": "static_ptq",
        "algorithm": algorithm,
        "device": "cpu",
        "layers": [{"module_name": type_, **scheme} for type_ in ("Conv", "Gemm")],
        "calibration": {"num_samples": count, "batch_size": BATCH_SIZE},
    }
    spec = folder / f"{backend}_{algorithm}_{count}.yaml"
    measure.write_spec(spec, NETWORK, images, BATCH_SIZE, WORKERS, quantize=section)
    return measure.in_child(measure.measured_taoq, "quantize", spec, backend)


def _bare(folder: Path, images: Path, count: int) -> measure.Figures:
    """Quantize without taoq: the function of the library, with a reader that streams."""
    import modelopt.onnx.quantization as moq
    import torchvision  # noqa: F401

    class Reader:
        def __init__(self) -> None:
            self.rewind()

        def rewind(self) -> None:
            self._batches = self._read()

        def _read(self) -> Iterator[dict[str, Any]]:
            seen = 0
            for batch, _ in measure.raw_loader(images, BATCH_SIZE, WORKERS):
                if seen < count:
                    yield {"input": batch[: count - seen].numpy()}
                seen += len(batch)

        def get_next(self) -> dict[str, Any] | None:
            return next(self._batches, None)

        def get_first(self) -> dict[str, Any]:
            return next(self._read())

    result = folder / "bare.onnx"
    result.unlink(missing_ok=True)
    return measure.measured(
        lambda: moq.quantize(
            str(folder / "float.onnx"),
            quantize_mode="int8",
            calibration_data_reader=Reader(),
            calibration_method="max",
            calibration_eps=["cpu"],
            op_types_to_quantize=["Conv", "Gemm"],
            high_precision_dtype="fp32",
            dq_only=True,
            output_path=str(result),
        )
    )


def _run_graphs(folder: Path, batch: int, runs: int) -> dict[str, list[float]]:
    """Run the graphs in turns and return the seconds of each run, by graph."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    files = {
        "float": folder / "float.onnx",
        **{name: folder / f"artifact_{name}" / "quantized_model.onnx" for name in ("modelopt.onnx", "onnxruntime")},
    }
    sessions = {
        name: onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for name, path in files.items()
    }
    images = np.random.default_rng(0).standard_normal((batch, 3, measure.SIZE, measure.SIZE)).astype(np.float32)
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    for number in range(runs + 3):
        for name, session in sessions.items():
            started = time.perf_counter()
            session.run(None, {"input": images})
            if number >= 3:  # The first runs warm up.
                seconds[name].append(time.perf_counter() - started)
    return seconds


if __name__ == "__main__":
    sys.exit(main())
