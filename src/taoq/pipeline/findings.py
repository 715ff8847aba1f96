# SPDX-License-Identifier: Apache-2.0
"""What was measured of a calibrated model, kept in a file as it is found: an interrupted run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from taoq.errors import Fault, Notice, SpecError
from taoq.files import replace_text
from taoq.plain import JsonMapping, JsonObject
from taoq.quantization.types import LayerPlan

log = logging.getLogger(__name__)

FILE = "analysis.json"
EVALUATION = "evaluation"
"""The part of a key that says what the true metric was measured on, and how."""
Kind = Literal["noise", "figure", "highest_difference"]


class Finding(NamedTuple):
    """What a number is about.

    Attributes:
        kind: Noise of the outputs, value of a figure, or upper end of the interval of its difference to float.
        figure: The figure; empty for noise.
        layers: Digest of the quantized layers and their formats.
    """

    kind: Kind
    figure: str
    layers: str


def digest_of(items: Iterable[LayerPlan]) -> str:
    """A choice of layers and formats as a short text: hundreds of names make a long key."""
    formats = [str(item.format) for item in items]
    return f"{len(formats)} layers {hashlib.sha256('; '.join(formats).encode()).hexdigest()[:16]}"


@dataclass(frozen=True)
class Findings:
    """The numbers found so far.

    Attributes:
        path: The file of the finished analysis; one beside it keeps the findings of an unfinished one.
        key: What they depend on.
        values: The numbers.
    """

    path: Path | None
    key: Mapping[str, str]
    values: dict[Finding, float] = field(default_factory=dict)

    def get(self, finding: Finding, measure: Callable[[], float]) -> float:
        """A number: known, or measured now and written down."""
        if finding not in self.values:
            self.values[finding] = measure()
            if self.path:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                replace_text(_unfinished(self.path), self._text({}))
        return self.values[finding]

    def finish(self, results: JsonMapping) -> None:
        """Write the finished analysis: the findings, and the results made from them."""
        if self.path:
            replace_text(self.path, self._text(results))
            _unfinished(self.path).unlink(missing_ok=True)

    def _text(self, results: JsonMapping) -> str:
        return json.dumps({"key": dict(self.key), "found": _to_json(self.values), **results}, indent=1) + "\n"


def open_findings(path: Path | None, key: Mapping[str, str]) -> Findings:
    """Load the findings of earlier runs, finished or not, whose key matches."""
    findings = Findings(path, key)
    for file in (path, _unfinished(path)) if path else ():
        kept = _read(file)
        if kept is None:
            continue
        values, differing = _fitting(kept, key)
        if differing:
            again = "everything except the ranking" if values else "everything"
            log.info(Notice(str(file), f"is of another {', '.join(differing)}: {again} is measured again"))
        if values:
            log.info(Notice(str(file), f"{len(values)} measurements are taken from it"))
        findings.values.update(values)
    return findings


def given_findings(path: Path, key: Mapping[str, str], where: str) -> Mapping[Finding, float]:
    """The findings of a file that a spec names.

    Args:
        path: The file.
        key: What the findings must be of.
        where: The field that names it.

    Raises:
        SpecError: There is no such file, it is something else, or of another model.
    """
    kept = _read(path)
    if kept is None:
        hint = "name the analysis.json of taoq <task> analyze, or leave it out"
        raise SpecError(Fault(where, f"{path} is no analysis", hint))
    values, differing = _fitting(kept, key)
    if differing and not values:
        hint = "run taoq <task> analyze on this model, or leave it out"
        raise SpecError(Fault(where, f"{path} is of another {', '.join(differing)}", hint))
    return values


def _unfinished(path: Path) -> Path:
    return path.with_suffix(f".unfinished{path.suffix}")


def _fitting(
    kept: tuple[Mapping[str, str], Mapping[Finding, float]], key: Mapping[str, str]
) -> tuple[Mapping[Finding, float], list[str]]:
    """The findings that are valid for a key, and the parts in which the keys differ.

    With another evaluation the ranking is the same, the metric is not.
    """
    before, values = kept
    differing = [name for name in {**before, **key} if before.get(name) != key.get(name)]
    if not differing:
        return values, []
    if differing == [EVALUATION]:
        return {finding: value for finding, value in values.items() if finding.kind == "noise"}, differing
    return {}, differing


def _to_json(values: Mapping[Finding, float]) -> JsonObject:
    """Numbers by kind, figure and layers."""
    nested: JsonObject = {}
    for finding, value in values.items():
        nested.setdefault(finding.kind, {}).setdefault(finding.figure, {})[finding.layers] = value
    return nested


def _read(path: Path) -> tuple[Mapping[str, str], Mapping[Finding, float]] | None:
    """Key and findings of a file; None if there is none, or it is something else, such as an earlier taoq's."""
    kinds: tuple[Kind, ...] = ("noise", "figure", "highest_difference")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        key = {str(name): str(value) for name, value in data["key"].items()}
        if not set(data["found"]) <= set(kinds):
            return None
        values = {
            Finding(kind, str(figure), str(layers)): float(value)
            for kind in kinds
            for figure, by_layers in data["found"].get(kind, {}).items()
            for layers, value in by_layers.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return key, values
