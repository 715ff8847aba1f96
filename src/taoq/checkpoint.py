# SPDX-License-Identifier: Apache-2.0
"""Load a float checkpoint into a model: plain state dict, Lightning or TAO file, safetensors. Runs no code of it."""

from __future__ import annotations

import logging
import pickle
import re
import struct
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from taoq.errors import Fault, Notice, TaoqError, abbreviated, first_line
from taoq.plain import JsonMapping

log = logging.getLogger(__name__)

_ANOTHER_NETWORK = "check that the spec describes the network of this checkpoint"
_CONTAINERS = ("ema", "module", "state_dict", "model_state_dict", "model")
"""Keys under which training frameworks keep the state dict; an averaged one (`ema`) goes first."""
_REFUSED = "nsupported (global|class)|GLOBAL|unrecognized function|Can only|instantiate"
"""What torch's unpickler says of objects it does not load, other than of bytes it does not understand."""
_DAMAGED = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError,
    TypeError, ValueError, struct.error,
)  # fmt: skip
"""What torch raises on a damaged file: its unpickler takes the bytes as they come."""
_FILLS = {
    "uniform_", "normal_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "xavier_normal_",
    "constant_", "fill_", "ones_", "zeros_", "zero_", "copy_", "erfinv_", "mul_", "div_", "add_", "clamp_",
}  # fmt: skip
"""What networks give their parameters a first value with, in torch.nn.init and of Tensor."""
_ZIP = b"PK"
_OLD_TORCH = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
"""How files of torch.save begin: a zip archive, or before torch 1.6 this number (torch.serialization.MAGIC_NUMBER)."""


class WithoutInitialisation(TorchFunctionMode):
    """`with WithoutInitialisation():` a network is built without giving its parameters a value.

    For a network whose every parameter is loaded afterwards: drawing random weights is most of the time that building
    takes. Buffers are computed as ever.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: JsonMapping | None = None
    ) -> Any:
        """Leave a parameter alone where `func` would fill it."""
        arguments = kwargs or {}
        if getattr(func, "__name__", "") in _FILLS:
            tensor = args[0] if args else arguments.get("tensor")
            if isinstance(tensor, nn.Parameter):
                return tensor
        return func(*args, **arguments)


def load_weights(model: nn.Module, checkpoint: str, hint: str = _ANOTHER_NETWORK) -> None:
    """Load every tensor of a model from a file; values are converted to the model's dtype.

    A prefix that a framework put in front of all names (`model.`, `module.`) is found and taken off.

    Args:
        model: The model.
        checkpoint: The file.
        hint: What to look at in the spec if they do not fit.

    Raises:
        TaoqError: The file is missing, damaged, holds code or no tensors, or does not fit the model.
    """
    state = read_state_dict(checkpoint)
    own = model.state_dict()
    prefix = _prefix(state, own)
    inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    outside = sorted(key for key in state if not key.startswith(prefix))
    load_state(model, inside, checkpoint, hint)
    if outside:
        what = f"{len(outside)} tensors outside of '{prefix}*' are not of this network: {abbreviated(outside)}"
        log.info(Notice(checkpoint, what))


def load_state(model: nn.Module, state: Mapping[str, Tensor], checkpoint: str, hint: str) -> None:
    """Load every tensor of a model from a state dict; values are converted to the model's dtype.

    Args:
        model: The model.
        state: Its tensors by name, no more and no less.
        checkpoint: Where they are from, for the message.
        hint: What to look at if they do not fit.

    Raises:
        TaoqError: Tensors are missing, unknown, or of another shape.
    """
    own = model.state_dict()
    _check_fit(state, own, checkpoint, hint)
    # assigned, not copied: a copy would take the time and the memory of all weights once more. One tensor that has two
    # names in the model must stay one, so there the values are copied
    parameters = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
    tied = len(parameters) > len(set(parameters))
    model.load_state_dict({key: value.to(own[key].dtype) for key, value in state.items()}, assign=not tied)


def without_prefix(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Take off what stands in front of a tensor that the network is known to have, and leave out what lacks it."""
    prefix = next((key.removesuffix(name) for key in state if key.endswith(name)), "")
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def read_state_dict(checkpoint: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name.

    Raises:
        TaoqError: The file is missing, damaged, or holds code or no tensors.
    """
    path = Path(checkpoint)
    if not path.is_file():
        what = "is a folder, not a checkpoint" if path.is_dir() else "there is no such checkpoint"
        raise TaoqError(Fault(checkpoint, what, "give a .pth, .ckpt or .safetensors file"))
    if path.suffix == ".safetensors":
        import safetensors
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            what = f"is not a whole safetensors file: {first_line(error)}"
            raise TaoqError(Fault(checkpoint, what, "copy the file again")) from None
    with path.open("rb") as file:
        head = file.read(len(_OLD_TORCH))
    if not head.startswith(_ZIP) and head != _OLD_TORCH:  # torch would try to unpickle whatever it is
        raise TaoqError(_damaged(checkpoint))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, on the pickle protocol of a damaged file
            data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "torchao" in str(error):
            raise TaoqError(_quantized(checkpoint)) from None
        if not re.search(_REFUSED, str(error)):
            raise TaoqError(_damaged(checkpoint)) from None
        what = "holds objects besides tensors, which taoq does not load: they could run code"
        hint = "save the tensors alone where you trust the file: torch.save(model.state_dict(), 'weights.pth')"
        raise TaoqError(Fault(checkpoint, what, hint)) from None
    except _DAMAGED:
        raise TaoqError(_damaged(checkpoint)) from None
    if isinstance(data, Mapping) and "modelopt_state" in data:
        raise TaoqError(_quantized(checkpoint))
    state = _tensors(data)
    if any(type(value) not in (Tensor, nn.Parameter) for value in state.values()):  # torchao was imported
        raise TaoqError(_quantized(checkpoint))
    if not state:
        raise TaoqError(Fault(checkpoint, "holds no state dict", "give a file that torch.save wrote of a state dict"))
    return state


def _damaged(checkpoint: str) -> Fault:
    return Fault(checkpoint, "is cut off, or is not a checkpoint of torch", "copy the file again, or give another one")


def _quantized(checkpoint: str) -> Fault:
    what = "is the payload of a quantized model, without the manifest.json that belongs to it"
    return Fault(checkpoint, what, "give the folder that quantize wrote, or quantize again")


def _tensors(data: object) -> dict[str, Tensor]:
    """The state dict in what torch.load returned: the data itself, or under a framework's key."""
    if not isinstance(data, Mapping):
        return {}
    for key in _CONTAINERS:
        if isinstance(data.get(key), Mapping):
            return _tensors(data[key])
    return {str(key): value for key, value in data.items() if isinstance(value, Tensor)}


def _prefix(state: Iterable[str], own: Mapping[str, Tensor]) -> str:
    """What stands in front of the model's names in most keys of a checkpoint."""
    votes: Counter[str] = Counter()
    for key in state:
        parts = key.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in own:
                votes["".join(f"{part}." for part in parts[:start])] += 1
                break
    return votes.most_common(1)[0][0] if votes else ""


def _check_fit(state: Mapping[str, Tensor], own: Mapping[str, Tensor], checkpoint: str, hint: str) -> None:
    missing = [key for key in own if key not in state]
    unknown = [key for key in state if key not in own]
    shapes = [
        f"{key} {list(state[key].shape)} for {list(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if not (missing or unknown or shapes):
        return
    parts = []
    if shapes:
        parts.append(f"{len(shapes)} of another shape ({abbreviated(shapes)})")
    if missing:
        parts.append(f"{len(missing)} missing ({abbreviated(missing)})")
    if unknown:
        parts.append(f"{len(unknown)} unknown ({abbreviated(unknown)})")
    raise TaoqError(Fault(checkpoint, "does not fit the network: tensors " + ", ".join(parts), hint))
