# SPDX-License-Identifier: Apache-2.0
"""The static quantizer of onnxruntime, for CPUs: INT8 with unsigned activations and signed weights.

onnxruntime runs a layer with its integer kernels only if the input and the output are both quantized. Therefore the
output of each planned layer is quantized as well, and nodes between planned layers read it quantized. Layers outside of
the plan stay float.
"""

from __future__ import annotations

import functools
import inspect
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static
from onnxruntime.quantization.calibrate import (
    CalibrationDataReader,
    EntropyCalibrater,
    MinMaxCalibrater,
    TensorsData,
)
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quant_utils import load_model_with_shape_infer

from taoq.errors import Fault, did_you_mean
from taoq.network import Inputs
from taoq.plain import Options
from taoq.quantization.backends.base import NO_SHIFTS, Backend
from taoq.quantization.capability import Algorithm, Capability, TensorCapability
from taoq.quantization.dtypes import INT8
from taoq.quantization.formats.base import Shifts
from taoq.quantization.formats.onnx import qdq
from taoq.quantization.formats.onnx.biases import add_shifts
from taoq.quantization.formats.onnx.calibration import ENTROPY_BINS, check_ranges, feeds, lean_options
from taoq.quantization.formats.onnx.file import read_graph, write_graph
from taoq.quantization.formats.onnx.graph import Graph
from taoq.quantization.formats.onnx.inputs import Arrays, graph_inputs
from taoq.quantization.formats.onnx.layers import TYPES, check_weights, list_layers, own_weights
from taoq.quantization.library import library_output
from taoq.quantization.ranges import RangeCache, Ranges, cached_ranges
from taoq.quantization.spec import QuantizeSpec
from taoq.quantization.types import Applied, Layer, LayerPlan, QuantizationPlan

_TYPES = ("Conv", "Gemm", "MatMul")
_FUSED = ("Relu", "Clip")
"""Op types that onnxruntime fuses into the preceding layer if both are quantized."""
_OPTIONS = ("reduce_range", "use_external_data_format")
"""Boolean arguments of `onnxruntime.quantization.quantize_static` that a spec may set."""


class OnnxRuntimeBackend:
    """INT8 with unsigned activations, for CPUs."""

    capability = Capability(
        name="onnxruntime",
        format="onnx",
        payload="quantized_model.onnx",
        libraries=("onnx", "onnxruntime-gpu"),
        modes=("static_ptq",),
        algorithms=tuple(Algorithm(name=name, activations=(INT8,)) for name in ("minmax", "max", "entropy")),
        weights=TensorCapability(dtypes=(INT8,), axes="channels"),
        activations=TensorCapability(dtypes=(INT8,), axes="none", symmetric=False),
        activations_alone=False,
        layer_types=_TYPES,
        devices=("cuda", "cpu"),
        caches_ranges=True,
        options={
            "reduce_range": "Use 7 bits, for processors whose 8-bit sums overflow 16 bits",
            "use_external_data_format": "Write the weights into a file beside the graph",
        },
        target="CPUs, through onnxruntime; for NVIDIA GPUs take backend modelopt.onnx",
    )

    def check(self, section: QuantizeSpec) -> list[Fault]:
        """Check `backend_kwargs` against the arguments of `onnxruntime.quantization.quantize_static`."""
        parameters = inspect.signature(quantize_static).parameters
        options_hint = "taoq takes " + ", ".join(_OPTIONS)
        faults = []
        for key, value in section.backend_kwargs.items():
            where = f"quantize.backend_kwargs.{key}"
            if key in _OPTIONS:
                if not isinstance(value, bool):
                    faults.append(Fault(where, f"'{value}' is not true or false", "write true or false"))
            elif key in parameters:
                what = f"'{key}' of onnxruntime's quantize_static is decided by taoq"
                faults.append(Fault(where, what, options_hint))
            else:
                hint = did_you_mean(key, _OPTIONS, options_hint)
                faults.append(Fault(where, f"onnxruntime's quantize_static has no argument '{key}'", hint))
        return faults

    def layers(self, model: Graph, options: Options) -> list[Layer]:
        """List all nodes as layers."""
        return list_layers(model, _TYPES, "onnxruntime has no quantized operator of its type")

    def calibrate(
        self,
        model: Graph,
        plan: QuantizationPlan,
        batches: Iterable[Inputs],
        options: Options,
        *,
        device: str,
        cache: RangeCache | None,
    ) -> OnnxRuntimeCalibrated:
        """Calibrate the ranges of all tensors that onnxruntime may quantize.

        Raises:
            TaoqError: If a weight, an image or a range is not finite.
        """
        check_weights(model)
        names = _with_activations(plan.quantized)
        ranges: Ranges = {}
        if names:
            entropy = plan.algorithm == "entropy"
            ranges = cached_ranges(
                cache,
                _input_and_output_names(model, [*names, *_fused(model, names)]),
                lambda: _calibrate_ranges(model, batches, device, entropy=entropy),
            )
        return OnnxRuntimeCalibrated(model, ranges, options)

    def applied(self, model: Graph) -> Applied:
        """Return the quantized layers and their schemes, read from the Q/DQ nodes."""
        return qdq.read(model)

    def weight(self, model: Graph, layer: str) -> NDArray[np.float64] | None:
        """Return the dequantized weight of a layer; None if the weight is not stored quantized."""
        return qdq.stored_weight(model, layer)

    def save(self, model: Graph, path: Path, options: Options) -> None:
        """Write a quantized graph. Weights go into a second file above 2 GB or with `use_external_data_format`."""
        write_graph(model, path, external=options.get("use_external_data_format", False))

    def load(self, path: Path, build: Callable[[], Graph]) -> Graph:
        """Read a quantized graph. The file is complete, so the float model is not needed."""
        return read_graph(path)


class OnnxRuntimeCalibrated:
    """A float graph and the ranges of its tensors."""

    def __init__(self, graph: Graph, ranges: Ranges, options: Options) -> None:
        self._graph, self._ranges, self._options = graph, ranges, options

    def left_out(self, plan: QuantizationPlan) -> Mapping[str, str]:
        """Return no layers: onnxruntime quantizes every planned layer."""
        return {}

    @functools.cached_property
    def _shaped(self) -> Graph:
        """The graph with inferred shapes, which the quantizer needs; without its weights, to save memory."""
        with tempfile.TemporaryDirectory() as folder, library_output():
            source = Path(folder, "model.onnx")
            write_graph(self._graph, source)
            model = load_model_with_shape_infer(source)
        del model.graph.initializer[:]
        return Graph(model)

    def with_only(self, layers: Iterable[LayerPlan], shifts: Shifts = NO_SHIFTS) -> Graph:
        """Return a quantized copy of the graph. In layers with float activations, only the weight is quantized."""
        planned = list(layers)
        names = _with_activations(planned)
        graph = self._quantize(planned, names) if names else self._graph.copy()
        qdq.insert(graph, [item for item in planned if not item.activations], {})
        # Integer kernels require an int32 bias; with a float bias, onnxruntime would compute the layer in float.
        return add_shifts(graph, shifts, integers=True)

    def quantize(self, plan: QuantizationPlan, shifts: Shifts = NO_SHIFTS) -> Graph:
        """Return a copy of the graph, quantized as planned."""
        return self.with_only(plan.quantized, shifts)

    def _quantize(self, planned: Sequence[LayerPlan], names: Sequence[str]) -> Graph:
        """Return a copy of the graph in which onnxruntime quantized the inputs, weights and outputs of layers.

        Args:
            planned: All planned layers.
            names: The planned layers whose activations are quantized. Nodes fused into them are quantized as well.
        """
        graph = self._shaped.copy()
        graph.proto.initializer.extend(self._graph.proto.initializer)
        own_weights(graph, [item.layer.name for item in planned])  # The quantizer modifies them for all readers.
        with library_output():
            quantizer = QDQQuantizer(
                graph.model,
                True,  # One scale per output channel.
                self._options.get("reduce_range", False),
                QuantType.QInt8,
                QuantType.QUInt8,
                TensorsData(CalibrationMethod.MinMax, _as_arrays(self._ranges)),
                [*names, *_fused(graph, names)],
                [],
                [*_TYPES, *_FUSED],
                {"ForceQuantizeNoInputCheck": False},
            )
            quantizer.quantize_model()
            quantizer.model.topological_sort()
        quantized = Graph(quantizer.model.model)
        _restore_float_inputs(quantized, set(names))
        return quantized


BACKEND: Backend[Graph] = OnnxRuntimeBackend()


def _with_activations(planned: Iterable[LayerPlan]) -> list[str]:
    """Return the names of the layers whose activations are quantized."""
    return [item.layer.name for item in planned if item.activations]


def _fused(graph: Graph, names: Sequence[str]) -> list[str]:
    """Return the activation functions that can be fused into planned layers.

    Such a function is the only reader of the layer's output, and its own output is not read by a float layer.
    """
    planned = set(names)
    fused = []
    for node in graph.proto.node:
        readers = graph.readers.get(node.output[0], []) if node.name in planned else []
        if len(readers) == 1 and readers[0].op_type in _FUSED:
            next_readers = graph.readers.get(readers[0].output[0], [])
            if not any(reader.op_type in TYPES and reader.name not in planned for reader in next_readers):
                fused.append(readers[0].name)
    return fused


def _restore_float_inputs(graph: Graph, planned: set[str]) -> None:
    """Connect layers outside of the plan to the float tensors: the quantizer also connected them to quantized ones."""
    for node in graph.proto.node:
        if node.op_type in TYPES and node.name not in planned:
            for index, name in enumerate(node.input):
                dequantize = graph.dequantizer(name)
                quantize = graph.maker(dequantize.input[0]) if dequantize is not None else None
                if quantize is not None:
                    graph.set_input(node, index, quantize.input[0])


def _input_and_output_names(graph: Graph, names: Sequence[str]) -> list[str]:
    """Return the names of the first input and the first output of nodes."""
    nodes = [graph.nodes[name] for name in names]
    return [name for node in nodes for name in (node.input[0], node.output[0])]


def _calibrate_ranges(graph: Graph, batches: Iterable[Inputs], device: str, *, entropy: bool) -> Ranges:
    """Calibrate the ranges of all tensors that onnxruntime may quantize.

    The calibrator gets one batch per call: with a reader of all batches it would keep all of them in memory.
    """
    with tempfile.TemporaryDirectory() as folder, library_output():
        source, augmented = Path(folder, "model.onnx"), Path(folder, "augmented.onnx")
        write_graph(graph, source)
        types = [*_TYPES, *_FUSED]
        if entropy:
            calibrator = EntropyCalibrater(source, types, str(augmented), num_bins=ENTROPY_BINS)
        else:
            calibrator = MinMaxCalibrater(source, types, str(augmented))
        calibrator.augment_graph()
        calibrator.infer_session = _session(augmented, device)
        for arrays in feeds(graph_inputs(graph, "quantize.model_path"), batches, entropy=entropy):
            calibrator.collect_data(_OneBatch(arrays))
        ranges = {
            name: (float(np.min(data.range_value[0])), float(np.max(data.range_value[1])))
            for name, data in calibrator.compute_data().items()
        }
    check_ranges(ranges)
    return ranges


def _session(path: Path, device: str) -> onnxruntime.InferenceSession:
    options = lean_options()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    index = device.partition(":")[2]
    gpu = [] if device == "cpu" else [("CUDAExecutionProvider", {"device_id": int(index)})]
    return onnxruntime.InferenceSession(str(path), options, providers=[*gpu, "CPUExecutionProvider"])


def _as_arrays(ranges: Ranges) -> dict[str, tuple[np.float32, np.float32]]:
    return {name: (np.float32(low), np.float32(high)) for name, (low, high) in ranges.items()}


class _OneBatch(CalibrationDataReader):  # type: ignore[misc]
    """A reader of one batch."""

    def __init__(self, arrays: Arrays) -> None:
        self._arrays: Arrays | None = arrays

    def get_next(self) -> Arrays | None:
        """Return the batch on the first call, and None afterwards."""
        arrays, self._arrays = self._arrays, None
        return arrays
