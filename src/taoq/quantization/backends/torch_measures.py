# SPDX-License-Identifier: Apache-2.0
"""What quantization does to each layer of a torch model and its bias, and how much each layer computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from taoq.quantization.backends.base import Inputs, LayerError, check_shifts
from taoq.quantization.backends.torch_layers import is_finite, is_transposed
from taoq.quantization.sqnr import sqnr


def layer_errors(
    reference: nn.Module,
    model: nn.Module,
    names: Sequence[str],
    batches: Iterable[Inputs],
    *,
    device: str,
    plain_weight: Callable[[nn.Module], Tensor],
) -> dict[str, LayerError]:
    """Errors of the layers of a model: each gets the input that the float model gives it, so it answers for its own.

    Args:
        reference: The float model.
        model: The quantized model.
        names: Its quantized layers.
        batches: Inputs; none measures the weights alone.
        device: Where to run.
        plain_weight: Gives the weight of a quantized layer as floats.
    """
    signals, noises = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)

    def compare(name: str, output: Tensor, found: Tensor) -> None:
        signals[name] += _energy(output)
        noises[name] += _energy(found - output)

    _run_both(reference, model, names, batches, compare, device=device)
    errors = {}
    for name in names:
        weight = reference.get_parameter(f"{name}.weight").detach()
        lost = plain_weight(model.get_submodule(name)) - weight  # of one layer at a time: all would be a second network
        errors[name] = LayerError(
            weights=sqnr(_energy(weight), _energy(lost)), outputs=sqnr(signals[name], noises[name])
        )
    return errors


def bias_shifts(
    reference: nn.Module, model: nn.Module, names: Sequence[str], batches: Iterable[Inputs], *, device: str
) -> dict[str, Tensor]:
    """What quantization shifts the mean output of layers by, for each channel: float minus quantized, float64.

    Each layer gets the input that the float model gives it (Nagel et al., "Data-Free Quantization Through Weight
    Equalization and Bias Correction", 2019: the empirical correction).

    Args:
        reference: The float model.
        model: The quantized model.
        names: Its quantized layers. One that no image reaches is not in what is returned.
        batches: Inputs; gone through once.
        device: Where to run.

    Raises:
        TaoqError: There are no inputs, or a mean is not finite.
    """
    shifts: dict[str, Tensor] = {}
    positions = dict.fromkeys(names, 0)

    def add(name: str, output: Tensor, found: Tensor) -> None:
        channels = output.ndim + 1 - reference.get_parameter(f"{name}.weight").ndim  # in front of the positions
        others = [axis for axis in range(output.ndim) if axis != channels]
        shifts[name] = shifts.get(name, 0) + (output - found).sum(others, dtype=torch.float64)
        positions[name] += output.numel() // output.shape[channels]

    images = _run_both(reference, model, names, batches, add, device=device)
    check_shifts(images, [name for name, shift in shifts.items() if not is_finite(shift)])
    return {name: shift / positions[name] for name, shift in shifts.items()}


def macs(model: nn.Module, inputs: Inputs) -> dict[str, int]:
    """Multiply-accumulates of each layer with a weight, for one sample; 0 for a layer that is not called.

    Args:
        model: The float model, on the CPU.
        inputs: One sample.
    """
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), Tensor) and module.weight.ndim >= 2
    ]
    found = dict.fromkeys(names, 0)

    def count(name: str, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:  # noqa: ARG001
        module: Any = model.get_submodule(name)
        if isinstance(output, Tensor) and not isinstance(module, nn.Embedding):
            # every weight is used once for each position: of the output, or of the input where that is spread out
            positions = given[0].numel() // module.weight.shape[0] if is_transposed(module) else 0
            found[name] += module.weight.numel() * (positions or output.numel() // module.weight.shape[0])

    with torch.inference_mode(), _watched(model, names, count):
        model.eval()(*inputs.values())
    return found


def _run_both(
    reference: nn.Module,
    model: nn.Module,
    names: Sequence[str],
    batches: Iterable[Inputs],
    look: Callable[[str, Tensor, Tensor], None],
    *,
    device: str,
) -> int:
    """Run the float model, and each layer of the quantized one on the same input.

    Args:
        reference: The float model.
        model: The quantized model.
        names: Its quantized layers.
        batches: Inputs.
        look: Gets the name of a layer, its float output and its quantized one.
        device: Where to run.

    Returns:
        Number of images.
    """
    images = 0

    def compare(name: str, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        look(name, output, model.get_submodule(name)(*inputs, **named))

    reference.to(device).eval()
    model.to(device)
    with torch.inference_mode(), _watched(reference, names, compare):
        for inputs in batches:
            reference(*(tensor.to(device) for tensor in inputs.values()))
            images += len(next(iter(inputs.values())))
    model.to("cpu")
    reference.to("cpu")
    return images


@contextmanager
def _watched(
    model: nn.Module, names: Sequence[str], look: Callable[[str, tuple[Any, ...], dict[str, Any], Any], None]
) -> Iterator[None]:
    """Call `look` with name, inputs and output of each layer that runs."""

    def hook(name: str) -> Callable[..., None]:
        return lambda _, inputs, named, output: look(name, inputs, named, output)

    handles = [model.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _energy(tensor: Tensor) -> float:
    """Sum of the squares, added up in float64 without a copy in it."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2
