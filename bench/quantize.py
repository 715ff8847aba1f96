# SPDX-License-Identifier: Apache-2.0
"""`taoq quantize` against a hand-written script that uses the library directly: time after start-up, peak memory."""

from __future__ import annotations

import functools
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure

BATCH_SIZE, WORKERS = 32, 1
MEMORY = 1.15


@dataclass(frozen=True)
class Case:
    """A backend and a network.

    Attributes:
        backend: Name of the backend.
        network: Name of the network in timm.
        rounds: Number of pairs to measure.
        images: Number of calibration images; 0 for weight-only quantization.
        target: Bound of the ratio of the seconds. The script stops when the file is written. taoq also runs the network
            once to check that it works, and measures every layer for the report: it runs 16 images through the float
            network and through the quantized layers, or reads all weights a second time. The cost is fixed, and the
            work in these cases is small.
    """

    backend: str
    network: str
    rounds: int
    images: int
    target: float

    @property
    def name(self) -> str:
        """Name of the case in the table."""
        return f"{self.backend}, {self.network}" + (f", {self.images} images" if self.images else "")


def main() -> int:
    """Measure both backends."""
    options = measure.options(__doc__)
    if options.quick:
        cases = [Case("modelopt.pytorch", "resnet18", 1, 32, 2.0), Case("torchao", "vit_tiny_patch16_224", 1, 0, 2.5)]
    else:
        cases = [Case("modelopt.pytorch", "resnet18", 7, 128, 1.40), Case("torchao", "vit_base_patch16_224", 7, 0, 2.0)]
    rows: list[measure.Row] = []
    with measure.workplace() as folder:
        for case in cases:
            rows += _compare(case, folder)
    return measure.report("taoq quantize / bare library", "taoq", "bare", rows, gate=not options.no_gate)


def _compare(case: Case, folder: Path) -> list[measure.Row]:
    images, checkpoint = folder / f"images_{case.images}", folder / f"{case.network}.pth"
    measure.in_child(measure.make_images, images, case.images)
    measure.in_child(measure.make_checkpoint, case.network, checkpoint)
    spec, bare = folder / f"{case.backend}.yaml", folder / f"{case.backend}.pth"
    section = _section(case, checkpoint)
    measure.write_spec(spec, case.network, images, BATCH_SIZE, WORKERS, quantize=section)
    artifact = Path(section["results_dir"])
    pairs = measure.interleave(
        case.rounds,
        functools.partial(_taoq, spec, case.backend, artifact),
        functools.partial(_bare, case, checkpoint, images, bare),
    )
    payload = next(artifact.glob("*.pth"))
    measure.in_child(_same_tensors, payload, bare)
    return [
        measure.Row(case=case.name, what="seconds", pairs=measure.column(pairs, "seconds"), target=case.target),
        measure.Row(case=case.name, what="CPU seconds", pairs=measure.column(pairs, "cpu")),
        measure.Row(case=case.name, what="peak, MB", pairs=measure.column(pairs, "peak", measure.MB), target=MEMORY),
        measure.Row(
            case=case.name, what="peak beyond start-up, MB", pairs=measure.column(pairs, "work_peak", measure.MB)
        ),
    ]


def _section(case: Case, checkpoint: Path) -> dict[str, Any]:
    static = case.backend != "torchao"
    scheme = {"weights": {"dtype": "int8"}, **({"activations": {"dtype": "int8"}} if static else {})}
    return {
        "model_path": str(checkpoint),
        "results_dir": str(checkpoint.parent / f"artifact_{case.backend}"),
        "backend": case.backend,
        "mode": "static_ptq" if static else "weight_only_ptq",
        "algorithm": "minmax",
        "device": "cpu",
        "layers": [{"module_name": type_, **scheme} for type_ in (("Conv2d", "Linear") if static else ("Linear",))],
        "calibration": {"num_samples": max(1, case.images), "batch_size": BATCH_SIZE},
    }


def _taoq(spec: Path, backend: str, artifact: Path) -> measure.Figures:
    shutil.rmtree(artifact, ignore_errors=True)
    return measure.in_child(measure.measured_taoq, "quantize", spec, backend)


def _bare(case: Case, checkpoint: Path, images: Path, result: Path) -> measure.Figures:
    result.unlink(missing_ok=True)
    child = _bare_torchao if case.backend == "torchao" else _bare_modelopt
    return measure.in_child(child, case.network, checkpoint, images, result)


def _bare_modelopt(network: str, checkpoint: Path, images: Path, result: Path) -> measure.Figures:
    import modelopt.torch.opt as mto
    import modelopt.torch.quantization as mtq
    import timm  # noqa: F401
    import torch
    import torchvision  # noqa: F401

    config: dict[str, Any] = {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            *(
                {"quantizer_name": f"*{quantizer}", "parent_class": layer, "cfg": {"num_bits": 8, "axis": axis}}
                for layer in ("nn.Conv2d", "nn.Linear")
                for quantizer, axis in (("weight_quantizer", 0), ("input_quantizer", None))
            ),
        ],
        "algorithm": "max",
    }

    def work() -> None:
        model = measure.raw_model(network, checkpoint)

        def calibrate(module: torch.nn.Module) -> None:
            with torch.no_grad():
                for batch, _ in measure.raw_loader(images, BATCH_SIZE, WORKERS):
                    module(batch)

        mtq.quantize(model, config, calibrate)
        mtq.compress(model)
        mto.save(model, result)

    return measure.measured(work)


def _bare_torchao(network: str, checkpoint: Path, images: Path, result: Path) -> measure.Figures:  # noqa: ARG001
    import timm  # noqa: F401
    import torch
    import torchao.quantization as ao
    import torchvision  # noqa: F401

    def work() -> None:
        model = measure.raw_model(network, checkpoint)
        ao.quantize_(model, ao.Int8WeightOnlyConfig(version=2))
        torch.save(model.state_dict(), result)

    return measure.measured(work)


def _same_tensors(payload: Path, bare: Path) -> None:
    """Check that both sides did the same work; otherwise the ratio would be meaningless."""
    import modelopt.torch.quantization  # noqa: F401 (torch.load needs the types of both)
    import torch
    import torchao.quantization  # noqa: F401

    ours, other = (torch.load(path, map_location="cpu", weights_only=True) for path in (payload, bare))
    ours, other = (state.get("model_state_dict", state) for state in (ours, other))
    if ours.keys() != other.keys():
        raise RuntimeError(f"taoq and the bare library differ in {sorted(ours.keys() ^ other.keys())[:8]}")
    for name in ours:
        pair = [
            tensor.dequantize() if type(tensor).__module__.startswith("torchao") else tensor
            for tensor in (ours[name], other[name])
        ]
        if not torch.equal(*pair):
            raise RuntimeError(f"taoq and the bare library differ in {name}")


if __name__ == "__main__":
    sys.exit(main())
