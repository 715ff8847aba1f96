# SPDX-License-Identifier: Apache-2.0
"""How published networks are fed: what timm, torchvision and the folders of Hugging Face say about it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from taoq.errors import Fault, Notice, SpecError, did_you_mean
from taoq.spec.fields import default_value
from taoq.tasks.classification.data import preprocessing
from taoq.tasks.classification.names import Source, find_network
from taoq.tasks.classification.processor_fields import fields_of_processor
from taoq.tasks.classification.spec import AugmentationSpec, ClassificationSpec
from taoq.tasks.image_processor import processor_folder
from taoq.tasks.published import IsWritten, fill_in, warn_of

log = logging.getLogger(__name__)

_AUGMENTATION = "dataset.augmentation"
_PREPROCESSING = f"{_AUGMENTATION}.preprocessing"
_DEFAULTS = {
    entry.name: default_value(entry) for entry in dataclasses.fields(AugmentationSpec) if entry.name != "preprocessing"
}


@dataclass(frozen=True)
class Published:
    """How a published network is fed.

    Attributes:
        name: The network and its weights.
        size: Width and height of its input, pixels.
        fields: Fields of `dataset.augmentation`; those that are not in it have their defaults.
    """

    name: str
    size: int
    fields: Mapping[str, Any]

    def fields_at(self, size: int) -> dict[str, Any]:
        """Return all fields of `dataset.augmentation` for another size of the input, of which the same part is cut."""
        fields = {**_DEFAULTS, **self.fields}
        if size != self.size and fields["resize_to"]:
            fields |= {"resize_to": None, "crop_fraction": self.size / fields["resize_to"]}
        return fields


def with_published(spec: ClassificationSpec, is_written: IsWritten) -> ClassificationSpec:
    """Return the spec with the preprocessing of the published network in the fields that the user did not write.

    Logs what was taken, and warns of fields that differ from the published network's.

    Args:
        spec: The spec.
        is_written: Whether the user wrote a field.

    Raises:
        SpecError: If dataset.augmentation.preprocessing names a network that its library does not have.
        TaoqError: If the files of Hugging Face are missing or cannot be read.
    """
    chosen = spec.dataset.augmentation.preprocessing
    if not chosen:
        _compare_normalization(spec)
        return spec
    library, _, weights = chosen.partition("/")
    published = _READERS[library](spec, weights)
    dataset, of_size = fill_in(spec.dataset, "dataset", {"img_size": published.size}, is_written)
    fields = published.fields_at(dataset.img_size)
    # Both say what images are resized to.
    for name, other in (("resize_to", "crop_fraction"), ("crop_fraction", "resize_to")):
        if is_written(f"{_AUGMENTATION}.{name}"):
            fields[other] = getattr(dataset.augmentation, other)
    augmentation, others = fill_in(dataset.augmentation, _AUGMENTATION, fields, is_written)
    transform = preprocessing(augmentation, dataset.img_size)
    log.info(Notice(_PREPROCESSING, f"{library}: {published.name}: {transform}"))
    warn_of([*of_size, *others], published.name)
    return dataclasses.replace(spec, dataset=dataclasses.replace(dataset, augmentation=augmentation))


def _compare_normalization(spec: ClassificationSpec) -> None:
    """Warn if mean and std are not those of the published network of this name."""
    if not spec.model.backbone.type or spec.model.backbone.args:  # Arguments make it another network.
        return
    with contextlib.suppress(SpecError):  # A name that no library has is refused where the network is built.
        source = find_network(spec.model.backbone)
        published = _TRAINED[source.library](source) if source.library in _TRAINED else None
        if published is None:
            return
        for name in ("mean", "std"):
            value, theirs = getattr(spec.dataset.augmentation, name), published.fields[name]
            if value != theirs:
                what = (
                    f"is {value}, but {theirs} in {source.library}'s {published.name}: right only if it was trained so"
                )
                log.warning(Notice(f"{_AUGMENTATION}.{name}", what))


def _timm(spec: ClassificationSpec, weights: str) -> Published:
    """Return what timm says about the network of a spec, or about other weights."""
    import timm

    source = find_network(spec.model.backbone)
    name = source.name
    if weights:
        name = weights if timm.is_model(weights.partition(".")[0]) else f"{name.partition('.')[0]}.{weights}"
    if not timm.is_model(name.partition(".")[0]):
        raise SpecError(_unknown("timm", name))
    try:
        published = _of_timm(name)
    except RuntimeError:  # timm has the network, but not these weights.
        tags = [tag.partition(".")[2] for tag in timm.list_pretrained(name.partition(".")[0])]
        what = f"timm has no weights {name}"
        hint = did_you_mean(name.partition(".")[2], tags, "one of " + ", ".join(tags))
        raise SpecError(Fault(_PREPROCESSING, what, hint)) from None
    if published is None:
        raise SpecError(_unknown("timm", name))
    return published


def _of_timm(name: str) -> Published | None:
    """Return what timm says about a network; None if it has no weights of it, or if they are for other inputs.

    The transform that it describes is that of timm.data.create_transform(..., is_training=False).

    Raises:
        RuntimeError: If the name has a tag of weights that timm does not have.
    """
    import timm
    from timm.data import resolve_data_config

    config = timm.get_pretrained_cfg(name)
    if config is None:
        return None
    data = resolve_data_config(pretrained_cfg=config.to_dict())
    channels, height, width = data["input_size"]
    if channels != 3 or height != width:
        return None
    fields = {
        "resize": {"center": "shorter_side", "squash": "squash", "border": "fit_and_pad"}[data["crop_mode"]],
        "crop_fraction": float(data["crop_pct"]),
        "interpolation": data["interpolation"],
        "mean": [float(value) for value in data["mean"]],
        "std": [float(value) for value in data["std"]],
    }
    if data["crop_mode"] == "border":
        fields["pad_color"] = [round(255 * value) for value in data["mean"]]
    tag = f".{config.tag}" if config.tag and "." not in name else ""
    return Published(f"{name}{tag}", height, fields)


def _torchvision(spec: ClassificationSpec, weights: str) -> Published:
    """Return what torchvision says about the network of a spec, with its newest or other weights."""
    from torchvision import models

    source = find_network(spec.model.backbone)
    if source.name not in models.list_models(models):
        raise SpecError(_unknown("torchvision", source.name))
    names = [entry.name for entry in models.get_model_weights(source.name)]
    if weights and weights not in names:
        what = f"torchvision has no weights {weights} of {source.name}"
        raise SpecError(Fault(_PREPROCESSING, what, did_you_mean(weights, names, "one of " + ", ".join(names))))
    return _of_torchvision(source.name, weights)


def _of_torchvision(name: str, weights: str = "") -> Published:
    """Return what torchvision says about a network: torchvision.transforms._presets.ImageClassification."""
    from torchvision import models

    entries = models.get_model_weights(name)
    entry = entries[weights] if weights else entries.DEFAULT
    transform = entry.transforms()
    fields = {
        "resize": "shorter_side",
        "resize_to": transform.resize_size[0],
        "interpolation": transform.interpolation.value,
        "antialias": bool(transform.antialias),
        "mean": list(transform.mean),
        "std": list(transform.std),
    }
    return Published(f"{name} {entry.name}", transform.crop_size[0], fields)


def _huggingface(spec: ClassificationSpec, folder: str) -> Published:
    """Return what preprocessor_config.json says, in a folder or in that of the checkpoint."""
    folder = processor_folder(spec, folder, _PREPROCESSING)
    size, fields = fields_of_processor(folder, _PREPROCESSING)
    return Published(folder, size, fields)


def _unknown(library: str, name: str) -> Fault:
    what = f"{library} does not say how {name} is fed"
    return Fault(_PREPROCESSING, what, "name other weights, or write the fields of dataset.augmentation")


def _timm_or_none(source: Source) -> Published | None:
    try:
        return _of_timm(source.name)
    except RuntimeError:
        return None


_READERS: Mapping[str, Callable[[ClassificationSpec, str], Published]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "huggingface": _huggingface,
}
_TRAINED: Mapping[str, Callable[[Source], Published | None]] = {
    "timm": _timm_or_none,
    "torchvision": lambda source: _of_torchvision(source.name),
}
