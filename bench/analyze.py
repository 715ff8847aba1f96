# SPDX-License-Identifier: Apache-2.0
"""`taoq analyze` against what its work costs by hand: (layers + 2) forward passes over the sample, one calibration.

For ONNX files there is one session build a layer as well.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure

NETWORK = "mobilenetv3_small_100"
BATCH_SIZE, WORKERS = 32, 1


@dataclass(frozen=True)
class Case:
    """A backend, with the name that it has for a convolution.

    Attributes:
        backend: As in the spec.
        convolution: As in the rules. All are quantized.
        float_file: The float model, in the folder of the run.
        parts: Measures, by hand, the seconds of one forward pass over the images, of one calibration, and of one
            session build: of (float model, folder of the images).
        target: Quantizers that are off still cost ModelOpt's network 4 % here, and one layer's are on. For each layer
            onnxruntime's quantizer makes a graph, which is not in the other side, and its Q/DQ nodes stand between
            operators that would run as one.
    """

    backend: str
    convolution: str
    float_file: str
    parts: Callable[[Path, Path], measure.Figures]
    target: float


def main() -> int:
    """Measure a torch backend and an ONNX backend."""
    options = measure.options(__doc__)
    images_of, rounds = (32, 1) if options.quick else (256, 2)
    rows = []
    with measure.workplace() as folder:
        images, few = folder / "images", folder / "few"
        measure.in_child(measure.make_images, images, images_of)
        measure.in_child(measure.make_images, few, 10)
        measure.in_child(measure.make_checkpoint, NETWORK, folder / "float.pth")
        measure.in_child(measure.make_onnx, NETWORK, folder / "float.pth", images, folder / "float.onnx")
        for case in (
            Case("modelopt.pytorch", "Conv2d", "float.pth", _modelopt, 1.10),
            Case("onnxruntime", "Conv", "float.onnx", _onnxruntime, 1.30),
        ):
            rows.append(_compare(case, folder, images, few, images_of, rounds))
    return measure.report("taoq analyze / its parts by hand", "taoq", "by hand", rows, gate=not options.no_gate)


def _compare(case: Case, folder: Path, images: Path, few: Path, count: int, rounds: int) -> measure.Row:
    spec, results = folder / f"{case.backend}.yaml", folder / f"analysis_{case.backend}"
    scheme = {"weights": {"dtype": "int8"}, "activations": {"dtype": "int8"}}
    quantize = {
        "model_path": str(folder / case.float_file),
        "backend": case.backend,
        "mode": "static_ptq",
        "device": "cpu",
        "layers": [{"module_name": case.convolution, **scheme}],
        "calibration": {"num_samples": count, "batch_size": BATCH_SIZE},
    }
    section = {"results_dir": str(results), "num_samples": count, "confirm": 0}
    measure.write_spec(spec, NETWORK, images, BATCH_SIZE, WORKERS, quantize=quantize, analyze=section)
    pairs, layers = [], 0
    for _ in range(rounds):
        shutil.rmtree(results, ignore_errors=True)
        seconds = measure.in_child(_taoq, spec, case.backend, few)["seconds"]
        layers = json.loads((results / "analysis.json").read_text(encoding="utf-8"))["layers"]
        parts = measure.in_child(case.parts, folder / case.float_file, images)
        pairs.append((seconds, parts["calibration"] + (layers + 2) * parts["forward"] + layers * parts["build"]))
    name = f"{case.backend}, {NETWORK}, {layers} layers, {count} images"
    return measure.Row(case=name, what="seconds", pairs=pairs, target=case.target)


def _taoq(spec: Path, backend: str, few: Path) -> measure.Figures:
    """The whole command; the metric, which is not in the other side, is of ten images."""
    return measure.measured_taoq("analyze", spec, backend, f"dataset.val_dataset.images_dir={few}")


def _modelopt(checkpoint: Path, images: Path) -> measure.Figures:
    import modelopt.torch.quantization as mtq
    import timm  # noqa: F401
    import torch
    import torchvision  # noqa: F401

    model = measure.raw_model(NETWORK, checkpoint)
    sample = list(_batches(images))

    def run(fed: torch.nn.Module, batches: Iterable[torch.Tensor]) -> None:
        with torch.inference_mode():
            for batch in batches:
                fed(batch)

    def calibrate() -> None:
        mtq.quantize(model, mtq.INT8_DEFAULT_CFG, lambda fed: run(fed, _batches(images)))

    run(model, sample)  # warm
    return {
        "forward": _seconds(lambda: run(model, sample)),
        "calibration": _seconds(calibrate),
        "build": 0.0,
    }


def _onnxruntime(file: Path, images: Path) -> measure.Figures:
    import onnxruntime
    import torchvision  # noqa: F401
    from onnxruntime.quantization import CalibrationMethod
    from onnxruntime.quantization.calibrate import CalibrationDataReader, create_calibrator

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._batches = ({"input": batch.numpy()} for batch in _batches(images))

        def get_next(self) -> dict[str, Any] | None:
            return next(self._batches, None)

    def build() -> Any:
        # threads as they come, as taoq has them
        return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def calibrate() -> None:
        with tempfile.TemporaryDirectory() as folder:
            calibrator = create_calibrator(
                file, ["Conv"], f"{folder}/augmented.onnx", calibrate_method=CalibrationMethod.MinMax
            )
            calibrator.collect_data(Reader())
            calibrator.compute_data()

    sample = [batch.numpy() for batch in _batches(images)]
    session = build()
    session.run(None, {"input": sample[0]})  # warm
    return {
        "forward": _seconds(lambda: [session.run(None, {"input": batch}) for batch in sample]),
        "calibration": _seconds(calibrate),
        "build": _seconds(build),
    }


def _batches(images: Path) -> Iterator[Any]:
    return (batch for batch, _ in measure.raw_loader(images, BATCH_SIZE, WORKERS))


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
