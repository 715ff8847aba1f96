# SPDX-License-Identifier: Apache-2.0
"""Quantize the example networks in many ways, evaluate float and quantized, print one table.

Everything runs through the command line of taoq, in this process: the libraries take longer to import than
all the work takes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from taoq.cli import main
from taoq.console import show, size

HERE = Path(__file__).parent
RESULTS = Path("results/demo")
AIFI_FEED_FORWARD = "encoder.encoder.*.linear?"
DECODER_FEED_FORWARD = "decoder.decoder.layers.*.linear?"


@dataclass(frozen=True)
class Variant:
    """A way to quantize a network.

    Attributes:
        name: For the table.
        backend: As in the spec.
        dtype: Of weights, and with modelopt.pytorch of activations.
        patterns: Of the rules.
        skip_names: Of the spec.
    """

    name: str
    backend: str
    dtype: str
    patterns: Sequence[str]
    skip_names: Sequence[str] = ()

    @property
    def overrides(self) -> list[str]:
        """On the command line."""
        static = self.backend == "modelopt.pytorch"
        parts = {"weights": {"dtype": self.dtype}, **({"activations": {"dtype": self.dtype}} if static else {})}
        return [
            f"quantize.backend={self.backend}",
            f"quantize.mode={'static_ptq' if static else 'weight_only_ptq'}",
            f"quantize.layers={json.dumps([{'module_name': pattern, **parts} for pattern in self.patterns])}",
            f"quantize.skip_names={json.dumps(list(self.skip_names))}",
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

    def taoq(self, action: str, *overrides: str) -> None:
        """Run one command; its own output goes to a file of the results, ours is the table."""
        words = [self.task, action, "-e", str(self.spec), *self.overrides, *overrides]
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code = main(words)
        if code:
            sys.exit(f"taoq {' '.join(words)}\n{output.getvalue()}")

    def evaluate(self, checkpoint: str, results_dir: Path) -> float:
        """The metric of a checkpoint on held-out data."""
        self.taoq("evaluate", f"evaluate.checkpoint={checkpoint}", f"evaluate.results_dir={results_dir}",
                  "evaluate.device=cpu")  # fmt: skip
        return float(read(results_dir / "results.json")["metrics"][self.metric])


def everywhere(*dtypes: str) -> list[Variant]:
    """All convolutions and linear layers of a classifier."""
    return [Variant(dtype, "modelopt.pytorch", dtype, ("Conv2d", "Linear")) for dtype in dtypes]


def weights(*dtypes: str) -> list[Variant]:
    """The weights of all linear layers."""
    return [Variant(dtype, "torchao", dtype, ("Linear",)) for dtype in dtypes]


def recipes(dtype: str) -> list[Variant]:
    """What is known to be safe in a detector, step by step: docs/rtdetr.md."""
    return [
        Variant(f"{dtype}, recipe A", "modelopt.pytorch", dtype, ("Conv2d",), ("decoder.*",)),
        Variant(f"{dtype}, recipe B", "modelopt.pytorch", dtype, ("Conv2d", AIFI_FEED_FORWARD), ("decoder.*",)),
        Variant(
            f"{dtype}, recipe C",
            "modelopt.pytorch",
            dtype,
            ("Conv2d", AIFI_FEED_FORWARD, DECODER_FEED_FORWARD),
            ("decoder.input_proj.*",),
        ),
    ]


def networks(scenes: int, *, only_recipes: bool) -> list[Network]:
    """What the table shows."""
    json_file = RESULTS / f"val_{scenes}.json"
    detector = Network(
        "rtdetr_small",
        "rtdetr",
        HERE / "digit_scenes" / "rtdetr.yaml",
        "val_mAP",
        [*recipes("int8"), *recipes("fp8_e4m3fn"), *everywhere("int8", "fp8_e4m3fn"), *weights("int8", "fp8_e4m3fn")]
        if only_recipes
        else [*recipes("int8")[:1], *recipes("fp8_e4m3fn")[:1], *weights("int8")],
        [f"dataset.test_data_sources.json_file={json_file}"],
    )
    data = read(HERE / "digit_scenes" / "data" / "val.json")
    data["images"] = data["images"][:scenes]
    kept = {image["id"] for image in data["images"]}
    data["annotations"] = [entry for entry in data["annotations"] if entry["image_id"] in kept]
    json_file.parent.mkdir(parents=True, exist_ok=True)
    json_file.write_text(json.dumps(data), encoding="utf-8")
    if only_recipes:
        return [detector]
    all_dtypes = [*weights("int8", "fp8_e4m3fn", "fp8_e5m2"), *everywhere("int8", "fp8_e4m3fn")]
    return [
        Network(name, "classification_pyt", HERE / "digits" / f"{name}.yaml", "val_acc_1", all_dtypes)
        for name in ("resnet_18", "vit_tiny")
    ] + [detector]


def read(path: Path) -> dict[str, Any]:
    """A JSON file."""
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def run(scenes: int, *, only_recipes: bool) -> Table:
    """All variants of all networks."""
    what = f"COCO AP on {scenes} held-out scenes"
    table = Table(
        title=what if only_recipes else f"top-1 on 597 held-out digits, {what}, in percent; sizes of the files"
    )
    for column in ("model", "backend", "quantized"):
        table.add_column(column, no_wrap=True)
    for column in ("layers", "float", "quantized", "difference", "float32 file", "quantized file"):
        table.add_column(column, justify="right", no_wrap=True)
    for network in networks(scenes, only_recipes=only_recipes):
        results = RESULTS / network.name
        (checkpoint,) = (HERE).glob(f"*/checkpoints/{network.name}*")
        float_figure = network.evaluate(str(checkpoint), results / "float")
        for variant in network.variants:
            print(f"{network.name}: {variant.backend} {variant.name}", file=sys.stderr)
            directory = results / f"{variant.backend}_{variant.name.replace(', ', '_').replace(' ', '_')}"
            network.taoq("quantize", *variant.overrides, f"quantize.results_dir={directory}")
            figure = network.evaluate(str(directory), directory / "evaluate")
            report = read(directory / "quantization_report.json")
            table.add_row(
                network.name,
                variant.backend,
                variant.name,
                f"{report['layers_quantized']} / {report['layers_quantizable']}",
                f"{100 * float_figure:.2f}",
                f"{100 * figure:.2f}",
                f"{100 * (figure - float_figure):+.2f}",
                size(report["float_size"]),
                size(report["size"]),
            )
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", action="store_true", help="all recipes of the detector on all 300 scenes, no more")
    only_recipes = parser.parse_args().recipes
    began = time.monotonic()
    show(run(300 if only_recipes else 100, only_recipes=only_recipes))
    print(f"{time.monotonic() - began:.0f} s; artifacts, results.json and pictures are in {RESULTS}")
