"""An unknown or missing field of a spec is named with its line and a hint, and nothing is written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from support.commands import Taoq
from support.small_spec import FC, LINEAR, STATIC_EDITS, Edit, Refused

DATASET_FIELDS = (
    "dataset, root_dir, classes_file, num_classes, img_size, batch_size, workers, val_dataset, test_dataset,"
    " quant_calibration_dataset, augmentation"
)
MAX_ARGUMENTS = (
    "moe_calib_experts_ratio, layerwise, shared_states, distributed_sync, sync_expert_weight_amax,"
    " skip_forward_without_activation_calib"
)


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
            {**STATIC_EDITS, "backend_kwargs: {}": "backend_kwargs: {method: mse}"},
            "spec.yaml:35: quantize.backend_kwargs.method: ModelOpt's MaxCalibConfig has no argument 'method'\n"
            f"hint: its arguments are {MAX_ARGUMENTS}\n",
            id="in the arguments of modelopt",
        ),
        pytest.param(
            {
                **STATIC_EDITS,
                "algorithm: minmax": "algorithm: entropy",
                "backend_kwargs: {}": "backend_kwargs: {strid: 8}",
            },
            "spec.yaml:35: quantize.backend_kwargs.strid:"
            " ModelOpt's HistogramCalibrator.compute_amax has no argument 'strid'\n"
            "hint: did you mean 'stride'?\n",
            id="in the arguments of entropy",
        ),
    ],
)
def test_an_unknown_field_is_named_with_its_line(
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
            {**STATIC_EDITS, "backend_kwargs: {}": "backend_kwargs: {distributed_sync: 7}"},
            "spec.yaml:35: quantize.backend_kwargs.distributed_sync:"
            " input should be a valid boolean, unable to interpret input\n"
            "hint: see ModelOpt's MaxCalibConfig\n",
            id="modelopt",
        ),
        pytest.param(
            {
                **STATIC_EDITS,
                "algorithm: minmax": "algorithm: entropy",
                "backend_kwargs: {}": "backend_kwargs: {stride: 0}",
            },
            "spec.yaml:35: quantize.backend_kwargs.stride: '0' is not a whole number above 0\n"
            "hint: write for example 8\n",
            id="entropy",
        ),
    ],
)
def test_a_wrong_argument_of_a_library_is_named_with_its_line(
    edit: Edit, refused: Refused, changes: Mapping[str, str], message: str
) -> None:
    edit(changes)
    assert refused("quantize") == (2, message)
    assert not Path("results").exists()


def test_a_device_of_torchao_that_this_machine_lacks_is_refused(edit: Edit, refused: Refused) -> None:
    edit({"backend_kwargs: {}": "backend_kwargs: {device: 'cuda:99'}"})
    assert refused("quantize") == (
        2,
        "spec.yaml:35: quantize.backend_kwargs.device: this machine has no device 'cuda:99'\n"
        "hint: leave it out: quantize.device says where to quantize\n",
    )


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
def test_a_missing_value_is_named_with_its_line(
    edit: Edit, refused: Refused, changes: Mapping[str, str], message: str
) -> None:
    edit(changes)
    assert refused("quantize") == (2, message)
    assert not Path("results").exists()


def test_a_missing_value_of_another_action_is_no_fault(taoq: Taoq, work: Path, edit: Edit) -> None:
    edit(
        {
            "evaluate:\n  checkpoint: weights.safetensors": "evaluate:\n  checkpoint: ???",
            "inference:\n  checkpoint: weights.safetensors": "inference:\n  checkpoint: ${evaluate.checkpoint}",
        }
    )
    assert taoq("classification_pyt", "quantize", "-e", "spec.yaml", "--dry-run")[0] == 0


def test_all_faults_of_a_spec_are_listed(edit: Edit, refused: Refused) -> None:
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
        "hint: the field is: Arguments for the library of the backend, checked against its signature\n"
        "override evaluate.devise=cpu: evaluate.devise: unknown field in section 'evaluate'\n"
        "hint: did you mean 'device'?\n",
    )
    assert not Path("results").exists()
