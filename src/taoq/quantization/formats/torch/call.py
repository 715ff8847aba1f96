# SPDX-License-Identifier: Apache-2.0
"""Call a torch network with named inputs, so that every layer is called."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator

import torch
from torch import nn

from taoq.network import Inputs


def call(model: nn.Module, inputs: Inputs) -> object:
    """The output of a network.

    Args:
        model: The network.
        inputs: By keyword if each name is a parameter of its forward, else by position.
    """
    if takes_by_keyword(model, inputs):
        return model(**inputs)
    return model(*inputs.values())


def takes_by_keyword(model: nn.Module, inputs: Inputs) -> bool:
    """Whether each name of the inputs is a parameter of a network's forward."""
    parameters = inspect.signature(model.forward).parameters
    return all(name in parameters for name in inputs)


def arguments(model: nn.Module, inputs: Inputs) -> tuple[object, ...]:
    """The inputs as positional arguments; None for a parameter between them that has no input.

    Raises:
        TypeError: The network does not take these inputs by position.
    """
    if not takes_by_keyword(model, inputs):
        return tuple(inputs.values())
    bound = inspect.signature(model.forward).bind(**inputs)
    bound.apply_defaults()
    if bound.kwargs:
        raise TypeError(f"{type(model).__name__} takes {', '.join(bound.kwargs)} by keyword only")
    values = list(bound.args)
    while values and values[-1] is None:
        values.pop()
    return tuple(values)


@contextlib.contextmanager
def every_layer_called() -> Iterator[None]:
    """Turn off the fused inference path of nn.TransformerEncoderLayer, which goes past the layers inside of it."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def call_every_layer(model: nn.Module) -> None:
    """Keep a network from the fused inference path for good, in this and every copy of it.

    nn.TransformerEncoderLayer takes that path only where this attribute says that its activation is one of the fused
    ones; the path without fusion does not read it.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
