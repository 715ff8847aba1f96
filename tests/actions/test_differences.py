"""How the settings and layers of artifacts differ, on plain data."""

from __future__ import annotations

from typing import Any

from taoq.pipeline import differences

INT8 = {"dtype": "int8", "axis": 0}


def row(layer: str, weights: Any, activations: Any, alias: str = "") -> dict[str, Any]:
    return {"layer": layer, "alias": alias, "weights": weights, "activations": activations}


def test_settings_with_different_values_are_listed() -> None:
    sections = {
        "a": {
            "backend": "torchao",
            "layers": [{"module_name": "*", "weights": {"dtype": "int8", "quant_axis": None}}],
            "skip_names": [],
        },
        "b": {"backend": "torchao", "layers": [{"module_name": "*", "weights": None}], "skip_names": ["head"]},
    }
    assert differences.settings(sections, "quantize") == {
        "quantize.layers[0].weights": {"a": "dtype: int8", "b": None},
        "quantize.skip_names[0]": {"a": None, "b": "head"},
    }


def test_layers_in_different_formats_are_listed_by_module() -> None:
    plans = {
        "torch": [row("conv", INT8, INT8), row("head", INT8, None), row("same", None, None)],
        "onnx": [
            row("/conv/Conv", INT8, INT8, "conv"),
            row("/head/Gemm", None, None, "head"),
            row("same", None, None),
            row("/add/Add", None, INT8),
        ],
    }
    assert differences.layers(plans) == {
        "head": {"torch": "int8 / float", "onnx": "float"},
        "/add/Add": {"torch": None, "onnx": "float / int8"},
    }
    assert differences.layers({"torch": plans["torch"]}) == {}
