# SPDX-License-Identifier: Apache-2.0
"""onnxruntime's own static quantizer, for CPUs: unsigned activations, signed weights, INT8 from layer to layer.

Its kernels take a layer whose input and output are both quantized. So the output of a planned layer is quantized too,
and what is between planned layers reads it quantized: that is where the speed comes from. Other layers stay float.
"""

from __future__ import annotations

import functools
import inspect
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static
from onnxruntime.quantization.calibrate import CalibrationDataReader, TensorsData, create_calibrator
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quant_utils import load_model_with_shape_infer

from taoq.errors import Fault, did_you_mean
from taoq.onnx_file import byte_size, image_input, write_onnx
from taoq.quantization.backends import onnx_biases, onnx_layers, onnx_measures, qdq
from taoq.quantization.backends.base import NO_SHIFTS, Inputs, library_output
from taoq.quantization.backends.onnx_calibration import ENTROPY_BINS, check_ranges, feeds, lean_sessions
from taoq.quantization.backends.onnx_layers import check_weights, list_layers, own_weights
from taoq.quantization.plan import Layer, LayerPlan, QuantizationPlan, Support
from taoq.quantization.ranges import RangeCache, Ranges, calibrated

name = "onnxruntime"
format: Literal["onnx"] = "onnx"
libraries = ("onnx", "onnxruntime-gpu")
payload = "quantized_model.onnx"
support = Support(
    modes=("static_ptq",),
    algorithms=("minmax", "max", "entropy"),
    weights=("int8",),
    activations=("int8",),
    entropy_activations=("int8",),
    activation_axes=False,
    activations_alone=False,
    weight_axes=False,
    layer_types=("Conv", "Gemm", "MatMul"),
    devices=("cuda", "cpu"),
    caches_ranges=True,
    target="CPUs, through onnxruntime; for NVIDIA GPUs take backend modelopt.onnx",
)

_OPTIONS = ("reduce_range", "use_external_data_format")
"""Arguments of `onnxruntime.quantization.quantize_static` that a spec may give; each is true or false."""
_FUSED = ("Relu", "Clip")
"""What onnxruntime takes into the layer in front of it, once both are quantized."""


def check_options(options: Mapping[str, Any], algorithm: str) -> list[Fault]:  # noqa: ARG001 (one face for all backends)
    """Faults of `backend_kwargs` against `onnxruntime.quantization.quantize_static`."""
    real = inspect.signature(quantize_static).parameters
    taken = "taoq takes " + ", ".join(_OPTIONS)
    faults = []
    for key, value in options.items():
        where = f"quantize.backend_kwargs.{key}"
        if key in _OPTIONS:
            if not isinstance(value, bool):
                faults.append(Fault(where, f"'{value}' is not true or false", "write true or false"))
        elif key in real:
            faults.append(Fault(where, f"'{key}' of onnxruntime's quantize_static is decided by taoq", taken))
        else:
            hint = did_you_mean(key, _OPTIONS, taken)
            faults.append(Fault(where, f"onnxruntime's quantize_static has no argument '{key}'", hint))
    return faults


def layers(model: onnx.ModelProto, options: Mapping[str, Any]) -> list[Layer]:  # noqa: ARG001 (no option bounds them)
    """All nodes."""
    return list_layers(model, support.layer_types)


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
    """Find the ranges of all that onnxruntime may quantize.

    Raises:
        TaoqError: A weight, an image or a range is not finite.
    """
    check_weights(model)
    whole = [item.layer.name for item in plan.quantized if item.activations]
    ranges: Ranges = {}
    if whole:
        needed = _tensors(model, [*whole, *_fused(model, whole)])
        entropy = plan.algorithm == "entropy"
        with tempfile.TemporaryDirectory() as folder, library_output(), lean_sessions():
            source = Path(folder, "model.onnx")
            write_onnx(model, source)
            ranges = calibrated(cache, needed, lambda: _calibrate(source, model, batches, device, entropy=entropy))
    return Calibrated(model, ranges, options)


class Calibrated:
    """A float graph and the ranges of its tensors."""

    def __init__(self, model: onnx.ModelProto, ranges: Ranges, options: Mapping[str, Any]) -> None:
        self._model, self._ranges, self._options = model, ranges, options

    def left_out(self, plan: QuantizationPlan) -> Mapping[str, str]:  # noqa: ARG002 (one face for all backends)
        """Onnxruntime leaves nothing out."""
        return {}

    @functools.cached_property
    def _shaped(self) -> onnx.ModelProto:
        """The graph with the shapes of its tensors, as the quantizer wants it; its weights would be there twice."""
        with tempfile.TemporaryDirectory() as folder, library_output():
            source = Path(folder, "model.onnx")
            write_onnx(self._model, source)
            model: onnx.ModelProto = load_model_with_shape_infer(source)
        del model.graph.initializer[:]
        return model

    def with_only(self, layers: Iterable[LayerPlan], shifts: Mapping[str, Any] = NO_SHIFTS) -> onnx.ModelProto:
        """A copy of the graph; layers whose activations stay float get their weights alone."""
        planned = list(layers)
        model = onnx.ModelProto()
        whole = [item.layer.name for item in planned if item.activations]
        model.CopyFrom(self._shaped if whole else self._model)
        if whole:
            model.graph.initializer.extend(self._model.graph.initializer)
            own_weights(model, [item.layer.name for item in planned])  # the quantizer changes them for all readers
            fused = _fused(model, whole)
            with library_output():
                quantizer = QDQQuantizer(
                    model,
                    True,  # one scale per output channel
                    self._options.get("reduce_range", False),
                    QuantType.QInt8,
                    QuantType.QUInt8,
                    TensorsData(CalibrationMethod.MinMax, _as_arrays(self._ranges)),
                    [*whole, *fused],
                    [],
                    [*support.layer_types, *_FUSED],
                    {"ForceQuantizeNoInputCheck": False},
                )
                quantizer.quantize_model()
                quantizer.model.topological_sort()
                model = quantizer.model.model
                _keep_float(model, set(whole))
        qdq.insert(model, [item for item in planned if not item.activations], {})
        return add_to_biases(model, shifts)

    def quantize(self, plan: QuantizationPlan) -> tuple[onnx.ModelProto, Mapping[str, str]]:
        """A copy of the graph as the plan says."""
        return self.with_only(plan.quantized), self.left_out(plan)


applied, ranges = qdq.read, qdq.ranges
layer_errors, macs, bias_shifts = onnx_measures.layer_errors, onnx_measures.macs, onnx_measures.bias_shifts
# its kernels take a bias as int32: a layer with another one would be computed in float
add_to_biases = functools.partial(onnx_biases.add, integers=True)
save, load = onnx_layers.save, onnx_layers.load


def _fused(model: onnx.ModelProto, names: Sequence[str]) -> list[str]:
    """Activation functions that are the only reader of a planned layer's output, and that no float layer reads."""
    planned = set(names)
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name_ in node.input:
            readers.setdefault(name_, []).append(node)
    found = []
    for node in model.graph.node:
        reading = readers.get(node.output[0], []) if node.name in planned else []
        if len(reading) == 1 and reading[0].op_type in _FUSED:
            behind = readers.get(reading[0].output[0], [])
            if not any(reader.op_type in onnx_layers.TYPES and reader.name not in planned for reader in behind):
                found.append(reading[0].name)
    return found


def _keep_float(model: onnx.ModelProto, planned: set[str]) -> None:
    """Let layers outside of the plan read what was there before it was quantized for others."""
    made_by = {name_: node for node in model.graph.node for name_ in node.output}
    for node in model.graph.node:
        if node.op_type in onnx_layers.TYPES and node.name not in planned:
            for index, name_ in enumerate(node.input):
                dequantize = made_by.get(name_)
                if dequantize is not None and dequantize.op_type == "DequantizeLinear":
                    quantize_ = made_by.get(dequantize.input[0])
                    if quantize_ is not None:
                        node.input[index] = quantize_.input[0]


def _tensors(model: onnx.ModelProto, names: Sequence[str]) -> list[str]:
    """Inputs and outputs of nodes."""
    wanted = set(names)
    nodes = [node for node in model.graph.node if node.name in wanted]
    return [name_ for node in nodes for name_ in (node.input[0], node.output[0])]


def _calibrate(
    source: Path, model: onnx.ModelProto, batches: Iterable[Inputs], device: str, *, entropy: bool
) -> Ranges:
    """Ranges of all that onnxruntime may quantize, a batch at a time: given all batches it keeps them in memory."""
    calibrator = create_calibrator(
        source,
        [*support.layer_types, *_FUSED],
        augmented_model_path=str(source.with_name("augmented.onnx")),
        calibrate_method=CalibrationMethod.Entropy if entropy else CalibrationMethod.MinMax,
        providers=[*_gpu(device), "CPUExecutionProvider"],
        extra_options={"num_bins": ENTROPY_BINS} if entropy else {},
    )
    graph_input = image_input(model, source)
    for feed in feeds(graph_input, batches, graph_input.shape[0], entropy=entropy):
        calibrator.collect_data(_One(feed))
    found = {
        name_: (float(np.min(data.range_value[0])), float(np.max(data.range_value[1])))
        for name_, data in calibrator.compute_data().items()
    }
    check_ranges(found)
    return found


def _gpu(device: str) -> list[tuple[str, dict[str, int]]]:
    return [] if device == "cpu" else [("CUDAExecutionProvider", {"device_id": int(device.partition(":")[2])})]


def _as_arrays(ranges: Ranges) -> dict[str, tuple[np.float32, np.float32]]:
    return {name_: (np.float32(low), np.float32(high)) for name_, (low, high) in ranges.items()}


class _One(CalibrationDataReader):  # type: ignore[misc]
    """One batch."""

    def __init__(self, batch: dict[str, Any]) -> None:
        self._batch: dict[str, Any] | None = batch

    def get_next(self) -> dict[str, Any] | None:
        """The batch, once."""
        batch, self._batch = self._batch, None
        return batch
