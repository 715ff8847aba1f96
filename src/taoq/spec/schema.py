# SPDX-License-Identifier: Apache-2.0
"""Generate the schema reference and the commented default spec from the dataclasses."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass

from omegaconf import MISSING

from taoq.spec.fields import Field, Hint, Schema, default_value, fields_of, item_type

_KINDS: dict[object, str] = {str: "string", int: "int", float: "float", bool: "bool"}


@dataclass(frozen=True)
class Row:
    """A row of the schema reference, with TAO's column names."""

    field: str
    value_type: str
    description: str
    default_value: str
    valid_options: str


def rows(schema: Schema, prefix: str = "") -> Iterator[Row]:
    """Yield a row for each field of a schema, a section before its fields. A list entry is written `layers[]`."""
    for field, kind in fields_of(schema):
        name = f"{prefix}{field.name}"
        item = item_type(kind)
        meta = field.metadata
        if dataclasses.is_dataclass(kind):
            yield Row(name, "section", meta["description"], "", "")
            yield from rows(kind, f"{name}.")
            continue
        if dataclasses.is_dataclass(item):
            yield Row(name, "list", meta["description"], "[]", "")
            yield from rows(item, f"{name}[].")
            continue
        value_type = "categorical" if meta["options"] and item is None else _value_type(kind)
        value_type += " or list" if meta["or_numbers"] else ""
        options = ",".join(meta["options"]) or meta["pattern"].replace("|", ",")
        yield Row(name, value_type, meta["description"], _default(field), options)


def markdown(title: str, schema: Schema, prefix: str = "") -> str:
    """Return a Markdown table of the fields, in the format of TAO's documentation."""
    lines = [
        f"## {title}",
        "",
        "| field | value_type | description | default_value | valid_options |",
        "|---|---|---|---|---|",
    ]
    for row in rows(schema, prefix):
        cells = (f"`{row.field}`", row.value_type, row.description, row.default_value, row.valid_options)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def commented_yaml(schema: type) -> str:
    """Return a valid spec with every field at its default, or at its example if the default leaves it incomplete."""
    return "\n".join(_yaml(schema, "")) + "\n"


def _yaml(schema: Schema, indent: str) -> Iterator[str]:
    for field, kind in fields_of(schema):
        meta = field.metadata
        options = f" [{', '.join(meta['options'])}]" if meta["options"] else ""
        yield f"{indent}# {meta['description']}{options}"
        item = item_type(kind)
        example = meta["example"]
        if dataclasses.is_dataclass(item):
            yield f"{indent}{field.name}:"
            yield from _list_item(item, f"{indent}  ")
        elif dataclasses.is_dataclass(kind) and field.default is None:
            yield f"{indent}{field.name}: null"
        elif dataclasses.is_dataclass(kind):
            yield f"{indent}{field.name}:"
            yield from _yaml(kind, f"{indent}  ")
        else:
            # JSON is valid YAML, and fits on one line.
            yield f"{indent}{field.name}: {json.dumps(example if example is not None else default_value(field))}"


def _list_item(schema: Schema, indent: str) -> Iterator[str]:
    """Yield the lines of one example entry: its required fields, and its first section with the first options."""
    required = [field for field, _ in fields_of(schema) if default_value(field) == MISSING]
    examples = (f"{field.name}: {json.dumps(field.metadata['example'])}" for field in required)
    yield f"{indent}- " + f"\n{indent}  ".join(examples)
    for field, kind in fields_of(schema):
        if dataclasses.is_dataclass(kind):
            inner = [entry for entry, _ in fields_of(kind) if default_value(entry) == MISSING]
            values = ", ".join(f"{entry.name}: {entry.metadata['options'][0]}" for entry in inner)
            yield f"{indent}  {field.name}: {{{values}}}"
            return


def _value_type(kind: Hint) -> str:
    origin = getattr(kind, "__origin__", None)
    return "list" if origin is list else "dict" if origin is dict else _KINDS[kind]


def _default(field: Field) -> str:
    value = default_value(field)
    return "required" if value == MISSING else "" if value in ("", None) else json.dumps(value).strip('"')
