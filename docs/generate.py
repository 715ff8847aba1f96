# SPDX-License-Identifier: Apache-2.0
"""Write the pages that are generated from the code: `python docs/generate.py`. A test fails if they are stale."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from taoq.checkpoint import WithoutInitialisation
from taoq.plugins import BACKENDS, RUNTIMES, TASKS
from taoq.quantization.backends import load_backend
from taoq.quantization.capability import Capability
from taoq.quantization.spec import QuantizeSpec
from taoq.runtimes import find_runtime
from taoq.spec.schema import markdown
from taoq.tasks import load_task
from taoq.tasks.backbones.fan import FanConfig
from taoq.tasks.backbones.networks import create_network
from taoq.tasks.backbones.tao_names import OWN, TAO_NETWORKS, TaoNetwork
from taoq.tasks.rtdetr.backbones import create_backbone
from taoq.tasks.rtdetr.spec import BACKBONES as DETECTORS
from taoq.tasks.rtdetr.spec import ModelSpec, tao_network

HERE = Path(__file__).parent
GENERATED = "<!-- made by docs/generate.py: do not edit -->\n"


def pages() -> Iterator[tuple[Path, str]]:
    """Yield the path and the text of each generated page."""
    yield HERE / "schema-quantize.md", quantize_page()
    yield HERE / "support.md", support_page()
    yield HERE / "tao-backbones.md", backbones_page()
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


CHECKPOINTS = {
    "resnet": "same names",
    "vit": "same names",
    "hiera": "same names",
    "fan": "same names",
    "fan_swin": "names converted",
    "convnext": "names converted",
    "edgenext": "names converted",
    "efficientvit": "names converted; two variants",
    "efficientvit_large": "names converted; two variants",
    "swin": "names converted; two variants",
    "gcvit": "names converted",
    "mit": "names converted",
    "dinov2": "names converted, positions resized",
    "dinov3": "names converted",
    "radio": "names converted, positions resized",
    "clip": "names converted, positions resized; text encoder left out",
}
"""What is done with a checkpoint of TAO, by family of networks."""

BACKBONES = """\
`model.backbone.type` of classification_pyt takes these names of TAO 7. Each network was built to write this table; the
parameters are those of a network for 1000 classes. What a network computes from a checkpoint of TAO is compared in
`tests/tasks/classification/test_tao_*.py` with a second implementation under TAO's names.

- *same names*: the tensors have the same names in TAO and in the library.
- *names converted*: taoq renames them. A file with the library's own names loads, too.
- *two variants*: timm has another network of the same name. `swin_*` of TAO has no norm before the classifier, shifts
  windows on maps of any size and pads before it shifts; `efficientvit_*` has one linear layer as classifier, and other
  epsilons. taoq sees from the checkpoint which one it is, says so, and stores it as `model.backbone.variant`.
- *positions resized*: TAO resizes position embeddings for each batch, taoq once to `dataset.img_size`, in the same way.

TAO builds `vit_*`, `hiera_*` and `gc_vit_*` for the size of images in the table; another `dataset.img_size` is an
error. `c_radio_*` takes multiples of 16. TAO itself cannot run its classifiers `efficientvit_l*`, which do not average
the last map; taoq averages it, with a warning. Checkpoints that were trained with `freeze_norm` load, too.

`dinov3_*` is in newer versions of TAO. FAN is not in a library: it is `taoq/tasks/backbones/fan.py`.
"""


DETECTOR_BACKBONES = """\
`model.backbone` of rtdetr takes these names of TAO; `fan_tiny`, `fan_small`, `fan_base` and `fan_large` are short for
those of FAN. Each backbone was built to write this table. The outputs of TAO's networks from their checkpoints are
compared in `tests/tasks/rtdetr/test_tao_checkpoints.py`. `resnet_*` is also the name of the authors' ResNet-vd.
"""


def backbones_page() -> str:
    """Return the page about TAO's backbones, made by building each of them."""
    lines = [
        "# The backbones of TAO\n",
        GENERATED,
        BACKBONES,
        *table(
            ("name in TAO", "network", "size", "parameters", "checkpoint of TAO"),
            map(backbone_cells, TAO_NETWORKS.values()),
        ),
        "",
        "`model.backbone.args` overrides arguments of the network in timm. Those of `fan_*` are:\n",
        *table(("argument", "meaning"), fan_arguments()),
        "",
        "## In rtdetr\n",
        DETECTOR_BACKBONES,
        *table(("name in TAO", "network", "channels of the feature maps", "parameters"), detector_cells()),
    ]
    return "\n".join(lines) + "\n"


def backbone_cells(network: TaoNetwork) -> Sequence[str]:
    """Return the cells of a network in the table of backbones."""
    if network.refused:
        return (f"`{network.name}`", "none", "-", "-", f"refused: {network.refused}; nearest is `{network.nearest}`")
    with torch.device("meta"), WithoutInitialisation():
        model = create_network(network, 1000, network.size, {})
    parameters = sum(parameter.numel() for parameter in model.parameters())
    given = "".join(f", {name} {value}" for name, value in network.args.items())
    source = "taoq's own" if network.library == OWN else f"{network.library} `{network.base}`{given}"
    return (f"`{network.name}`", source, str(network.size), f"{parameters / 1e6:.1f} M", CHECKPOINTS[network.family])


def detector_cells() -> Iterator[Sequence[str]]:
    """Yield the cells of each backbone of TAO's RT-DETR."""
    for name in DETECTORS:
        model = ModelSpec(backbone=name, resnet="plain")
        network = tao_network(model)
        if network.refused:
            yield f"`{name}`", "none", f"refused: {network.refused}; nearest is `{network.nearest}`", "-"
            continue
        with torch.device("meta"), WithoutInitialisation():
            backbone = create_backbone(model)
        source = "taoq's own" if network.library == OWN else f"{network.library} `{network.base}`"
        parameters = sum(tensor.numel() for tensor in backbone.state_dict().values())
        yield f"`{name}`", source, ", ".join(map(str, backbone.channels)), f"{parameters / 1e6:.1f} M"


def fan_arguments() -> Iterator[Sequence[str]]:
    """Yield the arguments of a FAN, and their descriptions."""
    text = (FanConfig.__doc__ or "").partition("Attributes:\n")[2]
    for line in text.strip().splitlines():
        name, _, meaning = line.strip().partition(": ")
        assert name in {field.name for field in dataclasses.fields(FanConfig)}
        yield f"`{name}`", meaning


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
