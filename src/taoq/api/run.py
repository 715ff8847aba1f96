# SPDX-License-Identifier: Apache-2.0
"""taoq.run: every command of the command line as a call."""

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
    """Run a command of the command line, silently.

    Args:
        task: The task.
        action: The action.
        spec: Path of the spec, or the spec as a dictionary.
        overrides: `key=value`, as on the command line.
        flags: `dry_run=True` of quantize; `artifacts=[...]` of compare.

    Returns:
        What the action returns: QuantizeResult, EvaluateResult, ...

    Raises:
        TaoqError: Whatever the command would print; of the same types, with `exit_code`.
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
