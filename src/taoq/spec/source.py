# SPDX-License-Identifier: Apache-2.0
"""Read a YAML spec with its command-line overrides, and record the line of each field."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from taoq.errors import Fault, SpecError, first_line
from taoq.spec.fields import is_field
from taoq.spec.overrides import INTERPOLATION_HINT, NO_INTERPOLATION, PLAIN, merge_overrides, not_yaml


@dataclass(frozen=True)
class SpecSource:
    """A parsed spec, with the line or the override that each value comes from.

    Attributes:
        path: The YAML file, as the user wrote it; empty if there is none.
        data: The parsed tree, not yet interpolated.
        lines: Line number (from 1) by field, `quantize.layers[0].module_name`.
        overrides: The last override of a field, as the user wrote it, by field.
        command: The command line, for reports.
    """

    path: str
    data: DictConfig
    lines: Mapping[str, int]
    overrides: Mapping[str, str]
    command: str

    def is_written(self, field: str) -> bool:
        """Return whether the user wrote a field, in the file or as an override; null is the same as leaving it out."""
        return OmegaConf.select(self.data, field, throw_on_missing=False, throw_on_resolution_failure=False) is not None

    def locate(self, where: str, schema: type | None = None) -> str:
        """Prefix a field with its file and line, or with the override that set it.

        Args:
            where: A field, or anything else that a fault can be about.
            schema: If given, a field of this schema that is not written in the spec gets the line of its section.

        Returns:
            `where` with its prefix; unchanged if it has no place in the spec.
        """
        field = where
        while field:  # An override of a section or a list replaced all lines below it.
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
    """Parse a YAML file and merge overrides into it; nothing is interpolated or checked yet.

    Args:
        path: The file; None for an empty spec.
        overrides: `key=value` with a dotted key; list entries by index, `quantize.layers.0.weights.dtype=int8`. As in
            Hydra, `+key=value` only adds a field, `++key=value` adds or replaces it, and `~key` removes it.
        command: The command line, for reports.

    Raises:
        SpecError: If the file is missing, does not parse, has a duplicate key, or is not a mapping; or if an override
            has another form or does not fit the tree.
    """
    data, lines = _parse(_read(path), path)
    data, by_field = merge_overrides(data, overrides)
    return SpecSource(path or "", data, lines, by_field, command)


def source_of(data: Mapping[str, object], overrides: Sequence[str] = (), *, command: str = "") -> SpecSource:
    """Make a spec from a dictionary, with overrides merged into it.

    Raises:
        SpecError: If a value is not plain data, or does not parse as an interpolation.
    """
    try:
        config = OmegaConf.create(dict(data))
    except GrammarParseError as error:
        raise SpecError(Fault(str(error.full_key), NO_INTERPOLATION, INTERPOLATION_HINT)) from None
    except OmegaConfBaseException as error:
        raise SpecError(Fault(str(error.full_key or "config"), _lower(first_line(error)), PLAIN)) from None
    config, by_field = merge_overrides(config, overrides)
    return SpecSource("", config, {}, by_field, command)


def _read(path: str | None) -> str:
    try:
        return Path(path).read_text(encoding="utf-8") if path else ""
    except OSError as error:
        raise SpecError(Fault(str(path), f"cannot be read: {error.strerror}", "give the spec file with -e")) from None
    except UnicodeDecodeError:
        raise SpecError(Fault(str(path), "is not a text file in UTF-8", "give a YAML file with -e")) from None


def _parse(text: str, path: str | None) -> tuple[DictConfig, dict[str, int]]:
    """Parse a YAML text. Returns its tree and the line of each field."""
    lines: dict[str, int] = {}
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        # An empty file is an empty spec: checking it against the schema reports what is missing.
        if root is not None and not isinstance(root, yaml.MappingNode):
            kind = "a list" if isinstance(root, yaml.SequenceNode) else "a single value"
            hint = "write sections: `quantize:`, `dataset:`, ..."
            raise SpecError(Fault(f"{path}:1", f"the spec is {kind}, not a mapping", hint))
        lines = dict(_lines(root, "")) if root is not None else {}
        data = OmegaConf.create(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise SpecError(not_yaml(f"{path}:{mark.line + 1}" if mark else str(path), error)) from None
    except GrammarParseError as error:
        where = f"{path}:{lines.get(str(error.full_key), 1)}: {error.full_key}"
        raise SpecError(Fault(where, NO_INTERPOLATION, INTERPOLATION_HINT)) from None
    assert isinstance(data, DictConfig)
    return data, lines


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


def _parent(field: str) -> str:
    """Return `quantize.layers` for `quantize.layers[0]`, `quantize` for that, and an empty string for that."""
    parent = re.sub(r"(^|\.)[^.\[\]]+$|\[\d+\]$", "", field)
    return parent if parent != field else ""  # Unchanged: `field` is not a field but, say, a file name.


def _lower(text: str) -> str:
    return text[0].lower() + text[1:]
