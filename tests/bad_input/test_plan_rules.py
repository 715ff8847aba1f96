"""Rules that fit no layer, or leave none to quantize, are named with their lines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from support.small_spec import FC, STATIC_EDITS, Edit, Refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            {"module_name: Linear": "module_name: Liner"},
            "spec.yaml:28: quantize.layers[0].module_name: pattern 'Liner' matches no layer\n"
            "hint: did you mean 'Linear'?\n",
            id="nothing",
        ),
        pytest.param(
            {"module_name: fc": "module_name: encoder.*"},
            "spec.yaml:31: quantize.layers[1].module_name: pattern 'encoder.*' matches no layer\n"
            "hint: the quantizable types of this model are Linear\n",
            id="nothing, and nothing is near",
        ),
        pytest.param(
            {**STATIC_EDITS, "module_name: fc": "module_name: layer4"},
            "spec.yaml:31: quantize.layers[1].module_name: pattern 'layer4' matches no layer\n"
            "hint: did you mean 'layer4.*'?\n",
            id="a container's name",
        ),
        pytest.param(
            {**STATIC_EDITS, "module_name: fc": "module_name: BasicBlock"},
            "spec.yaml:31: quantize.layers[1].module_name: pattern 'BasicBlock' matches no layer\n"
            "hint: the quantizable types of this model are Conv2d, Linear\n",
            id="a container's type",
        ),
        pytest.param(
            {"module_name: Linear": "module_name: Conv2d"},
            "spec.yaml:28: quantize.layers[0].module_name: pattern 'Conv2d' matches 21 layer(s), none of which torchao"
            " can quantize: torchao does not quantize Conv2d\n"
            "hint: torchao quantizes Linear\n",
            id="a type that the backend cannot quantize",
        ),
        pytest.param(
            {"module_name: Linear": "module_name: bn1"},
            "spec.yaml:28: quantize.layers[0].module_name: pattern 'bn1' matches 1 layer(s), none of which torchao"
            " can quantize: it has no weight matrix or kernel\n"
            "hint: torchao quantizes Linear\n",
            id="a layer that nothing can quantize",
        ),
        pytest.param(
            {"module_name: Linear": "module_name: Conv2d", "module_name: fc": "module_name: FC"},
            "spec.yaml:28: quantize.layers[0].module_name: pattern 'Conv2d' matches 21 layer(s), none of which torchao"
            " can quantize: torchao does not quantize Conv2d\n"
            "hint: torchao quantizes Linear\n"
            "spec.yaml:31: quantize.layers[1].module_name: pattern 'FC' matches no layer\n"
            "hint: did you mean 'fc'?\n",
            id="two times nothing",
        ),
        pytest.param(
            {"skip_names: []": "skip_names: [Linear]"},
            "spec.yaml:27: quantize.layers: no layer is left to quantize\n"
            "hint: take a pattern out of quantize.skip_names, or give a rule another dtype than native\n",
            id="only layers that are skipped",
        ),
        pytest.param(
            {FC: FC.replace("int8", "native")},
            "spec.yaml:27: quantize.layers: no layer is left to quantize\n"
            "hint: take a pattern out of quantize.skip_names, or give a rule another dtype than native\n",
            id="only layers that stay native",
        ),
        pytest.param(
            {FC: FC.replace("int8", "int8, quant_axis: 2")},
            "spec.yaml:32: quantize.layers[1].weights.quant_axis: axis 2 is outside of the weight of 'fc', shape"
            " [10, 128]\n"
            "hint: the output channels are axis 0\n",
            id="a layer without that axis",
        ),
    ],
)
def test_rules_that_fit_no_layer_are_refused(
    edit: Edit, refused: Refused, changes: Mapping[str, str], message: str
) -> None:
    edit(changes)
    assert refused("quantize") == (2, message)
    assert refused("quantize", "--dry-run") == (2, message)


def test_status_json_ends_with_the_fault(edit: Edit, refused: Refused) -> None:
    edit({"module_name: Linear": "module_name: Liner"})
    refused("quantize")
    last = Path("results/quantize/status.json").read_text().splitlines()[-1]
    assert last.endswith(
        '"status": "FAILURE", "verbosity": "ERROR", "message": "Quantize failed: quantize.layers[0].module_name:'
        " pattern 'Liner' matches no layer hint: did you mean 'Linear'?\"}"
    )
