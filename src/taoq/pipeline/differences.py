# SPDX-License-Identifier: Apache-2.0
"""Find the settings and layers in which artifacts differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from taoq.plain import JsonMapping, JsonObject, Plain


def settings(sections: Mapping[str, JsonMapping], section: str) -> dict[str, JsonObject]:
    """Return the fields whose values differ, with the value in each artifact; None where a list is shorter.

    An optional section that some of the specs leave out is compared as a single value: the text of its fields.

    Args:
        sections: The section of each spec, by the name of the artifact.
        section: Name of the section.
    """
    flat = {name: _flat(values, section) for name, values in sections.items()}
    unset = {field for values in flat.values() for field, value in values.items() if value is None}
    flat = {name: _joined(values, unset) for name, values in flat.items()}
    fields = dict.fromkeys(field for values in flat.values() for field in values)
    return _differing({field: {name: values.get(field) for name, values in flat.items()} for field in fields})


def layers(plans: Mapping[str, Sequence[JsonMapping]]) -> dict[str, dict[str, str | None]]:
    """Return the layers whose formats differ, with the format in each artifact; None where it has no such layer.

    A layer of an ONNX file is listed under the name of the torch module that it was exported from.

    Args:
        plans: The plan of each manifest, by the name of the artifact.
    """
    formats: dict[str, dict[str, str | None]] = {}
    for name, plan in plans.items():
        for row in plan:
            schemes = [row["weights"], row["activations"]]
            label = "float"
            if any(schemes):
                label = " / ".join(scheme["dtype"] if scheme else "float" for scheme in schemes)
            formats.setdefault(row["alias"] or row["layer"], dict.fromkeys(plans))[name] = label
    return _differing(formats)


def _differing(table: Mapping[str, JsonObject]) -> dict[str, JsonObject]:
    """Return the rows whose values are not all equal."""
    return {key: row for key, row in table.items() if any(value != next(iter(row.values())) for value in row.values())}


def _joined(values: JsonMapping, sections: Iterable[str]) -> JsonObject:
    """Join the set fields of each of these sections into one value."""
    joined = dict(values)
    for section in sections:
        prefix = f"{section}."
        fields = {name.removeprefix(prefix): joined.pop(name) for name in values if name.startswith(prefix)}
        if fields:
            joined[section] = ", ".join(f"{name}: {value}" for name, value in fields.items() if value not in (None, ""))
    return joined


def _flat(value: Plain, path: str) -> JsonObject:
    """Return the leaves of plain data, by their paths in the spec."""
    if isinstance(value, Mapping):
        children = [_flat(child, f"{path}.{name}") for name, child in value.items()]
    elif isinstance(value, list):
        children = [_flat(child, f"{path}[{index}]") for index, child in enumerate(value)]
    else:
        return {path: value}
    return {key: leaf for leaves in children for key, leaf in leaves.items()}
