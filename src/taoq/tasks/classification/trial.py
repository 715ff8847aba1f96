# SPDX-License-Identifier: Apache-2.0
"""Run a classifier once as soon as it is built, so that a size of images that it does not take is refused there."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from taoq.checkpoint import WithoutInitialisation
from taoq.errors import Fault, SpecError, first_line
from taoq.plain import JsonObject
from taoq.tasks.classification.names import Source

_SIZE = "img_size"
"""The argument by which networks of timm are built for a size of images."""
_FAILURES = (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError, ZeroDivisionError)
"""What networks raise for images of a size that they do not take; most of them do not check it."""

Build = Callable[[JsonObject], nn.Module]
"""Builds the network with these arguments in addition to those of the spec."""


def run_once(model: nn.Module, size: int, where: str, source: Source, build: Build) -> None:
    """Run a network on one black image.

    The run also fills what a network computes at its first image and keeps.

    Args:
        model: The network; it stays in its mode.
        size: Width and height of the image, pixels.
        where: The field that sets the size.
        source: Where the network comes from.
        build: Builds the network anew, to find out with which size it runs.

    Raises:
        SpecError: If the network does not run on it.
    """
    error = _failure(model, size)
    if error is None:
        return
    name = source.tao.name if source.tao else source.name
    taken = _size_of(model, source)
    if taken in (None, size) or _failure(model, taken or size) is not None:
        what = f"is {size}, but {name} does not run on images of this size: {first_line(error)}"
        raise SpecError(Fault(where, what, "write another size, or see model.backbone.args"))
    what = f"is {size}, but {name} does not run on it: {first_line(error)}"
    if getattr(model, "default_cfg", {}).get("fixed_input_size") or "match model" in str(error):
        what = f"is {size}, but {name} takes images of {taken} pixels"
    hint = f"write {taken}"
    if source.library == "timm" and _runs_with(build, size):
        hint += f"; for a checkpoint of a network for {size} pixels, write model.backbone.args: {{{_SIZE}: {size}}}"
    raise SpecError(Fault(where, what, hint))


def _failure(model: nn.Module, size: int) -> Exception | None:
    """Return what a network raises for an image of a size; None if it runs."""
    training = model.training
    model.eval()
    parameter = next(model.parameters(), None)
    device = None if parameter is None else parameter.device
    try:
        with torch.no_grad():  # Not inference_mode: what the network keeps must be usable outside of it.
            model(torch.zeros(1, 3, size, size, device=device))
    except _FAILURES as error:
        return error
    finally:
        model.train(training)
    return None


def _size_of(model: nn.Module, source: Source) -> int | None:
    """Return the width of the images that a network was made for, pixels; None if nothing says it."""
    for holder in (getattr(model, "patch_embed", None), model):
        made_for = getattr(holder, _SIZE, None)
        if isinstance(made_for, tuple | list) and made_for and isinstance(made_for[-1], int):
            return made_for[-1]
    if isinstance(image_size := getattr(model, "image_size", None), int):  # torchvision's vit
        return image_size
    if source.library == "torchvision":
        return _crop_of_torchvision(source.name)
    input_size = getattr(model, "default_cfg", {}).get("input_size")
    return int(input_size[-1]) if input_size else None


def _crop_of_torchvision(name: str) -> int | None:
    from torchvision.models import get_model_weights

    for weights in get_model_weights(name):
        crop = getattr(weights.transforms(), "crop_size", None)
        if crop:
            return int(crop[0])
    return None


def _runs_with(build: Build, size: int) -> bool:
    """Return whether the network, built for a size of images, runs on them."""
    try:
        with WithoutInitialisation():
            return _failure(build({_SIZE: size}), size) is None
    except (*_FAILURES, SpecError):
        return False
