# SPDX-License-Identifier: Apache-2.0
"""What every action does: load its spec, and show its result."""

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
"""Where an action shows its result: the screen, or nowhere for a Python caller."""


def nowhere(item: Table | str) -> None:
    """Show nothing."""


def load(task: Task[S], source: SpecSource, *needed: str) -> S:
    """Load the spec of a task.

    Args:
        task: The task.
        source: The spec.
        needed: Names of the actions whose sections must be complete.

    Raises:
        SpecError: With every fault of the spec.
    """
    not_needed = tuple(name for name in ACTIONS if name not in needed)
    return load_spec(source, task.spec, unused=task.unused, not_needed=not_needed)


def load_experiment(task: Task[S], source: SpecSource, *needed: str) -> Experiment:
    """Load a spec and bind its task to it; the arguments are those of `load`."""
    return bind(task, load(task, source, *needed))
