# SPDX-License-Identifier: Apache-2.0
"""Merge overrides into a spec: `key=value`, and Hydra's `+key=value`, `++key=value` and `~key`."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from taoq.errors import Fault, SpecError, first_line
from taoq.plain import Plain
from taoq.spec.hydra import NotHydraError, parse_value

NO_INTERPOLATION = "does not parse as an interpolation"
INTERPOLATION_HINT = "give it a value, or write the path of an existing field as ${section.field}"
_ONCE = "write each key once in a section"
PLAIN = "a spec is plain YAML data"
_OF_YAML = tuple("[{'\"!&|>%`")
"""Characters that begin anything but a plain text in YAML."""
_FORM = re.compile(r"(?P<sign>\+\+|\+|~)?(?P<key>[^+~=][^=]*)(?P<equals>=)?(?P<value>.*)", re.DOTALL)


@dataclass(frozen=True)
class Override:
    """An override.

    Attributes:
        text: What the user wrote.
        sign: `+` adds a field, `++` adds or replaces it, `~` removes it; empty: as `++`.
        key: The dotted key, with list entries by index: `quantize.layers.0.weights`.
        value: The text of the value; None if there is none, after `~`.
    """

    text: str
    sign: str
    key: str
    value: str | None

    @property
    def field(self) -> str:
        """The key as a field: `quantize.layers[0].weights`."""
        return re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", self.key)

    @property
    def path(self) -> list[str]:
        """The parts of the key."""
        return re.sub(r"\[(\w+)\]", r".\1", self.key).split(".")


def merge_overrides(data: DictConfig, overrides: Sequence[str]) -> tuple[DictConfig, Mapping[str, str]]:
    """Merge overrides into a parsed spec, in their order.

    Returns:
        The spec with the overrides, and the last override of each field.

    Raises:
        SpecError: If an override has another form, does not fit the spec, adds what is there, or removes what is not.
    """
    by_field: dict[str, str] = {}
    for text in overrides:
        override = _parse(text)
        data = _removed(data, override) if override.sign == "~" else _merged(data, override)
        by_field[override.field] = text
    return data, by_field


def _parse(text: str) -> Override:
    form = _FORM.fullmatch(text)
    if not form or not (form["equals"] or form["sign"] == "~"):
        raise SpecError(Fault(text, "an override has the form key=value", "for example quantize.device=cpu"))
    return Override(text, form["sign"] or "", form["key"], form["value"] if form["equals"] else None)


def _merged(data: DictConfig, override: Override) -> DictConfig:
    with _located(override):
        value = _value(override.value or "")
        present = _find(OmegaConf.to_container(data), override.path)
        if override.sign == "+" and present is not None and not isinstance(value, list | dict):  # Hydra merges these.
            where = f"override {override.text}: {override.field}"
            hint = f"write ++{override.key}=..., which replaces it"
            raise SpecError(Fault(where, "the spec has it already, and + only adds", hint))
        OmegaConf.update(data, override.key, value, merge=isinstance(present, dict) and isinstance(value, dict))
    return data


def _removed(data: DictConfig, override: Override) -> DictConfig:
    """Return the spec without a field, which then has its default; `~key=value` requires that it has this value."""
    where = f"override {override.text}: {override.field}"
    plain = OmegaConf.to_container(data)
    *parents, name = override.path
    section, current = _find(plain, parents), _find(plain, override.path)
    if current is None:
        what = "the spec does not have it, there is nothing to remove"
        raise SpecError(Fault(where, what, "leave the override out: the field has its default"))
    with _located(override):
        value = current if override.value is None else _value(override.value)
    if current != value:
        raise SpecError(Fault(where, f"is {current}, not {value}", f"write ~{override.key} to remove any value"))
    section.pop(int(name) if isinstance(section, list) else name)
    without = OmegaConf.create(plain)
    assert isinstance(without, DictConfig)
    return without


@contextlib.contextmanager
def _located(override: Override) -> Iterator[None]:
    """Turn errors of OmegaConf and YAML into a SpecError that names the override."""
    where = f"override {override.text}"
    try:
        yield
    except GrammarParseError:
        raise SpecError(Fault(f"{where}: {override.field}", NO_INTERPOLATION, INTERPOLATION_HINT)) from None
    except yaml.YAMLError as error:
        raise SpecError(not_yaml(where, error)) from None
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        hint = "name an existing field; lists take an index, layers.0.weights.dtype"
        raise SpecError(Fault(where, first_line(error), hint)) from None


def _value(text: str) -> object:
    """Convert a value by Hydra's grammar, as TAO does. What is not in the grammar is YAML, or a plain text as it is."""
    try:
        return parse_value(text)
    except NotHydraError:
        if not text.lstrip().startswith(_OF_YAML):
            return text.strip()
        data = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
        assert isinstance(data, dict)
        return data["value"]


def _find(data: Plain, path: Sequence[str]) -> Plain:
    """Return the value at a path in plain data; None if there is none."""
    for name in path:
        if isinstance(data, dict):
            data = data.get(name)
        elif isinstance(data, list) and name.isdigit() and int(name) < len(data):
            data = data[int(name)]
        else:
            return None
    return data


def not_yaml(where: str, error: yaml.YAMLError) -> Fault:
    """Return the fault of a text that is not valid YAML."""
    what = getattr(error, "problem", None) or first_line(error)
    if what.startswith("but "):
        what = f"{getattr(error, 'context', '')}, {what}"
    what = what.replace("tag:yaml.org,2002:", "!!")
    return Fault(where, f"not valid YAML: {what}", _ONCE if "duplicate" in what else PLAIN)
