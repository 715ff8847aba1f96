# SPDX-License-Identifier: Apache-2.0
"""export: a torch checkpoint or artifact as an ONNX file that gives the same outputs on real images."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import onnx
import torch
import yaml
from rich.table import Table
from torch import Tensor, nn

import taoq
from taoq.actions import others
from taoq.actions.open_model import build_empty, open_artifact, open_onnx, read_artifact
from taoq.actions.results import results_dir, staged, write_json
from taoq.artifact import find_artifact, sha256, versions
from taoq.console import show, size
from taoq.errors import Fault, SpecError, TaoqError
from taoq.files import total_size
from taoq.onnx_export import OPSETS, export_graph
from taoq.onnx_file import read_onnx, read_properties, write_onnx, write_properties
from taoq.quantization.backends import load_backend, qdq
from taoq.quantization.backends.base import Scales, TorchBackend
from taoq.quantization.backends.onnx_layers import OPSET, TYPES, list_layers
from taoq.quantization.backends.torch_layers import accept_biases
from taoq.quantization.plan import LayerPlan
from taoq.runtime import TorchRuntime, noise, torch_device
from taoq.spec import SpecSource, load_spec, spec_from_dict, spec_to_dict
from taoq.status import run_status
from taoq.tasks.base import Batches, Inputs, Outputs, Task, image_shape
from taoq.tasks.sections import ExportSpec

log = logging.getLogger(__name__)

_QUANTIZED_TOLERANCE = 0.1
"""Of a Q/DQ graph: a value that lies between two steps may be rounded either way, a step is 1/127 of the range."""


@dataclasses.dataclass(frozen=True)
class _Source:
    """What is exported.

    Attributes:
        reference: The torch model as it is evaluated.
        network: The float network that is traced: the same, or its weights dequantized.
        layers: Formats of its quantized layers.
        scales: Their scales.
    """

    reference: nn.Module
    network: nn.Module
    layers: Mapping[str, tuple[Any, Any]]
    scales: Mapping[str, Scales]


def run(task: Task[Any], source: SpecSource) -> None:
    """Export the checkpoint of a spec."""
    spec = load_spec(source, task.spec, unused=task.unused, not_needed=others("export"))
    section: ExportSpec = spec.export
    directory = results_dir(spec, "export")
    target = Path(section.onnx_file) if section.onnx_file else directory / "model.onnx"
    spec = _sized(task, spec, section)
    _check(section, target)
    with run_status(directory, task.name, "export") as status:
        source_sha256 = sha256(Path(section.checkpoint))
        _check_target(section, target, source_sha256)
        device = "cpu" if section.on_cpu else torch_device(f"cuda:{section.gpu_id}", "export.gpu_id")
        exported = _open(task, spec, section)
        model = _graph(task, spec, section, exported, device)
        properties = {
            "taoq": taoq.__version__,
            "task": task.name,
            "source": {"path": section.checkpoint, "sha256": source_sha256},
            "spec": spec_to_dict(spec),
        }
        write_properties(model, properties)
        with staged(target.parent) as stage:
            file = stage / target.name
            write_onnx(model, file)
            onnx.checker.check_model(str(file), full_check=True)
            written = total_size(file)
            proof = _prove(task, spec, section, exported, file)
            if section.serialize_nvdsinfer:
                _write_deepstream(task, spec, section, target, stage)
            report = {
                "onnx_file": str(target),
                "checkpoint": section.checkpoint,
                "opset_version": model.opset_import[0].version,
                "nodes": len(model.graph.node),
                "quantized_layers": len(exported.layers),
                "size": written,
                "proof": proof,
                "versions": versions(("torch", "onnx", "onnxruntime-gpu", *task.libraries)),
                "command": source.command,
            }
            write_json(stage / f"{target.stem}_export.json", report)
        status.write("RUNNING", "Exported.", {"size_mb": written / 1e6})
    _show(proof)
    batch = section.batch_size if section.batch_size > 0 else "any"
    quantized = f", {len(exported.layers)} layers quantized" if exported.layers else ""
    print(
        f"exported {size(written)}: opset {report['opset_version']}, {report['nodes']} nodes{quantized},"
        f" input [{batch}, {', '.join(map(str, image_shape(task, spec)[1:]))}]\n{target}"
    )


def _sized(task: Task[Any], spec: Any, section: ExportSpec) -> Any:
    """The spec for the input size of `export`, which is that of the data set unless it says another."""
    if section.input_channel != 3:
        what = f"the input has {section.input_channel} channels, every network here has 3"
        raise SpecError(Fault("export.input_channel", what, "leave it out"))
    _, _, *size_of_data = image_shape(task, spec)
    height, width = section.input_height or size_of_data[0], section.input_width or size_of_data[1]
    return spec if [height, width] == size_of_data else task.export.with_size(spec, height, width)


def _check(section: ExportSpec, target: Path) -> None:
    if not section.checkpoint:
        raise SpecError(Fault("export.checkpoint", "missing", "name a checkpoint or an artifact"))
    if not Path(section.checkpoint).exists():
        what = f"there is no {section.checkpoint}"
        raise TaoqError(Fault("export.checkpoint", what, "name a checkpoint or an artifact"))
    if section.checkpoint.endswith(".onnx"):
        what = f"{section.checkpoint} is an ONNX file already"
        raise SpecError(Fault("export.checkpoint", what, "name the checkpoint it was made from"))
    if target.suffix != ".onnx":
        raise SpecError(
            Fault("export.onnx_file", f"{target} does not end in .onnx", f"write {target.with_suffix('.onnx')}")
        )
    first, last = OPSETS
    if not first <= section.opset_version <= last:
        what = f"torch's exporter writes opset {first} to {last}, not {section.opset_version}"
        raise SpecError(Fault("export.opset_version", what, "write 17, which every network here takes"))
    if section.batch_size == 0:
        raise SpecError(Fault("export.batch_size", "0 images are no batch", "write -1 for any number of images"))
    if find_artifact(str(target)):
        what = f"{target} is the payload of an artifact"
        raise SpecError(Fault("export.onnx_file", what, "name another file"))


def _check_target(section: ExportSpec, target: Path, source_sha256: str) -> None:
    """Replace only what was made from the same checkpoint, unless asked."""
    if section.overwrite or not target.exists():
        return
    hint = "name another file, or set export.overwrite: true"
    try:
        made_from = (read_properties(read_onnx(target), target) or {}).get("source", {})
    except TaoqError:
        made_from = {}  # no file of ours
    if made_from.get("sha256") != source_sha256:
        where = made_from.get("path", "something else")
        raise TaoqError(Fault("export.onnx_file", f"{target} is there already, made from {where}", hint))
    log.info("export.onnx_file: %s was made from the same checkpoint and will be replaced", target)


def _open(task: Task[Any], spec: Any, section: ExportSpec) -> _Source:
    directory = find_artifact(section.checkpoint)
    if section.is_quantized is not None and section.is_quantized != (directory is not None):
        what = f"is {str(section.is_quantized).lower()}, but {section.checkpoint} is"
        what += " a quantized artifact" if directory else " no artifact"
        raise SpecError(Fault("export.is_quantized", what, "leave the field out: the artifact knows"))
    if directory is None:
        model = task.build_model(spec, section.checkpoint).eval()
        return _Source(model, model, {}, {})
    manifest = read_artifact(task, spec, directory)
    if manifest.format == "onnx":
        what = f"{section.checkpoint} is an artifact of {manifest.backend}: its payload is an ONNX file"
        raise SpecError(Fault("export.checkpoint", what, f"take {directory / manifest.payload} as it is"))
    backend = cast(TorchBackend[nn.Module], load_backend(manifest.backend))
    reference = open_artifact(task, directory, manifest)
    state, scales = backend.dequantized(reference)
    if not scales and not section.dequantize:
        what = f"{manifest.backend} quantizes weights in a way that ONNX has no operator for"
        hint = "set export.dequantize: true for a float file with these weights, or quantize the float ONNX file"
        raise SpecError(Fault("export.checkpoint", what, hint))
    network = build_empty(task, spec_from_dict(manifest.spec, task.spec)).eval()
    accept_biases(network, state)
    network.load_state_dict(dict(state), assign=True)
    if section.dequantize:
        log.warning("export.dequantize: the file has plain float32 weights, with the values of the quantized ones")
        scales = {}
    if not scales:
        reference = network
    return _Source(reference, network, backend.applied(reference), scales)


def _graph(task: Task[Any], spec: Any, section: ExportSpec, exported: _Source, device: str) -> onnx.ModelProto:
    opset = section.opset_version
    if exported.scales and opset < OPSET:
        log.info("export.opset_version: a quantized graph needs %d; %d is not enough", OPSET, opset)
        opset = OPSET
    example = noise(task.example_inputs(spec), max(section.batch_size, 1))
    inputs = {name: tensor.to(device) for name, tensor in example.items()}
    exported.network.to(device)
    _check_runs(exported.network, inputs, section)
    model = export_graph(
        exported.network,
        inputs,
        list(task.outputs(spec)),
        opset=opset,
        dynamic=section.batch_size < 0,
        fold=not exported.scales,  # scales are those of the weights as they are
    )
    exported.network.to("cpu")
    if exported.scales:
        _place(model, exported)
    return model


def _check_runs(network: nn.Module, inputs: Inputs, section: ExportSpec) -> None:
    try:
        with torch.inference_mode():
            network(*inputs.values())
    except (RuntimeError, ValueError, AssertionError) as error:
        where = "export.input_height" if section.input_height or section.input_width else "export.checkpoint"
        height, width = next(iter(inputs.values())).shape[2:]
        what = f"the network does not run at {height} x {width} (height x width): {str(error).strip().splitlines()[0]}"
        raise TaoqError(Fault(where, what, "leave input_height and input_width out")) from error


def _place(model: onnx.ModelProto, exported: _Source) -> None:
    """Put the scales of the torch layers at the nodes that come from them."""
    nodes = [layer for layer in list_layers(model, TYPES) if layer.alias in exported.layers and not layer.obstacle]
    missing = sorted(set(exported.layers) - {node.alias for node in nodes})
    if missing:
        what = f"{', '.join(missing[:3])}: not in the graph as one layer"
        raise TaoqError(Fault("export.checkpoint", what, "export with export.dequantize: true"))
    plans = []
    for node in nodes:
        weights, activations = exported.layers[node.alias]
        if weights and weights.axis is not None and node.type == "MatMul":
            weights = dataclasses.replace(weights, axis=1 - weights.axis)  # it has the transpose of nn.Linear's
        if activations and activations.axis is not None:
            activations = dataclasses.replace(activations, axis=node.input_axis)
        plans.append(LayerPlan(layer=node, weights=weights, activations=activations))
    qdq.insert(model, plans, {node.name: exported.scales[node.alias] for node in nodes})


def _prove(task: Task[Any], spec: Any, section: ExportSpec, exported: _Source, file: Path) -> dict[str, Any]:
    """Run the file beside the torch model.

    Raises:
        TaoqError: They differ.
    """
    graph = open_onnx(task, spec, file)
    model = TorchRuntime(exported.reference, task.outputs(spec), "cpu")
    tolerance = max(section.tolerance, _QUANTIZED_TOLERANCE) if exported.scales else section.tolerance
    unsure = functools.partial(task.export.ambiguous, exported.reference) if task.export.ambiguous else None
    align, found = task.export.align, task.export.found if exported.scales else None
    compared, ties = 0, 0
    largest: dict[str, tuple[float, float]] = {}
    for inputs in _images(task, spec, section.check_images):
        if unsure is not None:
            clear = ~unsure(inputs)
            ties += int((~clear).sum())
            inputs = {name: tensor[clear] for name, tensor in inputs.items()}
        count = len(next(iter(inputs.values())))
        if count:
            compared += count
            reference = model.run(inputs)
            if not all(bool(value.isfinite().all()) for value in reference.values()):
                hint = "look for NaN or infinite values in the checkpoint"
                raise TaoqError(Fault("export.checkpoint", "the network's outputs are not finite", hint))
            for name, (difference, value) in differences(reference, graph.run(inputs), align, found).items():
                before = largest.get(name, (0.0, 0.0))
                largest[name] = (max(before[0], difference), max(before[1], value))
    if not compared:
        what = f"on none of {ties} images can the outputs be compared: the network chooses its queries by ties"
        raise TaoqError(Fault("export.check_images", what, "give images of what the network was trained for"))
    if ties:
        log.warning("export.check_images: %d image(s) left out, where the network chooses its queries by a tie", ties)
    apart = {name: value for name, value in largest.items() if not value[0] <= tolerance * max(value[1], 1e-12)}
    if apart:
        names = "; ".join(f"{name} by {off:.2g}, its largest value is {top:.3g}" for name, (off, top) in apart.items())
        hint = f"the file was not written; export.tolerance is {tolerance:g} of the largest value"
        raise TaoqError(Fault("export.tolerance", f"torch and ONNX differ: {names}", hint))
    return {
        "images": compared,
        "left_out_for_ties": ties,
        "tolerance": tolerance,
        "outputs": {name: {"largest_difference": off, "largest_value": top} for name, (off, top) in largest.items()},
    }


def differences(
    reference: Outputs,
    outputs: Outputs,
    align: Callable[[Outputs, Outputs], Outputs],
    found: Callable[[Outputs], Tensor] | None,
) -> dict[str, tuple[float, float]]:
    """Largest difference and largest magnitude of each output.

    Args:
        reference: What must come out.
        outputs: What came out.
        align: Brings the second's entries into the order of the first's; both ways, so that none is forgotten.
        found: Which entries count; None counts all.
    """
    result = {name: (0.0, float(value.abs().max())) for name, value in reference.items()}
    for one, other in ((reference, align(reference, outputs)), (outputs, align(outputs, reference))):
        counts = found(one) if found else ...
        for name, (largest, value) in result.items():
            if one[name].shape != other[name].shape or not bool((one[name] - other[name]).isfinite().all()):
                result[name] = (float("inf"), value)
                continue
            apart = (one[name] - other[name])[counts].abs()
            result[name] = (max(largest, float(apart.max())) if apart.numel() else largest, value)
    return result


def _images(task: Task[Any], spec: Any, number: int) -> Iterator[Inputs]:
    """Batches of real images of the spec, `number` in all; noise where it has none, which is said."""
    calibration = dataclasses.replace(spec.quantize.calibration, num_samples=number, batch_size=None)
    few = dataclasses.replace(spec, quantize=dataclasses.replace(spec.quantize, calibration=calibration))
    reasons = []
    for source in (task.calibration_batches, task.evaluation_batches, task.inference_batches):
        try:
            batches: Batches = source(few)
        except TaoqError as error:
            reasons.append(error.faults[0])
            if not error.faults[0].what.startswith("missing"):  # it is given, and not there
                log.warning("%s: %s; export looks for other images", error.faults[0].where, error.faults[0].what)
            continue
        left = number
        for batch in batches:
            yield {name: tensor[:left] for name, tensor in batch.inputs.items()}
            left -= len(batch.paths)
            if left <= 0:
                return
        return
    log.warning(
        "export.check_images: the spec has no images (%s: %s): compared on noise", reasons[0].where, reasons[0].what
    )
    for seed in range(number):
        yield noise(task.example_inputs(spec), 1, seed)


def _write_deepstream(task: Task[Any], spec: Any, section: ExportSpec, target: Path, stage: Path) -> None:
    """nvdsinfer_config.yaml and labels.txt, as Gst-nvinfer of DeepStream reads them."""
    needed = task.export.deepstream(spec)
    properties = {
        "gpu-id": 0,
        "model-color-format": 0,  # RGB
        "onnx-file": target.name,
        "labelfile-path": "labels.txt",
        "infer-dims": ";".join(map(str, image_shape(task, spec)[1:])),
        "batch-size": max(section.batch_size, 1),
        "network-mode": 2,  # FP16 where the graph says nothing else
        **needed.properties,
    }
    (stage / "nvdsinfer_config.yaml").write_text(
        yaml.safe_dump({"property": properties}, sort_keys=False), encoding="utf-8"
    )
    (stage / "labels.txt").write_text(needed.labels, encoding="utf-8")


def _show(proof: Mapping[str, Any]) -> None:
    table = Table(title=f"torch beside ONNX on {proof['images']} images")
    table.add_column("output")
    for column in ("largest difference", "largest value", "accepted"):
        table.add_column(column, justify="right")
    for name, found in proof["outputs"].items():
        top = found["largest_value"]
        table.add_row(name, f"{found['largest_difference']:.2g}", f"{top:.3g}", f"{proof['tolerance'] * top:.2g}")
    show(table)
