# SPDX-License-Identifier: Apache-2.0
"""Load a float checkpoint into a classifier: one with the names of the library, or one of TAO with TAO's names."""

from __future__ import annotations

import logging

from torch import nn

from taoq.checkpoint import load_prefixed, load_state, read_names, read_state_dict
from taoq.errors import Fault, Notice, SpecError, abbreviated
from taoq.tasks.backbones.tao_keys import LAYOUTS, from_tao, tao_prefix, unused_in_classifier
from taoq.tasks.backbones.tao_names import TaoNetwork
from taoq.tasks.classification.names import Source

log = logging.getLogger(__name__)

_FIT_HINT = "check model.backbone.type, model.backbone.args and dataset.num_classes"


def is_of_tao(network: TaoNetwork, checkpoint: str, key: str) -> bool:
    """Return whether a file has TAO's names of the tensors of a network, where the library has other names.

    Raises:
        TaoqError: If the file cannot be read.
    """
    return network.family in LAYOUTS and tao_prefix(network.family, read_names(checkpoint, key)) is not None


def load_weights(model: nn.Module, source: Source, checkpoint: str, key: str) -> None:
    """Load every tensor of a network from a file.

    Args:
        model: The network.
        source: Where it comes from.
        checkpoint: The file.
        key: Value of model.checkpoint_key.

    Raises:
        SpecError: If the spec names one of two networks of a name, and the file has the other.
        TaoqError: If the file is missing or damaged, holds code or no tensors, or does not fit the network.
    """
    state = read_state_dict(checkpoint, key)
    network = source.tao
    prefix = tao_prefix(network.family, state) if network and network.family in LAYOUTS else None
    if network and network.two_variants and source.as_tao != (prefix is not None):
        given, has = ("tao", "timm's") if source.as_tao else ("library", "TAO's")
        what = f"is {given}, but {checkpoint} has {has} names of the tensors of {network.name}"
        raise SpecError(Fault("model.backbone.variant", what, "leave it out: it is seen from the checkpoint"))
    if network is None or prefix is None:
        load_prefixed(model, state, checkpoint, _FIT_HINT)
        return
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    load_state(model, from_tao(network.family, own, model), checkpoint, _FIT_HINT)
    if network.family == "efficientvit_large":
        what = (
            f"TAO 7 itself cannot run the classifier of {network.name}, which gets a map; here it gets the map's mean"
        )
        log.warning(Notice(checkpoint, what))
    unused = [*(key for key in state if not key.startswith(prefix)), *unused_in_classifier(network.family, own)]
    if unused:
        what = f"{len(unused)} tensors are not needed for classification: {abbreviated(sorted(unused))}"
        log.info(Notice(checkpoint, what))
