# SPDX-License-Identifier: Apache-2.0
"""What quantization does to each layer of a torch network and its bias, and how much each layer computes."""

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

_Arguments = tuple[Any, ...]
_Watch = Callable[[str, _Arguments, dict[str, Tensor], Any], None]
"""Gets the name of a layer that ran, its positional and keyword inputs, and its output."""


def layer_errors(
    reference: nn.Module,
    model: nn.Module,
    names: Sequence[str],
    batches: Iterable[Inputs],
    weight: Callable[[nn.Module, str], Tensor],
    *,
    device: str,
) -> dict[str, LayerError]:
    """Errors of quantized layers, each on the inputs that the float network gives it.

    Args:
        reference: The float network.
        model: The quantized network.
        names: Its quantized layers.
        batches: Inputs; without any, only weights are compared.
        weight: Gives the weight of a quantized layer as floats.
        device: Where to run.
    """
    signals, noises = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)

    def compare(name: str, output: Tensor, quantized: Tensor) -> None:
        signals[name] += _energy(output)
        noises[name] += _energy(quantized - output)

    _run_both(reference, model, names, batches, compare, device=device)
    errors = {}
    for name in names:
        original = reference.get_parameter(f"{name}.weight").detach()
        lost = weight(model, name) - original  # of one layer at a time: all of them would be a second network
        errors[name] = LayerError(
            weights=sqnr(_energy(original), _energy(lost)), outputs=sqnr(signals[name], noises[name])
        )
    return errors


def bias_shifts(
    reference: nn.Module, model: nn.Module, names: Sequence[str], batches: Iterable[Inputs], *, device: str
) -> dict[str, Tensor]:
    """How much quantization shifts the mean output of each layer: float minus quantized, one float64 per channel.

    Each layer gets the input that the float network gives it (Nagel et al., "Data-Free Quantization Through Weight
    Equalization and Bias Correction", 2019: the empirical correction).

    Args:
        reference: The float network.
        model: The quantized network.
        names: Its quantized layers. A layer that no sample reaches is left out of the result.
        batches: Inputs; iterated over once.
        device: Where to run.

    Raises:
        TaoqError: There are no inputs, or a mean is not finite.
    """
    sums: dict[str, Tensor] = {}
    positions = dict.fromkeys(names, 0)

    def add(name: str, output: Tensor, quantized: Tensor) -> None:
        channels = output.ndim + 1 - reference.get_parameter(f"{name}.weight").ndim  # in front of the positions
        others = [axis for axis in range(output.ndim) if axis != channels]
        sums[name] = sums.get(name, 0) + (output - quantized).sum(others, dtype=torch.float64)
        positions[name] += output.numel() // output.shape[channels]

    count = _run_both(reference, model, names, batches, add, device=device)
    check_shifts(count, [name for name, shift in sums.items() if not is_finite(shift)])
    return {name: shift / positions[name] for name, shift in sums.items()}


def macs(model: nn.Module, inputs: Inputs) -> dict[str, int]:
    """Multiply-accumulates of each layer with a weight, for one sample; 0 for a layer that is not called.

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

    def count(name: str, given: _Arguments, named: dict[str, Tensor], output: Any) -> None:
        module = model.get_submodule(name)
        weight = module.weight
        if isinstance(output, Tensor) and isinstance(weight, Tensor) and not isinstance(module, nn.Embedding):
            # every weight is used once for each position: of the output, or of the input if that is spread out
            spread = [*given, *named.values()][0] if isinstance(module, TRANSPOSED) else output
            counts[name] += weight.numel() * (spread.numel() // weight.shape[0])

    with torch.inference_mode(), _watched(model.eval(), names, count):
        call(model, inputs)
    return counts


def _run_both(
    reference: nn.Module,
    model: nn.Module,
    names: Sequence[str],
    batches: Iterable[Inputs],
    look: Callable[[str, Tensor, Tensor], None],
    *,
    device: str,
) -> int:
    """Run the float network, and each layer of the quantized one on the same input.

    Args:
        reference: The float network.
        model: The quantized network.
        names: Its quantized layers.
        batches: Inputs.
        look: Gets the name of a layer, its float output and its quantized one.
        device: Where to run.

    Returns:
        Number of samples.
    """
    count = 0

    def compare(name: str, given: _Arguments, named: dict[str, Tensor], output: Tensor) -> None:
        look(name, output, model.get_submodule(name)(*given, **named))

    reference.to(device).eval()
    model.to(device)
    with torch.inference_mode(), _watched(reference, names, compare):
        for inputs in batches:
            call(reference, {name: tensor.to(device) for name, tensor in inputs.items()})
            count += batch_size(inputs)
    model.to("cpu")
    reference.to("cpu")
    return count


@contextmanager
def _watched(model: nn.Module, names: Sequence[str], watch: _Watch) -> Iterator[None]:
    """Call `watch` for each of these layers that runs."""

    def hook(name: str) -> Callable[..., None]:
        return lambda _, given, named, output: watch(name, given, named, output)

    handles = [model.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True) for name in names]
    try:
        with every_layer_called():
            yield
    finally:
        for handle in handles:
            handle.remove()


def _energy(tensor: Tensor) -> float:
    """Sum of the squares, added up in float64 without a copy of the tensor in it."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2
