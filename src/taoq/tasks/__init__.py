# SPDX-License-Identifier: Apache-2.0
"""Tasks, by their name on the command line. Importing this package loads none of them."""

from __future__ import annotations

from typing import Any

from taoq.errors import Fault, TaoqError
from taoq.plugins import TASKS
from taoq.tasks.base import Task


def load_task(name: str) -> Task[Any]:
    """Import a task.

    Raises:
        SpecError: If there is no such task.
        MissingDependency: If a library that it needs is not installed.
        TaoqError: If another package provides it, and it cannot be imported or is not a Task.
    """
    task = TASKS.load(name, "the task")
    if not isinstance(task, Task):
        what = f"task {name}{TASKS.rows()[name].origin} is not a taoq.tasks.base.Task"
        raise TaoqError(Fault("the task", what, "let the entry point name a Task"))
    return task
