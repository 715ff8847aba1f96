# SPDX-License-Identifier: Apache-2.0
"""Write the pages that are made from the code: `python docs/generate.py`. A test fails when they are stale."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from taoq.plugins import BACKENDS, TASKS
from taoq.quantization.backends import load_backend
from taoq.quantization.capability import Capability
from taoq.quantization.spec import QuantizeSpec
from taoq.spec.schema import markdown
from taoq.tasks import load_task

HERE = Path(__file__).parent
GENERATED = "<!-- made by docs/generate.py: do not edit -->\n"


def pages() -> Iterator[tuple[Path, str]]:
    """Each generated page with its text."""
    yield HERE / "schema-quantize.md", quantize_page()
    yield HERE / "support.md", support_page()
    for row in TASKS.own:
        yield HERE / f"schema-{row.name}.md", task_page(row.name)


def quantize_page() -> str:
    """The section that all tasks share, under the headings of TAO's documentation."""
    return "\n".join(
        [
            "# Quantization configuration\n",
            GENERATED,
            "## 4.2 Schema Reference\n",
            "The fields of the `quantize:` section of every task. `layers[]` is an entry of the list `layers`.\n",
            markdown("5 ModelQuantizationConfig Fields", QuantizeSpec),
        ]
    )


def task_page(name: str) -> str:
    """All fields of a task, and those of TAO that it accepts and does not use."""
    task = load_task(name)
    lines = [
        f"# The spec of {name}\n",
        GENERATED,
        markdown("Fields", task.spec),
        "## Fields of TAO that are accepted and not used\n",
        "One log line of each run names those that a spec has. Any other unknown field is an error.\n",
        "| field | why |",
        "|---|---|",
        *(f"| `{field.replace('[[]*]', '[]')}` | {reason} |" for field, reason in task.unused.items()),
    ]
    return "\n".join(lines) + "\n"


def support_page() -> str:
    """What each backend can do, from the data that it is checked with."""
    lines = [
        "# What each backend can do\n",
        GENERATED,
        "Anything else is refused before work starts, with the alternatives.\n",
        "| backend | mode | weights | activations | algorithm | layers | device | good for |",
        "|---|---|---|---|---|---|---|---|",
    ]
    notes: list[str] = []
    for row in BACKENDS.own:
        capability = load_backend(row.name).capability
        lines.append(support_row(capability))
        notes += support_notes(capability)
    return "\n".join([*lines, "", *notes]) + "\n"


def support_row(capability: Capability) -> str:
    """A row of the table."""
    cells = (
        capability.modes,
        capability.weights.dtypes,
        capability.activations.dtypes if capability.activations else (),
        [algorithm.name for algorithm in capability.algorithms],
        capability.layer_types,
        capability.devices,
    )
    lists = [", ".join(map(str, cell)) or "-" for cell in cells]
    return " | ".join([f"| {capability.name}", *lists, f"{capability.target} |"])


def support_notes(capability: Capability) -> Iterator[str]:
    """What does not fit into the table."""
    name = capability.name
    for requested, realised in capability.realised.items():
        yield f"- {name}: `{requested}` is realised as `{realised}`, with a warning."
    if entropy := capability.algorithm("entropy"):
        yield f"- {name}: `algorithm: entropy` calibrates {', '.join(map(str, entropy.activations))} activations."
    if smoothquant := capability.algorithm("smoothquant"):
        dtypes = ", ".join(map(str, smoothquant.weights))
        yield f"- {name}: `algorithm: smoothquant` smooths the inputs of linear layers, with {dtypes}."


if __name__ == "__main__":
    for path, text in pages():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(HERE.parent))
