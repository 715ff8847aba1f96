# SPDX-License-Identifier: Apache-2.0
"""The table of actions. Importing it loads none of them.

An action is a module with `run(task, source, show)`: it loads the spec, calls the pipeline, shows the result and
returns it. It knows no task by name.
"""

from __future__ import annotations

from typing import NamedTuple


class ActionInfo(NamedTuple):
    """A row of the table: where the action is, and what the help says about it."""

    module: str
    summary: str


ACTIONS = {
    "quantize": ActionInfo("taoq.actions.quantize", "quantize a checkpoint into an artifact"),
    "evaluate": ActionInfo("taoq.actions.evaluate", "measure a float checkpoint or an artifact on labelled data"),
    "inference": ActionInfo("taoq.actions.inference", "run a float checkpoint or an artifact on images"),
    "export": ActionInfo("taoq.actions.export", "write a checkpoint or an artifact as an ONNX file, and prove it"),
    "benchmark": ActionInfo("taoq.actions.benchmark", "measure how fast a quantized model is beside its float model"),
    "analyze": ActionInfo("taoq.actions.analyze", "rank the layers by what quantizing them costs"),
    "compare": ActionInfo("taoq.actions.compare", "set artifacts side by side: accuracy, size, speed, layers"),
    "default_specs": ActionInfo("taoq.actions.default_specs", "write a commented spec with all defaults"),
}
