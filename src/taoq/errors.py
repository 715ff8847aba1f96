# SPDX-License-Identifier: Apache-2.0
"""What taoq tells its user: errors and notices. Imports nothing from taoq.

TaoqError (exit code 1)
  SpecError (2)          the spec or the command line is wrong
    NotGiven (2)         a field that this job needs is not set
  MissingDependency (3)  a library that the job needs is not installed
  RequirementNotMet (4)  the job is done, but its result is not what the spec asks for

An error is one or more faults; a fault prints as two lines, `where: what` and `hint: what to do`. A notice is one line,
`where: what`, and is logged: `log.warning(Notice(...))`.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Sequence
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


@dataclass(frozen=True)
class Notice:
    """Something the user should know about a field or a file. The command line adds the field's line in the spec.

    Attributes:
        where: A spec field, a file, or a word of the command line.
        what: What to know, in one line.
    """

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class TaoqError(Exception):
    """The job failed: a bad file, bad data, a library that did not do what the plan says."""

    exit_code = 1

    def __init__(self, *faults: Fault) -> None:
        super().__init__()
        self.faults = faults

    def __str__(self) -> str:
        return "\n".join(f"{fault.where}: {fault.what}\nhint: {fault.hint}" for fault in self.faults)

    def locate(self, locate: Callable[[str], str]) -> None:
        """Add to the field of each fault where the spec has it."""
        self.faults = tuple(dataclasses.replace(fault, where=locate(fault.where)) for fault in self.faults)


class SpecError(TaoqError):
    """Wrong use or a wrong spec. Raised before any work starts."""

    exit_code = 2


class NotGiven(SpecError):
    """A field that this job needs is not set."""


class MissingDependency(TaoqError):
    """A library that this job needs is not installed."""

    exit_code = 3


class RequirementNotMet(TaoqError):
    """The job is done, but its result is not what the spec asks for.

    Attributes:
        result: The result; None if nothing was kept.
    """

    exit_code = 4

    def __init__(self, *faults: Fault, result: object = None) -> None:
        super().__init__(*faults)
        self.result = result


def abbreviated(names: Sequence[str]) -> str:
    """The first three names, with `...` if there are more."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def first_line(error: BaseException) -> str:
    """The first line of an exception's message; its class name if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def did_you_mean(word: str, names: Iterable[str], otherwise: str) -> str:
    """A hint with the names nearest to `word`, or `otherwise` if none is near."""
    candidates = list(dict.fromkeys(names))
    near = difflib.get_close_matches(word, candidates, n=3, cutoff=0.6)
    if not near:  # a part of a name, or another case, scores low
        near = [name for name in candidates if word.lower() in name.lower()][:3]
    return "did you mean " + " or ".join(f"'{name}'" for name in near) + "?" if near else otherwise
