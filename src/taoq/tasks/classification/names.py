# SPDX-License-Identifier: Apache-2.0
"""Find the network that a spec names: one of TAO, timm or torchvision."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from taoq.errors import Fault, SpecError, did_you_mean_any
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


_OWN_SIZE = ("vit", "hiera", "gcvit")
"""Families that TAO builds for the size of images in their name, whatever the spec says."""


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


def check_size(backbone: BackboneSpec, size: int, where: str) -> None:
    """Refuse a size of images that a network of TAO does not take.

    Args:
        backbone: The network.
        size: Width and height of the input, pixels.
        where: The field that sets the size.

    Raises:
        SpecError: If the network does not take it.
    """
    network = TAO_NETWORKS.get(backbone.type)
    if network is None or backbone.args.keys() & {"img_size", "patch_size", "dynamic_img_size"}:
        return
    if network.family in _OWN_SIZE and size != network.size:
        what = f"is {size}, but {network.name} takes images of {network.size} pixels"
        raise SpecError(Fault(where, what, f"write {network.size}, which TAO uses too"))
    if network.family == "radio" and size % 16:
        what = f"is {size}, but {network.name} takes multiples of 16 pixels"
        raise SpecError(Fault(where, what, f"write {max(16, round(size / 16) * 16)}"))


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
    what = f"taoq does not build {name}: {network.refused}"
    return Fault(_TYPE, what, f"the nearest one that it builds is {network.nearest}")


def _unknown(type_: str, name: str, sources: Iterable[str]) -> Fault:
    """Return the fault of a name that no library has, with near names of networks of the same family."""
    names = {"tao": list(TAO_NETWORKS), **_library_names()}
    near = _nearest(name, [candidate for source in sources for candidate in names[source]])
    network = TAO_NETWORKS.get(near[0]) if near else None
    if network is not None and network.refused:
        return _refused(type_, network)
    otherwise = "any timm or torchvision name works, and those of TAO in docs/tao-backbones.md"
    return Fault(_TYPE, f"no library has a network '{type_}'", did_you_mean_any(near, otherwise))


def _nearest(name: str, names: Iterable[str]) -> list[str]:
    """Return up to three names of networks of the same family, those that begin like `name` as far as possible."""
    by_word: dict[str, list[str]] = {}
    for candidate in dict.fromkeys(names):
        by_word.setdefault(_first_word(candidate), []).append(candidate)
    plain = _plain(name)
    word = _first_word(plain)
    if word not in by_word:
        letters = re.sub(r"\d", "", word)
        others = [other for other in by_word if re.sub(r"\d", "", other) != letters]  # not another version of it
        corrected = difflib.get_close_matches(word, others, n=1, cutoff=0.8)
        if not corrected:
            return []
        plain, word = plain.replace(word, corrected[0], 1), corrected[0]
    scores = {other: (_common_prefix(plain, other), _alike(plain, other)) for other in by_word[word]}
    ranked = sorted(scores, key=lambda other: scores[other], reverse=True)
    best = scores[ranked[0]][0]
    same = [other for other in ranked if scores[other][0] == best and _module(other) == _module(ranked[0])]
    return same[:3]


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


def _first_word(name: str) -> str:
    """Return the word that names a family: `vit` of vit_base_patch16, `resnet` of resnet50, `gcvit` of gc_vit_tiny."""
    first, _, others = _plain(name).partition("_")
    joined = first + others if first in ("c", "gc", "faster") else first
    match = re.match(r"[a-z]*?v\d+(?![a-z\d])|[a-z]*", joined)
    return match[0] if match else ""


def _common_prefix(name: str, other: str) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(name, other, strict=False)))


def _alike(name: str, other: str) -> float:
    return difflib.SequenceMatcher(None, name, other).ratio()


def _module(name: str) -> str:
    """Return the module of timm that has a network: efficientvit_b0 and efficientvit_m0 are in two of them.

    An empty string if timm does not have it.
    """
    import timm

    network = TAO_NETWORKS.get(name)
    entry = network.base if network else name
    return str(timm.model_entrypoint(entry).__module__) if timm.is_model(entry) else ""
