# SPDX-License-Identifier: Apache-2.0
"""Load a float checkpoint into a model: a plain state dict, a Lightning or TAO file, or safetensors.

No code of a checkpoint is ever run: pickles are read with torch's `weights_only` unpickler.
"""

from __future__ import annotations

import argparse
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

from taoq.containers import keys_of, state_dict_in
from taoq.errors import Fault, Notice, TaoqError, abbreviated, first_line
from taoq.plain import JsonMapping

log = logging.getLogger(__name__)

_ANOTHER_NETWORK = "check that the spec describes the network of this checkpoint"
_REFUSED = "nsupported (global|class)|GLOBAL|unrecognized function|Can only|instantiate"
"""Pattern of the messages of torch's unpickler for objects that it refuses to load, as opposed to damaged files."""
_DAMAGED = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError,
    TypeError, ValueError, struct.error,
)  # fmt: skip
"""Exceptions that torch raises on a damaged file, because its unpickler does not check the bytes that it reads."""
_FILLS = {
    "uniform_", "normal_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "xavier_normal_",
    "constant_", "fill_", "ones_", "zeros_", "zero_", "copy_", "erfinv_", "mul_", "div_", "add_", "clamp_",
}  # fmt: skip
"""Functions of torch.nn.init and methods of Tensor with which networks initialise their parameters."""
_ZIP = b"PK"
_OLD_TORCH = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
"""How files of torch.save begin: as a zip archive, before torch 1.6 with torch.serialization.MAGIC_NUMBER."""


class WithoutInitialisation(TorchFunctionMode):
    """Skip the initialisation of the parameters of networks that are built in this context.

    For networks whose parameters are all loaded afterwards: drawing random weights takes most of the time of building
    a network. Buffers are computed as usual.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: JsonMapping | None = None
    ) -> Any:
        """Call `func`, unless it would fill a parameter."""
        arguments = kwargs or {}
        if getattr(func, "__name__", "") in _FILLS:
            tensor = args[0] if args else arguments.get("tensor")
            if isinstance(tensor, nn.Parameter):
                return tensor
        return func(*args, **arguments)


def load_weights(model: nn.Module, checkpoint: str, hint: str = _ANOTHER_NETWORK, *, key: str = "") -> None:
    """Load every tensor of a model from a file; values are converted to the model's dtype.

    A prefix that a framework put in front of all names (`model.`, `module.`) is detected and removed.

    Args:
        model: The model.
        checkpoint: The file.
        hint: What the user should check if the tensors do not fit the model.
        key: Keys that lead to the state dict in the file; empty to look for it.

    Raises:
        TaoqError: If the file is missing or damaged, holds code or no tensors, or does not fit the model.
    """
    load_prefixed(model, read_state_dict(checkpoint, key), checkpoint, hint)


def load_prefixed(model: nn.Module, state: Mapping[str, Tensor], checkpoint: str, hint: str) -> None:
    """Load every tensor of a model from a state dict, whose names may have a prefix that a framework put there.

    Args:
        model: The model.
        state: The tensors by name; those without the prefix are left out.
        checkpoint: The file that they come from, for messages.
        hint: What the user should check if the tensors do not fit the model.

    Raises:
        TaoqError: If tensors are missing, unknown, or of another shape.
    """
    prefix = _prefix(state, model.state_dict())
    own_state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    other_keys = sorted(key for key in state if not key.startswith(prefix))
    load_state(model, own_state, checkpoint, hint)
    if other_keys:
        what = f"{len(other_keys)} tensors outside of '{prefix}*' are not of this network: {abbreviated(other_keys)}"
        log.info(Notice(checkpoint, what))


def load_state(model: nn.Module, state: Mapping[str, Tensor], checkpoint: str, hint: str) -> None:
    """Load every tensor of a model from a state dict; values are converted to the model's dtype.

    Batch counts, which only training reads, may be missing: frozen batch norms, as in TAO, have none.

    Args:
        model: The model.
        state: The tensors by name: exactly those of the model.
        checkpoint: The file that they come from, for the message.
        hint: What the user should check if the tensors do not fit the model.

    Raises:
        TaoqError: If tensors are missing, unknown, or of another shape.
    """
    model_state = model.state_dict()
    missing = [key for key in model_state if key not in state]
    if all(key.endswith(".num_batches_tracked") for key in missing):
        state = {**state, **{key: torch.zeros_like(model_state[key]) for key in missing}}
    _check_fit(state, model_state, checkpoint, hint)
    # Assigning saves a copy of all weights. With tied weights (one parameter under two names) the values are copied,
    # because assigning two tensors would untie them.
    parameters = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
    tied = len(parameters) > len(set(parameters))
    model.load_state_dict({key: value.to(model_state[key].dtype) for key, value in state.items()}, assign=not tied)


def without_prefix(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Remove the prefix of all names of a state dict, and drop the tensors that do not have it.

    Args:
        state: Tensors by name.
        name: A tensor that every network of this kind has: what stands in front of it is the prefix.
    """
    prefix = next((key.removesuffix(name) for key in state if key.endswith(name)), "")
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def read_names(checkpoint: str, key: str = "") -> list[str]:
    """Return the names of the tensors of a checkpoint, without reading their values where the format allows that.

    Args:
        checkpoint: The file.
        key: Keys that lead to the state dict in the file; empty to look for it.

    Raises:
        TaoqError: As `read_state_dict`.
    """
    return list(read_state_dict(checkpoint, key, mapped=True))


def read_state_dict(checkpoint: str, key: str = "", *, mapped: bool = False) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint, by name. Log which state dict of a file is taken where it has several.

    Args:
        checkpoint: The file.
        key: Keys that lead to the state dict in the file, joined with dots; empty to look for it.
        mapped: Map a file of torch into memory, so that only what is used of its values is read, and log nothing. The
            tensors are then valid only while the file does not change.

    Raises:
        TaoqError: If the file is missing or damaged, holds code or no tensors, or has none under `key`.
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
    if not head.startswith(_ZIP) and head != _OLD_TORCH:  # torch would try to unpickle any other file
        raise TaoqError(_damaged(checkpoint))
    try:
        # Many training scripts save their command line. A Namespace only holds values, so it runs nothing.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # torch warns about the pickle protocol of a damaged file
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and head.startswith(_ZIP))
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
    if isinstance(data, Mapping) and data.get("state_dict_encrypted") is True:
        what = "is encrypted by TAO, and only TAO can decrypt it"
        raise TaoqError(Fault(checkpoint, what, "train or export without encryption_key (-k)"))
    state = state_dict_in(data, key, checkpoint, silent=mapped)
    # With torchao imported, torch loads its quantized tensors, which are subclasses of Tensor.
    if any(type(value) not in (Tensor, nn.Parameter) for value in state.values()):
        raise TaoqError(_quantized(checkpoint))
    if not state:
        keys = keys_of(data)
        what = f"holds no state dict, only {keys}" if keys else "holds no state dict"
        raise TaoqError(Fault(checkpoint, what, "give a file that torch.save wrote of a state dict"))
    return state


def _damaged(checkpoint: str) -> Fault:
    return Fault(checkpoint, "is cut off, or is not a checkpoint of torch", "copy the file again, or give another one")


def _quantized(checkpoint: str) -> Fault:
    what = "is the payload of a quantized model, without the manifest.json that belongs to it"
    return Fault(checkpoint, what, "give the folder that quantize wrote, or quantize again")


def _prefix(keys: Iterable[str], model_state: Mapping[str, Tensor]) -> str:
    """Return the prefix that most keys of a checkpoint have in front of a name of the model."""
    votes: Counter[str] = Counter()
    for key in keys:
        parts = key.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in model_state:
                votes["".join(f"{part}." for part in parts[:start])] += 1
                break
    return votes.most_common(1)[0][0] if votes else ""


def _check_fit(state: Mapping[str, Tensor], model_state: Mapping[str, Tensor], checkpoint: str, hint: str) -> None:
    missing = [key for key in model_state if key not in state]
    unknown = [key for key in state if key not in model_state]
    shapes = [
        f"{key} {list(state[key].shape)} for {list(tensor.shape)}"
        for key, tensor in model_state.items()
        if key in state and state[key].shape != tensor.shape
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
