# SPDX-License-Identifier: Apache-2.0
"""`taoq analyze` against its parts measured without taoq: one calibration and (layers + 2) passes over the sample.

For ONNX files, building one session per layer is added.
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
    """A backend to measure.

    Attributes:
        backend: Name of the backend.
        convolution: Type of a convolution in the rules; all convolutions are quantized.
        float_file: Name of the float model in the folder of the run.
        parts: Measures, without taoq, the seconds of one pass over the images, of one calibration, and of building one
            session; called with the float model and the folder of the images.
        target: Bound of the ratio. In ModelOpt's network, disabled quantizers still cost 4 %, and one layer's are
            enabled. onnxruntime's quantizer makes a graph for each layer, which the other side does not, and the Q/DQ
            nodes separate operators that would otherwise be fused.
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
    """Measure the whole command. Only ten images are evaluated, because the other side does not evaluate."""
    return measure.measured_taoq("analyze", spec, backend, f"dataset.val_dataset.images_dir={few}")


def _modelopt(checkpoint: Path, images: Path) -> measure.Figures:
    import modelopt.torch.quantization as mtq
    import timm  # noqa: F401
    import torch
    import torchvision  # noqa: F401

    model = measure.raw_model(NETWORK, checkpoint)
    sample = list(_batches(images))

    def run(network: torch.nn.Module, batches: Iterable[torch.Tensor]) -> None:
        with torch.inference_mode():
            for batch in batches:
                network(batch)

    def calibrate() -> None:
        mtq.quantize(model, mtq.INT8_DEFAULT_CFG, lambda network: run(network, _batches(images)))

    run(model, sample)  # Warm up.
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
        # Keep the default number of threads, as taoq does.
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
    session.run(None, {"input": sample[0]})  # Warm up.
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
