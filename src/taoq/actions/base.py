# SPDX-License-Identifier: Apache-2.0
"""Code that all actions share: load the spec, show the result."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from taoq.actions import ACTIONS
from taoq.pipeline.experiment import Experiment, bind
from taoq.spec.load import load_spec
from taoq.spec.source import SpecSource
from taoq.tasks.base import S, Task

if TYPE_CHECKING:
    from rich.table import Table

Show = Callable[["Table | str"], None]
"""Receives the lines and tables that an action shows: prints them on the command line, drops them in a Python call."""


def nowhere(item: Table | str) -> None:
    """Drop an item."""


def load(task: Task[S], source: SpecSource, *needed: str) -> S:
    """Load the spec of a task.

    Args:
        task: The task.
        source: The spec file and its overrides.
        needed: Names of the sections that the action needs; only these must be complete.

    Raises:
        SpecError: If the spec is invalid; lists every fault.
        TaoqError: If files that the spec takes values from cannot be read.
    """
    not_needed = tuple(name for name in ACTIONS if name not in needed)
    spec = load_spec(source, task.spec, unused=task.unused, not_needed=not_needed)
    return task.complete(spec, source.is_written) if task.complete else spec


def load_experiment(task: Task[S], source: SpecSource, *needed: str) -> Experiment:
    """Load a spec and bind the task to it. Takes the arguments of `load`."""
    return bind(task, load(task, source, *needed))
