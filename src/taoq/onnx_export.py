# SPDX-License-Identifier: Apache-2.0
"""A torch network as an ONNX graph: standard operators, constants folded, nodes named by the module they come from."""

from __future__ import annotations

import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import onnx
import onnx_graphsurgeon
import torch
from torch import Tensor, nn

from taoq.errors import Fault, SpecError
from taoq.onnx_file import LARGEST, byte_size

OPSETS = (9, 23)
"""The first and last opset that torch 2.10's exporter writes; before 9, weights are inputs."""
_SEPARATOR = ":"  # in no module name, and torch's exporter leaves it as it is


def export_graph(
    model: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str], *, opset: int, dynamic: bool, fold: bool
) -> onnx.ModelProto:
    """Trace a network in eval mode.

    A node is called `/layer1/0/conv1/Conv` where it comes from the module `layer1.0.conv1`, and `..._1` where that
    has more than one of its kind.

    Args:
        model: The network, on the device of the inputs.
        inputs: An example of each input, by name.
        outputs: Names of the outputs.
        opset: Version of the standard operators.
        dynamic: Whether the batch may be of any size; else it is that of the example.
        fold: Whether batch norms are folded into the convolution in front of them.

    Raises:
        SpecError: The network cannot be written with this opset.
    """
    axes = {name: {0: "batch"} for name in [*inputs, *outputs]} if dynamic else None
    # the fused path of nn.TransformerEncoderLayer is one operator that no other runtime has
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), _full_scopes(model):
        warnings.simplefilter("ignore")  # of the tracer, about Python numbers that are constants here
        path = Path(folder, "traced.onnx")
        try:
            torch.onnx.export(
                model.eval(),
                tuple(inputs.values()),
                str(path),
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_axes=axes,
                opset_version=opset,
                dynamo=False,  # the newer exporter freezes the batch of detectors
                do_constant_folding=True,
                training=torch.onnx.TrainingMode.EVAL if fold else torch.onnx.TrainingMode.PRESERVE,
            )
        except (torch.onnx.errors.UnsupportedOperatorError, ValueError) as error:
            what = f"the network cannot be written with opset {opset}: {str(error).strip().splitlines()[0]}"
            raise SpecError(Fault("export.opset_version", what, "write 17, which every network here takes")) from error
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
        graph = onnx_graphsurgeon.import_onnx(onnx.load(str(path)))
    graph.fold_constants().cleanup().toposort()
    result: onnx.ModelProto = onnx_graphsurgeon.export_onnx(graph)
    _rename(result.graph, {name for name, _ in model.named_modules()})
    _name_batch(result.graph, dynamic=dynamic)
    return result


class _full_scopes:  # noqa: N801 (a context manager)
    """Let torch's exporter see whole module names: it takes the last part, which is not unique."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __enter__(self) -> None:
        named = list(self._model.named_modules())

        def named_modules(*_: object, **__: object) -> Iterator[tuple[str, nn.Module]]:
            return ((name.replace(".", _SEPARATOR), module) for name, module in named)

        self._model.named_modules = named_modules  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        del self._model.named_modules


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
