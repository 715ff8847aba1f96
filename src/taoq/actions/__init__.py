# SPDX-License-Identifier: Apache-2.0
"""The table of actions. Importing it imports none of them.

An action is a module with a function `run(task, source, show)`, which loads the spec, calls the pipeline, shows the
result and returns it. Actions depend on no particular task.
"""

from __future__ import annotations

from typing import NamedTuple


class ActionInfo(NamedTuple):
    """The module of an action, and its line in the help."""

    module: str
    summary: str


ACTIONS = {
    "quantize": ActionInfo("taoq.actions.quantize", "quantize a checkpoint into an artifact"),
    "evaluate": ActionInfo("taoq.actions.evaluate", "evaluate a float checkpoint or an artifact on labelled data"),
    "inference": ActionInfo("taoq.actions.inference", "run a float checkpoint or an artifact on images"),
    "export": ActionInfo("taoq.actions.export", "export a checkpoint or an artifact to ONNX, and verify its outputs"),
    "benchmark": ActionInfo("taoq.actions.benchmark", "measure the speed of a quantized model and of its float model"),
    "analyze": ActionInfo("taoq.actions.analyze", "rank the layers by what quantizing them costs"),
    "compare": ActionInfo("taoq.actions.compare", "compare artifacts: accuracy, size, speed, layers"),
    "default_specs": ActionInfo("taoq.actions.default_specs", "write a commented spec with all defaults"),
}
