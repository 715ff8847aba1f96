# SPDX-License-Identifier: Apache-2.0
"""Fill in fields of a spec with the values of a published network, where the user did not write them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from taoq.errors import Notice

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

log = logging.getLogger(__name__)

IsWritten = Callable[[str], bool]
"""Return whether the user wrote a field, in the spec or as an override."""


@dataclass(frozen=True)
class Difference:
    """A field that the user wrote with another value than that of the published network.

    Attributes:
        field: The field.
        value: What the user wrote.
        theirs: The value of the published network.
    """

    field: str
    value: object
    theirs: object


def fill_in(section: T, where: str, theirs: Mapping[str, Any], is_written: IsWritten) -> tuple[T, list[Difference]]:
    """Return a section with the values of a published network in the fields that the user did not write.

    Args:
        section: The section.
        where: Its name, `dataset.augmentation`.
        theirs: Values of the published network, by the name of the field.
        is_written: Whether the user wrote a field.

    Returns:
        The section, and the fields that the user wrote with other values.
    """
    written = [name for name in theirs if is_written(f"{where}.{name}")]
    taken = {name: value for name, value in theirs.items() if name not in written}
    differences = [
        Difference(f"{where}.{name}", getattr(section, name), theirs[name])
        for name in written
        if getattr(section, name) != theirs[name]
    ]
    return dataclasses.replace(section, **taken), differences


def warn_of(differences: list[Difference], name: str) -> None:
    """Log that fields differ from those of a published network.

    Args:
        differences: The fields.
        name: The network.
    """
    for item in differences:
        what = f"is {item.value} as the spec says, instead of the {item.theirs} of {name}"
        log.warning(Notice(item.field, what))
