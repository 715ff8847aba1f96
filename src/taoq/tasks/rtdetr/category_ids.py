# SPDX-License-Identifier: Apache-2.0
"""Which category each output of the network is: what the spec says, or the only reading that the annotations allow."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from taoq.errors import Fault, Notice, SpecError, TaoqError, abbreviated
from taoq.plain import Plain
from taoq.tasks.rtdetr.coco_file import Id
from taoq.tasks.rtdetr.labels import Labels, checkpoint_labels, classmap_labels, original_checkpoint
from taoq.tasks.rtdetr.spec import RtdetrSpec

log = logging.getLogger(__name__)

OutputIds = tuple[Id | None, ...]
"""Category id of each output of the network; None for an output that is no category."""

COCO_IDS = tuple(id_ for id_ in range(1, 91) if id_ not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83))
"""The ids of COCO's 80 categories, in the order of the outputs of a network for COCO."""

_FIELD = "dataset.category_ids"
_ORDERED, _AS_IDS = "ordered", "as_ids"
_FITS = "the only reading that fits"


@dataclass(frozen=True)
class _Reading:
    """A reading of the category ids.

    Attributes:
        name: What dataset.category_ids would say.
        why: Why it is taken.
        ids: Category id of each output.
    """

    name: str
    why: str
    ids: OutputIds

    def because(self, why: str) -> _Reading:
        """Return the same reading for another reason."""
        return dataclasses.replace(self, why=why)


@dataclass(frozen=True)
class _Categories:
    """The categories of a json.

    Attributes:
        path: The json.
        names: Name of each category, by ascending id.
        num_outputs: Number of outputs of the network.
    """

    path: Path
    names: Mapping[Id, str]
    num_outputs: int

    def __str__(self) -> str:
        ids = list(self.names)
        return f"{self.path} has {len(ids)} categories with ids up to {ids[-1]}"

    @property
    def for_coco(self) -> bool:
        """Whether they may be some of COCO's categories, in a network for COCO."""
        return self.num_outputs == len(COCO_IDS) and all(id_ in COCO_IDS for id_ in self.names)

    @property
    def ordered(self) -> _Reading | None:
        """The reading that output k is the k-th category in the order of their ids; None if there are too many."""
        missing = self.num_outputs - len(self.names)
        return None if missing < 0 else _Reading(_ORDERED, _FITS, (*self.names, *[None] * missing))

    @property
    def as_ids(self) -> _Reading | None:
        """The reading that output k is category id k; None if an id is no output."""
        if not all(isinstance(id_, int) and 0 <= id_ < self.num_outputs for id_ in self.names):
            return None
        ids = tuple(index if index in self.names else None for index in range(self.num_outputs))
        return _Reading(_AS_IDS, _FITS, ids)


def output_ids(path: Path, names: Mapping[Id, str], spec: RtdetrSpec) -> OutputIds:
    """Return the category id of each output of the network, and log which reading of the ids this is.

    Args:
        path: The COCO json, for messages.
        names: Its categories by id.
        spec: The spec.

    Raises:
        TaoqError: If there are no categories, or if they do not fit the spec or the names of a checkpoint.
        SpecError: If dataset.category_ids does not fit, or if it is needed because two readings fit.
    """
    if not names:
        raise TaoqError(Fault(str(path), "names no categories", "name a COCO json with categories"))
    categories = _Categories(path, {id_: names[id_] for id_ in sorted(names)}, spec.dataset.num_classes)
    if spec.dataset.category_ids is not None:
        reading = _said(spec, categories)
    elif spec.dataset.remap_mscoco_category:
        reading = _remapped(categories)
    else:
        reading = _only_one(categories, spec)
        _check_labels(reading.ids, categories, spec)
    _say(reading, categories)
    return reading.ids


def _said(spec: RtdetrSpec, categories: _Categories) -> _Reading:
    """Return the reading that dataset.category_ids says."""
    said: Plain = spec.dataset.category_ids
    if spec.dataset.remap_mscoco_category:
        what = "dataset.remap_mscoco_category: true says what the outputs are, too"
        raise SpecError(Fault(_FIELD, what, "write one of the two"))
    why = "as the spec says"
    if isinstance(said, list):
        return _Reading("list", why, _listed(said, categories))
    if reading := categories.as_ids if said == _AS_IDS else categories.ordered:
        return reading.because(why)
    what = f"{said} does not fit: {categories}, dataset.num_classes is {categories.num_outputs}"
    raise SpecError(Fault(_FIELD, what, "correct dataset.num_classes, or list the category id of each output"))


def _listed(said: Sequence[int | None], categories: _Categories) -> OutputIds:
    """Return the category ids of a list in the spec, where -1 means the same as null."""
    ids = tuple(None if id_ == -1 else id_ for id_ in said)
    used = [id_ for id_ in ids if id_ is not None]
    repeated = next((id_ for id_ in used if used.count(id_) > 1), None)
    what = ""
    if len(ids) != categories.num_outputs:
        what = f"has {len(ids)} entries, dataset.num_classes is {categories.num_outputs}"
    elif repeated is not None:
        what = f"has {repeated} twice"
    elif categories.names.keys().isdisjoint(used):
        what = f"has no category id of {categories.path}: {_some(categories.names)}"
    if what:
        raise SpecError(Fault(_FIELD, what, "list the category id of each output, null for an output that is none"))
    return ids


def _remapped(categories: _Categories) -> _Reading:
    """Return the reading of a network for COCO, as in TAO: its outputs are COCO's categories, whatever the json has."""
    why = "because of dataset.remap_mscoco_category: true"
    if categories.num_outputs >= len(COCO_IDS):
        others = [id_ for id_ in categories.names if id_ not in COCO_IDS]
        if others:
            what = f"is true, but {categories.path} has categories with other ids than COCO's: {_some(others)}"
            raise TaoqError(Fault("dataset.remap_mscoco_category", what, "leave it out"))
        return _Reading(_ORDERED, why, (*COCO_IDS, *[None] * (categories.num_outputs - len(COCO_IDS))))
    if len(categories.names) == categories.num_outputs:
        return _Reading(_ORDERED, why, tuple(categories.names))
    hint = f"write {len(categories.names)}, or dataset.remap_mscoco_category: false if the outputs are category ids"
    raise TaoqError(Fault("dataset.num_classes", f"is {categories.num_outputs}; {categories}", hint))


def _only_one(categories: _Categories, spec: RtdetrSpec) -> _Reading:
    """Return the only reading that fits the json and all that the spec and its files say about the outputs."""
    ordered, as_ids = categories.ordered, categories.as_ids
    if ordered and len(categories.names) == categories.num_outputs:
        return ordered if as_ids is None else ordered.because("which is the same as as_ids here")
    if as_ids is None or ordered is None:
        raise TaoqError(_does_not_fit(categories))
    # There are fewer categories than outputs, and each id is an output. Either the outputs are ids, as in TAO, or the
    # json lacks some of the categories that the network was trained with, and these were numbered from 1.
    if 0 in categories.names:
        return as_ids.because("because the ids start at 0")
    if tuple(categories.names) == COCO_IDS:
        return as_ids
    if spec.dataset.remap_mscoco_category is False:
        return as_ids.because("because of dataset.remap_mscoco_category: false")
    for labels in filter(None, (checkpoint_labels(spec), classmap_labels(spec))):
        fitting = [item for item in (ordered, as_ids) if _compare(labels, item.ids, categories) == (True, None)]
        if len(fitting) == 1:
            return fitting[0].because(f"by the names in {labels.where}")
    if not categories.for_coco and (checkpoint := original_checkpoint(spec)):
        return as_ids.because(f"as in TAO and the original code, which made {checkpoint}")
    raise SpecError(_ambiguous(categories))


def _does_not_fit(categories: _Categories) -> Fault:
    """Return the fault of categories that do not fit the number of outputs in any way."""
    ids = list(categories.names)
    hint = f"write {len(ids)}"
    if all(isinstance(id_, int) and id_ >= 0 for id_ in ids):
        hint += f", or {int(ids[-1]) + 1} if the network was trained with TAO's largest id + 1"
    if categories.for_coco:
        hint = "write dataset.remap_mscoco_category: true if the outputs are COCO's 80 categories"
    hint += f"; or list the category id of each output in {_FIELD}"
    return Fault("dataset.num_classes", f"is {categories.num_outputs}; {categories}", hint)


def _ambiguous(categories: _Categories) -> Fault:
    """Return the fault of categories that allow two readings."""
    ids = list(categories.names)
    first, last, name = ids[0], ids[-1], next(iter(categories.names.values()))
    what = (
        f"missing, and needed: the {len(ids)} categories of {categories.path}, with ids from {first} to {last}, can be"
        f" two things in {categories.num_outputs} outputs"
    )
    hint = (
        f"write as_ids if output {first} is '{name}' (as in TAO), ordered if output 0 is '{name}', or a list of all ids"
    )
    if categories.for_coco:
        hint += "; or dataset.remap_mscoco_category: true if the outputs are COCO's 80 categories"
    return Fault(_FIELD, what, hint)


def _compare(labels: Labels, ids: OutputIds, categories: _Categories) -> tuple[bool, int | None]:
    """Compare the names of outputs with those of their categories.

    Returns:
        Whether any of them agree, and the first output whose category has the name of another output.
    """
    numbers = {_plain(name): index for index, name in enumerate(labels.names)}
    by_output = [
        (index, numbers.get(_plain(categories.names[id_])))
        for index, id_ in enumerate(ids)
        if id_ is not None and id_ in categories.names
    ]
    wrong = [index for index, other in by_output if other is not None and other != index]
    return any(index == other for index, other in by_output), wrong[0] if wrong else None


def _check_labels(ids: OutputIds, categories: _Categories, spec: RtdetrSpec) -> None:
    """Raise TaoqError if a checkpoint has the names of the categories, but in another order."""
    labels = checkpoint_labels(spec)
    wrong = _compare(labels, ids, categories)[1] if labels else None
    if labels is None or wrong is None:
        return
    by_name = {_plain(name): id_ for id_, name in categories.names.items()}
    listed = json.dumps([by_name.get(_plain(name)) for name in labels.names])
    name = next(name for id_, name in categories.names.items() if id_ == ids[wrong])
    what = f"missing, and needed: output {wrong} is '{labels.names[wrong]}' in {labels.where}"
    what += f", but '{name}' by the ids of {categories.path}"
    raise SpecError(Fault(_FIELD, what, f"write {listed} for the names in {Path(labels.where).name}, or ordered"))


def _say(reading: _Reading, categories: _Categories) -> None:
    """Log what the outputs are."""
    names = categories.names
    used = [(index, id_) for index, id_ in enumerate(reading.ids) if id_ in names]
    places = [f"output {index} is '{names[id_]}' (id {id_})" for index, id_ in (used[0], used[-1]) if id_ is not None]
    what = f"{reading.name}, {reading.why}: {' and '.join(dict.fromkeys(places))}"
    if rest := len(reading.ids) - len(used):
        what += f"; {rest} of {len(reading.ids)} outputs are no category of {categories.path}"
        if reading.name == _ORDERED and reading.ids[-1] is None:
            what += ": it must lack those with the largest ids"
    log.info(Notice(_FIELD, what))
    without = [name for id_, name in names.items() if id_ not in reading.ids]
    if without:
        what = f"{len(without)} categories of {categories.path} are no output, and are not evaluated: {_some(without)}"
        log.warning(Notice(_FIELD, what))


def _plain(name: str) -> str:
    return name.strip().casefold()


def _some(values: Sequence[object] | Mapping[Id, str]) -> str:
    return abbreviated([str(value) for value in values])
