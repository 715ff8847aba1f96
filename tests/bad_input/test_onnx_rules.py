"""Rules that fit no node of a graph, or that a backend cannot follow, are named with their lines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from support.small_spec import ONNX_BACKENDS, STATIC_FC, Edit, Refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            {"module_name: Conv": "module_name: Conf"},
            "spec.yaml:28: quantize.layers[0].module_name: pattern 'Conf' matches no layer\nhint: did you mean 'Conv'?\n",
            id="misspelt",
        ),
        pytest.param(
            {"module_name: Conv": "module_name: Conv2d"},
            "spec.yaml:28: quantize.layers[0].module_name: pattern 'Conv2d' matches no layer\n"
            "hint: did you mean 'Conv'?\n",
            id="a type of torch",
        ),
        pytest.param(
            {"module_name: Conv": "module_name: Linear"},
            "spec.yaml:28: quantize.layers[0].module_name: pattern 'Linear' matches no layer\n"
            "hint: the quantizable types of this model are Conv, Gemm\n",
            id="a type of torch with another name",
        ),
        pytest.param(
            {"module_name: fc": "module_name: layer4"},
            "spec.yaml:31: quantize.layers[1].module_name: pattern 'layer4' matches no layer\n"
            "hint: did you mean 'layer4.*'?\n",
            id="a container",
        ),
        pytest.param(
            {"module_name: fc": "module_name: /layer1/0/conv1"},
            "spec.yaml:31: quantize.layers[1].module_name: pattern '/layer1/0/conv1' matches no layer\n"
            "hint: did you mean '/layer1/0/conv1/Conv' or 'layer1.0.conv1' or '/layer4/0/conv1/Conv'?\n",
            id="half of a name",
        ),
        pytest.param(
            {"skip_names: []": "skip_names: [Conv, Gemm]"},
            "spec.yaml:27: quantize.layers: no layer is left to quantize\n"
            "hint: take a pattern out of quantize.skip_names, or give a rule another dtype than native\n",
            id="all skipped",
        ),
        pytest.param(
            {STATIC_FC: STATIC_FC.replace("{dtype: int8}\n", "{dtype: int8, quant_axis: 7}\n")},
            "spec.yaml:32: quantize.layers[1].weights.quant_axis: axis 7 is outside of the weight of '/fc/Gemm', shape"
            " [10, 128]\n"
            "hint: the output channels are axis 0\n",
            id="an axis that the weight has not",
        ),
    ],
)
def test_rules_that_fit_no_node_are_refused(
    onnx_file: Path, edit: Edit, refused: Refused, changes: Mapping[str, str], message: str
) -> None:
    edit(changes)
    assert refused("quantize", "quantize.backend=modelopt.onnx") == (2, message)
    assert refused("quantize", "quantize.backend=modelopt.onnx", "--dry-run") == (2, message)
    if "axis" not in message:
        assert refused("quantize") == (2, message)


@pytest.mark.parametrize(
    ("backend", "types"),
    [("modelopt.onnx", "Conv, ConvTranspose, Gemm, MatMul"), ("onnxruntime", "Conv, Gemm, MatMul")],
    ids=ONNX_BACKENDS,
)
def test_rules_for_nodes_without_weights_are_refused(
    onnx_file: Path, edit: Edit, refused: Refused, backend: str, types: str
) -> None:
    edit({"module_name: fc": "module_name: Relu"})
    assert refused("quantize", f"quantize.backend={backend}") == (
        2,
        "spec.yaml:31: quantize.layers[1].module_name: pattern 'Relu' matches 17 layer(s), none of which"
        f" {backend} can quantize: it has no weight matrix or kernel\n"
        f"hint: {backend} quantizes {types}\n",
    )


def test_an_axis_that_onnxruntime_does_not_scale_is_refused(onnx_file: Path, edit: Edit, refused: Refused) -> None:
    edit({STATIC_FC: STATIC_FC.replace("{dtype: int8}\n", "{dtype: int8, quant_axis: 1}\n")})
    assert refused("quantize") == (
        2,
        "spec.yaml:32: quantize.layers[1].weights.quant_axis: axis 1 is not that of the output channels of '/fc/Gemm'"
        " (Gemm)\n"
        "hint: leave it out: this backend has one scale a channel\n",
    )


@pytest.mark.parametrize(
    "types", ["op_types_to_quantize=[Gemm]", "op_types_to_exclude=[Conv]", "op_types_to_quantize=[]"]
)
def test_a_rule_for_a_type_that_an_argument_leaves_out_is_refused(
    onnx_file: Path, refused: Refused, types: str
) -> None:
    def fault(where: str, layers: str) -> str:
        return (
            f"{where}.module_name: pattern {layers}, none of which modelopt.onnx can quantize: quantize.backend_kwargs"
            " leaves its type out\n"
            "hint: modelopt.onnx quantizes Conv, ConvTranspose, Gemm, MatMul\n"
        )

    faults = [fault("spec.yaml:28: quantize.layers[0]", "'Conv' matches 21 layer(s)")]
    if types.endswith("[]"):
        faults.append(fault("spec.yaml:31: quantize.layers[1]", "'fc' matches 1 layer(s)"))
    assert refused("quantize", "quantize.backend=modelopt.onnx", f"quantize.backend_kwargs.{types}") == (
        2,
        "".join(faults),
    )
