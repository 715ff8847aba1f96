# SPDX-License-Identifier: Apache-2.0
"""Run an ONNX file with onnxruntime, on the CPU, a GPU or TensorRT."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from taoq.errors import Fault, TaoqError
from taoq.onnx_file import check_image_size, fixed_batches, has_float8, image_input, read_onnx
from taoq.runtime import torch_device

log = logging.getLogger(__name__)

onnxruntime.set_default_logger_severity(4)  # what it prints of an error, it also raises

_CPU = "CPUExecutionProvider"
_CUDA = "CUDAExecutionProvider"
_TENSORRT = "TensorrtExecutionProvider"

_NOT_AS_WRITTEN = ["WeightBiasQuantization"]
"""Optimisers that change what a graph computes: this one rounds biases that the file has as float32."""


class OnnxRuntime:
    """A graph with one image input. A fixed batch in the graph is fed whole: the last one is filled up, and cut."""

    def __init__(
        self,
        path: Path,
        sizes: Mapping[str, int],
        images: Sequence[int],
        device: str,
        *,
        where: str = "device",
        model: onnx.ModelProto | None = None,
    ) -> None:
        """Open a file.

        Args:
            path: The file.
            sizes: What the outputs must be: size of the last axis, by name.
            images: Shape of a batch of the images that it will get.
            device: cpu, cuda, cuda:N or trt; the CPU where the machine does not have it, which is said.
            where: The field that names the device, for messages.
            model: What `read_onnx` gave of the file, where it was read already.

        Raises:
            TaoqError: It cannot be run, or does not have these inputs and outputs.
        """
        if model is None:
            model = read_onnx(path)
        self._path, self._sizes = path, dict(sizes)
        self._input = image_input(model, path)
        check_image_size(self._input, images, path)
        self.fixed_batch = self._input.shape[0]
        self._outputs = _match_outputs(model, sizes, path)
        options = onnxruntime.SessionOptions()
        providers, self.device = execution_providers(device, where)
        source: str | bytes = str(path)
        if self.device == "cpu":
            if has_float8(model):
                # onnxruntime 1.24 moves float8 into operators that have no kernel for it at its higher levels
                options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
            if round_in_float32(model):
                source = model.SerializeToString()
        del model
        try:
            self._session = onnxruntime.InferenceSession(
                source, options, providers=providers, disabled_optimizers=_NOT_AS_WRITTEN
            )
        except Exception as error:  # its exceptions have no common class of their own
            what = f"onnxruntime cannot run it: {_reason(error)}"
            raise TaoqError(Fault(str(path), what, "export it again, or run it where it was made for")) from error
        wanted = providers[0][0] if isinstance(providers[0], tuple) else providers[0]
        if wanted not in self._session.get_providers():
            log.warning("%s: onnxruntime could not start %s; running on the CPU", where, wanted)
            self.device = "cpu"

    def run(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """One forward pass; the outputs are float32, named as the task names them."""
        (images,) = (tensor.numpy().astype(self._input.dtype, copy=False) for tensor in inputs.values())
        results: list[list[Any]] = []
        for fed, count in fixed_batches(images, self.fixed_batch):
            try:
                found = self._session.run(list(self._outputs.values()), {self._input.name: fed})
            except Exception as error:  # its exceptions have no common class of their own
                hint = "export it again, with a batch of any size"
                raise TaoqError(Fault(str(self._path), f"does not run: {_reason(error)}", hint)) from error
            for (name, size), values in zip(self._sizes.items(), found, strict=True):
                if values.ndim < 2 or values.shape[0] != len(fed) or values.shape[-1] != size:
                    what = f"its output '{name}' is {list(values.shape)} for {len(fed)} images, not [..., {size}]"
                    hint = "the file is of another task, or of another number of classes"
                    raise TaoqError(Fault(str(self._path), what, hint))
            results.append([values[:count] for values in found])
        joined = [np.concatenate(parts) if len(parts) > 1 else parts[0] for parts in zip(*results, strict=True)]
        return {name: torch.from_numpy(value).float() for name, value in zip(self._outputs, joined, strict=True)}


def round_in_float32(model: onnx.ModelProto) -> bool:
    """Let QuantizeLinear nodes of float16 round in float32, in place; returns whether there are any.

    onnxruntime 1.24 cuts float16 off on the CPU instead of rounding it: a network comes out a quarter wrong there, and
    right on a GPU. In float32 the CPU gives what the file means.
    """
    scales = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        scale = scales.get(node.input[1]) if node.op_type == "QuantizeLinear" else None
        if scale is not None and scale.data_type == onnx.TensorProto.FLOAT16:
            wide = f"{node.name}/float32"
            cast = onnx.helper.make_node("Cast", [node.input[0]], [wide], wide, to=onnx.TensorProto.FLOAT)
            values = onnx.numpy_helper.to_array(scale).astype(np.float32)
            model.graph.initializer.append(onnx.numpy_helper.from_array(values, f"{wide}_scale"))
            node.input[0], node.input[1] = wide, f"{wide}_scale"
            nodes.append(cast)
        nodes.append(node)
    if len(nodes) == len(model.graph.node):
        return False
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return True


def execution_providers(device: str, where: str) -> tuple[list[Any], str]:
    """Onnxruntime's providers for a spec's `device`, best first, and the device that is meant.

    Args:
        device: cpu, cuda, cuda:N or trt.
        where: The field, for messages.

    Raises:
        SpecError: The machine has GPUs, but not that one.
    """
    if device == "trt" and not torch.cuda.is_available():
        log.warning("%s: TensorRT needs a GPU, and this machine has none; running on the CPU", where)
        return [_CPU], "cpu"
    gpu = torch_device("cuda:0" if device == "trt" else device, where)
    if gpu == "cpu":
        return [_CPU], "cpu"
    onnxruntime.preload_dlls()  # the CUDA libraries of the installed wheels
    available = onnxruntime.get_available_providers()
    index = int(gpu.partition(":")[2])
    chosen: list[Any] = [(_CUDA, {"device_id": index}), _CPU] if _CUDA in available else [_CPU]
    if device == "trt" and _TENSORRT in available:
        chosen.insert(0, (_TENSORRT, {"device_id": index}))
        return chosen, "trt"
    found = gpu if len(chosen) > 1 else "cpu"
    if device == "trt" or found == "cpu":
        missing = _TENSORRT if device == "trt" else _CUDA
        log.warning("%s: this onnxruntime has no %s; running on %s", where, missing, found)
    return chosen, found


def _match_outputs(model: onnx.ModelProto, sizes: Mapping[str, int], path: Path) -> dict[str, str]:
    """Name of the graph's output for each of the task's: the same name, or the only one of its size."""
    found = {value.name: value.type.tensor_type.shape.dim for value in model.graph.output}
    last = {name: dims[-1].dim_value or None if dims else None for name, dims in found.items()}
    matched = {name: name for name in sizes if name in found}
    for name, size in sizes.items():
        free = [other for other in found if other not in matched.values()]
        fitting = [matched[name]] if name in matched else [other for other in free if last[other] == size]
        if len(fitting) != 1 or last[fitting[0]] not in (None, size):
            has = ", ".join(f"'{other}' [..., {its or '?'}]" for other, its in last.items()) or "none"
            what = f"has no output '{name}' with {size} values each: its outputs are {has}"
            raise TaoqError(Fault(str(path), what, "the file is of another task, or of another number of classes"))
        matched[name] = fitting[0]
    return {name: matched[name] for name in sizes}


def _reason(error: Exception) -> str:
    """The part of onnxruntime's message that says what is wrong, without its codes, paths and C++ signatures."""
    text = str(error).strip().splitlines()[0].rpartition(" : ")[2]
    return re.sub(r"^Load model from .* failed:|^\S+\.cc:\d+ .*\) ", "", text)
