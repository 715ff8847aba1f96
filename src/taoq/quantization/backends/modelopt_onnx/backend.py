# SPDX-License-Identifier: Apache-2.0
"""NVIDIA ModelOpt on ONNX graphs: static quantization for TensorRT.

ModelOpt calibrates the ranges, and names layers for which TensorRT has no fast kernel; those stay float. The Q/DQ nodes
are inserted by `formats/onnx/qdq.py` instead: one call of ModelOpt supports only one numeric format, always quantizes
activations, and quantizes a tensor for all of its readers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from taoq.errors import Fault, did_you_mean
from taoq.network import Inputs
from taoq.plain import Options, Plain
from taoq.quantization.backends.base import NO_SHIFTS, Backend
from taoq.quantization.backends.modelopt_onnx.calibration import calibrate_ranges
from taoq.quantization.capability import Algorithm, Capability, TensorCapability
from taoq.quantization.dtypes import FP8_E4M3FN, FP8_E5M2, INT8
from taoq.quantization.formats.base import Shifts
from taoq.quantization.formats.onnx import qdq
from taoq.quantization.formats.onnx.biases import add_shifts
from taoq.quantization.formats.onnx.file import read_graph, write_graph
from taoq.quantization.formats.onnx.graph import Graph
from taoq.quantization.formats.onnx.layers import TYPES, check_weights, list_layers
from taoq.quantization.formats.onnx.measures import half_precision_fault
from taoq.quantization.library import library_output
from taoq.quantization.ranges import RangeCache, Ranges, cached_ranges
from taoq.quantization.spec import QuantizeSpec
from taoq.quantization.types import Applied, Layer, LayerPlan, QuantizationPlan, Scales

with library_output():
    import modelopt.onnx.quantization as moq
    import onnx_graphsurgeon
    from modelopt.onnx.autocast.convert import convert_to_f16
    from modelopt.onnx.quantization.graph_utils import find_nodes_from_convs_to_exclude

_OPTIONS: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "use_external_data_format": (lambda value: isinstance(value, bool), "true or false"),
    "calibrate_per_node": (lambda value: isinstance(value, bool), "true or false"),
    "op_types_to_quantize": (lambda value: isinstance(value, list), "a list of op types"),
    "op_types_to_exclude": (lambda value: isinstance(value, list), "a list of op types"),
    # Not bf16: onnxruntime has no kernels for it, so the file could not be checked.
    "high_precision_dtype": (lambda value: value in ("fp32", "fp16"), "fp32 or fp16"),
}
"""Arguments of `modelopt.onnx.quantization.quantize` that a spec may set: a check of the value, and its description."""
_HINTS = {
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
"""Hints for arguments of `quantize` that other fields of a spec decide."""


class ModelOptOnnxBackend:
    """INT8 and FP8, for TensorRT."""

    capability = Capability(
        name="modelopt.onnx",
        format="onnx",
        payload="quantized_model.onnx",
        libraries=("onnx", "onnxruntime-gpu", "nvidia-modelopt"),
        modes=("static_ptq",),
        algorithms=tuple(Algorithm(name=name, activations=(INT8, FP8_E4M3FN)) for name in ("minmax", "max", "entropy")),
        weights=TensorCapability(dtypes=(INT8, FP8_E4M3FN)),
        activations=TensorCapability(dtypes=(INT8, FP8_E4M3FN), axes="none"),
        layer_types=TYPES,
        devices=("cuda", "cpu", "trt"),
        realised={FP8_E5M2: FP8_E4M3FN},  # ModelOpt and TensorRT support only E4M3.
        caches_ranges=True,
        options={
            "op_types_to_quantize": "Op types that may be quantized",
            "op_types_to_exclude": "Op types that stay float",
            "calibrate_per_node": "Calibrate one node at a time, for graphs that do not fit into memory",
            "use_external_data_format": "Write the weights into a file beside the graph",
            "high_precision_dtype": "Precision of the float part of the graph: fp32 or fp16",
        },
        target="NVIDIA GPUs through TensorRT; on a CPU its graph is slower than float, backend onnxruntime is for CPUs",
    )

    def check(self, section: QuantizeSpec) -> list[Fault]:
        """Check `backend_kwargs` against the arguments of `modelopt.onnx.quantization.quantize`."""
        options = section.backend_kwargs
        faults = [fault for key, value in options.items() for fault in _check_option(key, value)]
        if section.bias_correction and options.get("high_precision_dtype") == "fp16":
            faults.append(half_precision_fault())
        return faults

    def layers(self, model: Graph, options: Options) -> list[Layer]:
        """List all nodes as layers. `backend_kwargs` may restrict the op types that can be quantized."""
        types = options.get("op_types_to_quantize", TYPES)
        types = [type_ for type_ in types if type_ not in options.get("op_types_to_exclude", ())]
        return list_layers(model, types, "quantize.backend_kwargs leaves its type out")

    def calibrate(
        self,
        model: Graph,
        plan: QuantizationPlan,
        batches: Iterable[Inputs],
        options: Options,
        *,
        device: str,
        cache: RangeCache | None,
    ) -> ModelOptOnnxCalibrated:
        """Calibrate the input ranges of all quantizable layers, planned or not.

        Raises:
            TaoqError: If a weight, an image or a range is not finite, or ModelOpt cannot calibrate the graph.
        """
        check_weights(model)
        excluded = _excluded(model, plan)
        names = [item.layer.name for item in plan.quantized if item.activations and item.layer.name not in excluded]
        ranges: Ranges = {}
        if names:
            quantizable = [layer.name for layer in self.layers(model, options) if not layer.obstacle]
            entropy = plan.algorithm == "entropy"
            ranges = cached_ranges(
                cache,
                [model.nodes[name].input[0] for name in names],
                lambda: calibrate_ranges(model, quantizable, batches, options, device=device, entropy=entropy),
            )
        return ModelOptOnnxCalibrated(model, ranges, options)

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


class ModelOptOnnxCalibrated:
    """A float graph and the input ranges of its layers."""

    def __init__(self, graph: Graph, ranges: Ranges, options: Options) -> None:
        self._graph, self._ranges, self._options = graph, ranges, options
        self._inputs = {node.name: node.input[0] for node in graph.proto.node if node.input}

    def left_out(self, plan: QuantizationPlan) -> Mapping[str, str]:
        """Return the layers that ModelOpt always excludes, and those whose input it did not calibrate."""
        missing = [
            item.layer.name
            for item in plan.quantized
            if item.activations and self._inputs[item.layer.name] not in self._ranges
        ]
        return dict.fromkeys(missing, "ModelOpt found no range for its input") | _excluded(self._graph, plan)

    def with_only(self, layers: Iterable[LayerPlan], shifts: Shifts = NO_SHIFTS) -> Graph:
        """Return a copy of the graph with Q/DQ nodes at these layers."""
        planned = list(layers)
        graph = self._graph.copy()
        qdq.insert(graph, planned, {item.layer.name: self._scales(item) for item in planned})
        return add_shifts(graph, shifts)

    def quantize(self, plan: QuantizationPlan, shifts: Shifts = NO_SHIFTS) -> Graph:
        """Return a quantized copy of the graph, with the float part in the precision of `high_precision_dtype`."""
        graph = self.with_only(plan.quantized, shifts)
        precision = self._options.get("high_precision_dtype", "fp32")
        if precision == "fp32":
            return graph
        with library_output():
            return Graph(convert_to_f16(graph.model, keep_io_types=True, low_precision_type=precision))

    def _scales(self, item: LayerPlan) -> Scales:
        if not item.activations:
            return Scales()
        low, high = self._ranges[self._inputs[item.layer.name]]
        return Scales(activations=float(qdq.scale_of(max(-low, high), item.activations.dtype)))


BACKEND: Backend[Graph] = ModelOptOnnxBackend()


def _check_option(key: str, value: Plain) -> Iterator[Fault]:
    where = f"quantize.backend_kwargs.{key}"
    parameters = [name for name in inspect.signature(moq.quantize).parameters if name != "kwargs"]
    if key in _OPTIONS:
        is_valid, expected = _OPTIONS[key]
        if not is_valid(value):
            yield Fault(where, f"'{value}' is not {expected}", f"write {expected}")
        elif key.startswith("op_types"):
            for type_ in value:
                if type_ not in TYPES:
                    hint = did_you_mean(str(type_), TYPES, ", ".join(TYPES))
                    yield Fault(where, f"taoq quantizes no op type '{type_}'", hint)
    elif key in parameters:
        hint = _HINTS.get(key, "leave it out: taoq takes only " + ", ".join(_OPTIONS))
        yield Fault(where, f"'{key}' of ModelOpt's quantize is decided by taoq", hint)
    else:
        hint = did_you_mean(key, _OPTIONS, "taoq takes " + ", ".join(_OPTIONS))
        yield Fault(where, f"ModelOpt's quantize has no argument '{key}'", hint)


def _excluded(graph: Graph, plan: QuantizationPlan) -> dict[str, str]:
    """Return the planned layers that ModelOpt always excludes, with the reason, as its own function reports them."""
    reasons: dict[str, str] = {}
    surgeon = onnx_graphsurgeon.import_onnx(graph.model)
    modes = {INT8: "int8", FP8_E4M3FN: "fp8"}
    for dtype, mode in modes.items():
        items = [item for item in plan.quantized if item.activations and item.activations.dtype == dtype]
        if not items:
            continue
        with library_output():
            names = set(find_nodes_from_convs_to_exclude(surgeon, quantize_mode=mode))
        for item in items:
            if item.layer.name in names:
                reasons[item.layer.name] = f"ModelOpt leaves it out: TensorRT has no fast {mode} kernel for its shape"
    return reasons
