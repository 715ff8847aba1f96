# SPDX-License-Identifier: Apache-2.0
"""Load a YAML spec with command-line overrides into frozen dataclasses, with every fault at once.

A schema is a dataclass whose fields are made by `option`. OmegaConf parses, interpolates and converts;
what it does not do is done here: all faults in one go, their line in the file, near names, option lists.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import logging
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, InterpolationToMissingValueError, OmegaConfBaseException

from taoq.errors import Fault, SpecError, did_you_mean

log = logging.getLogger(__name__)
S = TypeVar("S")

REQUIRED: Any = MISSING
_NO_INTERPOLATION = "does not parse as an interpolation"
_INTERPOLATION_HINT = "give it a value, or write the path of an existing field as ${section.field}"


def option(
    default: Any,
    description: str,
    *,
    options: Sequence[str] = (),
    aliases: Mapping[str, str] | None = None,
    pattern: str = "",
    minimum: float | None = None,
    maximum: float | None = None,
    example: Any = None,
) -> Any:
    """A field of a schema: its default and what the reference says of it.

    Args:
        default: The default value, a zero-argument factory, or `REQUIRED`.
        description: One sentence for the schema reference and the comments of `default_specs`.
        options: The only values allowed; of a list, for each of its entries.
        aliases: Other spellings, by the option they stand for.
        pattern: A regular expression that the whole value must match.
        minimum: The least value of a number.
        maximum: The largest.
        example: What `default_specs` writes where the default would not make a complete spec.
    """
    metadata = {
        "description": description,
        "options": tuple(options),
        "aliases": dict(aliases or {}),
        "pattern": pattern,
        "minimum": minimum,
        "maximum": maximum,
        "example": example,
    }
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class SpecSource:
    """Where the values of a spec came from: the file, the line of each field, the overrides.

    Attributes:
        path: The YAML file as the user named it.
        data: The parsed, not yet interpolated tree.
        lines: Line number (from 1) by field, `quantize.layers[0].module_name`.
        overrides: The `key=value` that set a field, by field.
        command: The command line that named them, for reports.
    """

    path: str
    data: DictConfig
    lines: Mapping[str, int]
    overrides: Mapping[str, str]
    command: str

    def locate(self, where: str, schema: Any = None) -> str:
        """`where` with its file and line, when it is a field that was written, or one of `schema` below such."""
        field = where
        while field:  # an override of a section or a list wins over the lines of what it replaced
            if field in self.overrides:
                return f"override {self.overrides[field]}: {where}"
            field = _parent(field)
        for field, override in self.overrides.items():
            if field.startswith(f"{where}."):
                return f"override {override}: {where}"
        if where in self.lines:
            return f"{self.path}:{self.lines[where]}: {where}"
        field = where if schema is not None and is_field(schema, where) else ""
        while field := _parent(field):
            if field in self.lines:
                return f"{self.path}:{self.lines[field]}: {where}"
        return where


def read_spec(path: str | None, overrides: Sequence[str], *, command: str = "") -> SpecSource:
    """Parse a YAML file and merge `key=value` overrides into it; nothing is interpolated or checked yet.

    Args:
        path: The file; None is an empty spec.
        overrides: `key=value`, the key dotted, with an index in lists.
        command: The command line that names them.

    Raises:
        SpecError: The file is missing, does not parse, has a duplicate key, or is not a mapping; an override
            has no `=` or does not fit the tree.
    """
    try:
        text = Path(path).read_text(encoding="utf-8") if path else ""
    except OSError as error:
        raise SpecError(Fault(str(path), f"cannot be read: {error.strerror}", "give the spec file with -e")) from None
    except UnicodeDecodeError:
        raise SpecError(Fault(str(path), "is not a text file in UTF-8", "give a YAML file with -e")) from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        # an empty file is an empty spec: the schema then says what is missing
        if root is not None and not isinstance(root, yaml.MappingNode):
            kind = "a list" if isinstance(root, yaml.SequenceNode) else "a single value"
            raise SpecError(
                Fault(
                    f"{path}:1",
                    f"the spec is {kind}, not a mapping",
                    "write sections: `quantize:`, `dataset:`, ...",
                )
            )
        lines = dict(_lines(root, "")) if root is not None else {}
        data = OmegaConf.create(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise SpecError(_not_yaml(f"{path}:{mark.line + 1}" if mark else str(path), error)) from None
    except GrammarParseError as error:
        where = f"{path}:{lines.get(str(error.full_key), 1)}: {error.full_key}"
        raise SpecError(Fault(where, _NO_INTERPOLATION, _INTERPOLATION_HINT)) from None
    assert isinstance(data, DictConfig)
    by_field: dict[str, str] = {}
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            raise SpecError(Fault(override, "an override has the form key=value", "for example quantize.device=cpu"))
        try:
            data.merge_with_dotlist([override])
        except GrammarParseError:
            where = f"override {override}: {_brackets(key)}"
            raise SpecError(Fault(where, _NO_INTERPOLATION, _INTERPOLATION_HINT)) from None
        except yaml.YAMLError as error:
            raise SpecError(_not_yaml(f"override {override}", error)) from None
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            what = str(error).splitlines()[0]
            raise SpecError(
                Fault(
                    f"override {override}",
                    what,
                    "name an existing field; lists take an index, layers.0.weights.dtype",
                )
            ) from None
        by_field[_brackets(key)] = override
    return SpecSource(path or "", data, lines, by_field, command)


def _not_yaml(where: str, error: yaml.YAMLError) -> Fault:
    what = getattr(error, "problem", None) or str(error).splitlines()[0]
    if what.startswith("but "):
        what = f"{getattr(error, 'context', '')}, {what}"
    what = what.replace("tag:yaml.org,2002:", "!!")
    hint = "a key may stand once in a section" if "duplicate" in what else "a spec is plain YAML data"
    return Fault(where, f"not valid YAML: {what}", hint)


def load_spec(source: SpecSource, schema: type[S], *, unused: Mapping[str, str], not_needed: Sequence[str] = ()) -> S:
    """Interpolate, check and convert a spec.

    Args:
        source: What `read_spec` returned.
        schema: The dataclass of the whole spec.
        unused: Fields accepted and not used, as patterns (`train`, `wandb.*`), with the reason; one log line
            names those present.
        not_needed: Sections of other actions. One with a missing (`???`) value becomes its default, as the specs
            of TAO carry such.

    Raises:
        SpecError: With every fault found.
    """
    faults: list[Fault] = []
    present: list[str] = []
    # the defaults below what is written, for interpolation; not by OmegaConf, whose merge puts them in the place of ???
    defaults = OmegaConf.to_container(OmegaConf.structured(schema))
    merged = OmegaConf.create(_overlay(defaults, OmegaConf.to_container(source.data)))
    plain = _resolve(merged, "", faults, unused, present)
    if present:
        log.info(
            "not used by taoq: %s",
            ", ".join(f"{field} ({reason})" for field, reason in _reasons(present, unused)),
        )
    missing: list[str] = []
    _check(plain, schema, "", faults, missing)
    wrong = {fault.where for fault in faults}  # a value that does not interpolate is no missing one
    for field in missing:
        section = field.partition(".")[0]
        if section in not_needed:
            plain.pop(section, None)
        elif field not in wrong:
            hint = f"write it in the spec, or give {field}=..."
            faults.append(Fault(field, "missing: this field needs a value", hint))
    if faults:
        raise SpecError(*faults)
    return spec_from_dict(plain, schema)


def spec_from_dict(data: Mapping[str, Any], schema: type[S]) -> S:
    """The spec that `spec_to_dict` wrote into a manifest."""
    spec = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), dict(data)))
    assert isinstance(spec, schema)
    return spec


def spec_to_dict(spec: Any) -> dict[str, Any]:
    """A spec as plain data, for the manifest and `experiment.yaml`."""
    return dataclasses.asdict(spec)


def default_value(field: dataclasses.Field[Any]) -> Any:
    """The default of a field of a schema; `REQUIRED` if there is none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def changed(section: Any, names: Sequence[str]) -> list[str]:
    """The fields of these names that are not at their defaults."""
    fields = {field.name: field for field in dataclasses.fields(section)}
    return [name for name in names if getattr(section, name) != default_value(fields[name])]


def _reasons(present: Iterable[str], unused: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Each present field with the reason of the pattern that it matched."""
    for field in present:
        yield field, next(reason for pattern, reason in unused.items() if fnmatch.fnmatchcase(field, pattern))


def _parent(field: str) -> str:
    """`quantize.layers` of `quantize.layers[0]`, `quantize` of that, then nothing."""
    parent = re.sub(r"(^|\.)[^.\[\]]+$|\[\d+\]$", "", field)
    return parent if parent != field else ""  # it is no field, but a file of such a name


def is_field(schema: Any, path: str) -> bool:
    """Whether a path, `quantize.layers[0].weights`, leads to a field of a schema."""
    kind = schema
    for name in re.sub(r"\[\d+\]", "", path).split("."):
        if typing.get_origin(kind) is list:
            kind = typing.get_args(kind)[0]
        if not dataclasses.is_dataclass(kind):
            return typing.get_origin(kind) is dict
        hints = typing.get_type_hints(kind)
        if name not in hints:
            return False
        kind = without_none(hints[name])
    return True


def _brackets(dotted: str) -> str:
    """`quantize.layers.0.weights` as `quantize.layers[0].weights`."""
    return re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", dotted)


def _lines(node: yaml.Node, path: str) -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            field = f"{path}.{key.value}" if path else str(key.value)
            yield field, key.start_mark.line + 1
            yield from _lines(value, field)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield f"{path}[{index}]", value.start_mark.line + 1
            yield from _lines(value, f"{path}[{index}]")


def _overlay(below: Any, above: Any) -> Any:
    """Plain data `above`, with the keys of mappings `below` that it does not have."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {key: _overlay(below[key], value) if key in below else value for key, value in above.items()}


def _resolve(node: Any, path: str, faults: list[Fault], unused: Mapping[str, str], present: list[str]) -> Any:
    """Plain data of a config, interpolated value by value, without the unused fields."""
    if not OmegaConf.is_config(node):
        return node
    is_list = OmegaConf.is_list(node)
    keys = range(len(node)) if is_list else list(node)
    result: dict[Any, Any] = {}
    for key in keys:
        field = f"{path}[{key}]" if is_list else f"{path}.{key}" if path else str(key)
        if any(fnmatch.fnmatchcase(field, pattern) for pattern in unused):
            present.append(field)
            continue
        if OmegaConf.is_missing(node, key):
            result[key] = MISSING
            continue
        try:
            value = node[key]
        except InterpolationToMissingValueError:
            value = MISSING
        except OmegaConfBaseException as error:
            what, hint = str(error).splitlines()[0], _INTERPOLATION_HINT
            if "Unsupported interpolation" in what:
                hint = "a spec is data: taoq runs no code from it; write the value itself"
            if quoted := re.search(r'KeyError raised while resolving interpolation: "(.*)"', what):
                what = quoted[1]  # of the environment
            faults.append(Fault(field, what[0].lower() + what[1:], hint))
            continue
        result[key] = _resolve(value, field, faults, unused, present)
    return [result[key] for key in keys if key in result] if is_list else result


def _check(data: Any, schema: Any, path: str, faults: list[Fault], missing: list[str]) -> None:
    """Find unknown keys, wrong types, values that are not among the options; replace aliases in place.

    Args:
        data: A section as plain data.
        schema: Its dataclass.
        path: Its field.
        faults: Gets what is wrong.
        missing: Gets the fields without a value.
    """
    if not isinstance(data, dict):
        faults.append(Fault(path, f"is {_kind(data)}, not a section", "write `field: value` lines below it"))
        return
    hints = typing.get_type_hints(schema)
    fields = {field.name: field for field in dataclasses.fields(schema)}
    for key, value in data.items():
        where = f"{path}.{key}" if path else str(key)
        if key not in fields:
            section = f"section '{path}'" if path else "the spec"
            known = "its fields are " + ", ".join(fields)
            faults.append(Fault(where, f"unknown field in {section}", did_you_mean(str(key), fields, known)))
            continue
        if value == MISSING or (isinstance(value, list) and MISSING in value):
            missing.append(where)
            continue
        kind = without_none(hints[key])
        item = typing.get_args(kind)[0] if typing.get_origin(kind) is list else None
        if value is None and kind is not hints[key]:
            continue
        if dataclasses.is_dataclass(kind):
            _check(value, kind, where, faults, missing)
        elif item is not None and dataclasses.is_dataclass(item) and isinstance(value, list):
            for index, entry in enumerate(value):
                _check(entry, item, f"{where}[{index}]", faults, missing)
        else:
            data[key] = _check_value(value, schema, fields[key], where, faults)
    for name, field in fields.items():
        if field.default == MISSING and name not in data:
            missing.append(f"{path}.{name}" if path else name)


def _check_value(value: Any, schema: Any, field: dataclasses.Field[Any], where: str, faults: list[Fault]) -> Any:
    meta = field.metadata
    hint = f"the field is: {meta['description']}"
    kind = without_none(typing.get_type_hints(schema)[field.name])
    wanted = {list: "a list", dict: "a section"}.get(typing.get_origin(kind), "a single value")
    if value is None or _shape(value) != wanted:
        faults.append(Fault(where, f"is {_kind(value)}, not {wanted}", hint))
        return value
    if wanted == "a list":
        value = [meta["aliases"].get(entry, entry) if isinstance(entry, str) else entry for entry in value]
    elif isinstance(value, str):
        value = meta["aliases"].get(value, value)
    try:
        converted = OmegaConf.merge(_one_field(kind), {"value": value}).value
    except OmegaConfBaseException as error:
        what = str(error).splitlines()[0]
        faults.append(Fault(where, what[0].lower() + what[1:], hint))
        return value
    entries = [(where, value, converted)]
    if OmegaConf.is_list(converted):
        entries = [(f"{where}[{index}]", *pair) for index, pair in enumerate(zip(value, converted, strict=True))]
    for place, written, entry in entries:
        if fault := _fault(written, entry, meta):
            faults.append(Fault(place, fault[0], fault[1] or hint))
    return value


def _fault(written: Any, value: Any, meta: Mapping[str, Any]) -> tuple[str, str] | None:
    """What is wrong with a converted value, and a hint where the description of its field is none."""
    options, least, most = meta["options"], meta["minimum"], meta["maximum"]
    if options and value not in options:
        hint = did_you_mean(str(written), options, "one of " + ", ".join(options))
        return f"unknown value '{written}'", hint
    if meta["pattern"] and not re.fullmatch(meta["pattern"], str(value)):
        return f"unknown value '{written}'", ""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{written} is not a finite number", ""
    if least is not None and value is not None and value < least:
        return f"{written} is less than {least}", ""
    if most is not None and value is not None and value > most:
        return f"{written} is more than {most}", ""
    return None


@functools.cache
def _one_field(kind: Any) -> DictConfig:
    """A config with one value of a type: OmegaConf's check of a value, without building its whole section."""
    holder = dataclasses.make_dataclass("Holder", [("value", kind, dataclasses.field(default=MISSING))])
    config = OmegaConf.structured(holder)
    assert isinstance(config, DictConfig)
    return config


def without_none(hint: Any) -> Any:
    """The type of an optional field without its None."""
    if isinstance(hint, types.UnionType):
        return next(arg for arg in typing.get_args(hint) if arg is not type(None))
    return hint


def _kind(value: Any) -> str:
    if isinstance(value, list | dict):
        return _shape(value)
    return "empty" if value is None else f"the value '{value}'"


def _shape(value: Any) -> str:
    return "a list" if isinstance(value, list) else "a section" if isinstance(value, dict) else "a single value"
