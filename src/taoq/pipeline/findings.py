# SPDX-License-Identifier: Apache-2.0
"""Measurements of a calibrated model, saved to a file one by one so that an interrupted run can be resumed."""

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
"""Part of a key that identifies the evaluation data and the metric."""
Kind = Literal["noise", "figure", "highest_difference"]


class Finding(NamedTuple):
    """Identifies a measured number.

    Attributes:
        kind: Noise of the outputs, value of a figure, or upper end of the interval of its difference to float.
        figure: Name of the figure; empty for noise.
        layers: Digest of the quantized layers and their formats, from `digest_of`.
    """

    kind: Kind
    figure: str
    layers: str


def digest_of(items: Iterable[LayerPlan]) -> str:
    """Return a short digest of layers and their formats, because hundreds of names would make a long key."""
    formats = [str(item.format) for item in items]
    return f"{len(formats)} layers {hashlib.sha256('; '.join(formats).encode()).hexdigest()[:16]}"


@dataclass(frozen=True)
class Findings:
    """The measurements so far.

    Attributes:
        path: File of the finished analysis; an unfinished analysis is kept in a file beside it. None keeps nothing.
        key: Everything that the measurements depend on, by name.
        values: The measured numbers.
    """

    path: Path | None
    key: Mapping[str, str]
    values: dict[Finding, float] = field(default_factory=dict)

    def get(self, finding: Finding, measure: Callable[[], float]) -> float:
        """Return a number, and measure and save it if that has not been done yet."""
        if finding not in self.values:
            self.values[finding] = measure()
            if self.path:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                replace_text(_unfinished(self.path), self._text({}))
        return self.values[finding]

    def finish(self, results: JsonMapping) -> None:
        """Write the file of the finished analysis: the findings, and the results computed from them."""
        if self.path:
            replace_text(self.path, self._text(results))
            _unfinished(self.path).unlink(missing_ok=True)

    def _text(self, results: JsonMapping) -> str:
        return json.dumps({"key": dict(self.key), "found": _to_json(self.values), **results}, indent=1) + "\n"


def open_findings(path: Path | None, key: Mapping[str, str]) -> Findings:
    """Load the findings of earlier runs, finished or not, whose key matches."""
    findings = Findings(path, key)
    for file in (path, _unfinished(path)) if path else ():
        earlier = _read(file)
        if earlier is None:
            continue
        values, differing = _fitting(earlier, key)
        if differing:
            remeasured = "everything except the ranking" if values else "everything"
            log.info(Notice(str(file), f"is of another {', '.join(differing)}: {remeasured} is measured again"))
        if values:
            log.info(Notice(str(file), f"{len(values)} measurements are taken from it"))
        findings.values.update(values)
    return findings


def given_findings(path: Path, key: Mapping[str, str], where: str) -> Mapping[Finding, float]:
    """Load the findings of a file that a spec names.

    Args:
        path: The file.
        key: Key that the findings must match.
        where: Field that names the file, for messages.

    Raises:
        SpecError: If the file is missing, is not an analysis, or belongs to another model.
    """
    analysis = _read(path)
    if analysis is None:
        hint = "name the analysis.json of taoq <task> analyze, or leave it out"
        raise SpecError(Fault(where, f"{path} is not an analysis", hint))
    values, differing = _fitting(analysis, key)
    if differing and not values:
        hint = "run taoq <task> analyze on this model, or leave it out"
        raise SpecError(Fault(where, f"{path} is of another {', '.join(differing)}", hint))
    return values


def _unfinished(path: Path) -> Path:
    return path.with_suffix(f".unfinished{path.suffix}")


def _fitting(
    analysis: tuple[Mapping[str, str], Mapping[Finding, float]], key: Mapping[str, str]
) -> tuple[Mapping[Finding, float], list[str]]:
    """Return the findings that are valid for a key, and the names of the parts in which the keys differ.

    The noise does not depend on the evaluation, so it stays valid if only the evaluation differs.
    """
    other_key, values = analysis
    differing = [name for name in {**other_key, **key} if other_key.get(name) != key.get(name)]
    if not differing:
        return values, []
    if differing == [EVALUATION]:
        return {finding: value for finding, value in values.items() if finding.kind == "noise"}, differing
    return {}, differing


def _to_json(values: Mapping[Finding, float]) -> JsonObject:
    """Nest the numbers by kind, figure and layers."""
    nested: JsonObject = {}
    for finding, value in values.items():
        nested.setdefault(finding.kind, {}).setdefault(finding.figure, {})[finding.layers] = value
    return nested


def _read(path: Path) -> tuple[Mapping[str, str], Mapping[Finding, float]] | None:
    """Read the key and the findings of a file; None if it is missing or not an analysis of this version's form."""
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
