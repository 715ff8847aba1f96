# SPDX-License-Identifier: Apache-2.0
"""Find ranges with ModelOpt: it quantizes a copy of a graph to INT8, and its scales are read."""

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


def find_ranges(
    graph: Graph,
    nodes: Sequence[str],
    batches: Iterable[Inputs],
    options: Options,
    *,
    device: str,
    entropy: bool,
) -> Ranges:
    """Ranges of the inputs of nodes.

    Args:
        graph: The float graph, prepared.
        nodes: Names of the nodes.
        batches: Calibration data.
        options: `backend_kwargs`.
        device: Where to run.
        entropy: Whether ranges come from histograms; else they are the largest magnitudes.

    Raises:
        TaoqError: Data or a range is not finite, or ModelOpt cannot calibrate this graph.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        library_output(),
        _onnxruntime_kept(),
        _modelopt_settings(Path(folder)),
    ):
        source, result = Path(folder, "model.onnx"), Path(folder, "quantized.onnx")
        reader = _Reader(graph_inputs(graph, "quantize.model_path"), batches, entropy=entropy)
        per_node = options.get("calibrate_per_node", False)
        write_graph(reader.with_fixed_batch(graph) if per_node else graph, source)
        try:
            moq.quantize(
                str(source),
                quantize_mode="int8",  # FP8 takes the same ranges
                calibration_method="entropy" if entropy else "max",
                calibration_data_reader=reader,
                calibration_eps=_providers(device),
                # exact names: ModelOpt reads them as regular expressions, and quantizes everything if none matches
                nodes_to_quantize=[re.escape(node) + "$" for node in nodes],
                high_precision_dtype="fp32",
                output_path=str(result),
                log_level="WARNING",
                use_external_data_format=options.get("use_external_data_format", False),
                calibrate_per_node=per_node,
                # else Gemm and MatMul of a dynamic batch, or of one image, are left out
                enable_gemv_detection_for_trt=False,
            )
        except TaoqError:
            raise
        except Exception as error:  # whatever onnxruntime or ModelOpt raises
            hint = "take quantize.backend_kwargs out" if options else "export the model again, with a newer opset"
            what = f"ModelOpt cannot calibrate this graph: {first_line(error)}"
            raise TaoqError(Fault("quantize.backend", what, hint)) from error
        return _read_ranges(read_graph(result), nodes)


def _read_ranges(graph: Graph, nodes: Sequence[str]) -> Ranges:
    """Largest magnitudes from the scales of the INT8 graph."""
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
    """Calibration data for ModelOpt, one batch in memory at a time."""

    def __init__(self, wanted: Sequence[GraphInput], batches: Iterable[Inputs], *, entropy: bool) -> None:
        self._wanted, self._batches, self._entropy = wanted, batches, entropy
        self.rewind()

    def with_fixed_batch(self, graph: Graph) -> Graph:
        """A copy of the graph for the batch of the first images: calibration by node needs every shape."""
        copy = graph.copy()
        size = self._wanted[0].shape[0] or samples(self.get_first())
        self._wanted = [GraphInput(entry.name, (size, *entry.shape[1:]), entry.dtype) for entry in self._wanted]
        for value in copy.proto.input:
            if value.name in [entry.name for entry in self._wanted]:
                value.type.tensor_type.shape.dim[0].dim_value = size
        self.rewind()
        return copy

    def get_next(self) -> Arrays | None:
        """The next batch; None at the end."""
        return next(self._iterator, None)

    def get_first(self) -> Arrays:
        """The first batch."""
        return next(self._read())

    def rewind(self) -> None:
        """Start again."""
        self._iterator = self._read()

    def _read(self) -> Iterator[Arrays]:
        return feeds(self._wanted, self._batches, entropy=self._entropy)


def _providers(device: str) -> list[str]:
    """ModelOpt's names of onnxruntime's providers."""
    if device == "cpu":
        return ["cpu"]
    return ["trt", "cuda:0", "cpu"] if device == "trt" else [device, "cpu"]


@contextlib.contextmanager
def _modelopt_settings(folder: Path) -> Iterator[None]:
    """What ModelOpt has no argument for.

    Temporary files go into `folder`, which the caller removes. Sessions give memory back after each batch. There are no
    progress bars. Entropy has enough bins to choose from. Calibration by node infers shapes with onnx, since
    onnxruntime's inference fails on operators of detectors; and it does not collect garbage once a node and batch,
    which takes minutes with torch loaded.
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
def _onnxruntime_kept() -> Iterator[None]:
    """Undo what ModelOpt does to onnxruntime's own quantizer in this process."""
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
            for key, value in vars(owner).copy().items():
                if before.get(key) is not value and not key.startswith("__dict"):
                    setattr(owner, key, before[key]) if key in before else delattr(owner, key)
        ort_calibrate.create_calibrator = create
        for table, entry in zip(tables, entries, strict=True):
            table.clear()
            table.update(entry)
