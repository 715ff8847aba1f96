# SPDX-License-Identifier: Apache-2.0
"""Calibrate with ModelOpt: let it quantize a copy of the graph to INT8, and compute the ranges from its scales."""

from __future__ import annotations

import contextlib
import functools
import gc
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from onnxruntime.quantization import base_quantizer, qdq_quantizer, registry
from onnxruntime.quantization import calibrate as ort_calibrate

from taoq.errors import Fault, TaoqError, first_line
from taoq.network import Inputs
from taoq.plain import Options
from taoq.quantization.dtypes import INT8
from taoq.quantization.formats.onnx.calibration import ENTROPY_BINS, check_ranges, feeds, lean_options
from taoq.quantization.formats.onnx.file import read_graph, write_graph
from taoq.quantization.formats.onnx.graph import Graph
from taoq.quantization.formats.onnx.inputs import Arrays, GraphInput, graph_inputs, samples
from taoq.quantization.library import library_output, replaced
from taoq.quantization.ranges import Ranges

with library_output():
    import modelopt.onnx.quantization as moq
    from modelopt.onnx.quantization import ort_patching


def calibrate_ranges(
    graph: Graph,
    nodes: Sequence[str],
    batches: Iterable[Inputs],
    options: Options,
    *,
    device: str,
    entropy: bool,
) -> Ranges:
    """Calibrate the input ranges of nodes.

    Args:
        graph: The float graph, prepared.
        nodes: Names of the nodes.
        batches: Calibration data.
        options: `backend_kwargs`.
        device: Device to run on.
        entropy: Whether to use entropy calibration; otherwise ranges are the largest magnitudes.

    Raises:
        TaoqError: If an image or a range is not finite, or ModelOpt cannot calibrate the graph.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        library_output(),
        _onnxruntime_restored(),
        _modelopt_settings(Path(folder)),
    ):
        source, result = Path(folder, "model.onnx"), Path(folder, "quantized.onnx")
        reader = _Reader(graph_inputs(graph, "quantize.model_path"), batches, entropy=entropy)
        per_node = options.get("calibrate_per_node", False)
        write_graph(reader.with_fixed_batch(graph) if per_node else graph, source)
        try:
            moq.quantize(
                str(source),
                quantize_mode="int8",  # FP8 uses the same ranges.
                calibration_method="entropy" if entropy else "max",
                calibration_data_reader=reader,
                calibration_eps=_providers(device),
                # ModelOpt takes regular expressions, and quantizes all nodes if none matches.
                nodes_to_quantize=[re.escape(node) + "$" for node in nodes],
                high_precision_dtype="fp32",
                output_path=str(result),
                log_level="WARNING",
                use_external_data_format=options.get("use_external_data_format", False),
                calibrate_per_node=per_node,
                # Otherwise ModelOpt leaves out Gemm and MatMul nodes if the batch size is dynamic or 1.
                enable_gemv_detection_for_trt=False,
            )
        except TaoqError:
            raise
        except Exception as error:  # onnxruntime and ModelOpt raise exceptions of many types.
            hint = "take quantize.backend_kwargs out" if options else "export the model again, with a newer opset"
            what = f"ModelOpt cannot calibrate this graph: {first_line(error)}"
            raise TaoqError(Fault("quantize.backend", what, hint)) from error
        return _read_ranges(read_graph(result), nodes)


def _read_ranges(graph: Graph, nodes: Sequence[str]) -> Ranges:
    """Compute the input ranges of nodes from the scales of the INT8 graph. Nodes without a scale are left out."""
    ranges: dict[str, tuple[float, float]] = {}
    for node in (graph.nodes[name] for name in nodes if name in graph.nodes):
        dequantize = graph.dequantizer(node.input[0])
        if dequantize is None:
            continue
        quantize = graph.makers[dequantize.input[0]]
        largest = graph.scalar(quantize.input[1]) * INT8.largest
        ranges[quantize.input[0]] = (-largest, largest)
    check_ranges(ranges)
    return ranges


class _Reader(ort_calibrate.CalibrationDataReader):  # type: ignore[misc]
    """Calibration data for ModelOpt, with one batch in memory at a time."""

    def __init__(self, inputs: Sequence[GraphInput], batches: Iterable[Inputs], *, entropy: bool) -> None:
        self._inputs, self._batches, self._entropy = inputs, batches, entropy
        self.rewind()

    def with_fixed_batch(self, graph: Graph) -> Graph:
        """Return a copy of the graph with the size of the first batch. Calibration per node requires fixed shapes."""
        copy = graph.copy()
        size = self._inputs[0].shape[0] or samples(self.get_first())
        self._inputs = [GraphInput(entry.name, (size, *entry.shape[1:]), entry.dtype) for entry in self._inputs]
        for value in copy.proto.input:
            if value.name in [entry.name for entry in self._inputs]:
                value.type.tensor_type.shape.dim[0].dim_value = size
        self.rewind()
        return copy

    def get_next(self) -> Arrays | None:
        """Return the next batch; None at the end."""
        return next(self._iterator, None)

    def get_first(self) -> Arrays:
        """Return the first batch, without advancing."""
        return next(self._read())

    def rewind(self) -> None:
        """Start again from the first batch."""
        self._iterator = self._read()

    def _read(self) -> Iterator[Arrays]:
        return feeds(self._inputs, self._batches, entropy=self._entropy)


def _providers(device: str) -> list[str]:
    """Return ModelOpt's names of the execution providers for a device."""
    if device == "cpu":
        return ["cpu"]
    return ["trt", "cuda:0", "cpu"] if device == "trt" else [device, "cpu"]


@contextlib.contextmanager
def _modelopt_settings(folder: Path) -> Iterator[None]:
    """Change settings for which ModelOpt has no argument.

    - Temporary files go into `folder`, which the caller removes.
    - Sessions free their memory after each batch.
    - Progress bars are disabled.
    - Entropy calibration uses `ENTROPY_BINS` bins.
    - Calibration per node infers shapes with onnx: onnxruntime's inference fails on operators of detectors.
    - Existing objects are hidden from the garbage collector, which calibration per node calls for every node and batch.
      With torch loaded, this would take minutes.
    """
    gc.freeze()
    try:
        with (
            replaced(tempfile, "tempdir", str(folder)),
            replaced(onnxruntime, "SessionOptions", lean_options),
            replaced(ort_patching, "tqdm", functools.partial(ort_patching.tqdm, disable=True)),
            replaced(ort_patching, "EntropyCalibrater", _entropy_calibrater),
            replaced(ort_patching.SymbolicShapeInference, "infer_shapes", staticmethod(_infer_shapes)),
        ):
            yield
    finally:
        gc.unfreeze()


def _entropy_calibrater(*arguments: Any, **options: Any) -> Any:
    return ort_calibrate.EntropyCalibrater(*arguments, **{**options, "num_bins": ENTROPY_BINS})


def _infer_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


@contextlib.contextmanager
def _onnxruntime_restored() -> Iterator[None]:
    """Undo ModelOpt's patches of onnxruntime's quantizer, which would otherwise stay for the whole process."""
    classes = (
        ort_calibrate.CalibraterBase,
        ort_calibrate.MinMaxCalibrater,
        ort_calibrate.HistogramCalibrater,
        ort_calibrate.HistogramCollector,
        base_quantizer.BaseQuantizer,
        qdq_quantizer.QDQQuantizer,
    )
    attributes = [(owner, dict(vars(owner))) for owner in classes]
    create, tables = ort_calibrate.create_calibrator, (registry.QDQRegistry, registry.QLinearOpsRegistry)
    entries = [dict(table) for table in tables]
    try:
        yield
    finally:
        for owner, before in attributes:
            for name, value in vars(owner).copy().items():
                if before.get(name) is not value and not name.startswith("__dict"):
                    setattr(owner, name, before[name]) if name in before else delattr(owner, name)
        ort_calibrate.create_calibrator = create
        for table, entry in zip(tables, entries, strict=True):
            table.clear()
            table.update(entry)
