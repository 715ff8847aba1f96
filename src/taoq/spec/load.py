# SPDX-License-Identifier: Apache-2.0
"""Convert a parsed spec into frozen dataclasses, reporting all faults at once.

OmegaConf interpolates and converts values. This module adds what it lacks: collecting all faults, suggestions for
misspelled names, allowed values, and fields that are accepted but not used.
"""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import functools
import logging
import math
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import (
    InterpolationToMissingValueError,
    OmegaConfBaseException,
    UnsupportedInterpolationType,
)

from taoq.errors import Fault, SpecError, TaoqError, did_you_mean, first_line
from taoq.plain import JsonMapping, JsonObject, Plain
from taoq.spec.defaults import imply_results_dirs, with_defaults
from taoq.spec.fields import Field, Hint, Schema, default_value, is_required, item_type, without_none
from taoq.spec.overrides import INTERPOLATION_HINT
from taoq.spec.source import SpecSource

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

log = logging.getLogger(__name__)
S = TypeVar("S", bound="DataclassInstance")


def load_spec(source: SpecSource, schema: type[S], *, unused: Mapping[str, str], not_needed: Sequence[str] = ()) -> S:
    """Interpolate, check and convert a spec.

    Args:
        source: The parsed spec.
        schema: The dataclass of the spec.
        unused: Patterns of fields that are accepted but not used (`train`, `wandb.*`), with the reason. Those that the
            spec has are logged in one line.
        not_needed: Sections of other actions. A missing (`???`) value in them counts as left out, because the specs of
            TAO have such values; a section that cannot do without it is replaced by its default.

    Raises:
        SpecError: If the spec is wrong; has all its faults.
    """
    findings = _Findings()
    tree = with_defaults(source.data, schema)
    implied = imply_results_dirs(tree, schema)
    plain = _resolve(OmegaConf.create(tree), "", unused, findings)
    for section in implied:
        plain[section]["results_dir"] = ""
    implied_fields = {f"{section}.results_dir" for section in implied}
    findings.faults = [fault for fault in findings.faults if fault.where not in implied_fields]
    if findings.unused:
        reasons = [f"{name} ({_reason(name, unused)})" for name in findings.unused]
        log.info("not used by taoq: %s", ", ".join(reasons))
    _check(plain, schema, "", findings)
    faulty = {fault.where for fault in findings.faults}  # A value that does not interpolate is not missing.
    for name in findings.missing:
        if name.partition(".")[0] in not_needed:
            _leave_out(plain, name, schema)
        elif name not in faulty:
            hint = f"write it in the spec, or give {name}=..."
            findings.faults.append(Fault(name, "missing: this field needs a value", hint))
    if findings.faults:
        raise SpecError(*findings.faults)
    return spec_from_dict(plain, schema)


def spec_from_dict(data: Mapping[str, object], schema: type[S]) -> S:
    """Convert the result of `spec_to_dict` back into a spec.

    Raises:
        OmegaConfBaseException: If the data does not fit the schema.
    """
    spec = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), dict(data)))
    assert isinstance(spec, schema)
    return spec


@dataclass(frozen=True)
class StoredSpec:
    """A spec that is stored in a manifest or in an exported file.

    Attributes:
        data: The result of `spec_to_dict`.
        where: The manifest or file, for messages.
        version: The version of taoq that wrote it.
    """

    data: JsonMapping
    where: str
    version: str

    def load(self, schema: type[S]) -> S:
        """Convert it into a spec.

        Raises:
            TaoqError: If it does not fit the schema of this version of taoq.
        """
        try:
            return spec_from_dict(self.data, schema)
        except OmegaConfBaseException as error:
            what = f"its spec does not fit this taoq: {first_line(error)}"
            raise TaoqError(Fault(self.where, what, f"read it with taoq {self.version}")) from None


def spec_to_dict(spec: Plain) -> JsonObject:
    """Convert a spec into plain data, for the manifest and `experiment.yaml`."""
    return {
        entry.name: _to_plain(getattr(spec, entry.name))
        for entry in dataclasses.fields(spec)
        if not (entry.metadata.get("omit_default") and getattr(spec, entry.name) == default_value(entry))
    }


def _to_plain(value: Plain) -> Plain:
    if dataclasses.is_dataclass(value):
        return spec_to_dict(value)
    if isinstance(value, list):
        return [_to_plain(item) for item in value]
    return copy.deepcopy(value)


@dataclass
class _Findings:
    """Findings while a spec is loaded.

    Attributes:
        faults: The faults.
        missing: Required fields without a value.
        unused: Fields that are accepted but not used.
    """

    faults: list[Fault] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


def _reason(name: str, unused: Mapping[str, str]) -> str:
    return next(reason for pattern, reason in unused.items() if fnmatch.fnmatchcase(name, pattern))


def _leave_out(data: JsonObject, name: str, schema: type) -> None:
    """Remove a missing value from a spec; its whole section if the section requires it or if it is part of a list."""
    *sections, field_name = name.split(".")
    if "[" in name or is_required(schema, name):
        data.pop(sections[0], None)
        return
    for section in sections:
        data = data.get(section, {})
    data.pop(field_name, None)


def _resolve(node: Plain, path: str, unused: Mapping[str, str], findings: _Findings) -> Plain:
    """Convert a config into plain data, interpolating value by value to collect all faults. Drops unused fields."""
    if not OmegaConf.is_config(node):
        return node
    is_list = OmegaConf.is_list(node)
    keys = range(len(node)) if is_list else list(node)
    result: dict[Plain, Plain] = {}
    for key in keys:
        name = f"{path}[{key}]" if is_list else f"{path}.{key}" if path else str(key)
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in unused):
            findings.unused.append(name)
            continue
        if OmegaConf.is_missing(node, key):
            result[key] = MISSING
            continue
        try:
            value = node[key]
        except InterpolationToMissingValueError:
            value = MISSING
        except OmegaConfBaseException as error:
            findings.faults.append(_not_resolved(name, error))
            continue
        result[key] = _resolve(value, name, unused, findings)
    return [result[key] for key in keys if key in result] if is_list else result


def _not_resolved(name: str, error: OmegaConfBaseException) -> Fault:
    what, hint = first_line(error), INTERPOLATION_HINT
    if isinstance(error, UnsupportedInterpolationType):
        hint = "a spec is data: taoq runs no code from it; write the value itself"
    if quoted := re.search(r'KeyError raised while resolving interpolation: "(.*)"', what):
        what = quoted[1]  # the message of an environment variable that is not set, without OmegaConf's wrapping
    return Fault(name, what[0].lower() + what[1:], hint)


def _check(data: Plain, schema: Schema, path: str, findings: _Findings) -> None:
    """Check a section for unknown keys, wrong types and values that are not allowed; replace aliases in place.

    Args:
        data: The section as plain data.
        schema: Its dataclass.
        path: Its field; empty for the whole spec.
        findings: Collects faults and missing fields.
    """
    if not isinstance(data, dict):
        findings.faults.append(Fault(path, f"is {_kind(data)}, not a section", "write `field: value` lines below it"))
        return
    hints = typing.get_type_hints(schema)
    fields = {entry.name: entry for entry in dataclasses.fields(schema)}
    data |= {key: _other_form(data[key], hints[key], fields[key]) for key in data.keys() & fields.keys()}
    for key in [key for key, value in data.items() if value is None and key in fields]:
        del data[key]  # As in TAO, null means the default.
    for key, value in data.items():
        where = f"{path}.{key}" if path else str(key)
        if key not in fields:
            section = f"section '{path}'" if path else "the spec"
            hint = did_you_mean(str(key), fields, "its fields are " + ", ".join(fields))
            findings.faults.append(Fault(where, f"unknown field in {section}", hint))
            continue
        if value == MISSING or (isinstance(value, list) and MISSING in value):
            findings.missing.append(where)
            continue
        kind = without_none(hints[key])
        item = item_type(kind)
        if dataclasses.is_dataclass(kind) and isinstance(value, list) and fields[key].metadata.get("one_or_list"):
            what = f"lists {len(value)} sections, only one is read"
            findings.faults.append(Fault(where, what, f"the field is: {fields[key].metadata['description']}"))
        elif dataclasses.is_dataclass(kind):
            _check(value, kind, where, findings)
        elif dataclasses.is_dataclass(item) and isinstance(value, list):
            for index, entry in enumerate(value):
                _check(entry, item, f"{where}[{index}]", findings)
        else:
            data[key] = _check_value(value, kind, fields[key], where, findings)
    for name, entry in fields.items():
        if entry.default == MISSING and name not in data:
            findings.missing.append(f"{path}.{name}" if path else name)


def _other_form(value: Plain, kind: Hint, entry: Field) -> Plain:
    """Return the value of a field `one_or_list` in the form of its type: in a list, or out of a list of one."""
    if not entry.metadata.get("one_or_list") or value is None:
        return value
    if typing.get_origin(kind) is list:
        return value if isinstance(value, list | dict) else [value]
    if isinstance(value, list) and len(value) <= 1:
        return value[0] if value else None
    return value


def _check_value(value: Plain, kind: Hint, entry: Field, where: str, findings: _Findings) -> Plain:
    """Check the value of a field. Returns it with aliases replaced."""
    meta = entry.metadata
    hint = f"the field is: {meta['description']}"
    if meta["or_numbers"]:
        findings.faults += _check_option_or_numbers(value, meta["options"], where)
        return value
    names: dict[object, str] = {list: "a list", dict: "a section"}
    expected = names.get(typing.get_origin(kind), "a single value")
    if (value == "" and kind is not str) or _shape(value) != expected:
        findings.faults.append(Fault(where, f"is {_kind(value)}, not {expected}", hint))
        return value
    if isinstance(value, list):
        value = [meta["aliases"].get(item, item) if isinstance(item, str) else item for item in value]
    elif isinstance(value, dict) and typing.get_args(kind)[1] is str:
        value = {key: text for key, text in value.items() if text is not None}
    elif isinstance(value, str):
        value = meta["aliases"].get(value, value)
    # OmegaConf lets containers through where single values are meant.
    wrong = [(place, item) for place, item in _entries(value, kind, where) if isinstance(item, list | dict | None)]
    if wrong:
        findings.faults += [Fault(place, f"is {_kind(item)}, not a single value", hint) for place, item in wrong]
        return value
    try:
        converted = OmegaConf.merge(_one_field(kind), {"value": value}).value
    except OmegaConfBaseException as error:
        what = first_line(error)
        findings.faults.append(Fault(where, what[0].lower() + what[1:], hint))
        return value
    findings.faults += _check_bounds(value, converted, meta, where, hint)
    return value


def _check_option_or_numbers(value: Plain, options: Sequence[str], where: str) -> Iterator[Fault]:
    """Check the value of a field that is None, an option, or a list of whole numbers and None."""
    hint = "one of " + ", ".join(options) + ", or a list of whole numbers"
    if isinstance(value, list):
        for index, entry in enumerate(value):
            if entry is not None and type(entry) is not int:
                yield Fault(f"{where}[{index}]", f"is {_kind(entry)}, not a whole number", hint)
    elif value is not None and value not in options:
        what = f"unknown value '{value}'" if not isinstance(value, dict) else "is a section, not a single value"
        yield Fault(where, what, did_you_mean(str(value), options, hint))


def _entries(value: Plain, kind: Hint, where: str) -> list[tuple[str, Plain]]:
    """Return the entries of a list of single values, or of a section of texts, with their fields."""
    if isinstance(value, list) and item_type(kind) in (str, int, float, bool):
        return [(f"{where}[{index}]", item) for index, item in enumerate(value)]
    if isinstance(value, dict) and typing.get_args(kind)[1] is str:
        return [(f"{where}.{key}", item) for key, item in value.items()]
    return []


def _check_bounds(written: Plain, converted: Plain, meta: JsonMapping, where: str, description: str) -> Iterator[Fault]:
    """Check a value, or each entry of a list, against the options, pattern, minimum and maximum of its field.

    Args:
        written: The value as written in the spec, for messages.
        converted: The value as the type of the field.
        meta: Metadata of the field.
        where: The field.
        description: The hint of a value that is not an option.
    """
    entries = [(where, written, converted)]
    if OmegaConf.is_list(converted):
        entries = [(f"{where}[{index}]", *pair) for index, pair in enumerate(zip(written, converted, strict=True))]
    options, least, most = meta["options"], meta["minimum"], meta["maximum"]
    for place, text, value in entries:
        if options and value not in options:
            hint = did_you_mean(str(text), options, "one of " + ", ".join(options))
            yield Fault(place, f"unknown value '{text}'", hint)
        elif meta["pattern"] and not re.fullmatch(meta["pattern"], str(value)):
            yield Fault(place, f"unknown value '{text}'", description)
        elif isinstance(value, float) and not math.isfinite(value):
            yield Fault(place, f"{text} is not a finite number", description)
        elif least is not None and value is not None and value < least:
            yield Fault(place, f"{text} is less than {least}", description)
        elif most is not None and value is not None and value > most:
            yield Fault(place, f"{text} is more than {most}", description)


@functools.cache
def _one_field(kind: Hint) -> DictConfig:
    """Return a config with one field `value` of a type, to let OmegaConf convert a value without its section."""
    holder = dataclasses.make_dataclass("Holder", [("value", kind, dataclasses.field(default=MISSING))])
    config = OmegaConf.structured(holder)
    assert isinstance(config, DictConfig)
    return config


def _kind(value: object) -> str:
    """Describe a value for a message."""
    if isinstance(value, list | dict):
        return _shape(value)
    return "empty" if value in (None, "") else f"the value '{value}'"


def _shape(value: object) -> str:
    return "a list" if isinstance(value, list) else "a section" if isinstance(value, dict) else "a single value"
