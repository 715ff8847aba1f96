# SPDX-License-Identifier: Apache-2.0
"""The exception tree; imports nothing from taoq.

TaoqError (exit code 1)
  SpecError (2)          the spec or the command line is wrong
  MissingDependency (3)  a library that the job needs is not installed
  RequirementNotMet (4)  the job is done, and its result is not what the spec asks for

Every error is one or more faults; a fault prints as two lines, `where: what` and `hint: what to do`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    Attributes:
        where: A spec field (`quantize.layers[0].module_name`), a file, or a word of the command line.
        what: What is wrong with it, in one line.
        hint: What to do about it, in one line.
    """

    where: str
    what: str
    hint: str


class TaoqError(Exception):
    """Failed at work: a bad file, bad data, a library that did not do what the plan says."""

    exit_code = 1

    def __init__(self, *faults: Fault) -> None:
        super().__init__("\n".join(f"{f.where}: {f.what}\nhint: {f.hint}" for f in faults))
        self.faults = faults


class SpecError(TaoqError):
    """Wrong use or a wrong spec: nothing was started."""

    exit_code = 2


class MissingDependency(TaoqError):
    """A library that this job needs is not installed."""

    exit_code = 3


class RequirementNotMet(TaoqError):
    """The work is done; its result is not what the spec asks for."""

    exit_code = 4


def some(names: Sequence[str]) -> str:
    """The first three of many names."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def did_you_mean(word: str, known: Iterable[str], otherwise: str) -> str:
    """A hint with the nearest of `known`, or `otherwise` where none is near."""
    names = list(dict.fromkeys(known))
    near = difflib.get_close_matches(word, names, n=3, cutoff=0.6)
    if not near:  # a part of a name, or another case, scores low
        near = [name for name in names if word.lower() in name.lower()][:3]
    return "did you mean " + " or ".join(f"'{name}'" for name in near) + "?" if near else otherwise
