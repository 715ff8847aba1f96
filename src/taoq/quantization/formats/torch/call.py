# SPDX-License-Identifier: Apache-2.0
"""Call a torch network with named inputs, without fused paths that bypass its layers."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator

import torch
from torch import nn

from taoq.network import Inputs


def call(model: nn.Module, inputs: Inputs) -> object:
    """Run a network and return its output.

    Args:
        model: The network.
        inputs: Inputs by name; passed by keyword if every name is a parameter of the forward, otherwise by position.
    """
    if takes_by_keyword(model, inputs):
        return model(**inputs)
    return model(*inputs.values())


def takes_by_keyword(model: nn.Module, inputs: Inputs) -> bool:
    """Return whether every input name is a parameter of the network's forward."""
    parameters = forward_signature(model).parameters
    return all(name in parameters for name in inputs)


def forward_signature(model: nn.Module) -> inspect.Signature:
    """Return the signature of a network's forward; of a compiled network, that of the original."""
    return inspect.signature(getattr(model, "_orig_mod", model).forward)


def arguments(model: nn.Module, inputs: Inputs) -> tuple[object, ...]:
    """Return the inputs as positional arguments of the network's forward, with defaults for parameters between them.

    Raises:
        TypeError: If the forward does not take these inputs by position.
    """
    if not takes_by_keyword(model, inputs):
        return tuple(inputs.values())
    bound = forward_signature(model).bind(**inputs)
    bound.apply_defaults()
    if bound.kwargs:
        raise TypeError(f"{type(model).__name__} takes {', '.join(bound.kwargs)} by keyword only")
    values = list(bound.args)
    while values and values[-1] is None:
        values.pop()
    return tuple(values)


@contextlib.contextmanager
def every_layer_called() -> Iterator[None]:
    """Disable the fused inference path of nn.TransformerEncoderLayer, which bypasses the layers inside of it."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def call_every_layer(model: nn.Module) -> None:
    """Disable the fused inference path of `every_layer_called` permanently, for this network and its copies.

    nn.TransformerEncoderLayer takes the fused path only if `activation_relu_or_gelu` names a supported activation; the
    path without fusion does not read the attribute.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
