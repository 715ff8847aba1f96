# SPDX-License-Identifier: Apache-2.0
"""NVIDIA ModelOpt on ONNX graphs: static quantization for TensorRT.

ModelOpt calibrates: its ranges, and what it leaves out because TensorRT has no fast kernel for it. The nodes of the
plan are then placed by `qdq`, since one call of ModelOpt has one dtype, cannot leave activations float, and quantizes
a tensor for everything that reads it.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import onnx
from onnx import numpy_helper
from onnxruntime.quantization import base_quantizer, qdq_quantizer, registry
from onnxruntime.quantization import calibrate as ort_calibrate

from taoq.errors import Fault, TaoqError, did_you_mean
from taoq.onnx_file import byte_size, image_input, read_onnx, write_onnx
from taoq.quantization.backends import onnx_biases, onnx_layers, onnx_measures, qdq
from taoq.quantization.backends.base import NO_SHIFTS, Inputs, Scales, library_output
from taoq.quantization.backends.onnx_calibration import ENTROPY_BINS, check_ranges, feeds, lean_sessions
from taoq.quantization.backends.onnx_layers import check_weights, list_layers
from taoq.quantization.plan import Layer, LayerPlan, QuantizationPlan, Support
from taoq.quantization.ranges import RangeCache, Ranges, calibrated

with library_output():
    import modelopt.onnx.quantization as moq
    import onnx_graphsurgeon
    from modelopt.onnx.autocast.convert import convert_to_f16
    from modelopt.onnx.quantization import ort_patching
    from modelopt.onnx.quantization.graph_utils import find_nodes_from_convs_to_exclude

name = "modelopt.onnx"
format: Literal["onnx"] = "onnx"
libraries = ("onnx", "onnxruntime-gpu", "nvidia-modelopt")
payload = "quantized_model.onnx"
support = Support(
    modes=("static_ptq",),
    algorithms=("minmax", "max", "entropy"),
    weights=("int8", "fp8_e4m3fn"),
    activations=("int8", "fp8_e4m3fn"),
    entropy_activations=("int8", "fp8_e4m3fn"),
    activation_axes=False,
    layer_types=onnx_layers.TYPES,
    devices=("cuda", "cpu", "trt"),
    realised={"fp8_e5m2": "fp8_e4m3fn"},  # ModelOpt refuses E5M2; TensorRT has only E4M3
    caches_ranges=True,
    target="NVIDIA GPUs through TensorRT; on a CPU its graph is slower than float, backend onnxruntime is for CPUs",
)

_OPTIONS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "use_external_data_format": (lambda value: isinstance(value, bool), "true or false"),
    "calibrate_per_node": (lambda value: isinstance(value, bool), "true or false"),
    "op_types_to_quantize": (lambda value: isinstance(value, list), "a list of op types"),
    "op_types_to_exclude": (lambda value: isinstance(value, list), "a list of op types"),
    # not bf16: onnxruntime has no kernels for it, so the file could not be checked
    "high_precision_dtype": (lambda value: value in ("fp32", "fp16"), "fp32 or fp16"),
}
"""Arguments of `modelopt.onnx.quantization.quantize` that a spec may give, and their values."""
_INSTEAD = {
    "quantize_mode": "give dtypes in quantize.layers",
    "nodes_to_quantize": "write rules in quantize.layers",
    "nodes_to_exclude": "write patterns in quantize.skip_names",
    "calibration_method": "set quantize.algorithm",
    "calibration_eps": "set quantize.device",
    "calibration_cache_path": "set quantize.calibration.cache",
    "calibration_data": "calibration images come from the dataset section",
    "calibration_data_reader": "calibration images come from the dataset section",
    "dq_only": "leave it out: weights are stored quantized, always",
    "output_path": "set quantize.results_dir",
    "onnx_path": "set quantize.model_path",
}
"""Arguments of it that other fields of the spec decide."""


def check_options(options: Mapping[str, Any], algorithm: str) -> list[Fault]:  # noqa: ARG001 (one face for all backends)
    """Faults of `backend_kwargs` against `modelopt.onnx.quantization.quantize`."""
    real = [key for key in inspect.signature(moq.quantize).parameters if key != "kwargs"]
    faults = []
    for key, value in options.items():
        where = f"quantize.backend_kwargs.{key}"
        if key in _OPTIONS:
            fits, values = _OPTIONS[key]
            if not fits(value):
                faults.append(Fault(where, f"'{value}' is not {values}", f"write {values}"))
            elif key.startswith("op_types"):
                faults += _check_types(where, value)
        elif key in real:
            hint = _INSTEAD.get(key, "leave it out: taoq takes only " + ", ".join(_OPTIONS))
            faults.append(Fault(where, f"'{key}' of ModelOpt's quantize is decided by taoq", hint))
        else:
            otherwise = "taoq takes " + ", ".join(_OPTIONS)
            faults.append(
                Fault(where, f"ModelOpt's quantize has no argument '{key}'", did_you_mean(key, _OPTIONS, otherwise))
            )
    return faults


def layers(model: onnx.ModelProto, options: Mapping[str, Any]) -> list[Layer]:
    """All nodes; the op types of `backend_kwargs` bound what may be quantized."""
    types = options.get("op_types_to_quantize", onnx_layers.TYPES)
    return list_layers(model, [type_ for type_ in types if type_ not in options.get("op_types_to_exclude", ())])


float_size = byte_size


def calibrate(
    model: onnx.ModelProto,
    plan: QuantizationPlan,
    batches: Iterable[Inputs],
    options: Mapping[str, Any],
    *,
    device: str,
    cache: RangeCache | None,
) -> Calibrated:
    """Find the ranges of all layers that can be quantized with ModelOpt.

    Raises:
        TaoqError: A weight, an image or a range is not finite, or ModelOpt cannot calibrate this graph.
    """
    check_weights(model)
    left_out = _left_out(model, plan)
    inputs = {node.name: node.input[0] for node in model.graph.node}
    names = [item.layer.name for item in plan.quantized if item.activations and item.layer.name not in left_out]
    ranges: Ranges = {}
    if names:
        able = [layer.name for layer in layers(model, options) if not layer.obstacle]
        entropy = plan.algorithm == "entropy"
        ranges = calibrated(
            cache,
            [inputs[name_] for name_ in names],
            lambda: _calibrate(model, able, batches, options, device=device, entropy=entropy),
        )
    return Calibrated(model, ranges, options)


class Calibrated:
    """A float graph and the ranges of the inputs of its layers."""

    def __init__(self, model: onnx.ModelProto, ranges: Ranges, options: Mapping[str, Any]) -> None:
        self._model, self._ranges, self._options = model, ranges, options
        self._inputs = {node.name: node.input[0] for node in model.graph.node}

    def left_out(self, plan: QuantizationPlan) -> Mapping[str, str]:
        """Layers that ModelOpt excludes whatever it is told, or has no range for."""
        missing = [
            item.layer.name
            for item in plan.quantized
            if item.activations and self._inputs[item.layer.name] not in self._ranges
        ]
        return dict.fromkeys(missing, "ModelOpt found no range for its input") | _left_out(self._model, plan)

    def with_only(self, layers: Iterable[LayerPlan], shifts: Mapping[str, Any] = NO_SHIFTS) -> onnx.ModelProto:
        """A copy of the graph with the nodes of these layers."""
        planned = list(layers)
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        qdq.insert(model, planned, {item.layer.name: _scales(item, self._inputs, self._ranges) for item in planned})
        return add_to_biases(model, shifts)

    def quantize(self, plan: QuantizationPlan) -> tuple[onnx.ModelProto, Mapping[str, str]]:
        """A copy with the plan's nodes, its float part in the precision of `high_precision_dtype`."""
        left_out = self.left_out(plan)
        model = self.with_only(item for item in plan.quantized if item.layer.name not in left_out)
        high = self._options.get("high_precision_dtype", "fp32")
        if high != "fp32":
            with library_output():
                model = convert_to_f16(model, keep_io_types=True, low_precision_type=high)
        return model, left_out


applied, ranges = qdq.read, qdq.ranges
layer_errors, macs, bias_shifts = onnx_measures.layer_errors, onnx_measures.macs, onnx_measures.bias_shifts
save, load, add_to_biases = onnx_layers.save, onnx_layers.load, onnx_biases.add


def _check_types(where: str, types: Sequence[Any]) -> list[Fault]:
    known = ", ".join(onnx_layers.TYPES)
    return [
        Fault(where, f"taoq quantizes no op type '{type_}'", did_you_mean(str(type_), onnx_layers.TYPES, known))
        for type_ in types
        if type_ not in onnx_layers.TYPES
    ]


def _left_out(model: onnx.ModelProto, plan: QuantizationPlan) -> dict[str, str]:
    """Planned layers that ModelOpt excludes whatever it is told, with its reason, by asking the function it asks."""
    found: dict[str, str] = {}
    graph = onnx_graphsurgeon.import_onnx(model)
    for dtype in sorted({item.activations.dtype for item in plan.quantized if item.activations}):
        mode = "int8" if dtype == "int8" else "fp8"
        with library_output():
            excluded = set(find_nodes_from_convs_to_exclude(graph, quantize_mode=mode))
        for item in plan.quantized:
            if item.activations and item.activations.dtype == dtype and item.layer.name in excluded:
                found[item.layer.name] = f"ModelOpt leaves it out: TensorRT has no fast {mode} kernel for its shape"
    return found


def _scales(item: LayerPlan, inputs: Mapping[str, str], ranges: Ranges) -> Scales:
    if not item.activations:
        return Scales()
    low, high = ranges[inputs[item.layer.name]]
    return Scales(activations=float(qdq.scale_of(max(-low, high), item.activations.dtype)))


def _calibrate(
    model: onnx.ModelProto,
    nodes: Sequence[str],
    batches: Iterable[Inputs],
    options: Mapping[str, Any],
    *,
    device: str,
    entropy: bool,
) -> Ranges:
    """Ranges of the inputs of `nodes`: ModelOpt quantizes a copy to INT8, and its scales are read."""
    with (
        tempfile.TemporaryDirectory() as folder,
        library_output(),
        _onnxruntime_kept(),
        lean_sessions(),
        _in(Path(folder)),
    ):
        source, result = Path(folder, "model.onnx"), Path(folder, "quantized.onnx")
        reader = _Reader(model, batches, entropy=entropy)
        per_node = options.get("calibrate_per_node", False)
        write_onnx(reader.with_fixed_batch(model) if per_node else model, source)
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
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            hint = "take quantize.backend_kwargs out" if options else "export the model again, with a newer opset"
            raise TaoqError(
                Fault("quantize.backend", f"ModelOpt cannot calibrate this graph: {reason}", hint)
            ) from error
        return _read_ranges(read_onnx(result), nodes)


def _read_ranges(model: onnx.ModelProto, nodes: Sequence[str]) -> Ranges:
    """Largest magnitudes from the scales of the INT8 graph."""
    made_by = {name: node for node in model.graph.node for name in node.output}
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    ranges: dict[str, tuple[float, float]] = {}
    wanted = set(nodes)
    for node in model.graph.node:
        dequantize = made_by.get(node.input[0]) if node.name in wanted else None
        if dequantize is None or dequantize.op_type != "DequantizeLinear":
            continue
        quantize_ = made_by[dequantize.input[0]]
        scale = numpy_helper.to_array(tensors[quantize_.input[1]])
        largest = float(scale) * qdq.LARGEST["int8"]
        ranges[quantize_.input[0]] = (-largest, largest)
    check_ranges(ranges)
    return ranges


class _Reader(ort_calibrate.CalibrationDataReader):  # type: ignore[misc]
    """Calibration images for ModelOpt, one batch in memory at a time."""

    def __init__(self, model: onnx.ModelProto, batches: Iterable[Inputs], *, entropy: bool) -> None:
        self._entropy = entropy
        self._input = image_input(model, Path("quantize.model_path"))
        self._batches = batches
        self._fixed = self._input.shape[0]
        self.rewind()

    def with_fixed_batch(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """A copy of the model for the batch of the first images: calibration by node needs every shape."""
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        self._fixed = self._fixed or len(self.get_first()[self._input.name])
        copy.graph.input[0].type.tensor_type.shape.dim[0].dim_value = self._fixed
        self.rewind()
        return copy

    def get_next(self) -> dict[str, Any] | None:
        """The next batch; None at the end."""
        return next(self._iterator, None)

    def get_first(self) -> dict[str, Any]:
        """The first batch."""
        return next(self._read())

    def rewind(self) -> None:
        """Begin again."""
        self._iterator = self._read()

    def _read(self) -> Iterator[dict[str, Any]]:
        return feeds(self._input, self._batches, self._fixed, entropy=self._entropy)


def _entropy_calibrater(*arguments: Any, **options: Any) -> Any:
    return ort_calibrate.EntropyCalibrater(*arguments, **{**options, "num_bins": ENTROPY_BINS})


def _infer_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def _providers(device: str) -> list[str]:
    """ModelOpt's names of onnxruntime's providers."""
    if device == "cpu":
        return ["cpu"]
    return ["trt", "cuda:0", "cpu"] if device == "trt" else [device, "cpu"]


@contextlib.contextmanager
def _in(folder: Path) -> Iterator[None]:
    """Temporary files of ModelOpt go into a folder that goes away; no progress bars, no slow garbage collection."""
    gc.freeze()  # calibration by node collects garbage once a node and batch: with torch loaded, minutes
    try:
        with (
            mock.patch.object(tempfile, "tempdir", str(folder)),
            mock.patch.object(ort_patching, "tqdm", functools.partial(ort_patching.tqdm, disable=True)),
            mock.patch.object(ort_patching, "EntropyCalibrater", _entropy_calibrater),
            # calibration by node: onnxruntime's shape inference fails on operators of detectors, onnx's does not
            mock.patch.object(ort_patching.SymbolicShapeInference, "infer_shapes", _infer_shapes),
        ):
            yield
    finally:
        gc.unfreeze()


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
