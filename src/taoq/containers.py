# SPDX-License-Identifier: Apache-2.0
"""Find the state dict in what a training script saved."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from taoq.errors import Fault, Notice, TaoqError, abbreviated, did_you_mean

log = logging.getLogger(__name__)

CHECKPOINT_KEY = "model.checkpoint_key"
_KNOWN = ("module", "state_dict", "model_state_dict", "model")
"""Keys under which training frameworks store the state dict, besides averaged ones; the preferred ones first."""
_AVERAGED = re.compile(r"(^|[._])(ema|averaged?|swa|teacher)([._]|$)")
"""Matches keys of averaged weights. In self-distillation (DINO), the teacher is the average of the student."""
_OF_TRAINING = re.compile(r"optim|sched|scaler|amp|rng|callback|loops|hyper_parameters|args|config|criterion|loss")
"""Matches keys of what training needs besides the network."""
_DEPTH = 4
"""Containers in containers that are looked into: `ema.module` of RT-DETR's authors is 2 deep."""


@dataclass(frozen=True)
class Container:
    """A mapping with tensors.

    Attributes:
        key: The keys that lead to it, joined with dots; empty for the outermost mapping.
        tensors: Its tensors by name.
    """

    key: str
    tensors: Mapping[str, Tensor]

    @property
    def averaged(self) -> bool:
        """Whether it has averaged weights, by its name."""
        return bool(_AVERAGED.search(self.key))

    def __str__(self) -> str:
        return f"'{self.key}'" if self.key else "the outermost dictionary"


def state_dict_in(data: object, key: str, checkpoint: str, *, silent: bool) -> dict[str, Tensor]:
    """Return the state dict in the result of torch.load.

    Of several, averaged weights go first, then those under a key that frameworks use, then the largest.

    Args:
        data: The result.
        key: Keys that lead to the state dict, joined with dots; empty to look for it.
        checkpoint: The file, for messages.
        silent: Do not log which one was taken.

    Returns:
        The tensors by name; empty if there are none.

    Raises:
        TaoqError: If `key` leads to no tensors.
    """
    found = list(_containers(data, "", _DEPTH, set()))
    if key:
        return _chosen(found, key, checkpoint)
    candidates = [item for item in found if not _OF_TRAINING.search(item.key)]
    largest = max((len(item.tensors) for item in candidates), default=0)
    # Not the few tensors beside a state dict, such as the mean of a data set.
    whole = [item for item in candidates if 2 * len(item.tensors) >= largest]
    if not whole:
        return {}
    taken = max(whole, key=_rank)
    others = [item for item in whole if item is not taken]
    if not silent:
        _say(taken, others, data, checkpoint)
    return dict(taken.tensors)


def keys_of(data: object) -> str:
    """Return the outermost keys of the result of torch.load, for a message."""
    return abbreviated([str(key) for key in data]) if isinstance(data, Mapping) and data else ""


def _containers(data: object, key: str, depth: int, seen: set[int]) -> Iterator[Container]:
    """Yield the mappings with tensors, outer ones first; each once, because it can be in many places, or in itself."""
    if not isinstance(data, Mapping) or id(data) in seen:
        return
    seen.add(id(data))
    tensors = {str(name): value for name, value in data.items() if isinstance(value, Tensor)}
    if tensors:
        yield Container(key, tensors)
    if depth:
        for name, value in data.items():
            yield from _containers(value, f"{key}.{name}" if key else str(name), depth - 1, seen)


def _rank(item: Container) -> tuple[bool, int, int]:
    name = item.key.rpartition(".")[2]
    known = len(_KNOWN) - _KNOWN.index(name) if name in _KNOWN else 0
    return item.averaged, known, len(item.tensors)


def _chosen(found: Sequence[Container], key: str, checkpoint: str) -> dict[str, Tensor]:
    for item in found:
        if item.key == key:
            return dict(item.tensors)
    inner = [item for item in found if item.key.startswith(f"{key}.")]
    if inner:
        return dict(max(inner, key=_rank).tensors)
    names = [item.key for item in found if item.key]
    hint = did_you_mean(key, names, "it has tensors under " + abbreviated(names) if names else "leave it out")
    raise TaoqError(Fault(CHECKPOINT_KEY, f"{checkpoint} has no tensors under '{key}'", hint))


def _say(taken: Container, others: Sequence[Container], data: object, checkpoint: str) -> None:
    """Log which of several state dicts was taken, or that one has an unusual name."""
    if isinstance(data, Mapping) and isinstance(data.get("ema"), Mapping) and not taken.averaged:
        what = "its averaged weights (ema) are a list without names, or empty: the others are taken"
        log.info(Notice(checkpoint, what))
    if others:
        kind = "the averaged weights in " if taken.averaged else ""
        what = f"{kind}{taken} are taken, not {', '.join(map(str, others))}; {CHECKPOINT_KEY} chooses"
        log.info(Notice(checkpoint, what))
    elif taken.key and not taken.averaged and taken.key.rpartition(".")[2] not in _KNOWN:
        log.info(Notice(checkpoint, f"the tensors in {taken} are taken"))
