# SPDX-License-Identifier: Apache-2.0
"""Loaders that are supplied from Python: iterables of tensors, tuples or dictionaries, read as batches."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from taoq.errors import Fault, Notice, SpecError, TaoqError
from taoq.network import Inputs, batch_size, first_samples
from taoq.tasks.base import Batch, Targets

log = logging.getLogger(__name__)

_YIELD = "let the loader yield a tensor, a tuple (inputs, targets), or a dictionary"


@dataclass(frozen=True)
class Signature:
    """The inputs of a network.

    Attributes:
        names: Their names, in order.
        required: Number of required inputs, which come first.
    """

    names: tuple[str, ...]
    required: int


@dataclass(frozen=True, kw_only=True)
class LoaderBatches:
    """The batches of a loader.

    Attributes:
        loader: Yields the same batches, in the same order, each time it is iterated over.
        signature: The inputs of the network.
        where: Name of the argument that is the loader, for messages.
        num_samples: Number of samples to yield; the rest of the loader is not used.
        key: Empty: it is not known what a loader depends on, so no results are reused.
    """

    loader: Iterable[object]
    signature: Signature
    where: str
    num_samples: int
    key: str = ""

    def __iter__(self) -> Iterator[Batch]:
        left = self.num_samples
        for item in self.loader:
            inputs, targets = split(item, self.signature, self.where)
            count = batch_size(inputs)
            if count > left:  # Only calibration data is cut, and its targets are not used.
                inputs = first_samples(inputs, left)
            yield Batch(inputs, targets)
            left -= count
            if left <= 0:
                return


def open_loader(loader: Iterable[object], signature: Signature, where: str, *, labelled: bool) -> LoaderBatches:
    """Check a loader and count its samples.

    Args:
        loader: The loader.
        signature: The inputs of the network.
        where: Name of the argument, for messages.
        labelled: Whether its batches must have targets.

    Raises:
        SpecError: If it is empty, can be iterated over only once, or yields other batches the second time.
        TaoqError: If a batch lacks an input of the network.
    """
    if iter(loader) is loader:
        what = f"a {type(loader).__name__} can be iterated over only once, and it is needed more often"
        raise SpecError(Fault(where, what, "give a DataLoader or a list of batches"))
    items = [next(iter(loader), None) for _ in range(2)]
    if items[0] is None or items[1] is None:
        raise SpecError(Fault(where, "the loader has no batches", "give at least one batch"))
    inputs, targets = split(items[0], signature, where)
    again, _ = split(items[1], signature, where)
    if any(not _equal(tensor, again[name]) for name, tensor in inputs.items()):
        what = "the loader gives other batches each time: what is measured on them cannot be compared or repeated"
        raise SpecError(Fault(where, what, "give a loader with shuffle=False and without random augmentation"))
    if labelled and targets is None:
        what = f"its batches have no targets: all that they have are inputs ({', '.join(inputs)})"
        raise SpecError(Fault(where, what, "let the loader yield (inputs, targets), or a dictionary with both"))
    if not labelled and targets is not None:
        what = f"of each batch, {', '.join(inputs)} is used; the rest is taken for targets and not used"
        log.info(Notice(where, what))
    return LoaderBatches(
        loader=loader, signature=signature, where=where, num_samples=_count_samples(loader, signature, where)
    )


def split(item: object, signature: Signature, where: str) -> tuple[Inputs, Targets]:
    """Split a batch into inputs and targets.

    A tensor is the network's only input. In a dictionary, keys that are names of inputs are inputs, and the others are
    targets. In a tuple or list, the first entries, one for each required input, are inputs, and the others are targets;
    or the first entry is a tuple or dictionary of all inputs. A single target is returned as it is.

    Args:
        item: What the loader yields.
        signature: The inputs of the network.
        where: Name of the argument, for messages.

    Returns:
        The inputs, and the targets; None if there are none.

    Raises:
        TaoqError: If an input is missing or is not a tensor of samples.
    """
    rest: Sequence[object] = ()
    if isinstance(item, Mapping):
        named, rest = _by_name(item, signature), [value for key, value in item.items() if key not in signature.names]
    elif isinstance(item, tuple | list):
        named, rest = _by_position(item, signature, where)
    else:
        named = {signature.names[0]: item}
    missing = [name for name in signature.names[: signature.required] if name not in named]
    if missing or not named:
        what, hint = f"a batch has no '{(missing or signature.names)[0]}', which the network takes", _YIELD
        if isinstance(item, Mapping):
            what += f": its keys are {', '.join(map(str, item))}"
            hint = f"name the inputs of the network as it does: {', '.join(signature.names)}"
        raise TaoqError(Fault(where, what, hint))
    inputs = {name: _tensor(value, name, where) for name, value in named.items()}
    if len({len(tensor) for tensor in inputs.values()}) > 1:
        sizes = ", ".join(f"{name} {len(tensor)}" for name, tensor in inputs.items())
        raise TaoqError(Fault(where, f"the inputs of a batch have different numbers of samples: {sizes}", _YIELD))
    if isinstance(item, Mapping) and len(rest) > 1:
        return inputs, _on_the_cpu({key: value for key, value in item.items() if key not in inputs})
    return inputs, None if not rest else _on_the_cpu(rest[0] if len(rest) == 1 else tuple(rest))


def _by_name(item: Mapping[str, object], signature: Signature) -> dict[str, object]:
    return {name: item[name] for name in signature.names if name in item}


def _by_position(
    item: Sequence[object], signature: Signature, where: str
) -> tuple[dict[str, object], Sequence[object]]:
    """Return the inputs of a tuple or list by name, and the other entries."""
    first = item[0] if item else None
    entries: Sequence[object]
    if isinstance(first, Mapping):
        return _by_name(first, signature), item[1:]
    if isinstance(first, tuple | list):
        entries, rest = first, item[1:]
    else:
        count = max(signature.required, 1)
        entries, rest = item[:count], item[count:]
    if len(entries) > len(signature.names):
        what = f"the first entry of a batch has {len(entries)} tensors, the network takes {len(signature.names)}"
        raise TaoqError(Fault(where, what, _YIELD))
    return dict(zip(signature.names, entries, strict=False)), rest


def _tensor(value: object, name: str, where: str) -> Tensor:
    """Return an input as a tensor on the CPU; floating-point inputs as float32, the type of the networks."""
    value = _on_the_cpu(value)
    if not isinstance(value, Tensor) or not value.ndim or not len(value):
        kind = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TaoqError(Fault(where, f"'{name}' of a batch is {kind}, not a tensor of samples", _YIELD))
    return value.float() if value.is_floating_point() else value


def _on_the_cpu(value: Targets) -> Targets:
    """Return a copy of a value with arrays as tensors, and all tensors on the CPU, like the outputs of the models."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(value)
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: _on_the_cpu(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_on_the_cpu, value))
    return value


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.equal(first.nan_to_num(), second.nan_to_num())


def _count_samples(loader: Iterable[object], signature: Signature, where: str) -> int:
    """Count the samples, without reading them if the loader knows their number."""
    if isinstance(loader, DataLoader) and loader.batch_size is not None and loader.collate_fn is default_collate:
        try:
            count = len(loader.sampler)  # type: ignore[arg-type]
        except TypeError:  # An iterable data set has no length.
            pass
        else:
            return count - count % loader.batch_size if loader.drop_last else count
    return sum(batch_size(split(item, signature, where)[0]) for item in loader)
