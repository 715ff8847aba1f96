# SPDX-License-Identifier: Apache-2.0
"""Quantize the example networks in many ways, evaluate them before and after, and print a table.

The script calls commands of taoq through `taoq.run` in one process, because importing the libraries takes longer than
running the commands.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import taoq

HERE = Path(os.path.relpath(Path(__file__).parent))  # Relative, for short paths in the artifacts.
RESULTS = Path("results/demo")
ONNX_BACKENDS = ("modelopt.onnx", "onnxruntime")
AIFI_FEED_FORWARD = "encoder.encoder.*.linear?"
IN_THE_DEMO = ("int8, recipe A", "fp8_e4m3fn, recipe A")
DECODER_FEED_FORWARD = "decoder.decoder.layers.*.linear?"


@dataclass(frozen=True)
class Variant:
    """A way to quantize a network.

    Attributes:
        name: Name in the table.
        backend: Value of `quantize.backend`.
        dtype: Format of the weights, and of the activations for backends other than torchao.
        patterns: Pattern of each rule in `quantize.layers`.
        skip_names: Value of `quantize.skip_names`.
        more_overrides: More overrides of the spec.
    """

    name: str
    backend: str
    dtype: str
    patterns: Sequence[str]
    skip_names: Sequence[str] = ()
    more_overrides: Sequence[str] = ()

    @property
    def needs_onnx(self) -> bool:
        """Whether the backend quantizes ONNX files."""
        return self.backend in ONNX_BACKENDS

    @property
    def overrides(self) -> list[str]:
        """Overrides of the spec, as on the command line."""
        static = self.backend != "torchao"
        parts = {"weights": {"dtype": self.dtype}, **({"activations": {"dtype": self.dtype}} if static else {})}
        return [
            f"quantize.backend={self.backend}",
            f"quantize.mode={'static_ptq' if static else 'weight_only_ptq'}",
            f"quantize.layers={json.dumps([{'module_name': pattern, **parts} for pattern in self.patterns])}",
            f"quantize.skip_names={json.dumps(list(self.skip_names))}",
            *self.more_overrides,
        ]


@dataclass(frozen=True)
class Network:
    """An example network.

    Attributes:
        name: Name in the table.
        task: Name of its task.
        spec: Path of its spec.
        metric: Name of the metric that the table shows, in percent.
        variants: The ways to quantize it.
        overrides: Overrides of the spec, for all commands.
    """

    name: str
    task: str
    spec: Path
    metric: str
    variants: Sequence[Variant]
    overrides: Sequence[str] = ()

    def run(self, action: str, *overrides: str) -> Any:
        """Run a command and return its result."""
        return taoq.run(self.task, action, self.spec, [*self.overrides, *overrides])

    def evaluate(self, checkpoint: str, results_dir: Path) -> float:
        """Return the metric of a checkpoint or artifact on the validation data."""
        result = self.run(
            "evaluate",
            f"evaluate.checkpoint={checkpoint}",
            f"evaluate.results_dir={results_dir}",
            "evaluate.device=cpu",
        )
        return float(result.metrics[self.metric])


def everywhere(*dtypes: str, backend: str = "modelopt.pytorch") -> list[Variant]:
    """Return variants that quantize all convolutions and linear layers."""
    return [Variant(dtype, backend, dtype, ("*",)) for dtype in dtypes]


def weights(*dtypes: str) -> list[Variant]:
    """Return variants that quantize only the weights of linear layers."""
    return [Variant(dtype, "torchao", dtype, ("Linear",)) for dtype in dtypes]


def recipes(dtype: str, backend: str = "modelopt.pytorch") -> list[Variant]:
    """Return the recipes for RT-DETR, each with more layers than the one before (docs/rtdetr.md)."""
    convolutions = "Conv" if backend in ONNX_BACKENDS else "Conv2d"
    steps = {
        "A": ((convolutions,), ("decoder.*",)),
        "B": ((convolutions, AIFI_FEED_FORWARD), ("decoder.*",)),
        "C": ((convolutions, AIFI_FEED_FORWARD, DECODER_FEED_FORWARD), ("decoder.input_proj.*",)),
    }
    return [Variant(f"{dtype}, recipe {name}", backend, dtype, *step) for name, step in steps.items()]


def all_recipes() -> list[Variant]:
    """Return all variants for RT-DETR."""
    return [
        *recipes("int8"),
        *recipes("fp8_e4m3fn"),
        *everywhere("int8", "fp8_e4m3fn"),
        *weights("int8", "fp8_e4m3fn"),
        *recipes("int8", "modelopt.onnx"),
        *recipes("fp8_e4m3fn", "modelopt.onnx"),
        *everywhere("int8", "fp8_e4m3fn", backend="modelopt.onnx"),
        *recipes("int8", "onnxruntime"),
        *everywhere("int8", backend="onnxruntime"),
    ]


def biases() -> list[Network]:
    """Return classifiers with all layers in INT8, with and without bias correction."""
    entropy = "quantize.algorithm=entropy"
    smoothquant = ("quantize.algorithm=smoothquant", "quantize.backend_kwargs={alpha: 0.5}")
    settings = {
        "mobilenetv3_small": [("modelopt.pytorch", "int8"), ("modelopt.pytorch", "int8, entropy", entropy),
                              ("modelopt.onnx", "int8"), ("onnxruntime", "int8")],
        "vit_tiny": [("modelopt.pytorch", "int8"), ("modelopt.pytorch", "int8, smoothquant", *smoothquant)],
    }  # fmt: skip
    return [
        classifier(
            network,
            [
                Variant(
                    name + suffix,
                    backend,
                    "int8",
                    ("*",),
                    more_overrides=(*overrides, f"quantize.bias_correction={correct}"),
                )
                for backend, name, *overrides in variants
                for suffix, correct in (("", "false"), (", corrected", "true"))
            ],
        )
        for network, variants in settings.items()
    ]


def classifier(name: str, variants: Sequence[Variant]) -> Network:
    """Return a network of examples/digits."""
    return Network(name, "classification_pyt", HERE / "digits" / f"{name}.yaml", "val_acc_1", variants)


def detector(scenes: int, variants: Sequence[Variant]) -> Network:
    """Return the network of examples/digit_scenes, evaluated on the first `scenes` validation scenes."""
    json_file = RESULTS / f"val_{scenes}.json"
    data = read_json(HERE / "digit_scenes" / "data" / "val.json")
    data["images"] = data["images"][:scenes]
    image_ids = {image["id"] for image in data["images"]}
    data["annotations"] = [entry for entry in data["annotations"] if entry["image_id"] in image_ids]
    json_file.parent.mkdir(parents=True, exist_ok=True)
    json_file.write_text(json.dumps(data), encoding="utf-8")
    spec, override = HERE / "digit_scenes" / "rtdetr.yaml", f"dataset.test_data_sources.json_file={json_file}"
    return Network("rtdetr_small", "rtdetr", spec, "val_mAP", variants, [override])


def all_networks() -> list[Network]:
    """Return the networks and variants of the demo."""
    all_dtypes = [
        *weights("int8", "fp8_e4m3fn", "fp8_e5m2"),
        *everywhere("int8", "fp8_e4m3fn"),
        *everywhere("int8", "fp8_e4m3fn", backend="modelopt.onnx"),
        *everywhere("int8", backend="onnxruntime"),
    ]
    recipes_a = [variant for variant in all_recipes() if variant.name in IN_THE_DEMO]
    return [*(classifier(name, all_dtypes) for name in ("resnet_18", "vit_tiny")), detector(100, recipes_a)]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file."""
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def megabytes(size: int) -> str:
    """Format a number of bytes for the table."""
    return f"{size / 1e6:.3g} MB"


def show(table: Table) -> None:
    """Print a table. If stdout is not a terminal, the width is large enough for all columns."""
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def run(title: str, networks: Sequence[Network]) -> Table:
    """Quantize and evaluate all variants of the networks. Return the table of results."""
    table = Table(title=f"{title}, in percent; sizes of the files")
    for column in ("model", "backend", "quantized"):
        table.add_column(column, no_wrap=True)
    for column in ("layers", "float", "quantized", "difference", "float32 file", "quantized file"):
        table.add_column(column, justify="right", no_wrap=True)
    for network in networks:
        results = RESULTS / network.name
        (checkpoint,) = HERE.glob(f"*/checkpoints/{network.name}*")
        float_figure = network.evaluate(str(checkpoint), results / "float")
        onnx_file = results / "float.onnx"
        network.run(
            "export",
            f"export.checkpoint={checkpoint}",
            f"export.onnx_file={onnx_file}",
            "export.on_cpu=true",
            f"export.results_dir={results / 'export'}",
            "export.overwrite=true",
        )
        for variant in network.variants:
            print(f"{network.name}: {variant.backend} {variant.name}", file=sys.stderr)
            directory = results / f"{variant.backend}_{variant.name.replace(', ', '_').replace(' ', '_')}"
            source = onnx_file if variant.needs_onnx else checkpoint
            result: taoq.QuantizeResult = network.run(
                "quantize", *variant.overrides, f"quantize.model_path={source}", f"quantize.results_dir={directory}"
            )
            figure = network.evaluate(str(directory), directory / "evaluate")
            table.add_row(
                network.name,
                variant.backend,
                variant.name,
                f"{len(result.plan.quantized)} / {len(result.plan.quantizable)}",
                f"{100 * float_figure:.2f}",
                f"{100 * figure:.2f}",
                f"{100 * (figure - float_figure):+.2f}",
                megabytes(result.manifest.float_size),
                megabytes(result.manifest.size),
            )
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--recipes", action="store_true", help="run only the recipes of the detector, on all 300 scenes")
    modes.add_argument(
        "--biases", action="store_true", help="run only the classifiers, with and without bias correction"
    )
    arguments = parser.parse_args()
    logging.getLogger("taoq").setLevel(logging.ERROR)  # Warnings are also in the reports.
    started = time.monotonic()
    if arguments.recipes:
        show(run("COCO AP on 300 held-out scenes", [detector(300, all_recipes())]))
    elif arguments.biases:
        show(run("top-1 on 597 held-out digits", biases()))
    else:
        show(run("top-1 on 597 held-out digits, COCO AP on 100 held-out scenes", all_networks()))
    print(f"{time.monotonic() - started:.0f} s; artifacts, results.json and pictures are in {RESULTS}")
