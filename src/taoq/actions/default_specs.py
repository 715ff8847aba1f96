# SPDX-License-Identifier: Apache-2.0
"""default_specs: a commented spec with every field and its default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from taoq.actions.results import staged
from taoq.errors import Fault, TaoqError
from taoq.schema import commented_yaml
from taoq.spec import SpecSource, load_spec
from taoq.tasks.base import Task


def run(task: Task[Any], source: SpecSource) -> None:
    """Print the spec, or write it as `<results_dir>/experiment.yaml` where results_dir=... is given, as in TAO."""
    text = commented_yaml(task.spec)
    spec = load_spec(source, task.spec, unused=task.unused)
    if not spec.results_dir:
        print(text, end="")
        return
    path = Path(spec.results_dir, "experiment.yaml")
    if path.exists():
        raise TaoqError(Fault(str(path), "is there already", "name another results_dir, or move the file away"))
    with staged(path.parent) as stage:
        (stage / path.name).write_text(text, encoding="utf-8")
    print(path)
