# SPDX-License-Identifier: Apache-2.0
"""default_specs: write a commented spec with every field and its default."""

from __future__ import annotations

from pathlib import Path

from taoq.actions.base import Show, load
from taoq.errors import Fault, TaoqError
from taoq.pipeline.staging import staged
from taoq.spec.schema import commented_yaml
from taoq.spec.source import SpecSource
from taoq.tasks.base import S, Task


def run(task: Task[S], source: SpecSource, show: Show) -> str:
    """Show the spec; with results_dir=..., write it to `<results_dir>/experiment.yaml` instead, as TAO does."""
    text = commented_yaml(task.spec)
    results = load(task, source).results_dir
    if not results:
        show(text.rstrip("\n"))
        return text
    path = Path(results, "experiment.yaml")
    if path.exists():
        raise TaoqError(Fault(str(path), "is there already", "name another results_dir, or move the file away"))
    with staged(path.parent) as stage:
        stage.write_text(path.name, text)
        stage.commit()
    show(str(path))
    return text
