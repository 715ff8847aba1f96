# SPDX-License-Identifier: Apache-2.0
"""A torch network as an ONNX graph: standard operators, constants folded, nodes named by the module they come from."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import onnx
import onnx_graphsurgeon
import torch
from torch import Tensor, nn

from taoq.errors import Fault, SpecError, first_line
from taoq.quantization.formats.onnx.file import LARGEST, byte_size
from taoq.quantization.formats.onnx.graph import Graph
from taoq.quantization.formats.torch.call import arguments, every_layer_called
from taoq.quantization.library import library_output, replaced

OPSETS = (9, 23)
"""The first and last opset that torch 2.10's exporter writes; before 9, weights are inputs."""
_SEPARATOR = ":"  # in no module name, and torch's exporter leaves it as it is


def export_graph(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    *,
    opset: int,
    dynamic: bool,
    fold: bool,
    verbose: bool = False,
) -> Graph:
    """Trace a network in eval mode.

    A node is called `/layer1/0/conv1/Conv` if it comes from the module `layer1.0.conv1`, and `..._1` if that module has
    more than one of its kind.

    Args:
        model: The network, on the device of the inputs.
        inputs: An example of each input, by name.
        outputs: Names of the outputs.
        opset: Version of the standard operators.
        dynamic: Whether the batch may be of any size; else it is that of the example.
        fold: Whether batch norms are folded into the convolution in front of them.
        verbose: Whether what the exporter prints is logged as information; else for log.txt alone.

    Raises:
        SpecError: The network cannot be written with this opset.
    """
    axes = {name: {0: "batch"} for name in [*inputs, *outputs]} if dynamic else None
    with (
        tempfile.TemporaryDirectory() as folder,
        library_output(logging.INFO if verbose else logging.DEBUG),
        every_layer_called(),  # the fused path of nn.TransformerEncoderLayer is one operator that no other runtime has
        _full_scopes(model),
    ):
        path = Path(folder, "traced.onnx")
        try:
            torch.onnx.export(
                model.eval(),
                arguments(model, inputs),
                str(path),
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_axes=axes,
                opset_version=opset,
                dynamo=False,  # the newer exporter freezes the batch of detectors
                do_constant_folding=True,
                verbose=verbose,
                training=torch.onnx.TrainingMode.EVAL if fold else torch.onnx.TrainingMode.PRESERVE,
            )
        except (torch.onnx.errors.UnsupportedOperatorError, ValueError) as error:
            what = f"the network cannot be written with opset {opset}: {first_line(error)}"
            raise SpecError(Fault("export.opset_version", what, "write 17, which every network here takes")) from error
        surgeon = onnx_graphsurgeon.import_onnx(onnx.load(str(path)))
    surgeon.fold_constants().cleanup().toposort()
    result: onnx.ModelProto = onnx_graphsurgeon.export_onnx(surgeon)
    _rename(result.graph, {name for name, _ in model.named_modules()})
    _name_batch(result.graph, dynamic=dynamic)
    return Graph(result)


@contextlib.contextmanager
def _full_scopes(model: nn.Module) -> Iterator[None]:
    """Let torch's exporter see whole module names: it takes the last part, which is not unique."""
    named = list(model.named_modules())

    def named_modules(*_: object, **__: object) -> Iterator[tuple[str, nn.Module]]:
        return ((name.replace(".", _SEPARATOR), module) for name, module in named)

    with replaced(model, "named_modules", named_modules):
        yield


def _rename(graph: onnx.GraphProto, modules: set[str]) -> None:
    """Names of nodes, of what they compute, and of weights that the exporter numbered."""
    counts: Counter[str] = Counter()
    values: dict[str, str] = {}
    outputs = {value.name for value in graph.output}
    initializers = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        scope = node.name.rpartition("/")[0].rpartition("/")[2].replace(_SEPARATOR, ".")
        if scope not in modules:  # `..._1`: the module is called again
            scope = scope.rpartition("_")[0]
        stem = "/" + "/".join([*filter(None, scope.split(".")), node.op_type])
        number = counts[stem]
        counts[stem] += 1
        node.name = f"{stem}_{number}" if number else stem
        for index, name in enumerate(node.output):
            if name and name not in outputs:
                values[name] = f"{node.name}_output_{index}"
        for index, name in enumerate(node.input):
            if name in initializers and name.startswith(("onnx::", "/")):  # no parameter, but computed from some
                values.setdefault(name, f"{node.name}_input_{index}")
    for node in graph.node:
        node.input[:] = [values.get(name, name) for name in node.input]
        node.output[:] = [values.get(name, name) for name in node.output]
    for tensor in graph.initializer:
        tensor.name = values.get(tensor.name, tensor.name)
    del graph.value_info[:]  # under the old names, and known from shape inference


def _name_batch(graph: onnx.GraphProto, *, dynamic: bool) -> None:
    """Keep the sizes of outputs that are known; the exporter invents names for those it does not see."""
    if byte_size(onnx.helper.make_model(graph)) >= LARGEST:
        return  # shape inference takes models that protobuf can copy
    inferred = onnx.shape_inference.infer_shapes(onnx.helper.make_model(graph), strict_mode=False, data_prop=True)
    for value, seen in zip(graph.output, inferred.graph.output, strict=True):
        for index, dim in enumerate(value.type.tensor_type.shape.dim):
            known = seen.type.tensor_type.shape.dim[index]
            if index == 0 and dynamic:
                dim.dim_param = "batch"
            elif known.HasField("dim_value"):
                dim.dim_value = known.dim_value
