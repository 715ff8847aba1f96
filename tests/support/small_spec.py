"""The spec of the tests of bad input, tests/bad_input/good.yaml: the parts of it that are replaced, and its notices."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

Edit = Callable[[Mapping[str, str]], None]
"""Replaces parts of spec.yaml: (old and new text of each)."""
Refused = Callable[..., tuple[int, str]]
"""Runs an action that must fail, on spec.yaml: (action, *overrides); returns exit code and stderr."""
RefusedByAll = Callable[..., tuple[int, str]]
"""Runs actions that read float.onnx and must say the same: (actions=...); returns exit code and stderr."""
Quantize = Callable[..., tuple[int, str]]
"""Quantizes as spec.yaml says: (*overrides); returns exit code and stderr."""

LAYERS = """\
  layers:
    - module_name: Linear
      weights: {dtype: int8}
      activations: {dtype: native}
    - module_name: fc
      weights: {dtype: int8}
      activations: {dtype: native}
"""
LINEAR = "Linear\n      weights: {dtype: int8}\n      activations: {dtype: native}"
FC = "fc\n      weights: {dtype: int8}\n      activations: {dtype: native}"
STATIC_FC = FC.replace("native", "int8")
STATIC_EDITS = {
    "backend: torchao": "backend: modelopt.pytorch",
    "mode: weight_only_ptq": "mode: static_ptq",
    LINEAR: LINEAR.replace("native", "int8"),
    FC: STATIC_FC,
}
"""Turns the spec into static quantization with modelopt.pytorch."""
STATIC_OVERRIDES = (
    "quantize.backend=modelopt.pytorch",
    "quantize.mode=static_ptq",
    "quantize.layers=[{module_name: Linear, weights: {dtype: int8}, activations: {dtype: int8}}]",
)
ONNX_EDITS = {
    "model_path: weights.safetensors": "model_path: float.onnx",
    "backend: torchao": "backend: onnxruntime",
    "mode: weight_only_ptq": "mode: static_ptq",
    LINEAR: "Conv\n      weights: {dtype: int8}\n      activations: {dtype: int8}",
    FC: STATIC_FC,
    "evaluate:\n  checkpoint: weights.safetensors": "evaluate:\n  checkpoint: float.onnx",
    "inference:\n  checkpoint: weights.safetensors": "inference:\n  checkpoint: float.onnx",
}
"""Turns the spec into static quantization of float.onnx with onnxruntime."""
ONNX_BACKENDS = ("modelopt.onnx", "onnxruntime")
every_onnx_backend = pytest.mark.parametrize("backend", ONNX_BACKENDS)

PURPOSE = {
    "torchao": "torchao is for smaller files and less memory; on a CPU in eager mode slower than float\n",
    "modelopt.pytorch": (
        "modelopt.pytorch is for accuracy studies in torch (quantization is simulated, it brings no speed) and smaller"
        " files\n"
    ),
    "modelopt.onnx": (
        "modelopt.onnx is for NVIDIA GPUs through TensorRT; on a CPU its graph is slower than float,"
        " backend onnxruntime is for CPUs\n"
    ),
    "onnxruntime": "onnxruntime is for CPUs, through onnxruntime; for NVIDIA GPUs take backend modelopt.onnx\n",
}
"""What `quantize` says of each backend."""
ALL_IMAGES_USED = "spec.yaml:21: quantize.calibration.num_samples: is 512, there are 20 images: all are used\n"
CALIBRATION_NOTICES = {backend: PURPOSE[backend] + ALL_IMAGES_USED for backend in PURPOSE if backend != "torchao"}
"""What `quantize` says before calibration."""


def replace_parts(text: str, changes: Mapping[str, str]) -> str:
    """Replace parts of a text, each of which it has once."""
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text
