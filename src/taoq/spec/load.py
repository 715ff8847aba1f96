# SPDX-License-Identifier: Apache-2.0
"""Turn a spec as it was written into frozen dataclasses, reporting every fault at once.

OmegaConf parses, interpolates and converts. What it does not do is done here: all faults in one go, near names, option
lists, fields that are accepted and not used.
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
from taoq.spec.fields import Field, Hint, Schema, default_value, item_type, without_none
from taoq.spec.source import INTERPOLATION_HINT, SpecSource

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

log = logging.getLogger(__name__)
S = TypeVar("S", bound="DataclassInstance")


def load_spec(source: SpecSource, schema: type[S], *, unused: Mapping[str, str], not_needed: Sequence[str] = ()) -> S:
    """Interpolate, check and convert a spec.

    Args:
        source: What `read_spec` returned.
        schema: The dataclass of the whole spec.
        unused: Patterns of fields that are accepted and not used (`train`, `wandb.*`), with the reason; the fields
            present are logged in one line.
        not_needed: Sections of other actions. One with a missing (`???`) value is replaced by its default, because
            the specs of TAO have such sections.

    Raises:
        SpecError: With every fault of the spec.
    """
    found = _Findings()
    # defaults go below what is written, for interpolation; OmegaConf's own merge would replace ??? by them
    defaults = OmegaConf.to_container(OmegaConf.structured(schema))
    merged = OmegaConf.create(_overlay(defaults, OmegaConf.to_container(source.data)))
    plain = _resolve(merged, "", unused, found)
    if found.unused:
        reasons = [f"{name} ({_reason(name, unused)})" for name in found.unused]
        log.info("not used by taoq: %s", ", ".join(reasons))
    _check(plain, schema, "", found)
    faulty = {fault.where for fault in found.faults}  # a value that does not interpolate is not missing
    for name in found.missing:
        section = name.partition(".")[0]
        if section in not_needed:
            plain.pop(section, None)
        elif name not in faulty:
            hint = f"write it in the spec, or give {name}=..."
            found.faults.append(Fault(name, "missing: this field needs a value", hint))
    if found.faults:
        raise SpecError(*found.faults)
    return spec_from_dict(plain, schema)


def spec_from_dict(data: Mapping[str, object], schema: type[S]) -> S:
    """The spec that `spec_to_dict` wrote.

    Raises:
        OmegaConfBaseException: The data does not fit the schema.
    """
    spec = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), dict(data)))
    assert isinstance(spec, schema)
    return spec


@dataclass(frozen=True)
class StoredSpec:
    """A spec in a manifest or in a file that taoq exported.

    Attributes:
        data: What `spec_to_dict` wrote.
        where: The manifest or file, for messages.
        version: The taoq that wrote it.
    """

    data: JsonMapping
    where: str
    version: str

    def load(self, schema: type[S]) -> S:
        """The spec.

        Raises:
            TaoqError: It does not fit the schema of this taoq.
        """
        try:
            return spec_from_dict(self.data, schema)
        except OmegaConfBaseException as error:
            what = f"its spec does not fit this taoq: {first_line(error)}"
            raise TaoqError(Fault(self.where, what, f"read it with taoq {self.version}")) from None


def spec_to_dict(spec: Plain) -> JsonObject:
    """A spec as plain data, for the manifest and `experiment.yaml`."""
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
    """What was found while a spec was read.

    Attributes:
        faults: What is wrong.
        missing: Required fields without a value.
        unused: Fields that are accepted and not used.
    """

    faults: list[Fault] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


def _reason(name: str, unused: Mapping[str, str]) -> str:
    return next(reason for pattern, reason in unused.items() if fnmatch.fnmatchcase(name, pattern))


def _overlay(below: Plain, above: Plain) -> Plain:
    """`above`, plus the keys of the mappings in `below` that it does not have."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {key: _overlay(below[key], value) if key in below else value for key, value in above.items()}


def _resolve(node: Plain, path: str, unused: Mapping[str, str], found: _Findings) -> Plain:
    """Plain data of a config, interpolated value by value, without the unused fields."""
    if not OmegaConf.is_config(node):
        return node
    is_list = OmegaConf.is_list(node)
    keys = range(len(node)) if is_list else list(node)
    result: dict[Plain, Plain] = {}
    for key in keys:
        name = f"{path}[{key}]" if is_list else f"{path}.{key}" if path else str(key)
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in unused):
            found.unused.append(name)
            continue
        if OmegaConf.is_missing(node, key):
            result[key] = MISSING
            continue
        try:
            value = node[key]
        except InterpolationToMissingValueError:
            value = MISSING
        except OmegaConfBaseException as error:
            found.faults.append(_not_resolved(name, error))
            continue
        result[key] = _resolve(value, name, unused, found)
    return [result[key] for key in keys if key in result] if is_list else result


def _not_resolved(name: str, error: OmegaConfBaseException) -> Fault:
    what, hint = first_line(error), INTERPOLATION_HINT
    if isinstance(error, UnsupportedInterpolationType):
        hint = "a spec is data: taoq runs no code from it; write the value itself"
    if quoted := re.search(r'KeyError raised while resolving interpolation: "(.*)"', what):
        what = quoted[1]  # an environment variable that is not set
    return Fault(name, what[0].lower() + what[1:], hint)


def _check(data: Plain, schema: Schema, path: str, found: _Findings) -> None:
    """Find unknown keys, wrong types and values that are not allowed; replace aliases in place.

    Args:
        data: A section as plain data.
        schema: Its dataclass.
        path: Its field.
        found: Gets what is wrong or missing.
    """
    if not isinstance(data, dict):
        found.faults.append(Fault(path, f"is {_kind(data)}, not a section", "write `field: value` lines below it"))
        return
    hints = typing.get_type_hints(schema)
    fields = {entry.name: entry for entry in dataclasses.fields(schema)}
    for key, value in data.items():
        where = f"{path}.{key}" if path else str(key)
        if key not in fields:
            section = f"section '{path}'" if path else "the spec"
            hint = did_you_mean(str(key), fields, "its fields are " + ", ".join(fields))
            found.faults.append(Fault(where, f"unknown field in {section}", hint))
            continue
        if value == MISSING or (isinstance(value, list) and MISSING in value):
            found.missing.append(where)
            continue
        kind = without_none(hints[key])
        if value is None and kind is not hints[key]:
            continue
        item = item_type(kind)
        if dataclasses.is_dataclass(kind):
            _check(value, kind, where, found)
        elif dataclasses.is_dataclass(item) and isinstance(value, list):
            for index, entry in enumerate(value):
                _check(entry, item, f"{where}[{index}]", found)
        else:
            data[key] = _check_value(value, kind, fields[key], where, found)
    for name, entry in fields.items():
        if entry.default == MISSING and name not in data:
            found.missing.append(f"{path}.{name}" if path else name)


def _check_value(value: Plain, kind: Hint, entry: Field, where: str, found: _Findings) -> Plain:
    """The value of a field, with its aliases replaced."""
    meta = entry.metadata
    hint = f"the field is: {meta['description']}"
    names: dict[object, str] = {list: "a list", dict: "a section"}
    expected = names.get(typing.get_origin(kind), "a single value")
    if value is None or _shape(value) != expected:
        found.faults.append(Fault(where, f"is {_kind(value)}, not {expected}", hint))
        return value
    if isinstance(value, list):
        value = [meta["aliases"].get(item, item) if isinstance(item, str) else item for item in value]
    elif isinstance(value, str):
        value = meta["aliases"].get(value, value)
    try:
        converted = OmegaConf.merge(_one_field(kind), {"value": value}).value
    except OmegaConfBaseException as error:
        what = first_line(error)
        found.faults.append(Fault(where, what[0].lower() + what[1:], hint))
        return value
    found.faults += _check_bounds(value, converted, meta, where, hint)
    return value


def _check_bounds(written: Plain, converted: Plain, meta: JsonMapping, where: str, description: str) -> Iterator[Fault]:
    """Faults of a value against the options, pattern, minimum and maximum of its field; of a list, of each entry."""
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
    """A config with one value of a type: OmegaConf's check of a value, without building its whole section."""
    holder = dataclasses.make_dataclass("Holder", [("value", kind, dataclasses.field(default=MISSING))])
    config = OmegaConf.structured(holder)
    assert isinstance(config, DictConfig)
    return config


def _kind(value: object) -> str:
    if isinstance(value, list | dict):
        return _shape(value)
    return "empty" if value is None else f"the value '{value}'"


def _shape(value: object) -> str:
    return "a list" if isinstance(value, list) else "a section" if isinstance(value, dict) else "a single value"
