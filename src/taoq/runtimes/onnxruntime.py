# SPDX-License-Identifier: Apache-2.0
"""Run ONNX graphs with onnxruntime, on the CPU, a GPU or TensorRT."""

from __future__ import annotations

import contextlib
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray

from taoq.errors import Fault, Notice, TaoqError
from taoq.network import Inputs, Outputs, OutputSpec, format_shape
from taoq.plain import Options
from taoq.quantization.formats.onnx.file import has_float8, write_graph
from taoq.quantization.formats.onnx.graph import QUANTIZE, Graph
from taoq.quantization.formats.onnx.inputs import arrays_of, check_inputs, filled, fixed_batch, graph_inputs, samples
from taoq.runtimes.base import RuntimeKind, torch_device

log = logging.getLogger(__name__)

onnxruntime.set_default_logger_severity(4)  # what it prints of an error, it also raises

_CPU = "CPUExecutionProvider"
_CUDA = "CUDAExecutionProvider"
_TENSORRT = "TensorrtExecutionProvider"

_NOT_AS_WRITTEN = ["WeightBiasQuantization"]
"""Optimisers that change what a graph computes: this one rounds biases that the file has as float32."""
_ANOTHER_TASK = "the file is of another task, or of another number of classes"

Providers = list[str | tuple[str, dict[str, int]]]


class OnnxRuntime:
    """A graph in a session. A fixed batch in the graph is fed whole: the last one is filled up, and cut."""

    def __init__(
        self,
        graph: Graph,
        path: Path | None,
        example: Inputs,
        outputs: Mapping[str, OutputSpec],
        device: str,
        where: str,
    ) -> None:
        """Open a graph; the arguments are those of `RuntimeKind.open`."""
        self._where, self._outputs = str(path or "the graph"), dict(outputs)
        self._inputs = graph_inputs(graph, self._where)
        check_inputs(self._inputs, example, self._where)
        self.fixed_batch = fixed_batch(self._inputs)
        self._names = match_outputs(graph, outputs, self._where)
        providers, self.device = execution_providers(device, where)
        options = onnxruntime.SessionOptions()
        if self.device == "cpu":
            if has_float8(graph):
                # onnxruntime 1.24 moves float8 into operators that have no kernel for it at its higher levels
                options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
            if round_in_float32(graph):
                path = None  # the file is another one
        try:
            with _file(graph, path) as file:
                self._session = onnxruntime.InferenceSession(
                    str(file), options, providers=providers, disabled_optimizers=_NOT_AS_WRITTEN
                )
        except Exception as error:  # its exceptions have no common class of their own
            what = f"onnxruntime cannot run it: {_reason(error)}"
            raise TaoqError(Fault(self._where, what, "export it again, or run it where it was made for")) from error
        wanted = providers[0][0] if isinstance(providers[0], tuple) else providers[0]
        if wanted not in self._session.get_providers():
            log.warning(Notice(where, f"onnxruntime could not start {wanted}; running on the CPU"))
            self.device = "cpu"

    def run(self, inputs: Inputs) -> Outputs:
        """One forward pass; the outputs are float32, named as the task names them."""
        results: list[list[NDArray[np.float32]]] = []
        arrays = arrays_of(inputs, self._inputs)
        for fed, count in filled(arrays, self.fixed_batch or max(samples(arrays), 1)):
            try:
                values = self._session.run(list(self._names.values()), fed)
            except Exception as error:  # its exceptions have no common class of their own
                hint = "export it again, with a batch of any size"
                raise TaoqError(Fault(self._where, f"does not run: {_reason(error)}", hint)) from error
            for (name, expected), value in zip(self._outputs.items(), values, strict=True):
                if not expected.accepts(value.shape) or value.shape[0] != samples(fed):
                    what = f"its output '{name}' is {list(value.shape)} for {samples(fed)} images, not {expected}"
                    raise TaoqError(Fault(self._where, what, _ANOTHER_TASK))
            results.append([value[:count] for value in values])
        joined = [np.concatenate(parts) if len(parts) > 1 else parts[0] for parts in zip(*results, strict=True)]
        return {name: torch.from_numpy(value).float() for name, value in zip(self._outputs, joined, strict=True)}

    def compiled(self) -> None:
        """The session has compiled the graph already."""
        return

    def half(self) -> None:
        """The graph has the precision that it has."""
        return


class OnnxRuntimeKind:
    """onnxruntime."""

    name = "onnxruntime"
    formats = ("onnx",)
    libraries = ("onnxruntime-gpu",)
    options: Mapping[str, str] = MappingProxyType({})

    def device(self, requested: str, where: str) -> str:
        """A device of onnxruntime's providers."""
        return execution_providers(requested, where)[1]

    def open(
        self,
        model: Graph,
        path: Path | None,
        example: Inputs,
        outputs: Mapping[str, OutputSpec],
        device: str,
        where: str,
        options: Options,
    ) -> OnnxRuntime:
        """Start a session."""
        return OnnxRuntime(model, path, example, outputs, device, where)


RUNTIME: RuntimeKind = OnnxRuntimeKind()


@contextlib.contextmanager
def _file(graph: Graph, path: Path | None) -> Iterator[Path]:
    """The file of a graph; a temporary one if it has none."""
    if path is not None:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.onnx")
        write_graph(graph, file)
        yield file


def round_in_float32(graph: Graph) -> bool:
    """Let QuantizeLinear nodes of float16 round in float32, in place; returns whether there are any.

    onnxruntime 1.24 cuts float16 off on the CPU instead of rounding it: a network comes out a quarter wrong there, and
    right on a GPU. In float32 the CPU gives what the file means.
    """
    nodes = [node for node in graph.proto.node if node.op_type == QUANTIZE and _has_half_scale(graph, node)]
    for node in nodes:
        wide = graph.unused_name(f"{node.name}/float32")
        graph.add_node("Cast", [node.input[0]], wide, wide, {"to": onnx.TensorProto.FLOAT})
        graph.set_input(node, 0, wide)
        graph.set_input(node, 1, graph.store(f"{wide}_scale", graph.values(node.input[1]).astype(np.float32)))
    graph.close()
    return bool(nodes)


def _has_half_scale(graph: Graph, node: onnx.NodeProto) -> bool:
    scale = graph.tensors.get(node.input[1])
    return scale is not None and scale.data_type == onnx.TensorProto.FLOAT16


def execution_providers(device: str, where: str) -> tuple[Providers, str]:
    """Onnxruntime's providers for a spec's `device`, best first, and the device that is meant.

    Args:
        device: cpu, cuda, cuda:N or trt.
        where: The field, for messages.

    Raises:
        SpecError: The machine has GPUs, but not that one.
    """
    if device == "trt" and not torch.cuda.is_available():
        log.warning(Notice(where, "TensorRT needs a GPU, and this machine has none; running on the CPU"))
        return [_CPU], "cpu"
    gpu = torch_device("cuda:0" if device == "trt" else device, where)
    if gpu == "cpu":
        return [_CPU], "cpu"
    onnxruntime.preload_dlls()  # the CUDA libraries of the installed wheels
    available = onnxruntime.get_available_providers()
    index = int(gpu.partition(":")[2])
    chosen: Providers = [(_CUDA, {"device_id": index}), _CPU] if _CUDA in available else [_CPU]
    if device == "trt" and _TENSORRT in available:
        return [(_TENSORRT, {"device_id": index}), *chosen], "trt"
    real = gpu if len(chosen) > 1 else "cpu"
    if device == "trt" or real == "cpu":
        missing = _TENSORRT if device == "trt" else _CUDA
        log.warning(Notice(where, f"this onnxruntime has no {missing}; running on {real}"))
    return chosen, real


def match_outputs(graph: Graph, expected: Mapping[str, OutputSpec], where: str) -> dict[str, str]:
    """Name of the graph's output for each expected one: the same name, or the only other one of its shape.

    Raises:
        TaoqError: There is none, or more than one.
    """
    shapes = graph.output_shapes
    matched = {name: name for name in expected if name in shapes}
    for name, spec in expected.items():
        free = [other for other in shapes if other not in matched.values()]
        fitting = [matched[name]] if name in matched else [other for other in free if _may_be(spec, shapes[other])]
        if len(fitting) != 1 or (shapes[fitting[0]] and not spec.accepts(shapes[fitting[0]])):
            has = ", ".join(f"'{other}' {format_shape(shape)}" for other, shape in shapes.items()) or "none"
            raise TaoqError(Fault(where, f"has no output '{name}' {spec}: its outputs are {has}", _ANOTHER_TASK))
        matched[name] = fitting[0]
    return {name: matched[name] for name in expected}


def _may_be(spec: OutputSpec, shape: Sequence[int | None]) -> bool:
    """Whether an output of another name is meant: where its shape is known, and every fixed size is there."""
    fixed = [(index, size) for index, size in enumerate(spec.shape) if isinstance(size, int)]
    return len(shape) == len(spec.shape) and all(shape[index] == size for index, size in fixed)


def _reason(error: Exception) -> str:
    """The part of onnxruntime's message that says what is wrong, without its codes, paths and C++ signatures."""
    text = str(error).strip().splitlines()[0].rpartition(" : ")[2]
    return re.sub(r"^Load model from .* failed:|^\S+\.cc:\d+ .*\) ", "", text)
