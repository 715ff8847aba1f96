# SPDX-License-Identifier: Apache-2.0
"""taoq.run."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from taoq.actions import ACTIONS
from taoq.actions.base import nowhere
from taoq.errors import Fault, SpecError, TaoqError, did_you_mean
from taoq.plain import JsonMapping
from taoq.spec.source import read_spec, source_of
from taoq.tasks import load_task


def run(task: str, action: str, spec: str | Path | JsonMapping, overrides: Sequence[str] = (), **flags: object) -> Any:
    """Run `taoq <task> <action> -e <spec>`, without printing.

    Args:
        task: Name of a task, such as `classification_pyt`.
        action: Name of an action, such as `evaluate`.
        spec: Path of the spec file, or the spec as a dictionary.
        overrides: Overrides of fields, `section.field=value`, as on the command line.
        flags: Options of the command: `dry_run=True` of quantize, `artifacts=[...]` of compare.

    Returns:
        The result of the action: QuantizeResult for quantize, EvaluateResult for evaluate, and so on.

    Raises:
        TaoqError: If the command fails. `exit_code` is the exit code of the command line.

    Example:
        >>> import taoq
        >>> overrides = ["evaluate.checkpoint=results/quantize", "evaluate.device=cpu"]
        >>> result = taoq.run("classification_pyt", "evaluate", "spec.yaml", overrides)
        >>> accuracy = result.metrics["val_acc_1"]
    """
    if action not in ACTIONS:
        hint = did_you_mean(action, ACTIONS, "actions are " + ", ".join(ACTIONS))
        raise SpecError(Fault(f"{task} {action}", "there is no such action", hint))
    module = importlib.import_module(ACTIONS[action].module)
    loaded = load_task(task)
    source = source_of(spec, overrides) if isinstance(spec, Mapping) else read_spec(str(spec), overrides)
    try:
        return module.run(loaded, source, nowhere, **flags)
    except TaoqError as error:
        error.locate(lambda where: source.locate(where, loaded.spec))
        raise
