# SPDX-License-Identifier: Apache-2.0
"""Fields of a schema, which is a frozen dataclass whose fields are made by `option`."""

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
"""A type annotation, as `typing.get_type_hints` returns it."""


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
    one_or_list: bool = False,
    or_numbers: bool = False,
) -> Any:
    """Define a field of a schema.

    Args:
        default: The default value, a zero-argument factory of it, or `REQUIRED`.
        description: One sentence for the schema reference, the comments of `default_specs`, and hints in errors.
        options: The allowed values; for a list, the allowed values of each entry.
        aliases: Alternative spellings, and the option that each stands for.
        pattern: A regular expression that the whole value must match.
        minimum: The smallest allowed number.
        maximum: The largest allowed number.
        example: The value that `default_specs` writes, where the default would leave the spec incomplete.
        omit_default: Leave the field out of stored specs while it has its default value. For fields added after the
            first release: artifacts that do not use them stay as they were, and older versions of taoq can read them.
        one_or_list: For a list, also accept its only entry without the list; for a section, also accept a list of one
            section. For fields that one version or another of TAO reads in both forms.
        or_numbers: For a field of the type Plain: the value is None, one of `options`, or a list of whole numbers and
            None. OmegaConf has no such type.

    Returns:
        A dataclass field. The return type is Any, so that a field can be annotated with the type of its value.
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
        "one_or_list": one_or_list,
        "or_numbers": or_numbers,
    }
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def default_value(field: Field) -> object:
    """Return the default value of a field, `REQUIRED` if it has none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def changed(section: Plain, names: Sequence[str]) -> list[str]:
    """Return those of `names` whose fields in a section differ from their defaults."""
    fields = {field.name: field for field in dataclasses.fields(section)}
    return [name for name in names if getattr(section, name) != default_value(fields[name])]


def fields_of(schema: Schema) -> Iterator[tuple[Field, Hint]]:
    """Yield the fields of a schema with their types, `T` for `T | None`."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        yield field, without_none(hints[field.name])


def without_none(hint: Hint) -> Hint:
    """Return `T` for `T | None`, and any other type unchanged."""
    if isinstance(hint, types.UnionType):
        return next(argument for argument in typing.get_args(hint) if argument is not type(None))
    return hint


def item_type(kind: Hint) -> Hint:
    """Return `T` for `list[T]`, None for any other type."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is list else None


def is_field(schema: type, path: str) -> bool:
    """Return whether a path such as `quantize.layers[0].weights` leads to a field of a schema."""
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


def is_required(schema: type, path: str) -> bool:
    """Return whether a path such as `quantize.accuracy.max_drop` leads to a field without a default."""
    *sections, name = path.split(".")
    kind: Hint = schema
    for section in sections:
        kind = without_none(typing.get_type_hints(kind)[section])
    fields = {field.name: field for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else {}
    return name in fields and default_value(fields[name]) == REQUIRED
