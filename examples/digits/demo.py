# SPDX-License-Identifier: Apache-2.0
"""Quantize both digit networks with each backend and dtype, evaluate float and quantized, print one table.

Everything runs through the command line of taoq, in this process: the libraries take longer to import than
all the work takes.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
from pathlib import Path
from typing import Any

from rich.table import Table

from taoq.cli import main
from taoq.console import show, size

HERE = Path(__file__).parent
NETWORKS = ("resnet_18", "vit_tiny")
WEIGHT_ONLY = "[{{module_name: Linear, weights: {{dtype: {0}}}}}]"
STATIC = (
    "[{{module_name: Conv2d, weights: {{dtype: {0}}}, activations: {{dtype: {0}}}}},"
    " {{module_name: Linear, weights: {{dtype: {0}}}, activations: {{dtype: {0}}}}}]"
)
VARIANTS = (
    ("torchao", "weight_only_ptq", "int8", WEIGHT_ONLY),
    ("torchao", "weight_only_ptq", "fp8_e4m3fn", WEIGHT_ONLY),
    ("torchao", "weight_only_ptq", "fp8_e5m2", WEIGHT_ONLY),
    ("modelopt.pytorch", "static_ptq", "int8", STATIC),
    ("modelopt.pytorch", "static_ptq", "fp8_e4m3fn", STATIC),
)


def taoq(action: str, network: str, *overrides: str) -> None:
    """Run one command of the README; its own output goes to a file of the results, ours is the table."""
    words = ["classification_pyt", action, "-e", str(HERE / f"{network}.yaml"), *overrides]
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = main(words)
    if code:
        sys.exit(f"taoq {' '.join(words)}\n{output.getvalue()}")


def read(path: Path) -> dict[str, Any]:
    """A JSON file."""
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def top1(network: str, checkpoint: str, results_dir: Path) -> float:
    """Evaluate a checkpoint on the held-out digits."""
    taoq("evaluate", network, f"evaluate.checkpoint={checkpoint}", f"evaluate.results_dir={results_dir}",
         "evaluate.device=cpu")  # fmt: skip
    return float(read(results_dir / "results.json")["metrics"]["val_acc_1"])


def run(results: Path) -> Table:
    """All variants of all networks."""
    table = Table(title="597 held-out digits, top-1 in percent, sizes of the files")
    for column in ("model", "backend", "dtype"):
        table.add_column(column, no_wrap=True)
    for column in ("layers", "float", "quantized", "difference", "float32 file", "quantized file"):
        table.add_column(column, justify="right", no_wrap=True)
    for network in NETWORKS:
        checkpoint = str(HERE / "checkpoints" / f"{network}.safetensors")
        float_top1 = top1(network, checkpoint, results / network / "float")
        for backend, mode, dtype, layers in VARIANTS:
            print(f"{network}: {backend} {dtype}", file=sys.stderr)
            directory = results / network / f"{backend}_{dtype}"
            taoq("quantize", network, f"quantize.backend={backend}", f"quantize.mode={mode}",
                 f"quantize.layers={layers.format(dtype)}", f"quantize.results_dir={directory}")  # fmt: skip
            quantized_top1 = top1(network, str(directory), directory / "evaluate")
            report = read(directory / "quantization_report.json")
            table.add_row(
                network,
                backend,
                dtype,
                f"{report['layers_quantized']} / {report['layers_quantizable']}",
                f"{100 * float_top1:.2f}",
                f"{100 * quantized_top1:.2f}",
                f"{100 * (quantized_top1 - float_top1):+.2f}",
                size(report["float_size"]),
                size(report["size"]),
            )
    return table


if __name__ == "__main__":
    began = time.monotonic()
    show(run(Path("results/digits")))
    print(f"{time.monotonic() - began:.0f} s; artifacts, results.json and confusion matrices are in results/digits")
