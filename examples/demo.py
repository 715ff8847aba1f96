# SPDX-License-Identifier: Apache-2.0
"""Quantize the example networks in many ways, evaluate float and quantized, print one table.

Every step is a command of taoq as a Python call, `taoq.run`, in one process: the libraries take longer to import than
all the work takes.
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

HERE = Path(os.path.relpath(Path(__file__).parent))  # short paths, also in what the artifacts keep
RESULTS = Path("results/demo")
ONNX_BACKENDS = ("modelopt.onnx", "onnxruntime")
AIFI_FEED_FORWARD = "encoder.encoder.*.linear?"
IN_THE_DEMO = ("int8, recipe A", "fp8_e4m3fn, recipe A")
DECODER_FEED_FORWARD = "decoder.decoder.layers.*.linear?"


@dataclass(frozen=True)
class Variant:
    """A way to quantize a network.

    Attributes:
        name: For the table.
        backend: As in the spec.
        dtype: Of weights, and but for torchao of activations.
        patterns: Of the rules.
        skip_names: Of the spec.
        others: More overrides.
    """

    name: str
    backend: str
    dtype: str
    patterns: Sequence[str]
    skip_names: Sequence[str] = ()
    others: Sequence[str] = ()

    @property
    def of_onnx(self) -> bool:
        """Whether it quantizes an ONNX file."""
        return self.backend in ONNX_BACKENDS

    @property
    def overrides(self) -> list[str]:
        """On the command line."""
        static = self.backend != "torchao"
        parts = {"weights": {"dtype": self.dtype}, **({"activations": {"dtype": self.dtype}} if static else {})}
        return [
            f"quantize.backend={self.backend}",
            f"quantize.mode={'static_ptq' if static else 'weight_only_ptq'}",
            f"quantize.layers={json.dumps([{'module_name': pattern, **parts} for pattern in self.patterns])}",
            f"quantize.skip_names={json.dumps(list(self.skip_names))}",
            *self.others,
        ]


@dataclass(frozen=True)
class Network:
    """An example network.

    Attributes:
        name: For the table.
        task: Of taoq.
        spec: Its spec.
        metric: The figure of `evaluate` in the table, in percent.
        variants: What to do with it.
        overrides: For all its commands.
    """

    name: str
    task: str
    spec: Path
    metric: str
    variants: Sequence[Variant]
    overrides: Sequence[str] = ()

    def run(self, action: str, *overrides: str) -> Any:
        """The result of a command."""
        return taoq.run(self.task, action, self.spec, [*self.overrides, *overrides])

    def evaluate(self, checkpoint: str, results_dir: Path) -> float:
        """The metric of a checkpoint on held-out data."""
        result = self.run(
            "evaluate",
            f"evaluate.checkpoint={checkpoint}",
            f"evaluate.results_dir={results_dir}",
            "evaluate.device=cpu",
        )
        return float(result.metrics[self.metric])


def everywhere(*dtypes: str, backend: str = "modelopt.pytorch") -> list[Variant]:
    """All convolutions and linear layers."""
    return [Variant(dtype, backend, dtype, ("*",)) for dtype in dtypes]


def weights(*dtypes: str) -> list[Variant]:
    """The weights of all linear layers."""
    return [Variant(dtype, "torchao", dtype, ("Linear",)) for dtype in dtypes]


def recipes(dtype: str, backend: str = "modelopt.pytorch") -> list[Variant]:
    """What is known to be safe in a detector, step by step: docs/rtdetr.md."""
    convolutions = "Conv" if backend in ONNX_BACKENDS else "Conv2d"
    steps = {
        "A": ((convolutions,), ("decoder.*",)),
        "B": ((convolutions, AIFI_FEED_FORWARD), ("decoder.*",)),
        "C": ((convolutions, AIFI_FEED_FORWARD, DECODER_FEED_FORWARD), ("decoder.input_proj.*",)),
    }
    return [Variant(f"{dtype}, recipe {name}", backend, dtype, *step) for name, step in steps.items()]


def all_recipes() -> list[Variant]:
    """All that is known of the detector."""
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
    """What correcting biases brings where everything is INT8."""
    entropy = "quantize.algorithm=entropy"
    smoothquant = ("quantize.algorithm=smoothquant", "quantize.backend_kwargs={alpha: 0.5}")
    ways = {
        "mobilenetv3_small": [("modelopt.pytorch", "int8"), ("modelopt.pytorch", "int8, entropy", entropy),
                              ("modelopt.onnx", "int8"), ("onnxruntime", "int8")],
        "vit_tiny": [("modelopt.pytorch", "int8"), ("modelopt.pytorch", "int8, smoothquant", *smoothquant)],
    }  # fmt: skip
    return [
        classifier(
            network,
            [
                Variant(name + also, backend, "int8", ("*",), others=(*others, f"quantize.bias_correction={correct}"))
                for backend, name, *others in variants
                for also, correct in (("", "false"), (", corrected", "true"))
            ],
        )
        for network, variants in ways.items()
    ]


def classifier(name: str, variants: Sequence[Variant]) -> Network:
    """A network on the digits."""
    return Network(name, "classification_pyt", HERE / "digits" / f"{name}.yaml", "val_acc_1", variants)


def detector(scenes: int, variants: Sequence[Variant]) -> Network:
    """The network on the scenes, evaluated on the first of them."""
    json_file = RESULTS / f"val_{scenes}.json"
    data = read(HERE / "digit_scenes" / "data" / "val.json")
    data["images"] = data["images"][:scenes]
    kept = {image["id"] for image in data["images"]}
    data["annotations"] = [entry for entry in data["annotations"] if entry["image_id"] in kept]
    json_file.parent.mkdir(parents=True, exist_ok=True)
    json_file.write_text(json.dumps(data), encoding="utf-8")
    spec, override = HERE / "digit_scenes" / "rtdetr.yaml", f"dataset.test_data_sources.json_file={json_file}"
    return Network("rtdetr_small", "rtdetr", spec, "val_mAP", variants, [override])


def all_networks() -> list[Network]:
    """What the demo shows."""
    all_dtypes = [
        *weights("int8", "fp8_e4m3fn", "fp8_e5m2"),
        *everywhere("int8", "fp8_e4m3fn"),
        *everywhere("int8", "fp8_e4m3fn", backend="modelopt.onnx"),
        *everywhere("int8", backend="onnxruntime"),
    ]
    recipes_a = [variant for variant in all_recipes() if variant.name in IN_THE_DEMO]
    return [*(classifier(name, all_dtypes) for name in ("resnet_18", "vit_tiny")), detector(100, recipes_a)]


def read(path: Path) -> dict[str, Any]:
    """A JSON file."""
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def megabytes(size: int) -> str:
    """A number of bytes for the table."""
    return f"{size / 1e6:.3g} MB"


def show(table: Table) -> None:
    """Print a table, wide enough to cut nothing where stdout is no terminal."""
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def run(title: str, networks: Sequence[Network]) -> Table:
    """All variants of all networks."""
    table = Table(title=f"{title}, in percent; sizes of the files")
    for column in ("model", "backend", "quantized"):
        table.add_column(column, no_wrap=True)
    for column in ("layers", "float", "quantized", "difference", "float32 file", "quantized file"):
        table.add_column(column, justify="right", no_wrap=True)
    for network in networks:
        results = RESULTS / network.name
        (checkpoint,) = (HERE).glob(f"*/checkpoints/{network.name}*")
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
            source = onnx_file if variant.of_onnx else checkpoint
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
    modes.add_argument("--recipes", action="store_true", help="all recipes of the detector on all 300 scenes, no more")
    modes.add_argument("--biases", action="store_true", help="bias correction of the classifiers, no more")
    asked = parser.parse_args()
    logging.getLogger("taoq").setLevel(logging.ERROR)  # the reports keep the warnings
    began = time.monotonic()
    if asked.recipes:
        show(run("COCO AP on 300 held-out scenes", [detector(300, all_recipes())]))
    elif asked.biases:
        show(run("top-1 on 597 held-out digits", biases()))
    else:
        show(run("top-1 on 597 held-out digits, COCO AP on 100 held-out scenes", all_networks()))
    print(f"{time.monotonic() - began:.0f} s; artifacts, results.json and pictures are in {RESULTS}")
