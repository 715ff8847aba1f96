# SPDX-License-Identifier: Apache-2.0
"""Write the pages that are made from the code: `python docs/generate.py`. A test fails when they are stale."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from taoq.quantization.backends import BACKENDS, load_backend
from taoq.quantization.spec import QuantizeSpec
from taoq.schema import markdown
from taoq.tasks import TASKS, load_task

HERE = Path(__file__).parent
GENERATED = "<!-- made by docs/generate.py: do not edit -->\n"


def pages() -> Iterator[tuple[Path, str]]:
    """Each generated page with its text."""
    yield HERE / "schema-quantize.md", quantize_page()
    yield HERE / "support.md", support_page()
    for name in TASKS:
        yield HERE / f"schema-{name}.md", task_page(name)


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
    notes = []
    for name in BACKENDS:
        support = load_backend(name).support
        cells = (
            support.modes,
            support.weights,
            support.activations,
            support.algorithms,
            support.layer_types,
            support.devices,
        )
        lines.append(" | ".join([f"| {name}", *(", ".join(cell) or "-" for cell in cells), f"{support.target} |"]))
        notes += [
            f"- {name}: `{asked}` is realised as `{real}`, with a warning." for asked, real in support.realised.items()
        ]
        if support.entropy_activations:
            kinds = ", ".join(support.entropy_activations)
            notes.append(f"- {name}: `algorithm: entropy` calibrates {kinds} activations.")
        if support.smoothquant:
            kinds = ", ".join(support.smoothquant)
            notes.append(f"- {name}: `algorithm: smoothquant` smooths the inputs of linear layers, with {kinds}.")
    return "\n".join([*lines, "", *notes]) + "\n"


if __name__ == "__main__":
    for path, text in pages():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(HERE.parent))
