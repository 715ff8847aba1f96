# SPDX-License-Identifier: Apache-2.0
"""In what artifacts differ: their settings and layers, compared as plain data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from taoq.plain import JsonMapping, JsonObject, Plain


def settings(sections: Mapping[str, JsonMapping], section: str) -> dict[str, JsonObject]:
    """Fields with different values, with the value in each artifact; None where a list is shorter.

    A section that not all of them have is compared as one value: the fields that are set in it.

    Args:
        sections: A section of the spec of each artifact, by the artifact's name.
        section: Name of the section.
    """
    flat = {name: _flat(values, section) for name, values in sections.items()}
    unset = {field for values in flat.values() for field, value in values.items() if value is None}
    flat = {name: _joined(values, unset) for name, values in flat.items()}
    fields = dict.fromkeys(field for values in flat.values() for field in values)
    return _differing({field: {name: values.get(field) for name, values in flat.items()} for field in fields})


def layers(plans: Mapping[str, Sequence[JsonMapping]]) -> dict[str, dict[str, str | None]]:
    """Layers in different formats, with the format in each artifact; None where it has no such layer.

    Layers of an ONNX file are listed under the name of the module that they were exported from.

    Args:
        plans: The plan of each manifest, by the artifact's name.
    """
    formats: dict[str, dict[str, str | None]] = {}
    for name, plan in plans.items():
        for row in plan:
            parts = [row["weights"], row["activations"]]
            words = " / ".join(part["dtype"] if part else "float" for part in parts) if any(parts) else "float"
            formats.setdefault(row["alias"] or row["layer"], dict.fromkeys(plans))[name] = words
    return _differing(formats)


def _differing(table: Mapping[str, JsonObject]) -> dict[str, JsonObject]:
    """The rows whose values are not all equal."""
    return {key: row for key, row in table.items() if any(value != next(iter(row.values())) for value in row.values())}


def _joined(values: JsonMapping, sections: Iterable[str]) -> JsonObject:
    """The leaves, with those of these sections as one value each: the ones that are set."""
    joined = dict(values)
    for section in sections:
        start = f"{section}."
        inside = {name.removeprefix(start): joined.pop(name) for name in values if name.startswith(start)}
        if inside:
            joined[section] = ", ".join(f"{name}: {value}" for name, value in inside.items() if value not in (None, ""))
    return joined


def _flat(value: Plain, path: str) -> JsonObject:
    """The leaves of plain data, by their path as a spec has it."""
    if isinstance(value, Mapping):
        inside = [_flat(inner, f"{path}.{name}") for name, inner in value.items()]
    elif isinstance(value, list):
        inside = [_flat(inner, f"{path}[{index}]") for index, inner in enumerate(value)]
    else:
        return {path: value}
    return {key: leaf for leaves in inside for key, leaf in leaves.items()}
