# SPDX-License-Identifier: Apache-2.0
"""The graph of the network that `export` writes, and of the post-processing behind it."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import nn

from taoq.errors import Fault, Notice, TaoqError, first_line
from taoq.network import format_shape
from taoq.pipeline.experiment import BoundPostProcess, Experiment
from taoq.pipeline.export_source import ExportSource
from taoq.pipeline.models import OpenedModel, start
from taoq.quantization.formats.onnx import qdq
from taoq.quantization.formats.onnx.export import append, export_graph
from taoq.quantization.formats.onnx.graph import Graph, opset
from taoq.quantization.formats.onnx.layers import OPSET
from taoq.quantization.formats.torch.call import call
from taoq.runtimes.base import noise
from taoq.tasks.sections import ExportSpec

log = logging.getLogger(__name__)


def trace(experiment: Experiment, source: ExportSource, postprocess: BoundPostProcess | None, device: str) -> Graph:
    """Trace a network, and insert Q/DQ nodes if it is quantized.

    Args:
        experiment: The experiment.
        source: The network.
        postprocess: Post-processing that will be appended, whose names of the inputs are used; None if there is none.
        device: Device that the network is traced on.

    Raises:
        SpecError: If the network cannot be exported with the opset of the section.
        TaoqError: If the network does not run on inputs of the example's shapes, or cannot be traced.
    """
    section = experiment.spec.export
    version = section.opset_version
    if source.scales and version < OPSET:
        what = f"a quantized graph needs {OPSET}; {version} is not enough"
        log.info(Notice("export.opset_version", what))
        version = OPSET
    example = noise((postprocess.experiment if postprocess else experiment).example(), max(section.batch_size, 1))
    inputs = {name: example[name].to(device) for name in list(example)[: len(experiment.example())]}
    source.network.to(device)
    _check_runs(source.network, inputs, section)
    graph = export_graph(
        source.network,
        inputs,
        list(experiment.outputs),
        opset=version,
        dynamic=section.batch_size < 0,
        fold=not source.scales,  # folding batch norms would change the weights that the scales belong to
        verbose=section.verbose,
    )
    source.network.to("cpu")
    if source.scales:
        qdq.place_scales(graph, source.layers, source.scales)
    return graph


def append_postprocess(
    network: Graph, experiment: Experiment, source: ExportSource, postprocess: BoundPostProcess
) -> Graph:
    """Return the graph of a network followed by that of its post-processing."""
    section = experiment.spec.export
    example = noise(postprocess.experiment.example(), max(section.batch_size, 1))
    traced = start(experiment, OpenedModel(source.network, "torch", None, False), "cpu", "export.on_cpu")
    read = dict(traced.run(postprocess.network_inputs(example)))
    read |= list(example.items())[len(postprocess.inputs) :]
    tail = export_graph(
        postprocess.module,
        read,
        list(postprocess.experiment.outputs),
        opset=opset(network.model),
        dynamic=section.batch_size < 0,
        fold=True,
        verbose=section.verbose,
    )
    return append(network.copy(), tail, "postprocess")


def _check_runs(network: nn.Module, inputs: Mapping[str, torch.Tensor], section: ExportSpec) -> None:
    try:
        with torch.inference_mode():
            call(network, inputs)
    except Exception as error:  # The network's code may raise anything.
        shapes = ", ".join(format_shape(tensor.shape) for tensor in inputs.values())
        what = f"the network does not run on inputs of {shapes}: {first_line(error)}"
        where, hint = "export.checkpoint", "check the input size in the spec"
        if section.input_height or section.input_width:
            where, hint = "export.input_height", "leave input_height and input_width out"
        raise TaoqError(Fault(where, what, hint)) from error
