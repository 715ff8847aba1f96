# SPDX-License-Identifier: Apache-2.0
"""Write the pages that are generated from the code: `python docs/generate.py`. A test fails if they are stale."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from taoq.plugins import BACKENDS, RUNTIMES, TASKS
from taoq.quantization.backends import load_backend
from taoq.quantization.capability import Capability
from taoq.quantization.spec import QuantizeSpec
from taoq.runtimes import find_runtime
from taoq.spec.schema import markdown
from taoq.tasks import load_task

HERE = Path(__file__).parent
GENERATED = "<!-- made by docs/generate.py: do not edit -->\n"


def pages() -> Iterator[tuple[Path, str]]:
    """Yield the path and the text of each generated page."""
    yield HERE / "schema-quantize.md", quantize_page()
    yield HERE / "support.md", support_page()
    for row in TASKS.own:
        yield HERE / f"schema-{row.name}.md", task_page(row.name)


def quantize_page() -> str:
    """Return the page of the section that all tasks share, with the headings of TAO's documentation."""
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
    """Return the page of a task: all its fields, and the fields of TAO that it accepts and does not use."""
    task = load_task(name)
    lines = [
        f"# The spec of {name}\n",
        GENERATED,
        markdown("Fields", task.spec),
        "## Fields of TAO that are accepted and not used\n",
        "Each run logs one line that names those that its spec contains. Any other unknown field is an error.\n",
        *table(
            ("field", "why"),
            ((f"`{field.replace('[[]*]', '[]')}`", reason) for field, reason in task.unused.items()),
        ),
    ]
    return "\n".join(lines) + "\n"


def support_page() -> str:
    """Return the page about backends and runtimes, made from the data that specs are checked against."""
    capabilities = [load_backend(row.name).capability for row in BACKENDS.own]
    runtimes = [(row.summary, find_runtime(row.name, "runtime")) for row in RUNTIMES.own]
    lines = [
        "# What each backend can do\n",
        GENERATED,
        "taoq rejects every other combination before any work starts, and names the alternatives.\n",
        *table(
            ("backend", "mode", "weights", "activations", "algorithm", "layers", "device", "good for"),
            map(support_cells, capabilities),
        ),
        "",
        *(note for capability in capabilities for note in support_notes(capability)),
        "",
        "## Options of each backend\n",
        "Set these options in `quantize.backend_kwargs`. `taoq <task> quantize --options <backend>` prints them, also"
        " for a backend of another package.\n",
        *table(
            ("backend", "option", "description"),
            (
                (capability.name, f"`{option}`", description)
                for capability in capabilities
                for option, description in capability.options.items()
            ),
        ),
        "",
        "## Runtimes\n",
        "A runtime is a library that runs models. Select one with `runtime` in the sections `evaluate`, `inference` and"
        " `benchmark`, and set its options in `runtime_kwargs`. The default, `auto`, selects taoq's own runtime for the"
        " format of the model.\n",
        *table(
            ("runtime", "formats", "runs", "options"),
            (
                (runtime.name, joined(runtime.formats), summary, joined(f"`{option}`" for option in runtime.options))
                for summary, runtime in runtimes
            ),
        ),
    ]
    return "\n".join(lines) + "\n"


def support_cells(capability: Capability) -> Sequence[str]:
    """Return the cells of a backend in the table of capabilities."""
    return (
        capability.name,
        joined(capability.modes),
        joined(capability.weights.dtypes),
        joined(capability.activations.dtypes if capability.activations else ()),
        joined(algorithm.name for algorithm in capability.algorithms),
        joined(capability.layer_types),
        joined(capability.devices),
        capability.target,
    )


def support_notes(capability: Capability) -> Iterator[str]:
    """Yield the capabilities of a backend that do not fit into the table, as list items."""
    name = capability.name
    for requested, realised in capability.realised.items():
        yield f"- {name}: `{requested}` is realised as `{realised}`, with a warning."
    if entropy := capability.algorithm("entropy"):
        yield f"- {name}: `algorithm: entropy` calibrates {joined(entropy.activations)} activations."
    if smoothquant := capability.algorithm("smoothquant"):
        dtypes = joined(smoothquant.weights)
        yield f"- {name}: `algorithm: smoothquant` smooths the inputs of {dtypes} linear layers."


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield row_of(header)
    yield "|" + "---|" * len(header)
    yield from map(row_of, rows)


def row_of(cells: Sequence[str]) -> str:
    """Return a row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def joined(values: Iterable[object]) -> str:
    """Return values as a list for a table cell; `-` if there are none."""
    return ", ".join(map(str, values)) or "-"


if __name__ == "__main__":
    for path, text in pages():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(HERE.parent))
