# SPDX-License-Identifier: Apache-2.0
"""Fields of a schema. A schema is a frozen dataclass whose fields are made by `option`."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from omegaconf import MISSING

from taoq.plain import Plain

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Schema: TypeAlias = "DataclassInstance | type[DataclassInstance]"
"""A frozen dataclass whose fields are made by `option`."""
REQUIRED: Plain = MISSING
"""The default of a field that a spec must set."""
Field = dataclasses.Field[Any]
Hint: TypeAlias = object
"""A type, as `typing.get_type_hints` gives it."""


def option(
    default: object,
    description: str,
    *,
    options: Sequence[str] = (),
    aliases: Mapping[str, str] | None = None,
    pattern: str = "",
    minimum: float | None = None,
    maximum: float | None = None,
    example: object = None,
    omit_default: bool = False,
) -> Any:
    """A field of a schema: its default value and what the reference says about it.

    Args:
        default: The default value, a zero-argument factory, or `REQUIRED`.
        description: One sentence for the schema reference and the comments of `default_specs`.
        options: The allowed values; for a list, the allowed values of each entry.
        aliases: Other spellings, each with the option it stands for.
        pattern: A regular expression that the whole value must match.
        minimum: The smallest allowed number.
        maximum: The largest allowed number.
        example: What `default_specs` writes if the default would leave the spec incomplete.
        omit_default: Whether stored specs leave the field out at its default. Of fields that came later: artifacts
            that do not use them are the same as before, and an older taoq reads them.
    """
    metadata = {
        "description": description,
        "options": tuple(options),
        "aliases": dict(aliases or {}),
        "pattern": pattern,
        "minimum": minimum,
        "maximum": maximum,
        "example": example,
        "omit_default": omit_default,
    }
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def default_value(field: Field) -> object:
    """The default value of a field; `REQUIRED` if it has none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def changed(section: Plain, names: Sequence[str]) -> list[str]:
    """Those of the named fields of a section that are not at their defaults."""
    fields = {field.name: field for field in dataclasses.fields(section)}
    return [name for name in names if getattr(section, name) != default_value(fields[name])]


def fields_of(schema: Schema) -> Iterator[tuple[Field, Hint]]:
    """The fields of a schema, each with its type; the type of an optional field without its None."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        yield field, without_none(hints[field.name])


def without_none(hint: Hint) -> Hint:
    """`T` of `T | None`; any other type as it is."""
    if isinstance(hint, types.UnionType):
        return next(argument for argument in typing.get_args(hint) if argument is not type(None))
    return hint


def item_type(kind: Hint) -> Hint:
    """`T` of `list[T]`; None of any other type."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is list else None


def is_field(schema: type, path: str) -> bool:
    """Whether a path (`quantize.layers[0].weights`) leads to a field of a schema."""
    kind: Hint = schema
    for name in re.sub(r"\[\d+\]", "", path).split("."):
        kind = item_type(kind) or kind
        if not dataclasses.is_dataclass(kind):
            return typing.get_origin(kind) is dict
        hints = typing.get_type_hints(kind)
        if name not in hints:
            return False
        kind = without_none(hints[name])
    return True
