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

_CPU = "CPUExecutionProvider"
_CUDA = "CUDAExecutionProvider"
_TENSORRT = "TensorrtExecutionProvider"

_DISABLED_OPTIMIZERS = ["WeightBiasQuantization"]
"""Optimizers that change the outputs of a graph: this one quantizes biases that are float32 in the file."""

_OTHER_TASK_HINT = "the file is of another task, or of another number of classes"

Provider = str | tuple[str, dict[str, int]]
Providers = list[Provider]


class OnnxRuntime:
    """A graph in a session of onnxruntime. Batches are padded if the graph requires a batch size."""

    def __init__(
        self,
        graph: Graph,
        path: Path | None,
        example: Inputs,
        outputs: Mapping[str, OutputSpec],
        device: str,
        where: str,
    ) -> None:
        """Create a session, with the arguments of `RuntimeKind.open`."""
        self._where, self._outputs = str(path or "the graph"), dict(outputs)
        self._inputs = graph_inputs(graph, self._where)
        check_inputs(self._inputs, example, self._where)
        self.fixed_batch = fixed_batch(self._inputs)
        self._names = match_outputs(graph, outputs, self._where)
        providers, self.device = execution_providers(device, where)
        session = None
        while session is None and len(providers) > 1:
            session = self._on_a_gpu(graph, path, providers)
            if session is None:
                failed, *providers = providers
                self.device = _device_of(providers[0])
                what = f"onnxruntime could not start {_name(failed)}; running on {self.device}"
                log.warning(Notice(where, what))
        self._session = session or self._on_the_cpu(graph, path)

    def _on_a_gpu(self, graph: Graph, path: Path | None, providers: Providers) -> onnxruntime.InferenceSession | None:
        """Create a session on a GPU; None if the preferred execution provider does not start."""
        try:
            session = self._session_of(graph, path, providers, onnxruntime.SessionOptions())
        except TaoqError:
            return None  # If the file is the cause, the next provider reports it.
        return session if session.get_providers()[0] == _name(providers[0]) else None

    def _on_the_cpu(self, graph: Graph, path: Path | None) -> onnxruntime.InferenceSession:
        """Create a session on the CPU, without what onnxruntime's CPU kernels cannot compute."""
        options = onnxruntime.SessionOptions()
        if has_float8(graph):
            # At higher levels, onnxruntime 1.24 creates float8 operators that it has no CPU kernels for.
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        if round_in_float32(graph):
            path = None  # The file does not have these edits.
        return self._session_of(graph, path, [_CPU], options)

    def _session_of(
        self, graph: Graph, path: Path | None, providers: Providers, options: onnxruntime.SessionOptions
    ) -> onnxruntime.InferenceSession:
        try:
            with _file(graph, path) as file:
                # onnxruntime's own fallback would go on with other providers and without the disabled optimizers.
                return onnxruntime.InferenceSession(
                    str(file),
                    options,
                    providers=providers,
                    disabled_optimizers=_DISABLED_OPTIMIZERS,
                    enable_fallback=0,
                )
        except Exception as error:  # Exceptions of onnxruntime have no base class of their own.
            what = f"onnxruntime cannot run it: {_reason(error)}"
            hint = "export it again, or run it on the device that it was made for"
            raise TaoqError(Fault(self._where, what, hint)) from error

    def run(self, inputs: Inputs) -> Outputs:
        """Run the graph. Return its outputs as float32 tensors on the CPU, by their names in the task."""
        results: list[list[NDArray[np.float32]]] = []
        arrays = arrays_of(inputs, self._inputs)
        for batch, count in filled(arrays, self.fixed_batch or max(samples(arrays), 1)):
            try:
                values = self._session.run(list(self._names.values()), batch)
            except Exception as error:  # Exceptions of onnxruntime have no base class of their own.
                hint = "export it again, with a batch of any size"
                raise TaoqError(Fault(self._where, f"does not run: {_reason(error)}", hint)) from error
            for (name, expected), value in zip(self._outputs.items(), values, strict=True):
                if not expected.accepts(value.shape) or value.shape[0] != samples(batch):
                    what = f"its output '{name}' is {list(value.shape)} for {samples(batch)} images, not {expected}"
                    raise TaoqError(Fault(self._where, what, _OTHER_TASK_HINT))
            results.append([value[:count] for value in values])
        joined = [np.concatenate(parts) if len(parts) > 1 else parts[0] for parts in zip(*results, strict=True)]
        return {name: torch.from_numpy(value).float() for name, value in zip(self._outputs, joined, strict=True)}

    def compiled(self) -> None:
        """Return None: the session has no other compiler."""
        return

    def half(self) -> None:
        """Return None: the precision of a graph is fixed."""
        return


class OnnxRuntimeKind:
    """The runtime `onnxruntime`."""

    name = "onnxruntime"
    formats = ("onnx",)
    libraries = ("onnxruntime-gpu",)
    options: Mapping[str, str] = MappingProxyType({})

    def device(self, requested: str, where: str) -> str:
        """Return the device that a graph will run on, as `execution_providers` does."""
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
        """Create a session."""
        return OnnxRuntime(model, path, example, outputs, device, where)


RUNTIME: RuntimeKind = OnnxRuntimeKind()


@contextlib.contextmanager
def _file(graph: Graph, path: Path | None) -> Iterator[Path]:
    """Yield the path of a graph's file, or write the graph to a temporary file if there is none."""
    if path is not None:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.onnx")
        write_graph(graph, file)
        yield file


def round_in_float32(graph: Graph) -> bool:
    """Cast the inputs of float16 QuantizeLinear nodes to float32, in place. Return whether there are any.

    On the CPU, onnxruntime 1.24 truncates float16 values instead of rounding them, which changes the outputs of a
    network by a quarter. In float32 it rounds them, as on a GPU.
    """
    nodes = [node for node in graph.proto.node if node.op_type == QUANTIZE and _has_half_scale(graph, node)]
    for node in nodes:
        cast = graph.unused_name(f"{node.name}/float32")
        graph.add_node("Cast", [node.input[0]], cast, cast, {"to": onnx.TensorProto.FLOAT})
        graph.set_input(node, 0, cast)
        graph.set_input(node, 1, graph.store(f"{cast}_scale", graph.values(node.input[1]).astype(np.float32)))
    graph.close()
    return bool(nodes)


def _has_half_scale(graph: Graph, node: onnx.NodeProto) -> bool:
    scale = graph.tensors.get(node.input[1])
    return scale is not None and scale.data_type == onnx.TensorProto.FLOAT16


def execution_providers(device: str, where: str) -> tuple[Providers, str]:
    """Choose the execution providers of onnxruntime for a spec's `device`. Falling back is logged as a warning.

    Args:
        device: The `device` of the spec: cpu, cuda, cuda:N or trt.
        where: The field that names it, for messages.

    Returns:
        The providers, by descending priority, and the device that they run on: cpu, cuda:N or trt.

    Raises:
        SpecError: If there are GPUs, but not this one.
    """
    if device == "trt" and not torch.cuda.is_available():
        log.warning(Notice(where, "TensorRT needs a GPU, and this machine has none; running on the CPU"))
        return [_CPU], "cpu"
    gpu = torch_device("cuda:0" if device == "trt" else device, where)
    if gpu == "cpu":
        return [_CPU], "cpu"
    onnxruntime.preload_dlls()  # Loads the CUDA libraries of the installed wheels.
    available = onnxruntime.get_available_providers()
    index = int(gpu.partition(":")[2])
    chosen: Providers = [(_CUDA, {"device_id": index}), _CPU] if _CUDA in available else [_CPU]
    if device == "trt" and _TENSORRT in available:
        return [(_TENSORRT, {"device_id": index}), *chosen], "trt"
    actual = gpu if len(chosen) > 1 else "cpu"
    if device == "trt" or actual == "cpu":
        missing = _TENSORRT if device == "trt" else _CUDA
        log.warning(Notice(where, f"this onnxruntime has no {missing}; running on {actual}"))
    return chosen, actual


def match_outputs(graph: Graph, expected: Mapping[str, OutputSpec], where: str) -> dict[str, str]:
    """Match the outputs of a graph with those of a task: by name, otherwise by shape if only one output fits.

    Args:
        graph: The graph.
        expected: The specs of the task's outputs by name.
        where: File of the graph, for messages.

    Returns:
        The name in the graph of each output, by its name in the task.

    Raises:
        TaoqError: If no output fits, or more than one.
    """
    shapes = graph.output_shapes
    matched = {name: name for name in expected if name in shapes}
    for name, spec in expected.items():
        unmatched = [output for output in shapes if output not in matched.values()]
        candidates = [matched[name]] if name in matched else [o for o in unmatched if _may_match(spec, shapes[o])]
        if len(candidates) != 1 or (shapes[candidates[0]] and not spec.accepts(shapes[candidates[0]])):
            listing = ", ".join(f"'{output}' {format_shape(shape)}" for output, shape in shapes.items()) or "none"
            what = f"has no output '{name}' {spec}: its outputs are {listing}"
            raise TaoqError(Fault(where, what, _OTHER_TASK_HINT))
        matched[name] = candidates[0]
    return {name: matched[name] for name in expected}


def _may_match(spec: OutputSpec, shape: Sequence[int | None]) -> bool:
    """Return whether an output of another name may be the expected one: its shape is known and has all fixed sizes."""
    fixed = [(index, size) for index, size in enumerate(spec.shape) if isinstance(size, int)]
    return len(shape) == len(spec.shape) and all(shape[index] == size for index, size in fixed)


def _name(provider: Provider) -> str:
    return provider if isinstance(provider, str) else provider[0]


def _device_of(provider: Provider) -> str:
    """Return the device of an execution provider: cpu, cuda:N or trt."""
    if isinstance(provider, str):
        return "cpu"
    name, options = provider
    return "trt" if name == _TENSORRT else f"cuda:{options['device_id']}"


def _reason(error: Exception) -> str:
    """Return the message of an exception of onnxruntime without error codes, paths and C++ signatures."""
    text = str(error).strip().splitlines()[0].rpartition(" : ")[2]
    return re.sub(r"^Load model from .* failed:|^\S+\.cc:\d+ .*\) ", "", text)
