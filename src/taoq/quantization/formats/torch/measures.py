# SPDX-License-Identifier: Apache-2.0
"""Per-layer measurements of torch networks: quantization error, shift of the mean output, multiply-accumulates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from taoq.network import Inputs, batch_size
from taoq.quantization.formats.checks import check_shifts
from taoq.quantization.formats.torch.call import call, every_layer_called
from taoq.quantization.formats.torch.layers import TRANSPOSED
from taoq.quantization.formats.torch.state import is_finite
from taoq.quantization.sqnr import sqnr
from taoq.quantization.types import LayerError

_Args = tuple[Any, ...]
_Observer = Callable[[str, _Args, dict[str, Tensor], Any], None]
"""Called with the name of a layer that ran, its positional and keyword arguments, and its output."""


def layer_errors(
    reference: nn.Module,
    model: nn.Module,
    names: Sequence[str],
    batches: Iterable[Inputs],
    weight: Callable[[nn.Module, str], Tensor],
    *,
    device: str,
) -> dict[str, LayerError]:
    """Return the errors of quantized layers, with each layer's input taken from the float network.

    Args:
        reference: The float network.
        model: The quantized network.
        names: Names of its quantized layers.
        batches: Inputs; if empty, only weights are compared.
        weight: Returns the dequantized weight of a layer.
        device: Device to run on.
    """
    signals, noises = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)

    def add_energies(name: str, output: Tensor, quantized: Tensor) -> None:
        signals[name] += _energy(output)
        noises[name] += _energy(quantized - output)

    _run_both(reference, model, names, batches, add_energies, device=device)
    errors = {}
    for name in names:
        original = reference.get_parameter(f"{name}.weight").detach()
        # One layer at a time: dequantizing all weights at once would take the memory of a second network.
        difference = weight(model, name) - original
        errors[name] = LayerError(
            weights=sqnr(_energy(original), _energy(difference)), outputs=sqnr(signals[name], noises[name])
        )
    return errors


def bias_shifts(
    reference: nn.Module, model: nn.Module, names: Sequence[str], batches: Iterable[Inputs], *, device: str
) -> dict[str, Tensor]:
    """Return the shift of each layer's mean output: float minus quantized, one float64 per output channel.

    Each layer's input is taken from the float network: the empirical bias correction of Nagel et al., "Data-Free
    Quantization Through Weight Equalization and Bias Correction", 2019.

    Args:
        reference: The float network.
        model: The quantized network.
        names: Names of its quantized layers. Layers that are never called are left out of the result.
        batches: Inputs; iterated over once.
        device: Device to run on.

    Raises:
        TaoqError: If there are no inputs, or a mean is not finite.
    """
    sums: dict[str, Tensor] = {}
    positions = dict.fromkeys(names, 0)

    def add(name: str, output: Tensor, quantized: Tensor) -> None:
        # The channel axis precedes the spatial axes of the output, and a weight has two axes besides the spatial ones.
        channel_axis = output.ndim + 1 - reference.get_parameter(f"{name}.weight").ndim
        reduced = [axis for axis in range(output.ndim) if axis != channel_axis]
        sums[name] = sums.get(name, 0) + (output - quantized).sum(reduced, dtype=torch.float64)
        positions[name] += output.numel() // output.shape[channel_axis]

    count = _run_both(reference, model, names, batches, add, device=device)
    check_shifts(count, [name for name, shift in sums.items() if not is_finite(shift)])
    return {name: shift / positions[name] for name, shift in sums.items()}


def macs(model: nn.Module, inputs: Inputs) -> dict[str, int]:
    """Return the multiply-accumulates of each layer with a weight, for one sample; 0 for a layer that is not called.

    Args:
        model: The float network, on the CPU.
        inputs: One sample.
    """
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), Tensor) and module.weight.ndim >= 2
    ]
    counts = dict.fromkeys(names, 0)

    def count(name: str, args: _Args, kwargs: dict[str, Tensor], output: Any) -> None:
        module = model.get_submodule(name)
        weight = module.weight
        if isinstance(output, Tensor) and isinstance(weight, Tensor) and not isinstance(module, nn.Embedding):
            # Every weight element is used once per position of the output, or of the input in a transposed convolution.
            # Either has weight.shape[0] channels.
            tensor = [*args, *kwargs.values()][0] if isinstance(module, TRANSPOSED) else output
            counts[name] += weight.numel() * (tensor.numel() // weight.shape[0])

    with torch.inference_mode(), observed(model.eval(), names, count):
        call(model, inputs)
    return counts


def _run_both(
    reference: nn.Module,
    model: nn.Module,
    names: Sequence[str],
    batches: Iterable[Inputs],
    compare: Callable[[str, Tensor, Tensor], None],
    *,
    device: str,
) -> int:
    """Run the float network, and each quantized layer on the same input as its float layer.

    Args:
        reference: The float network.
        model: The quantized network.
        names: Names of its quantized layers.
        batches: Inputs.
        compare: Called with the name of a layer, its float output and its quantized output.
        device: Device to run on.

    Returns:
        The number of samples.
    """
    count = 0

    def run_quantized(name: str, args: _Args, kwargs: dict[str, Tensor], output: Tensor) -> None:
        compare(name, output, model.get_submodule(name)(*args, **kwargs))

    reference.to(device).eval()
    model.to(device)
    with torch.inference_mode(), observed(reference, names, run_quantized):
        for inputs in batches:
            call(reference, {name: tensor.to(device) for name, tensor in inputs.items()})
            count += batch_size(inputs)
    model.to("cpu")
    reference.to("cpu")
    return count


@contextmanager
def observed(model: nn.Module, names: Sequence[str], observer: _Observer) -> Iterator[None]:
    """Call `observer` after each call of one of these layers."""

    def hook(name: str) -> Callable[..., None]:
        return lambda _, args, kwargs, output: observer(name, args, kwargs, output)

    handles = [model.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True) for name in names]
    try:
        with every_layer_called():
            yield
    finally:
        for handle in handles:
            handle.remove()


def _energy(tensor: Tensor) -> float:
    """Return the sum of squares, accumulated in float64 without converting the tensor."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2
