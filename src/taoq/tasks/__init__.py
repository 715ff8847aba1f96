# SPDX-License-Identifier: Apache-2.0
"""The table of tasks. Importing it loads none of them."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

from taoq.tasks.base import Task


class TaskInfo(NamedTuple):
    """A row of the table: where the task is, and what the help says of it."""

    module: str
    summary: str


TASKS = {
    "classification_pyt": TaskInfo(
        "taoq.tasks.classification.task", "image classification (timm and torchvision networks)"
    ),
    "rtdetr": TaskInfo("taoq.tasks.rtdetr.task", "object detection with RT-DETR"),
}


def load_task(name: str) -> Task[Any]:
    """Import a task that is built."""
    task: Task[Any] = importlib.import_module(TASKS[name].module).TASK
    return task
