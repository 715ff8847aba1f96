# SPDX-License-Identifier: Apache-2.0
"""Errors and notices for the user. Imports nothing from taoq.

TaoqError (exit code 1)
  SpecError (2)          the spec or the command line is wrong
    NotGiven (2)         a field that this job needs is not set
  MissingDependency (3)  a library that the job needs is not installed
  RequirementNotMet (4)  the job is done, but its result is not what the spec asks for

An error holds one or more faults. A fault prints as two lines, `where: what` and `hint: what to do`. A notice is one
line, `where: what`, and is logged: `log.warning(Notice(...))`.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One problem, and how to solve it.

    Attributes:
        where: A spec field (`quantize.layers[0].module_name`), a file, or a word of the command line.
        what: What is wrong there, in one line.
        hint: What to do about it, in one line.
    """

    where: str
    what: str
    hint: str


@dataclass(frozen=True)
class Notice:
    """A log message about a spec field or a file. The command line adds the field's line in the spec.

    Attributes:
        where: A spec field, a file, or a word of the command line.
        what: The message, in one line.
    """

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class TaoqError(Exception):
    """The job failed: a bad file, bad data, or a library that did not do what the plan says."""

    exit_code = 1

    def __init__(self, *faults: Fault) -> None:
        super().__init__()
        self.faults = faults

    def __str__(self) -> str:
        return "\n".join(f"{fault.where}: {fault.what}\nhint: {fault.hint}" for fault in self.faults)

    def locate(self, locate: Callable[[str], str]) -> None:
        """Replace the `where` of each fault by `locate(where)`, which adds the line of the spec."""
        self.faults = tuple(dataclasses.replace(fault, where=locate(fault.where)) for fault in self.faults)


class SpecError(TaoqError):
    """The spec or the command line is wrong. Raised before any work starts."""

    exit_code = 2


class NotGiven(SpecError):
    """A field that this job needs is not set."""


class MissingDependency(TaoqError):
    """A library that this job needs is not installed."""

    exit_code = 3


class RequirementNotMet(TaoqError):
    """The job is done, but its result is not what the spec asks for.

    Attributes:
        result: The result of the job; None if none was kept.
    """

    exit_code = 4

    def __init__(self, *faults: Fault, result: object = None) -> None:
        super().__init__(*faults)
        self.result = result


def abbreviated(names: Sequence[str]) -> str:
    """Return the first three names, followed by `...` if there are more."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its class name if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def did_you_mean(word: str, names: Iterable[str], otherwise: str) -> str:
    """Return a hint with the names closest to `word`, or `otherwise` if none is close."""
    candidates = list(dict.fromkeys(names))
    matches = difflib.get_close_matches(word, candidates, n=3, cutoff=0.6)
    if not matches:  # difflib scores a part of a name, or a name in another case, too low
        matches = [name for name in candidates if word.lower() in name.lower()][:3]
    return did_you_mean_any(matches, otherwise)


def did_you_mean_any(names: Sequence[str], otherwise: str) -> str:
    """Return a hint with the given names, or `otherwise` if there are none."""
    return "did you mean " + " or ".join(f"'{name}'" for name in names) + "?" if names else otherwise
