"""A wrong spec or command line: two lines for every fault, exit code 2, nothing left behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

Taoq = Callable[..., tuple[int, str, str]]
Edit = Callable[[Mapping[str, str]], None]
Refused = Callable[..., tuple[int, str]]

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
STATIC = {
    "backend: torchao": "backend: modelopt.pytorch",
    "mode: weight_only_ptq": "mode: static_ptq",
    LINEAR: LINEAR.replace("native", "int8"),
    FC: FC.replace("native", "int8"),
}
"""Turns good.yaml into static quantization with modelopt.pytorch."""
DATASET_FIELDS = (
    "dataset, root_dir, classes_file, num_classes, img_size, batch_size, workers, val_dataset, test_dataset,"
    " quant_calibration_dataset, augmentation"
)
MAX_DROP = "hint: the field is: Largest loss of the metric that is accepted, as a part of 1: 0.005 is half a point"
MAX_ARGUMENTS = (
    "moe_calib_experts_ratio, layerwise, shared_states, distributed_sync, sync_expert_weight_amax,"
    " skip_forward_without_activation_calib"
)


def test_the_good_spec_is_good(taoq: Taoq, work: Path) -> None:
    code, _, err = taoq("classification_pyt", "quantize", "-e", "spec.yaml")
    assert (code, err) == (
        0,
        "torchao is for smaller files and less memory; on a CPU in eager mode slower than float\n",
    )


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
            "hint: the field is: Where to quantize: cuda, cuda:N or cpu; trt (TensorRT) is for modelopt.onnx\n",
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
                **STATIC,
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
            "hint: the field is: Exit code 4 where the quantized model is not this many times as fast,"
            " at any batch size\n",
            id="speed-up that is no number",
        ),
        pytest.param(
            {"num_classes: 10": "num_classes: 10\n  augmentation: {mean: [0.5, .inf, 0.5]}"},
            "spec.yaml:12: dataset.augmentation.mean[1]: inf is not a finite number\n"
            "hint: the field is: Subtracted from each channel (red, green, blue) of an image in 0..1\n",
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
            {"num_classes: 10": "num_classes:"},
            "spec.yaml:11: dataset.num_classes: is empty, not a single value\nhint: the field is: Number of classes\n",
            id="nothing for a number",
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
            "hint: the field is: Folder with classes.txt, one class name a line; without it the sorted folder names"
            " count\n",
            id="list for a text",
        ),
        pytest.param(
            {"    type: resnet_18": "    type: resnet_18\n    pretrained: maybe"},
            "spec.yaml:6: model.backbone.pretrained: value 'maybe' is not a valid bool (type str)\n"
            "hint: the field is: Take the library's pretrained weights (a download) where no checkpoint is given\n",
            id="text for true or false",
        ),
        pytest.param(
            {LAYERS: "  layers: 3\n"},
            "spec.yaml:27: quantize.layers: is the value '3', not a list\n"
            "hint: the field is: The rules: which layers are quantized, and to what\n",
            id="number for a list",
        ),
        pytest.param(
            {LAYERS: "  layers:\n"},
            "spec.yaml:27: quantize.layers: is empty, not a list\n"
            "hint: the field is: The rules: which layers are quantized, and to what\n",
            id="nothing for a list",
        ),
        pytest.param(
            {LAYERS: "  layers: {module_name: Linear, weights: {dtype: int8}}\n"},
            "spec.yaml:27: quantize.layers: is a section, not a list\n"
            "hint: the field is: The rules: which layers are quantized, and to what\n",
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
            "hint: the field is: Patterns of layers that stay float, whatever the rules say\n",
            id="text for a list of texts",
        ),
        pytest.param(
            {"backend_kwargs: {}": "backend_kwargs: 3"},
            "spec.yaml:35: quantize.backend_kwargs: is the value '3', not a section\n"
            "hint: the field is: Arguments of the library behind the backend, checked against it\n",
            id="number for arguments",
        ),
        pytest.param(
            {"backend_kwargs: {}": "backend_kwargs: [3]"},
            "spec.yaml:35: quantize.backend_kwargs: is a list, not a section\n"
            "hint: the field is: Arguments of the library behind the backend, checked against it\n",
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            {"\nquantize:\n": "\nquantise:\n"},
            "spec.yaml:21: quantise: unknown field in the spec\nhint: did you mean 'quantize'?\n",
            id="at the top",
        ),
        pytest.param(
            {"img_size: 32": "image_size: 32"},
            "spec.yaml:12: dataset.image_size: unknown field in section 'dataset'\n"
            "hint: did you mean 'img_size' or 'batch_size'?\n",
            id="in a section",
        ),
        pytest.param(
            {"img_size: 32": "resolution: 32"},
            "spec.yaml:12: dataset.resolution: unknown field in section 'dataset'\n"
            f"hint: its fields are {DATASET_FIELDS}\n",
            id="with none near",
        ),
        pytest.param(
            {FC: FC.replace("int8", "int8, axis: 0")},
            "spec.yaml:32: quantize.layers[1].weights.axis: unknown field in section 'quantize.layers[1].weights'\n"
            "hint: did you mean 'quant_axis'?\n",
            id="in a rule",
        ),
        pytest.param(
            {"backend_kwargs: {}": "backend_kwargs: {devise: cpu}"},
            "spec.yaml:35: quantize.backend_kwargs.devise: torchao's quantize_ has no argument 'devise'\n"
            "hint: did you mean 'device'?\n",
            id="in the arguments of torchao",
        ),
        pytest.param(
            {"backend_kwargs: {}": "backend_kwargs: {filter_fn: all}"},
            "spec.yaml:35: quantize.backend_kwargs.filter_fn: 'filter_fn' of torchao's quantize_ is set by the plan\n"
            "hint: write rules in quantize.layers\n",
            id="an argument of torchao that is the plan's",
        ),
        pytest.param(
            {**STATIC, "backend_kwargs: {}": "backend_kwargs: {method: mse}"},
            "spec.yaml:35: quantize.backend_kwargs.method: ModelOpt's MaxCalibConfig has no argument 'method'\n"
            f"hint: its arguments are {MAX_ARGUMENTS}\n",
            id="in the arguments of modelopt",
        ),
        pytest.param(
            {**STATIC, "algorithm: minmax": "algorithm: entropy", "backend_kwargs: {}": "backend_kwargs: {strid: 8}"},
            "spec.yaml:35: quantize.backend_kwargs.strid:"
            " ModelOpt's HistogramCalibrator.compute_amax has no argument 'strid'\n"
            "hint: did you mean 'stride'?\n",
            id="in the arguments of entropy",
        ),
    ],
)
def test_an_unknown_field_is_named_in_full_with_its_line(
    edit: Edit, refused: Refused, changes: Mapping[str, str], message: str
) -> None:
    edit(changes)
    assert refused("quantize") == (2, message)
    assert not Path("results").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            {"backend_kwargs: {}": "backend_kwargs: {device: gpu}"},
            "spec.yaml:35: quantize.backend_kwargs.device: 'gpu' is not a torch device\n"
            "hint: write cpu, cuda or cuda:N\n",
            id="torchao",
        ),
        pytest.param(
            {**STATIC, "backend_kwargs: {}": "backend_kwargs: {distributed_sync: 7}"},
            "spec.yaml:35: quantize.backend_kwargs.distributed_sync:"
            " input should be a valid boolean, unable to interpret input\n"
            "hint: see ModelOpt's MaxCalibConfig\n",
            id="modelopt",
        ),
        pytest.param(
            {**STATIC, "algorithm: minmax": "algorithm: entropy", "backend_kwargs: {}": "backend_kwargs: {stride: 0}"},
            "spec.yaml:35: quantize.backend_kwargs.stride: '0' is not a whole number above 0\n"
            "hint: write for example 8\n",
            id="entropy",
        ),
    ],
)
def test_a_wrong_value_of_an_argument_of_the_library_is_named_with_its_line(
    edit: Edit, refused: Refused, changes: Mapping[str, str], message: str
) -> None:
    edit(changes)
    assert refused("quantize") == (2, message)
    assert not Path("results").exists()


def test_a_device_of_torchao_that_this_machine_has_not_is_refused(edit: Edit, refused: Refused) -> None:
    edit({"backend_kwargs: {}": "backend_kwargs: {device: 'cuda:99'}"})
    assert refused("quantize") == (
        2,
        "spec.yaml:35: quantize.backend_kwargs.device: this machine has no device 'cuda:99'\n"
        "hint: leave it out: quantize.device says where to quantize\n",
    )


def test_all_faults_of_a_spec_come_at_once(edit: Edit, refused: Refused) -> None:
    edit(
        {
            "num_classes: 10": "num_classes: abc",
            "img_size: 32": "image_size: 32",
            "backend: torchao": "backend: openvino",
            LINEAR: LINEAR.replace("int8", "int4, axis: 0"),
            FC: "fc\n      weight: {dtype: int8}",
            "backend_kwargs: {}": "backend_kwargs: []",
        }
    )
    assert refused("quantize", "evaluate.devise=cpu") == (
        2,
        "spec.yaml:11: dataset.num_classes: value 'abc' of type 'str' could not be converted to Integer\n"
        "hint: the field is: Number of classes\n"
        "spec.yaml:12: dataset.image_size: unknown field in section 'dataset'\n"
        "hint: did you mean 'img_size' or 'batch_size'?\n"
        "spec.yaml:23: quantize.backend: unknown value 'openvino'\n"
        "hint: one of torchao, modelopt.pytorch, modelopt.onnx, onnxruntime\n"
        "spec.yaml:29: quantize.layers[0].weights.dtype: unknown value 'int4'\n"
        "hint: did you mean 'int8'?\n"
        "spec.yaml:29: quantize.layers[0].weights.axis: unknown field in section 'quantize.layers[0].weights'\n"
        "hint: did you mean 'quant_axis'?\n"
        "spec.yaml:32: quantize.layers[1].weight: unknown field in section 'quantize.layers[1]'\n"
        "hint: did you mean 'weights'?\n"
        "spec.yaml:34: quantize.backend_kwargs: is a list, not a section\n"
        "hint: the field is: Arguments of the library behind the backend, checked against it\n"
        "override evaluate.devise=cpu: evaluate.devise: unknown field in section 'evaluate'\n"
        "hint: did you mean 'device'?\n",
    )
    assert not Path("results").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            {"model_path: weights.safetensors": "model_path: ???"},
            "spec.yaml:22: quantize.model_path: missing: this field needs a value\n"
            "hint: write it in the spec, or give quantize.model_path=...\n",
            id="in the section of the action",
        ),
        pytest.param(
            {"num_classes: 10": "num_classes: ???"},
            "spec.yaml:11: dataset.num_classes: missing: this field needs a value\n"
            "hint: write it in the spec, or give dataset.num_classes=...\n",
            id="in a section of all actions",
        ),
        pytest.param(
            {"module_name: Linear": "module_name: ???"},
            "spec.yaml:28: quantize.layers[0].module_name: missing: this field needs a value\n"
            "hint: write it in the spec, or give quantize.layers[0].module_name=...\n",
            id="in a rule",
        ),
        pytest.param(
            {LINEAR: LINEAR.replace("{dtype: int8}", "{quant_axis: 0}")},
            "spec.yaml:29: quantize.layers[0].weights.dtype: missing: this field needs a value\n"
            "hint: write it in the spec, or give quantize.layers[0].weights.dtype=...\n",
            id="left out of a rule",
        ),
        pytest.param(
            {"results_dir: results": "results_dir: ???"},
            "spec.yaml:2: results_dir: missing: this field needs a value\n"
            "hint: write it in the spec, or give results_dir=...\n",
            id="at the top",
        ),
    ],
)
def test_a_value_that_is_missing_is_named_with_its_line(
    edit: Edit, refused: Refused, changes: Mapping[str, str], message: str
) -> None:
    edit(changes)
    assert refused("quantize") == (2, message)
    assert not Path("results").exists()


def test_a_value_that_is_missing_in_the_section_of_another_action_is_no_fault(
    taoq: Taoq, work: Path, edit: Edit
) -> None:
    edit(
        {
            "evaluate:\n  checkpoint: weights.safetensors": "evaluate:\n  checkpoint: ???",
            "inference:\n  checkpoint: weights.safetensors": "inference:\n  checkpoint: ${evaluate.checkpoint}",
        }
    )
    assert taoq("classification_pyt", "quantize", "-e", "spec.yaml", "--dry-run")[0] == 0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        pytest.param(
            "${datset.classes}",
            "interpolation key 'datset.classes' not found\n"
            "hint: give it a value, or write the path of an existing field as ${section.field}\n",
            id="of a field that is not there",
        ),
        pytest.param(
            "${dataset.num_classes}",
            "recursive interpolation detected\n"
            "hint: give it a value, or write the path of an existing field as ${section.field}\n",
            id="of itself",
        ),
        pytest.param(
            "${dataset.img_size",
            "does not parse as an interpolation\n"
            "hint: give it a value, or write the path of an existing field as ${section.field}\n",
            id="without its end",
        ),
        pytest.param(
            "${oc.env:TAOQ_IS_NOT_SET}",
            "environment variable 'TAOQ_IS_NOT_SET' not found\n"
            "hint: give it a value, or write the path of an existing field as ${section.field}\n",
            id="of the environment",
        ),
        pytest.param(
            '${eval:\'__import__("pathlib").Path("ran").touch()\'}',
            "unsupported interpolation type eval\n"
            "hint: a spec is data: taoq runs no code from it; write the value itself\n",
            id="that is code",
        ),
    ],
)
@pytest.mark.parametrize("override", [False, True], ids=["spec", "override"])
def test_a_wrong_interpolation_is_named(edit: Edit, refused: Refused, value: str, message: str, override: bool) -> None:
    if override:
        where = f"override dataset.num_classes={value}"
        assert refused("quantize", f"dataset.num_classes={value}") == (2, f"{where}: dataset.num_classes: {message}")
    else:
        edit({"num_classes: 10": f"num_classes: {value}"})
        assert refused("quantize") == (2, f"spec.yaml:11: dataset.num_classes: {message}")
    assert not Path("ran").exists()
    assert not Path("results").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            {"args: {channels: [16, 32, 64, 128]}": "args: {channels: [16, 32"},
            "spec.yaml:7: not valid YAML: expected ',' or ']', but got ':'\nhint: a spec is plain YAML data\n",
            id="that does not parse",
        ),
        pytest.param(
            {"    type: resnet_18": "\ttype: resnet_18"},
            "spec.yaml:5: not valid YAML: found character '\\t' that cannot start any token\n"
            "hint: a spec is plain YAML data\n",
            id="with a tab",
        ),
        pytest.param(
            {"img_size: 32": "num_classes: 11"},
            "spec.yaml:12: not valid YAML: found duplicate key num_classes\nhint: a key may stand once in a section\n",
            id="with a duplicate key",
        ),
        pytest.param(
            {"inference:\n": "evaluate:\n"},
            "spec.yaml:39: not valid YAML: found duplicate key evaluate\nhint: a key may stand once in a section\n",
            id="with a duplicate section",
        ),
        pytest.param(
            {"evaluate:\n": "---\nevaluate:\n"},
            "spec.yaml:36: not valid YAML: expected a single document in the stream, but found another document\n"
            "hint: a spec is plain YAML data\n",
            id="with two documents",
        ),
        pytest.param(
            {"num_classes: 10": "num_classes: *classes"},
            "spec.yaml:11: not valid YAML: found undefined alias 'classes'\nhint: a spec is plain YAML data\n",
            id="with an unknown alias",
        ),
        pytest.param(
            {"num_classes: 10": "num_classes: !!python/object/apply:os.system ['touch ran']"},
            "spec.yaml:11: not valid YAML:"
            " could not determine a constructor for the tag '!!python/object/apply:os.system'\n"
            "hint: a spec is plain YAML data\n",
            id="with code",
        ),
    ],
)
def test_yaml_is_refused(edit: Edit, refused: Refused, changes: Mapping[str, str], message: str) -> None:
    edit(changes)
    assert refused("quantize") == (2, message)
    assert not Path("ran").exists()
    assert not Path("results").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(
            b"- quantize\n- evaluate\n",
            "spec.yaml:1: the spec is a list, not a mapping\nhint: write sections: `quantize:`, `dataset:`, ...\n",
            id="a list",
        ),
        pytest.param(
            b"quantize\n",
            "spec.yaml:1: the spec is a single value, not a mapping\n"
            "hint: write sections: `quantize:`, `dataset:`, ...\n",
            id="a scalar",
        ),
        pytest.param(
            b"!!python/object/apply:os.system ['touch ran']\n",
            "spec.yaml:1: the spec is a list, not a mapping\nhint: write sections: `quantize:`, `dataset:`, ...\n",
            id="code",
        ),
        pytest.param(
            b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
            "spec.yaml: is not a text file in UTF-8\nhint: give a YAML file with -e\n",
            id="a picture",
        ),
        pytest.param(
            b"a: \x00\n",
            "spec.yaml: not valid YAML: unacceptable character #x0000: special characters are not allowed\n"
            "hint: a spec is plain YAML data\n",
            id="with a zero byte",
        ),
        pytest.param(
            b"",
            "quantize.layers: empty: nothing would be quantized\n"
            "hint: write at least one rule: {module_name: Linear, weights: {dtype: int8}}\n",
            id="empty",
        ),
    ],
)
def test_a_file_that_is_no_spec_is_refused(work: Path, refused: Refused, content: bytes, message: str) -> None:
    Path("spec.yaml").write_bytes(content)
    assert refused("quantize") == (2, message)
    assert not Path("ran").exists()
    assert not Path("results").exists()


def test_a_spec_that_is_not_there_is_refused(work: Path, refused: Refused) -> None:
    Path("spec.yaml").unlink()
    assert refused("quantize") == (
        2,
        "spec.yaml: cannot be read: No such file or directory\nhint: give the spec file with -e\n",
    )


def test_a_folder_as_a_spec_is_refused(work: Path, refused: Refused) -> None:
    Path("spec.yaml").unlink()
    Path("spec.yaml").mkdir()
    assert refused("quantize") == (
        2,
        "spec.yaml: cannot be read: Is a directory\nhint: give the spec file with -e\n",
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        pytest.param(
            "quantize.device",
            "quantize.device: an override has the form key=value\nhint: for example quantize.device=cpu\n",
            id="without a value",
        ),
        pytest.param(
            "=cpu",
            "=cpu: an override has the form key=value\nhint: for example quantize.device=cpu\n",
            id="without a key",
        ),
        pytest.param(
            "quantize.layers.7.weights.dtype=int8",
            "override quantize.layers.7.weights.dtype=int8: list index out of range\n"
            "hint: name an existing field; lists take an index, layers.0.weights.dtype\n",
            id="of a rule that is not there",
        ),
        pytest.param(
            "quantize.layers.fc.weights.dtype=int8",
            "override quantize.layers.fc.weights.dtype=int8: Index 'fc' (str) is not an int\n"
            "hint: name an existing field; lists take an index, layers.0.weights.dtype\n",
            id="of a rule by its pattern",
        ),
        pytest.param(
            "quantize.layers.1.weights.dtype=int4",
            "override quantize.layers.1.weights.dtype=int4: quantize.layers[1].weights.dtype: unknown value 'int4'\n"
            "hint: did you mean 'int8'?\n",
            id="wrong value in a rule",
        ),
        pytest.param(
            "quantize.layers=[{module_name: Linear, weights: {dtype: int4}}]",
            "override quantize.layers=[{module_name: Linear, weights: {dtype: int4}}]:"
            " quantize.layers[0].weights.dtype: unknown value 'int4'\n"
            "hint: did you mean 'int8'?\n",
            id="wrong value in a list",
        ),
        pytest.param(
            "quantize.layers=[{module_name: Linear, weights: {}}]",
            "override quantize.layers=[{module_name: Linear, weights: {}}]:"
            " quantize.layers[0].weights.dtype: missing: this field needs a value\n"
            "hint: write it in the spec, or give quantize.layers[0].weights.dtype=...\n",
            id="missing value in a list",
        ),
        pytest.param(
            "dataset={num_classes: 0}",
            "override dataset={num_classes: 0}: dataset.num_classes: 0 is less than 1\n"
            "hint: the field is: Number of classes\n",
            id="wrong value in a section",
        ),
        pytest.param(
            "quantize.devise=cpu",
            "override quantize.devise=cpu: quantize.devise: unknown field in section 'quantize'\n"
            "hint: did you mean 'device'?\n",
            id="unknown field",
        ),
        pytest.param(
            "quantise.device=cpu",
            "override quantise.device=cpu: quantise: unknown field in the spec\nhint: did you mean 'quantize'?\n",
            id="unknown section",
        ),
        pytest.param(
            "dataset.num_classes.digits=10",
            "override dataset.num_classes.digits=10: dataset.num_classes: is a section, not a single value\n"
            "hint: the field is: Number of classes\n",
            id="below a value",
        ),
        pytest.param(
            "dataset.num_classes=",
            "override dataset.num_classes=: dataset.num_classes: is empty, not a single value\n"
            "hint: the field is: Number of classes\n",
            id="empty",
        ),
        pytest.param(
            "quantize.layers=[{module_name: Linear",
            "override quantize.layers=[{module_name: Linear: not valid YAML: did not find expected ','"
            " or '}'\n"
            "hint: a spec is plain YAML data\n",
            id="that does not parse",
        ),
        pytest.param(
            "dataset.num_classes=!!python/object/apply:os.system ['touch ran']",
            "override dataset.num_classes=!!python/object/apply:os.system ['touch ran']: not valid YAML:"
            " could not determine a constructor for the tag '!!python/object/apply:os.system'\n"
            "hint: a spec is plain YAML data\n",
            id="with code",
        ),
    ],
)
def test_a_wrong_override_is_named(work: Path, refused: Refused, override: str, message: str) -> None:
    assert refused("quantize", override) == (2, message)
    assert not Path("ran").exists()
    assert not Path("results").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-e"], "argument -e/--experiment_spec_file: expected one argument\nhint: see taoq {} --help\n"),
        (["-e", ""], "no spec is given\nhint: add -e spec.yaml\n"),
        (["spec.yaml"], "no spec is given\nhint: add -e spec.yaml\n"),
        (["-e", "spec.yaml", "--gpus", "2"], "unrecognized arguments: --gpus\nhint: see taoq {} --help\n"),
        (["-e", "spec.yaml", "-k", "key"], "unrecognized arguments: -k\nhint: see taoq {} --help\n"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_line_is_refused(taoq: Taoq, work: Path, words: list[str], message: str) -> None:
    action = "classification_pyt quantize"
    assert taoq(*action.split(), *words) == (2, "", f"{action}: {message.format(action)}")


@pytest.mark.parametrize(
    ("override", "code", "message"),
    [
        pytest.param(
            "results_dir=weights.safetensors/new",
            1,
            "weights.safetensors/new: cannot be written: Not a directory\n"
            "hint: free some space, or name another folder\n",
            id="below a file",
        ),
        pytest.param(
            "results_dir=[new]",
            2,
            "override results_dir=[new]: results_dir: is a list, not a single value\n"
            "hint: the field is: Folder of all results; an action without a folder of its own writes below it\n",
            id="a list",
        ),
        pytest.param(
            "results_dir=${new}",
            2,
            "override results_dir=${new}: results_dir: interpolation key 'new' not found\n"
            "hint: give it a value, or write the path of an existing field as ${section.field}\n",
            id="a wrong interpolation",
        ),
        pytest.param(
            "result_dir=new",
            2,
            "override result_dir=new: result_dir: unknown field in the spec\nhint: did you mean 'results_dir'?\n",
            id="misspelt",
        ),
    ],
)
def test_a_wrong_results_dir_for_the_default_spec_is_refused(
    taoq: Taoq, work: Path, override: str, code: int, message: str
) -> None:
    assert taoq("classification_pyt", "default_specs", override) == (code, "", message)


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
            {**STATIC, "module_name: fc": "module_name: layer4"},
            "spec.yaml:31: quantize.layers[1].module_name: pattern 'layer4' matches no layer\n"
            "hint: did you mean 'layer4.*'?\n",
            id="a container's name",
        ),
        pytest.param(
            {**STATIC, "module_name: fc": "module_name: BasicBlock"},
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
def test_rules_that_match(edit: Edit, refused: Refused, changes: Mapping[str, str], message: str) -> None:
    edit(changes)
    assert refused("quantize") == (2, message)
    assert refused("quantize", "--dry-run") == (2, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            {"type: resnet_18": "type: resnet_81"},
            "spec.yaml:5: model.backbone.type: no library has a network 'resnet_81'\n"
            "hint: did you mean 'resnet_18' or 'resnet18' or 'resnetv2_18'?\n",
            id="unknown",
        ),
        pytest.param(
            {"type: resnet_18": "type: fan_tiny_8_p4_hybrid"},
            "spec.yaml:5: model.backbone.type: no library has a network 'fan_tiny_8_p4_hybrid'\n"
            "hint: any timm or torchvision name works, and TAO's where these have the network\n",
            id="unknown, and nothing is near",
        ),
        pytest.param(
            {"type: resnet_18": "type: keras/resnet18"},
            "spec.yaml:5: model.backbone.type: unknown library 'keras'\nhint: write timm/NAME or torchvision/NAME\n",
            id="of an unknown library",
        ),
        pytest.param(
            {"type: resnet_18": "type: ''"},
            "spec.yaml:5: model.backbone.type: missing: which network is it?\n"
            "hint: write a name, for example resnet_50\n",
            id="not given",
        ),
        pytest.param(
            {"args: {channels": "args: {chanels"},
            "spec.yaml:6: model.backbone.args: timm cannot build resnet18:"
            " ResNet.__init__() got an unexpected keyword argument 'chanels'\n"
            "hint: see the constructor of resnet18 in timm\n",
            id="with an unknown argument",
        ),
        pytest.param(
            {"type: resnet_18": "type: torchvision/resnet18", "args: {channels": "args: {chanels"},
            "spec.yaml:6: model.backbone.args: torchvision cannot build resnet18:"
            " ResNet.__init__() got an unexpected keyword argument 'chanels'\n"
            "hint: see the constructor of resnet18 in torchvision\n",
            id="of torchvision with an unknown argument",
        ),
        pytest.param(
            {"args: {channels": "args: {num_classes: 3, channels"},
            "spec.yaml:6: model.backbone.args.num_classes: the network gets it from dataset.num_classes\n"
            "hint: take it out of the arguments\n",
            id="with num_classes in the arguments",
        ),
        pytest.param(
            {"model_path: weights.safetensors": "model_path: ''"},
            "spec.yaml:4: model.backbone.pretrained: no checkpoint is given, and pretrained weights are not asked for\n"
            "hint: give the checkpoint in the action's section, or set model.backbone.pretrained: true\n",
            id="without weights",
        ),
    ],
)
def test_a_network_is_refused(edit: Edit, refused: Refused, changes: Mapping[str, str], message: str) -> None:
    edit(changes)
    assert refused("quantize") == (2, message)


def test_an_argument_of_the_network_cannot_bring_a_checkpoint_past_the_check_for_code(
    edit: Edit, refused: Refused
) -> None:
    edit({"args: {channels": "args: {checkpoint_path: weights.pth, channels"})
    assert refused("quantize") == (
        2,
        "spec.yaml:6: model.backbone.args.checkpoint_path: the network gets it from the checkpoint of the action\n"
        "hint: take it out of the arguments\n",
    )


def test_arguments_that_modelopt_takes_but_cannot_use_on_this_network_are_refused(edit: Edit, refused: Refused) -> None:
    edit({**STATIC, "backend_kwargs: {}": "backend_kwargs: {layerwise: {enable: true}}"})
    assert refused("quantize") == (
        2,
        "modelopt.pytorch is for accuracy studies in torch (quantization is simulated, it brings no speed) and"
        " smaller files\n"
        "quantize.calibration.num_samples is 512, there are 20 images: all are used\n"
        "spec.yaml:35: quantize.backend_kwargs: ModelOpt cannot calibrate with these arguments: Could not find"
        " transformer layers in model. Layerwise calibration requires a model with identifiable transformer layers.\n"
        "hint: take out those that this network does not allow\n",
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            {"topk: [1, 5]": "topk: [1, 11]"},
            "spec.yaml:8: model.head.topk: [1, 11] does not fit 10 classes\nhint: write numbers from 1 to 10\n",
            id="topk is larger than num_classes",
        ),
        pytest.param(
            {"evaluate:\n": "evaluate:\n  num_gpus: 2\n"},
            "spec.yaml:37: evaluate.num_gpus: num_gpus is 2, gpu_ids is [0]: taoq runs on one device\n"
            "hint: write num_gpus: 1 and one entry in gpu_ids\n",
            id="two GPUs",
        ),
        pytest.param(
            {"device: cpu\ninference": "device: trt\ninference"},
            "spec.yaml:38: evaluate.device: trt does not run torch models\nhint: write cuda, cuda:N or cpu\n",
            id="device trt",
        ),
        pytest.param(
            {"device: cpu\ninference": "device: gpu\ninference"},
            "spec.yaml:38: evaluate.device: unknown value 'gpu'\n"
            "hint: the field is: Where to run: cuda, cuda:N or cpu; trt (TensorRT) for ONNX files\n",
            id="unknown device",
        ),
        pytest.param(
            {"evaluate:\n": "evaluate:\n  is_quantized: true\n"},
            "spec.yaml:37: evaluate.is_quantized: weights.safetensors is not an artifact: there is no manifest.json"
            " beside it that names it\n"
            "hint: quantize first, or give the folder of an artifact as evaluate.checkpoint\n",
            id="is_quantized of a float checkpoint",
        ),
        pytest.param(
            {"evaluate:\n  checkpoint: weights.safetensors\n": "evaluate:\n  is_quantized: true\n"},
            "spec.yaml:37: evaluate.is_quantized: is true, but evaluate.checkpoint is not given\n"
            "hint: quantize first, or give the folder of an artifact as evaluate.checkpoint\n",
            id="is_quantized of nothing",
        ),
        pytest.param(
            {"evaluate:\n  checkpoint: weights.safetensors\n": "evaluate:\n"},
            "spec.yaml:4: model.backbone.pretrained: no checkpoint is given, and pretrained weights are not asked for\n"
            "hint: give the checkpoint in the action's section, or set model.backbone.pretrained: true\n",
            id="no checkpoint",
        ),
        pytest.param(
            {"  val_dataset:\n    images_dir: data/val\n  test_dataset:\n    images_dir: data/test\n": ""},
            "spec.yaml:9: dataset.val_dataset.images_dir: missing: evaluate needs labelled images\n"
            "hint: name a folder with one folder per class\n",
            id="no images",
        ),
    ],
)
def test_an_evaluation_is_refused(edit: Edit, refused: Refused, changes: Mapping[str, str], message: str) -> None:
    edit(changes)
    assert refused("evaluate") == (2, message)


def test_static_quantization_without_calibration_images_is_refused(edit: Edit, refused: Refused) -> None:
    edit({**STATIC, "  quant_calibration_dataset:\n    images_dir: data/calibration\n": ""})
    assert refused("quantize") == (
        2,
        "modelopt.pytorch is for accuracy studies in torch (quantization is simulated, it brings no speed) and"
        " smaller files\n"
        "spec.yaml:9: dataset.quant_calibration_dataset.images_dir: missing: static_ptq with activations needs"
        " calibration images\n"
        "hint: name a folder of a few hundred images like those the model will see\n",
    )


def test_the_last_line_of_status_json_says_what_was_wrong(edit: Edit, refused: Refused) -> None:
    edit({"module_name: Linear": "module_name: Liner"})
    refused("quantize")
    assert (
        Path("results/quantize/status.json")
        .read_text()
        .splitlines()[-1]
        .endswith(
            '"status": "FAILURE", "verbosity": "ERROR", "message": "Quantize failed: quantize.layers[0].module_name:'
            " pattern 'Liner' matches no layer hint: did you mean 'Linear'?\"}"
        )
    )
