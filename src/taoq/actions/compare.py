# SPDX-License-Identifier: Apache-2.0
"""compare: artifacts beside the float models that they were made from, on the same images, in turns."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from taoq.actions import differences, others
from taoq.actions.measure import Measured, figure_of, measure
from taoq.actions.open_model import open_runtime, read_artifact
from taoq.actions.results import staged, write_experiment, write_json
from taoq.actions.timing import SPEEDUP, check_batch_sizes, in_turns, latency, say_fixed_batches
from taoq.artifact import Manifest, find_artifact, is_there, read_manifest, versions
from taoq.bootstrap import difference
from taoq.console import show, size
from taoq.errors import Fault, SpecError, TaoqError
from taoq.pages import page
from taoq.quantization.backends import load_backend
from taoq.runtime import Runtime, noise
from taoq.spec import SpecSource, changed, load_spec, spec_from_dict, spec_to_dict
from taoq.status import run_status
from taoq.tasks.base import Task
from taoq.tasks.sections import BenchmarkSpec

log = logging.getLogger(__name__)

_NOT_USED = ("batch_size", "compile", "min_speedup")  # of the section benchmark; models are those of the command line
_SHOWN = 20  # differing layers on the screen; the page has all


@dataclass(frozen=True, kw_only=True)
class _Compared:
    """An artifact.

    Attributes:
        name: For the tables.
        path: As it was given.
        manifest: Its manifest.
        source: The float model that it was made from, for the tables.
        source_path: Its path.
    """

    name: str
    path: str
    manifest: Manifest
    source: str
    source_path: str


def routed(artifacts: Sequence[str], spec: str | None) -> tuple[str, str]:
    """The task of artifacts, and the spec to compare them with: the one that is given, or that of the first artifact.

    Args:
        artifacts: Folders of artifacts, as they were given.
        spec: Path of the spec that was given, if one was.

    Raises:
        SpecError: There is no artifact.
        TaoqError: The first is damaged, or its spec is gone.
    """
    if not artifacts:
        hint = "name the folders of artifacts: taoq compare results/a results/b"
        raise SpecError(Fault("compare", "no artifact is given", hint))
    directory = _folder(artifacts[0])
    if spec is None and not (directory / "experiment.yaml").is_file():
        hint = "give a spec with the evaluation data: -e spec.yaml"
        raise TaoqError(Fault(str(directory / "experiment.yaml"), "the spec of this artifact is gone", hint))
    return read_manifest(directory).task, spec or str(directory / "experiment.yaml")


def run(task: Task[Any], source: SpecSource, *, artifacts: Sequence[str]) -> None:
    """Measure artifacts and their float models; write results.json and compare.html into `<results_dir>/compare`.

    Args:
        task: The task.
        source: The spec, for the evaluation data and the sections evaluate and benchmark.
        artifacts: Their folders.
    """
    spec = load_spec(source, task.spec, unused=task.unused, not_needed=others())
    section: BenchmarkSpec = spec.benchmark
    check_batch_sizes(section)
    for name in changed(section, _NOT_USED):
        log.warning("benchmark.%s: has no effect on compare", name)
    compared = _read(task, spec, artifacts)
    floats = {one.source: one.source_path for one in compared}
    if len({_origin(one) for one in compared}) > 1:
        what = "the artifacts were made from different float models, %s: each is compared with its own"
        log.warning(what, " and ".join(floats.values()))
    budget = spec.quantize.accuracy
    figure = figure_of(task, spec, budget.metric if budget else "auto", "quantize.accuracy.metric")
    task.evaluation_batches(spec)  # what is missing is said before the work
    directory = Path(spec.results_dir or ".", "compare")
    with run_status(directory, task.name, "compare") as status:
        models = {
            name: open_runtime(
                task, spec, dataclasses.replace(section, checkpoint=path, is_quantized=None), "benchmark"
            )
            for name, path in (*floats.items(), *((one.name, one.path) for one in compared))
        }
        found = measure(task, spec, list(models.values()), figure)
        results = {
            "task": task.name,
            "metric": figure,
            "num_images": found.num_images,
            "device": next(iter(models.values())).device,
            "threads": torch.get_num_threads(),
            "runs": section.runs,
            "batch_sizes": list(section.batch_sizes),
            "models": _rows(compared, list(models), found, figure, _speeds(task, spec, section, compared, models)),
            "settings": _settings(task, compared),
            "layers": differences.layers({one.name: one.manifest.plan for one in compared}),
            "versions": versions(("torch", "onnxruntime-gpu")),
            "command": source.command,
        }
        with staged(directory) as stage:
            write_json(stage / "results.json", results)
            (stage / "compare.html").write_text(page("compare", results), encoding="utf-8")
            write_experiment(stage / "experiment.yaml", spec)
        status.write("RUNNING", "Compared.", {"artifacts": len(compared)})
        _show(results)
        print(f"report: {directory / 'compare.html'}")


def _folder(name: str) -> Path:
    directory = find_artifact(name)
    if directory is None:
        raise TaoqError(Fault(name, "is no artifact", "name a folder that taoq <task> quantize wrote"))
    return directory


def _read(task: Task[Any], spec: Any, artifacts: Sequence[str]) -> list[_Compared]:
    manifests: dict[str, Manifest] = {}
    directories: set[Path] = set()
    for path in artifacts:
        directory = _folder(path)
        if directory.resolve() in directories:
            raise SpecError(Fault(path, "is named twice", "name each artifact once"))
        directories.add(directory.resolve())
        manifest = manifests[path] = read_artifact(task, spec, directory)
        if not is_there(manifest.source):
            what = f"the float model that it was made from, {manifest.source['path'] or 'none'}, is not there as it was"
            raise TaoqError(
                Fault(path, what, "compare in the folder in which it was quantized, with that file in place")
            )
    sources: dict[str, str] = {}  # one float model may have been given by several paths
    for manifest in manifests.values():
        sources.setdefault(manifest.source["sha256"], manifest.source["path"])
    names = _names(artifacts, sources.values())
    compared = []
    for path, manifest in manifests.items():
        source = sources[manifest.source["sha256"]]
        compared.append(
            _Compared(name=names[path], path=path, manifest=manifest, source=names[source], source_path=source)
        )
    return compared


def _names(artifacts: Sequence[str], sources: Iterable[str]) -> dict[str, str]:
    """Short names by path: of artifacts what their paths do not share, of float models the file's; else the paths."""
    shared = os.path.commonpath([Path(path).absolute().parent for path in artifacts])
    short = {path: os.path.relpath(Path(path).absolute(), shared) for path in artifacts} if len(artifacts) > 1 else {}
    short = {path: path for path in artifacts} | short | {path: Path(path).name for path in sources}
    return short if len(set(short.values())) == len(short) else {path: path for path in short}


def _origin(one: _Compared) -> str:
    """The sha256 of what an artifact comes from: of an ONNX file that taoq exported, the checkpoint that it was."""
    if one.manifest.format == "onnx":
        from taoq.onnx_file import read_onnx, read_properties

        path = Path(one.source_path)
        properties = read_properties(read_onnx(path), path)
        if properties:
            return str(properties["source"].get("sha256"))
    return one.manifest.source["sha256"]


def _speeds(
    task: Task[Any],
    spec: Any,
    section: BenchmarkSpec,
    compared: Sequence[_Compared],
    models: Mapping[str, Runtime],
) -> dict[str, list[dict[str, Any]]]:
    """Latencies of each model, one entry a batch size, against its own float model."""
    reference = {one.name: one.source for one in compared}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in models}
    for batch in section.batch_sizes:
        say_fixed_batches(models, batch)
        seconds = in_turns(models, noise(task.example_inputs(spec), batch), warmup=section.warmup, runs=section.runs)
        for name in models:
            found[name].append(latency(name, batch, seconds[name], seconds[reference.get(name, name)]))
    return found


def _rows(
    compared: Sequence[_Compared],
    names: Sequence[str],
    found: Measured,
    figure: str,
    speeds: Mapping[str, list[dict[str, Any]]],
) -> list[dict[str, Any]]:
    """One row a model, the float ones first."""
    measured = dict(zip(names, zip(found.metrics, found.figures, strict=True), strict=True))
    rows: list[dict[str, Any]] = []
    for source in dict.fromkeys(one.source for one in compared):
        made = next(one for one in compared if one.source == source)
        figures, size_ = measured[source][1], made.manifest.float_size
        rows.append(_row(source, made.source_path, "float32", size_, figures, speeds[source]))
    first = compared[0]
    for one in compared:
        metric, figures = measured[one.name]
        to_first = None if one is first else difference(measured[first.name][0], metric, figure)
        rows.append(
            _row(one.name, one.path, one.manifest.backend, one.manifest.size, figures, speeds[one.name])
            | {
                "source": one.source,
                "target": load_backend(one.manifest.backend).support.target,
                "accuracy": dict(one.manifest.accuracy),
                "layers": sum(1 for row in one.manifest.plan if row["weights"] or row["activations"]),
                "float_size": one.manifest.float_size,
                "difference": dataclasses.asdict(difference(measured[one.source][0], metric, figure)),
                "difference_to_first": dataclasses.asdict(to_first) if to_first else None,
            }
        )
    return rows


def _row(
    name: str, path: str, backend: str, size_: int, figures: Mapping[str, float], speeds: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    return {
        "model": name,
        "path": path,
        "backend": backend,
        "size": size_,
        "figures": dict(figures),
        "speeds": [{key: value for key, value in speed.items() if key != "model"} for speed in speeds],
        "difference": None,
    }


def _settings(task: Task[Any], compared: Sequence[_Compared]) -> dict[str, dict[str, Any]]:
    """The settings of `quantize` that differ."""
    # through the schema, which fills in the fields that an older taoq did not have
    sections = {one.name: spec_to_dict(spec_from_dict(one.manifest.spec, task.spec))["quantize"] for one in compared}
    found = differences.settings(sections, "quantize")
    found.pop("quantize.results_dir", None)  # always
    return found


def _show(results: Mapping[str, Any]) -> None:
    figure = results["metric"]
    title = f"{results['num_images']} images; {results['runs']} runs in turns on {results['device']}"
    table = Table(title=title, caption=SPEEDUP)
    table.add_column("model", overflow="fold")
    table.add_column("backend")
    for column in ("layers", "size", figure, "difference", "95 % interval"):
        table.add_column(column, justify="right")
    for batch in results["batch_sizes"]:
        table.add_column(f"ms at batch {batch}", justify="right")
        table.add_column("speed-up", justify="right")
    for row in results["models"]:
        one = row["difference"]
        speeds = [cell for speed in row["speeds"] for cell in (f"{speed['p50_ms']:.2f}", f"{speed['speedup']:.2f}")]
        table.add_row(
            row["model"],
            row["backend"],
            str(row["layers"]) if one else "",
            size(row["size"]),
            f"{row['figures'][figure]:.4f}",
            f"{one['value']:+.4f}" if one else "",
            f"{one['low']:+.4f} .. {one['high']:+.4f}" if one else "",
            *speeds,
        )
    show(table)
    artifacts = [row for row in results["models"] if row["difference"]]
    for row in artifacts[1:]:
        one = row["difference_to_first"]
        sure = "not distinguishable" if one["low"] <= 0 <= one["high"] else "better" if one["low"] > 0 else "worse"
        print(
            f"{row['model']} against {artifacts[0]['model']}: {figure} {one['value']:+.4f}"
            f" ({one['low']:+.4f} .. {one['high']:+.4f}): {sure}"
        )
    for backend, target in {row["backend"]: row["target"] for row in artifacts}.items():
        print(f"{backend} is for {target}")
    if len(artifacts) > 1:
        _show_differences(results, [row["model"] for row in artifacts])


def _show_differences(results: Mapping[str, Any], names: Sequence[str]) -> None:
    settings, layers = results["settings"], results["layers"]
    table = Table(title=f"{len(settings)} setting(s) and {len(layers)} layer(s) differ")
    table.add_column("what", overflow="fold")
    for name in names:
        table.add_column(name, overflow="fold")
    for what, values in (*settings.items(), *itertools.islice(layers.items(), _SHOWN)):
        table.add_row(what, *("-" if values[name] is None else str(values[name]) for name in names))
    if len(layers) > _SHOWN:
        table.caption = f"{len(layers) - _SHOWN} more layers are in compare.html"
    show(table)
