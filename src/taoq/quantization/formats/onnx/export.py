# SPDX-License-Identifier: Apache-2.0
"""Export a torch network as an ONNX graph of standard operators, with nodes named after the modules they come from."""

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

from taoq.errors import Fault, SpecError, TaoqError, first_line
from taoq.quantization.formats.onnx.file import LARGEST, byte_size
from taoq.quantization.formats.onnx.graph import Graph
from taoq.quantization.formats.onnx.sizes import store_sizes
from taoq.quantization.formats.torch.call import arguments, every_layer_called
from taoq.quantization.library import library_output, replaced

OPSETS = (9, 23)
"""First and last supported opset. torch 2.10's exporter writes up to 23; below 9 it makes weights graph inputs."""
_SEPARATOR = ":"  # Does not occur in module names, and torch's exporter does not change it.


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

    A Conv node of the module `layer1.0.conv1` is named `/layer1/0/conv1/Conv`. Further nodes of the same type in that
    module get the suffixes `_1`, `_2`, ...

    Args:
        model: The network, on the device of the inputs.
        inputs: An example of each input, by name.
        outputs: Names of the outputs.
        opset: Version of the standard operators.
        dynamic: Whether the batch may have any size; otherwise it has the size of the example.
        fold: Whether to fold batch norms into the preceding convolutions.
        verbose: Whether to log the exporter's output at level INFO; otherwise at level DEBUG.

    Raises:
        SpecError: If the network cannot be exported with this opset.
        TaoqError: If the network cannot be traced.
    """
    axes = {name: {0: "batch"} for name in [*inputs, *outputs]} if dynamic else None
    with (
        tempfile.TemporaryDirectory() as folder,
        library_output(logging.INFO if verbose else logging.DEBUG),
        every_layer_called(),  # The fused path of nn.TransformerEncoderLayer is an operator of torch, not of ONNX.
        _full_scopes(model),
    ):
        path = Path(folder, "traced.onnx")
        # Networks may keep tensors of an earlier run, which was in inference mode; with gradients, torch refuses them.
        with _errors_reported(opset), torch.no_grad():
            torch.onnx.export(
                model.eval(),
                arguments(model, inputs),
                str(path),
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_axes=axes,
                opset_version=opset,
                dynamo=False,  # The dynamo exporter fixes the batch size of detectors.
                do_constant_folding=True,
                verbose=verbose,
                training=torch.onnx.TrainingMode.EVAL if fold else torch.onnx.TrainingMode.PRESERVE,
            )
        surgeon = onnx_graphsurgeon.import_onnx(onnx.load(str(path)))
        surgeon.fold_constants().cleanup().toposort()
        result = store_sizes(onnx_graphsurgeon.export_onnx(surgeon), dynamic=dynamic)
    _rename(result.graph, {name for name, _ in model.named_modules()})
    _set_output_shapes(result.graph, dynamic=dynamic)
    return Graph(result)


def append(graph: Graph, tail: Graph, name: str) -> Graph:
    """Return a graph followed by another one, which reads outputs of the first and may have further inputs.

    Args:
        graph: The first graph; it is modified.
        tail: The second graph, with the same opset. Its outputs become the outputs.
        name: Path that the names of its nodes begin with, as if it was a module of this name.
    """
    proto, prefix = graph.proto, f"/{name}"
    renamed = onnx.compose.add_prefix_graph(tail.proto, prefix, rename_inputs=False, rename_outputs=False)
    made = {value.name for value in proto.output}
    proto.node.extend(renamed.node)
    proto.initializer.extend(renamed.initializer)
    proto.input.extend(value for value in renamed.input if value.name not in made)
    del proto.output[:]
    proto.output.extend(renamed.output)
    return Graph(graph.model)


@contextlib.contextmanager
def _errors_reported(opset: int) -> Iterator[None]:
    """Turn exceptions of torch's exporter into errors of the opset or of the network."""
    try:
        yield
    except (torch.onnx.errors.UnsupportedOperatorError, ValueError) as error:
        what = f"the network cannot be written with opset {opset}: {first_line(error)}"
        default = "write 17, which every network here takes"
        hint = default if opset < 17 else "replace the operation in the network"
        raise SpecError(Fault("export.opset_version", what, hint)) from error
    except Exception as error:  # Tracing runs the code of the network.
        what = f"torch's exporter cannot trace the network: {first_line(error)}"
        raise TaoqError(Fault("export.checkpoint", what, "see export.verbose: true")) from error


@contextlib.contextmanager
def _full_scopes(model: nn.Module) -> Iterator[None]:
    """Make torch's exporter use full module names: it takes the part after the last dot, which is not unique."""
    named = list(model.named_modules())

    def named_modules(*_: object, **__: object) -> Iterator[tuple[str, nn.Module]]:
        return ((name.replace(".", _SEPARATOR), module) for name, module in named)

    with replaced(model, "named_modules", named_modules):
        yield


def _rename(graph: onnx.GraphProto, modules: set[str]) -> None:
    """Rename nodes, their outputs, and the weights that the exporter numbered."""
    counts: Counter[str] = Counter()
    values: dict[str, str] = {}
    outputs = {value.name for value in graph.output}
    initializers = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        scope = node.name.rpartition("/")[0].rpartition("/")[2].replace(_SEPARATOR, ".")
        if scope not in modules:  # The exporter appends `_1` when a module is called again.
            scope = scope.rpartition("_")[0]
        stem = "/" + "/".join([*filter(None, scope.split(".")), node.op_type])
        number = counts[stem]
        counts[stem] += 1
        node.name = f"{stem}_{number}" if number else stem
        for index, name in enumerate(node.output):
            if name and name not in outputs:
                values[name] = f"{node.name}_output_{index}"
        for index, name in enumerate(node.input):
            if name in initializers and name.startswith(("onnx::", "/")):  # Made by constant folding.
                values.setdefault(name, f"{node.name}_input_{index}")
    for node in graph.node:
        node.input[:] = [values.get(name, name) for name in node.input]
        node.output[:] = [values.get(name, name) for name in node.output]
    for tensor in graph.initializer:
        tensor.name = values.get(tensor.name, tensor.name)
    del graph.value_info[:]  # It has the old names, and shape inference can restore it.


def _set_output_shapes(graph: onnx.GraphProto, *, dynamic: bool) -> None:
    """Name the batch axis of outputs, and set sizes that shape inference knows and the exporter left symbolic."""
    model = onnx.helper.make_model(graph)
    if byte_size(model) >= LARGEST:
        return  # Shape inference serializes the model, which protobuf limits to 2 GB.
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=False, data_prop=True)
    for output, inferred_output in zip(graph.output, inferred.graph.output, strict=True):
        for index, dim in enumerate(output.type.tensor_type.shape.dim):
            inferred_dim = inferred_output.type.tensor_type.shape.dim[index]
            if index == 0 and dynamic:
                dim.dim_param = "batch"
            elif inferred_dim.HasField("dim_value"):
                dim.dim_value = inferred_dim.dim_value
