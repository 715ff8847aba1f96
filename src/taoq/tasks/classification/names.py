# SPDX-License-Identifier: Apache-2.0
"""Find the network that a spec names: one of TAO, timm or torchvision."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from taoq.errors import Fault, SpecError, did_you_mean
from taoq.tasks.backbones.tao_names import TAO_NETWORKS, TaoNetwork
from taoq.tasks.classification.spec import BackboneSpec

_TYPE = "model.backbone.type"
_SHORT_NAMES = (
    (r"resnet_(\d+d?)", r"resnet\1"),
    (r"vit_(tiny|small|base|large|huge|giant)_patch(\d+)", r"vit_\1_patch\2_224"),
    (r"gc_vit_(\w+)", r"gcvit_\1"),
    (r"hiera_(tiny|small|base|base_plus|large|huge)", r"hiera_\1_224"),
)
"""Patterns of names in the style of TAO, with the timm name. They hold for more networks than TAO has."""


@dataclass(frozen=True)
class Source:
    """Where a network comes from.

    Attributes:
        library: timm, torchvision or taoq.
        name: Its name there.
        tao: The network of TAO that the spec names; None for any other.
        as_tao: Whether it is built as TAO has it, where that differs from the network of the same name in timm.
    """

    library: str
    name: str
    tao: TaoNetwork | None = None
    as_tao: bool = False


def find_network(backbone: BackboneSpec) -> Source:
    """Find the library of a network, and its name there.

    Raises:
        SpecError: If no library has it.
    """
    type_ = backbone.type
    if not type_:
        raise SpecError(Fault(_TYPE, "missing: which network is it?", "write a name, for example resnet_50"))
    network = TAO_NETWORKS.get(type_)
    if network is not None:
        return _tao_source(network, backbone)
    if backbone.variant == "tao":
        what = f"is tao, but TAO has no network '{type_}'"
        raise SpecError(Fault("model.backbone.variant", what, "leave it out: it is seen from the checkpoint"))
    prefix, _, name = type_.rpartition("/")
    candidates = [name]
    for pattern, replacement in _SHORT_NAMES:
        if re.fullmatch(pattern, name):
            candidates.append(re.sub(pattern, replacement, name))
    networks = _library_names()
    if prefix and prefix not in networks:
        raise SpecError(Fault(_TYPE, f"unknown library '{prefix}'", "write timm/NAME or torchvision/NAME"))
    for library in [prefix] if prefix else networks:
        for candidate in candidates:
            # A timm name may end in a tag of pretrained weights: resnet50.a1_in1k.
            if candidate.partition(".")[0] in networks[library]:
                return Source(library, candidate)
    raise SpecError(_unknown(type_, name, [prefix] if prefix else ["tao", *networks]))


def _tao_source(network: TaoNetwork, backbone: BackboneSpec) -> Source:
    if network.refused:
        raise SpecError(_refused(network.name, network))
    if network.two_variants:
        return Source("timm", network.base, network, as_tao=backbone.variant == "tao")
    if backbone.variant == "library" and not network.same_in_timm:
        what = f"is library, but no library has the network '{network.name}'"
        raise SpecError(Fault("model.backbone.variant", what, "leave it out: it is seen from the checkpoint"))
    return Source(network.library, network.base or network.name, network, as_tao=not network.same_in_timm)


def _library_names() -> Mapping[str, Sequence[str]]:
    import timm
    import torchvision

    return {"timm": timm.list_models(), "torchvision": torchvision.models.list_models(torchvision.models)}


def _refused(name: str, network: TaoNetwork) -> Fault:
    return Fault(
        _TYPE, f"'{name}' cannot be built: {network.refused}", f"the nearest that works is '{network.nearest}'"
    )


def _unknown(type_: str, name: str, sources: Iterable[str]) -> Fault:
    """Return the fault of a name that no library has, with near names of networks of the same family."""
    names = {"tao": list(TAO_NETWORKS), **_library_names()}
    near = _relatives(name, [name for source in sources for name in names[source]])
    refused = [TAO_NETWORKS[name] for name in near if name in TAO_NETWORKS and TAO_NETWORKS[name].refused]
    if refused and len(refused) == len(near):
        return _refused(name, refused[0])
    works = [name for name in near if name not in TAO_NETWORKS or not TAO_NETWORKS[name].refused]
    otherwise = "any timm or torchvision name works, and those of TAO in docs/tao-backbones.md"
    return Fault(_TYPE, f"no library has a network '{type_}'", did_you_mean(name, _one_family(name, works), otherwise))


def _first_word(name: str) -> str:
    """Return the letters that a name begins with: `vit` of vit_base_patch16, `resnet` of resnet50."""
    match = re.match(r"[a-z]*", name.lower())
    return match[0] if match else ""


def _relatives(name: str, names: Iterable[str]) -> list[str]:
    """Return the names that begin with the same word. A misspelt word stands for the nearest one."""
    by_word: dict[str, list[str]] = {}
    for candidate in dict.fromkeys(names):
        by_word.setdefault(_first_word(candidate), []).append(candidate)
    word = _first_word(name)
    words = [word] if word in by_word else difflib.get_close_matches(word, by_word, n=1, cutoff=0.8)
    return by_word[words[0]] if words else []


def _one_family(name: str, names: Sequence[str]) -> Sequence[str]:
    """Return the names of networks that are in the same file of timm as the one nearest to `name`.

    Different networks can begin with the same word: efficientvit_b0 and efficientvit_m0 do.
    """
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0)
    return [candidate for candidate in names if _file(candidate) == _file(nearest[0])] if nearest else names


def _file(name: str) -> str:
    """Return the module of timm that has a network; an empty string if timm does not have it."""
    import timm

    network = TAO_NETWORKS.get(name)
    entry = network.base if network else name
    return str(timm.model_entrypoint(entry).__module__) if timm.is_model(entry) else ""
