"""Sizes in exported graphs: constants, except those that depend on the batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from taoq.quantization.formats.onnx.export import export_graph
from taoq.quantization.formats.onnx.graph import Graph

Forward = Callable[[Tensor], Tensor]

SIZE_TYPES = {"Shape", "Gather", "Unsqueeze", "Concat", "Slice", "Cast", "ConstantOfShape", "Equal", "Where", "Range"}
TABLE = torch.rand(1, 6, 4, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    """A function as a network."""

    def __init__(self, function: Forward) -> None:
        super().__init__()
        self._function = function

    def forward(self, x: Tensor) -> Tensor:
        return self._function(x)


def heads(x: Tensor) -> Tensor:
    """Split channels into heads, merge heads with the batch, and back."""
    batch, positions, channels = x.shape
    split = x.view(batch, positions, 2, channels // 2).transpose(1, 2)
    merged = split.reshape(batch * 2, positions, channels // 2) / split.shape[-1] ** 0.5
    return merged.view(batch, 2, *merged.shape[1:]).transpose(1, 2).reshape(*x.shape[:-1], -1)


def windows(x: Tensor) -> Tensor:
    """Merge windows with the batch, twice, as in a Swin transformer."""
    for _ in range(2):
        batch, positions, channels = x.shape
        parts = x.view(batch, positions // 3, 3, channels).reshape(-1, 3, channels)
        parts = parts.softmax(1)
        x = parts.view(parts.shape[0] // (positions // 3), -1, channels)
    return x


def attention(x: Tensor) -> Tensor:
    """Attention of torch, whose scale is computed from a size."""
    return nn.functional.scaled_dot_product_attention(x, x, x)


WITHOUT = {
    "heads": heads,
    "windows": windows,
    "attention": attention,
    "gather": lambda x: x.gather(1, x.argmax(1, keepdim=True).expand(-1, 2, -1)),
    "flatten": lambda x: x.flatten(1) * x.flatten(1).shape[1],
    "half": lambda x: x[:, : x.shape[1] // 2],
}
"""Functions whose graph needs no node that computes a size."""
DEPENDENT = {
    "a mean over the batch": lambda x: x * (x.sum(0, keepdim=True) / x.shape[0]),
    "positions in the batch": lambda x: x + torch.arange(x.shape[0]).view(-1, 1, 1),
    "the batch in an axis of the table": lambda x: torch.cat([TABLE.expand(x.shape[0], -1, -1), x], 1),
    "half of the batch": lambda x: x + x[: (x.shape[0] + 1) // 2].sum(0),
    "two inferred axes": lambda x: x.reshape(x.shape[0] * 2, -1, x.shape[0] * 2 // x.shape[0]).view(x.shape[0], -1),
}
"""Functions that need the size of the batch."""


def exported(function: Forward, *, dynamic: bool = True) -> Graph:
    example = {"x": torch.rand(2, 6, 4)}
    return export_graph(Network(function), example, ["y"], opset=17, dynamic=dynamic, fold=True)


def run(graph: Graph, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(graph.model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["y"], {"x": x.numpy()})[0])


def types(graph: Graph) -> Counter[str]:
    return Counter(node.op_type for node in graph.proto.node)


@pytest.mark.parametrize("name", WITHOUT)
@pytest.mark.parametrize("dynamic", [True, False], ids=["any batch", "batch 2"])
def test_no_node_computes_a_size(name: str, dynamic: bool) -> None:
    graph = exported(WITHOUT[name], dynamic=dynamic)
    assert set(types(graph)) & SIZE_TYPES <= ({"Slice"} if name == "half" else set())
    onnx.checker.check_model(graph.model, full_check=True)


@pytest.mark.parametrize("name", [*WITHOUT, *DEPENDENT])
def test_the_graph_computes_the_same_for_any_batch(name: str) -> None:
    function = (WITHOUT | DEPENDENT)[name]
    graph = exported(function)
    for batch in (1, 2, 3, 62, 64):
        x = torch.rand(batch, 6, 4, generator=torch.Generator().manual_seed(batch))
        outputs, expected = run(graph, x), function(x)
        assert outputs.shape == expected.shape
        np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)
