"""A wrong value in a spec is named with its line and a hint, and nothing is written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from support.commands import Taoq
from support.small_spec import FC, LAYERS, LINEAR, PURPOSE, STATIC_EDITS, Edit, Refused

MAX_DROP = "hint: the field is: Largest accepted drop of the metric, as a fraction: 0.005 is half a percentage point"


def test_the_unchanged_spec_quantizes(taoq: Taoq, work: Path) -> None:
    code, _, err = taoq("classification_pyt", "quantize", "-e", "spec.yaml")
    assert (code, err) == (0, PURPOSE["torchao"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            {"backend: torchao": "backend: torchoa"},
            "spec.yaml:23: quantize.backend: unknown value 'torchoa'\nhint: did you mean 'torchao'?\n",
            id="unknown backend",
        ),
        pytest.param(
            {"backend: torchao": "backend: openvino"},
            "spec.yaml:23: quantize.backend: unknown value 'openvino'\n"
            "hint: one of torchao, modelopt.pytorch, modelopt.onnx, onnxruntime\n",
            id="unknown backend, none near",
        ),
        pytest.param(
            {"mode: weight_only_ptq": "mode: weight_only"},
            "spec.yaml:24: quantize.mode: unknown value 'weight_only'\nhint: did you mean 'weight_only_ptq'?\n",
            id="unknown mode",
        ),
        pytest.param(
            {"algorithm: minmax": "algorithm: mse"},
            "spec.yaml:25: quantize.algorithm: unknown value 'mse'\nhint: one of minmax, max, entropy, smoothquant\n",
            id="unknown algorithm",
        ),
        pytest.param(
            {"device: cpu\n  layers": "device: gpu\n  layers"},
            "spec.yaml:26: quantize.device: unknown value 'gpu'\n"
            "hint: the field is: Device to quantize on: cuda, cuda:N or cpu; trt (TensorRT) with modelopt.onnx only\n",
            id="unknown device",
        ),
        pytest.param(
            {LINEAR: LINEAR.replace("int8", "int4")},
            "spec.yaml:29: quantize.layers[0].weights.dtype: unknown value 'int4'\nhint: did you mean 'int8'?\n",
            id="unknown dtype of weights",
        ),
        pytest.param(
            {FC: FC.replace("native", "bfloat16")},
            "spec.yaml:33: quantize.layers[1].activations.dtype: unknown value 'bfloat16'\n"
            "hint: one of int8, fp8_e4m3fn, fp8_e5m2, native\n",
            id="unknown dtype of activations",
        ),
        pytest.param(
            {"mode: weight_only_ptq": "mode: static_ptq"},
            "spec.yaml:24: quantize.mode: backend torchao has no mode static_ptq\n"
            "hint: write mode: weight_only_ptq, or choose a backend that has static_ptq\n",
            id="torchao in static mode",
        ),
        pytest.param(
            {"backend: torchao": "backend: modelopt.pytorch"},
            "spec.yaml:24: quantize.mode: backend modelopt.pytorch has no mode weight_only_ptq\n"
            "hint: write mode: static_ptq, or choose a backend that has weight_only_ptq\n",
            id="modelopt in weight-only mode",
        ),
        pytest.param(
            {"device: cpu\n  layers": "device: trt\n  layers"},
            "spec.yaml:26: quantize.device: backend torchao does not run on trt\nhint: choose one of cuda, cpu\n",
            id="device that the backend does not run on",
        ),
        pytest.param(
            {LAYERS: "  layers: []\n"},
            "spec.yaml:27: quantize.layers: empty: nothing would be quantized\n"
            "hint: write at least one rule: {module_name: Linear, weights: {dtype: int8}}\n",
            id="no rules",
        ),
        pytest.param(
            {LAYERS: "  layers:\n"},
            "spec.yaml:27: quantize.layers: empty: nothing would be quantized\n"
            "hint: write at least one rule: {module_name: Linear, weights: {dtype: int8}}\n",
            id="null for the rules",
        ),
        pytest.param(
            {LINEAR: "Linear"},
            "spec.yaml:28: quantize.layers[0]: rule 'Linear' says nothing of weights or activations\n"
            "hint: write weights: {dtype: int8}, or weights: {dtype: native} to keep the layers float\n",
            id="rule without weights and activations",
        ),
        pytest.param(
            {LINEAR: "Linear\n      activations: {dtype: int8}"},
            "spec.yaml:28: quantize.layers[0]: rule 'Linear' has activations only, torchao quantizes weights only\n"
            "hint: write weights: {dtype: int8}, or choose a backend that quantizes activations\n",
            id="rule with activations only",
        ),
        pytest.param(
            {
                **STATIC_EDITS,
                FC: FC.replace("native", "fp8_e4m3fn"),
                "algorithm: minmax": "algorithm: entropy",
            },
            "spec.yaml:25: quantize.algorithm: entropy cannot calibrate fp8_e4m3fn activations (quantize.layers[1])\n"
            "hint: write algorithm: max, or activations: {dtype: int8}\n",
            id="entropy of a dtype that has none",
        ),
        pytest.param(
            {"results_dir: results\n": ""},
            "results_dir: missing: neither results_dir nor quantize.results_dir is set\n"
            "hint: name a folder for the results\n",
            id="no results_dir",
        ),
        pytest.param(
            {"backend_kwargs: {}": "accuracy: {max_drop: .nan}"},
            f"spec.yaml:35: quantize.accuracy.max_drop: nan is not a finite number\n{MAX_DROP}\n",
            id="budget that is no number",
        ),
        pytest.param(
            {"backend_kwargs: {}": "accuracy: {max_drop: -0.1}"},
            f"spec.yaml:35: quantize.accuracy.max_drop: -0.1 is less than 0\n{MAX_DROP}\n",
            id="budget below nothing",
        ),
        pytest.param(
            {"backend_kwargs: {}": "accuracy: {max_drop: 1.5}"},
            f"spec.yaml:35: quantize.accuracy.max_drop: 1.5 is more than 1\n{MAX_DROP}\n",
            id="budget above everything",
        ),
        pytest.param(
            {"backend_kwargs: {}": "accuracy: {max_drop: 0.1, dtypes: [float8_e4m3fn, int4]}"},
            "spec.yaml:35: quantize.accuracy.dtypes[1]: unknown value 'int4'\nhint: did you mean 'int8'?\n",
            id="format of a search",
        ),
        pytest.param(
            {"evaluate:\n": "benchmark: {min_speedup: .nan}\nevaluate:\n"},
            "spec.yaml:36: benchmark.min_speedup: nan is not a finite number\n"
            "hint: the field is: Required speed-up of the quantized model over the float model, at each batch size;"
            " otherwise exit code 4\n",
            id="speed-up that is no number",
        ),
        pytest.param(
            {"num_classes: 10": "num_classes: 10\n  augmentation: {mean: [0.5, .inf, 0.5]}"},
            "spec.yaml:12: dataset.augmentation.mean[1]: inf is not a finite number\n"
            "hint: the field is: Mean of each channel (red, green, blue), which is subtracted from images scaled to"
            " 0..1\n",
            id="infinite number of a list",
        ),
    ],
)
def test_a_wrong_value_is_named_with_its_line(
    edit: Edit, refused: Refused, changes: Mapping[str, str], message: str
) -> None:
    edit(changes)
    assert refused("quantize") == (2, message)
    assert not Path("results").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            {"num_classes: 10": "num_classes: abc"},
            "spec.yaml:11: dataset.num_classes: value 'abc' of type 'str' could not be converted to Integer\n"
            "hint: the field is: Number of classes\n",
            id="text for a number",
        ),
        pytest.param(
            {"num_classes: 10": "num_classes: 0"},
            "spec.yaml:11: dataset.num_classes: 0 is less than 1\nhint: the field is: Number of classes\n",
            id="number too small",
        ),
        pytest.param(
            {"num_classes: 10": "num_classes: ''"},
            "spec.yaml:11: dataset.num_classes: is empty, not a single value\nhint: the field is: Number of classes\n",
            id="empty text for a number",
        ),
        pytest.param(
            {"num_classes: 10": "num_classes: ??"},
            "spec.yaml:11: dataset.num_classes: value '??' of type 'str' could not be converted to Integer\n"
            "hint: the field is: Number of classes\n",
            id="the placeholder of TAO's quantize.yaml",
        ),
        pytest.param(
            {"num_classes: 10": "num_classes: {digits: 10}"},
            "spec.yaml:11: dataset.num_classes: is a section, not a single value\n"
            "hint: the field is: Number of classes\n",
            id="section for a number",
        ),
        pytest.param(
            {"root_dir: data": "root_dir: [data]"},
            "spec.yaml:10: dataset.root_dir: is a list, not a single value\n"
            "hint: the field is: Folder with classes.txt, one class name per line; without this file, classes are the"
            " sorted names of the folders\n",
            id="list for a text",
        ),
        pytest.param(
            {"    type: resnet_18": "    type: resnet_18\n    pretrained: maybe"},
            "spec.yaml:6: model.backbone.pretrained: value 'maybe' is not a valid bool (type str)\n"
            "hint: the field is: Download the library's pretrained weights if no checkpoint is given\n",
            id="text for true or false",
        ),
        pytest.param(
            {LAYERS: "  layers: 3\n"},
            "spec.yaml:27: quantize.layers: is the value '3', not a list\n"
            "hint: the field is: The rules: which layers to quantize, and to which formats\n",
            id="number for a list",
        ),
        pytest.param(
            {LAYERS: "  layers: ''\n"},
            "spec.yaml:27: quantize.layers: is empty, not a list\n"
            "hint: the field is: The rules: which layers to quantize, and to which formats\n",
            id="empty text for a list",
        ),
        pytest.param(
            {LAYERS: "  layers: [null]\n"},
            "spec.yaml:27: quantize.layers[0]: is empty, not a section\nhint: write `field: value` lines below it\n",
            id="nothing for a rule",
        ),
        pytest.param(
            {LAYERS: "  layers: {module_name: Linear, weights: {dtype: int8}}\n"},
            "spec.yaml:27: quantize.layers: is a section, not a list\n"
            "hint: the field is: The rules: which layers to quantize, and to which formats\n",
            id="section for a list",
        ),
        pytest.param(
            {LAYERS: "  layers: [Linear]\n"},
            "spec.yaml:27: quantize.layers[0]: is the value 'Linear', not a section\n"
            "hint: write `field: value` lines below it\n",
            id="text for a rule",
        ),
        pytest.param(
            {LINEAR: "Linear\n      weights: int8"},
            "spec.yaml:29: quantize.layers[0].weights: is the value 'int8', not a section\n"
            "hint: write `field: value` lines below it\n",
            id="text for a section in a rule",
        ),
        pytest.param(
            {"skip_names: []": "skip_names: fc"},
            "spec.yaml:34: quantize.skip_names: is the value 'fc', not a list\n"
            "hint: the field is: Patterns of layers that stay float regardless of the rules\n",
            id="text for a list of texts",
        ),
        pytest.param(
            {"skip_names: []": "skip_names: [fc, [conv], null, {a: b}]"},
            "spec.yaml:34: quantize.skip_names[1]: is a list, not a single value\n"
            "hint: the field is: Patterns of layers that stay float regardless of the rules\n"
            "spec.yaml:34: quantize.skip_names[2]: is empty, not a single value\n"
            "hint: the field is: Patterns of layers that stay float regardless of the rules\n"
            "spec.yaml:34: quantize.skip_names[3]: is a section, not a single value\n"
            "hint: the field is: Patterns of layers that stay float regardless of the rules\n",
            id="list, nothing and section for a text of a list",
        ),
        pytest.param(
            {"backend_kwargs: {}": "backend_kwargs: 3"},
            "spec.yaml:35: quantize.backend_kwargs: is the value '3', not a section\n"
            "hint: the field is: Arguments for the library of the backend, checked against its signature\n",
            id="number for arguments",
        ),
        pytest.param(
            {"backend_kwargs: {}": "backend_kwargs: [3]"},
            "spec.yaml:35: quantize.backend_kwargs: is a list, not a section\n"
            "hint: the field is: Arguments for the library of the backend, checked against its signature\n",
            id="list for arguments",
        ),
        pytest.param(
            {"evaluate:\n  checkpoint: weights.safetensors\n  device: cpu\n": "evaluate: [weights.safetensors]\n"},
            "spec.yaml:36: evaluate: is a list, not a section\nhint: write `field: value` lines below it\n",
            id="list for a section",
        ),
    ],
)
def test_a_value_of_a_wrong_type_is_named_with_its_line(
    edit: Edit, refused: Refused, changes: Mapping[str, str], message: str
) -> None:
    edit(changes)
    assert refused("quantize") == (2, message)
    assert not Path("results").exists()
