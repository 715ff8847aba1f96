# SPDX-License-Identifier: Apache-2.0
"""Measure two sides in turns in child processes, and print their ratios."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

import taoq
from taoq.pipeline.memory import peak_resident, resident

T = TypeVar("T")
Figures = Mapping[str, float]
"""Measurements of a child process, by name."""

SIZE, CLASSES = 224, 1000
"""Input width and height, and number of classes, of ImageNet networks."""
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
MB = 1e6


@dataclass(frozen=True, kw_only=True)
class Row:
    """A figure of both sides, measured in pairs.

    Attributes:
        case: Description of the case.
        what: Name of the figure, with its unit.
        pairs: taoq's value and the other side's value, pair by pair.
        target: Bound of the median ratio; None if there is none.
        at_least: Whether the target is a lower bound rather than an upper bound.
    """

    case: str
    what: str
    pairs: Sequence[tuple[float, float]]
    target: float | None = None
    at_least: bool = False

    @property
    def ratios(self) -> list[float]:
        """Ratio of taoq's value to the other side's, of each pair."""
        return [ours / other for ours, other in self.pairs]

    @property
    def missed(self) -> bool:
        """Whether the median ratio is on the wrong side of the target."""
        ratio = statistics.median(self.ratios)
        return self.target is not None and (ratio < self.target if self.at_least else ratio > self.target)


def options(description: str | None) -> argparse.Namespace:
    """Parse the command line of a benchmark: `quick`, `no_gate`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a small run: does it work at all?")
    parser.add_argument("--no-gate", action="store_true", help="exit 0 also where a target is missed")
    return parser.parse_args()


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """Create a temporary folder for images, checkpoints and results."""
    with tempfile.TemporaryDirectory(prefix="taoq-bench-") as folder:
        yield Path(folder)


def in_child(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function in a new process with one torch thread; show its output only if it fails."""
    with tempfile.NamedTemporaryFile(prefix="taoq-bench-", suffix=".log") as log:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context, initializer=_prepare_child, initargs=(log.name,)) as pool:
            try:
                return pool.submit(function, *arguments).result()
            except BaseException:
                sys.stderr.write(Path(log.name).read_text(encoding="utf-8", errors="replace")[-4000:])
                raise


def _prepare_child(log: str) -> None:
    """Limit torch to one thread, fork the workers of a DataLoader, and redirect the output to a file."""
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")  # Must be set before torch is imported.
    # A spawned process spawns its own children by default, which would make the workers of a DataLoader start slowly.
    multiprocessing.set_start_method("fork", force=True)
    with Path(log).open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def measured(work: Callable[[], object]) -> Figures:
    """Measure work whose libraries are imported already. Call it only once per child process.

    Returns:
        `seconds` of the work; `cpu` seconds, which vary less on a busy machine; `peak` memory of the process in bytes;
        and `work_peak`, the increase over the memory before the work.
    """
    before = resident()
    cpu, started = _cpu_seconds(), time.perf_counter()
    work()
    seconds, cpu = time.perf_counter() - started, _cpu_seconds() - cpu
    peak = peak_resident()
    return {"seconds": seconds, "cpu": cpu, "peak": peak, "work_peak": peak - before}


def _cpu_seconds() -> float:
    times = os.times()  # Includes the workers of a DataLoader after they have ended.
    return times.user + times.system + times.children_user + times.children_system


def start_up(task: str, action: str, backend: str | None = None) -> None:
    """Import the libraries that an action imports when it runs."""
    import timm  # noqa: F401
    import torchvision  # noqa: F401

    from taoq.quantization.backends import load_backend
    from taoq.quantization.formats import load_format
    from taoq.runtimes import load_runtime
    from taoq.tasks import load_task

    load_task(task)
    importlib.import_module(f"taoq.actions.{action}")
    model_format = load_backend(backend).capability.format if backend else "torch"
    load_format(model_format)
    load_runtime(model_format)


def measured_taoq(action: str, spec: Path, backend: str, *overrides: str) -> Figures:
    """Measure `taoq classification_pyt <action>`. Call it in a child process."""
    start_up("classification_pyt", action, backend)
    return measured(lambda: taoq.run("classification_pyt", action, spec, overrides))


def interleave(rounds: int, ours: Callable[[], Figures], other: Callable[[], Figures]) -> list[tuple[Figures, Figures]]:
    """Measure both sides in turns, A B, B A, A B, ..., so that a change of the machine's speed affects both."""
    pairs = []
    for number in range(rounds):
        if number % 2:
            second = other()
            pairs.append((ours(), second))
        else:
            first = ours()
            pairs.append((first, other()))
    return pairs


def column(pairs: Sequence[tuple[Figures, Figures]], name: str, scale: float = 1.0) -> list[tuple[float, float]]:
    """Return a figure of all pairs, divided by `scale`."""
    return [(ours[name] / scale, other[name] / scale) for ours, other in pairs]


def report(title: str, ours: str, other: str, rows: Sequence[Row], *, gate: bool) -> int:
    """Print the machine and the table, and return the exit code: 1 if a target is missed and `gate` is set."""
    print(machine())
    table = Table(title=title, title_justify="left")
    for name in ("case", "figure"):
        table.add_column(name)
    for name in ("pairs", ours, other, "ratio", "lowest to highest", "target"):
        table.add_column(name, justify="right")
    table.add_column("")
    for row in rows:
        bound = "" if row.target is None else f"{'>=' if row.at_least else '<='} {row.target:.2f}"
        medians = [f"{statistics.median(values):.4g}" for values in zip(*row.pairs, strict=True)]
        spread = f"{min(row.ratios):.3f} to {max(row.ratios):.3f}"
        verdict = "" if row.target is None else "MISSED" if row.missed else "met"
        ratio = f"{statistics.median(row.ratios):.3f}"
        table.add_row(row.case, row.what, str(len(row.pairs)), *medians, ratio, spread, bound, verdict)
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    return int(gate and any(row.missed for row in rows))


def machine() -> str:
    """Describe the processor, the cores and the versions in one line."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    names = ("torch", "torchvision", "torchao", "nvidia-modelopt", "timm", "transformers", "pycocotools", "pillow")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    cores = len(os.sched_getaffinity(0))
    return f"{cpu}, {cores} cores, no GPU used, 1 torch thread; Python {platform.python_version()}, {versions}"


def make_images(folder: Path, count: int) -> None:
    """Write crops of scikit-learn's two photographs into ten class folders, every fourth as PNG, and `classes.txt`."""
    import random

    from PIL import Image
    from sklearn.datasets import load_sample_images

    draw = random.Random(0)
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    names = [f"class_{number:04d}" for number in range(CLASSES)]
    for name in names[:10]:
        (folder / name).mkdir(parents=True)
    for number in range(count):
        photograph = draw.choice(photographs)
        side = draw.randint(240, 420)
        left, top = draw.randint(0, photograph.width - side), draw.randint(0, photograph.height - side)
        suffix = "png" if number % 4 == 3 else "jpg"
        crop = photograph.crop((left, top, left + side, top + side))
        crop.save(folder / names[number % 10] / f"{number:05d}.{suffix}")
    (folder / "classes.txt").write_text("\n".join(names) + "\n", encoding="utf-8")


def make_checkpoint(network: str, path: Path) -> None:
    """Save an untrained timm network: trained weights would make no difference to time and memory."""
    import timm
    import torch

    torch.manual_seed(0)
    torch.save(timm.create_model(network, num_classes=CLASSES).state_dict(), path)


def make_onnx(network: str, checkpoint: Path, images: Path, file: Path) -> None:
    """Export a checkpoint with `taoq export`, which uses the images to check the file."""
    section = {"checkpoint": str(checkpoint), "onnx_file": str(file), "on_cpu": True}
    spec = file.with_suffix(".yaml")
    write_spec(spec, network, images, batch_size=8, workers=0, export=section)
    taoq.run("classification_pyt", "export", spec)


def raw_loader(folder: Path, batch_size: int, workers: int) -> Any:
    """Return the hand-written data pipeline: a Dataset over the files, the transforms of the spec, a DataLoader."""
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    transform = transforms.Compose(
        [transforms.Resize((SIZE, SIZE)), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    )

    class Images(Dataset[tuple[torch.Tensor, int]]):
        def __init__(self) -> None:
            self.files = sorted(path for path in folder.glob("*/*") if path.suffix in (".jpg", ".png"))

        def __len__(self) -> int:
            return len(self.files)

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            path = self.files[index]
            return transform(Image.open(path).convert("RGB")), int(path.parent.name.rpartition("_")[2])

    return DataLoader(Images(), batch_size=batch_size, num_workers=workers)


def raw_model(network: str, checkpoint: Path) -> Any:
    """Load the float network without taoq."""
    import timm
    import torch

    model = timm.create_model(network, num_classes=CLASSES)
    model.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True))
    return model.eval()


def write_spec(path: Path, network: str, images: Path, batch_size: int, workers: int, **sections: Any) -> None:
    """Write a spec of classification_pyt as JSON, which is valid YAML."""
    spec = {
        "results_dir": str(path.with_suffix("")),
        "model": {"backbone": {"type": f"timm/{network}"}, "head": {"topk": [1, 5]}},
        "dataset": {
            "root_dir": str(images),
            "num_classes": CLASSES,
            "img_size": SIZE,
            "batch_size": batch_size,
            "workers": workers,
            "val_dataset": {"images_dir": str(images)},
            "quant_calibration_dataset": {"images_dir": str(images)},
            "augmentation": {"mean": MEAN, "std": STD},
        },
        **sections,
    }
    path.write_text(json.dumps(spec, indent=2), encoding="utf-8")
