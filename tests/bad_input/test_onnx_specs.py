"""What a backend of ONNX files cannot do is refused with its line or override."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.small_spec import Refused, every_onnx_backend

TORCH_OVERRIDES = (
    "quantize.model_path=weights.safetensors",
    "quantize.layers=[{module_name: Linear, weights: {dtype: int8}}]",
)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(
            ["quantize.model_path=weights.safetensors"],
            "override quantize.model_path=weights.safetensors: quantize.model_path: weights.safetensors is a torch"
            " checkpoint, backend {} quantizes an ONNX file\n"
            "hint: set quantize.backend to modelopt.pytorch or torchao; taoq <task> export makes an ONNX file of a"
            " checkpoint\n",
            id="a checkpoint",
        ),
        pytest.param(
            ["quantize.model_path=''"],
            "override quantize.model_path='': quantize.model_path: missing: backend {} quantizes an ONNX"
            " file\n"
            "hint: taoq <task> export makes an ONNX file of a checkpoint\n",
            id="no file",
        ),
        pytest.param(
            ["quantize.mode=weight_only_ptq"],
            "override quantize.mode=weight_only_ptq: quantize.mode: backend {} has no mode weight_only_ptq\n"
            "hint: write mode: static_ptq, or choose a backend that has weight_only_ptq\n",
            id="weights only",
        ),
        pytest.param(
            ["quantize.layers.0.activations.quant_axis=1"],
            "override quantize.layers.0.activations.quant_axis=1: quantize.layers[0].activations.quant_axis: {} has one"
            " scale for all of a layer's input\n"
            "hint: leave it out\n",
            id="a scale per channel of the input",
        ),
        pytest.param(
            ["quantize.device=gpu"],
            "override quantize.device=gpu: quantize.device: unknown value 'gpu'\n"
            "hint: the field is: Device to quantize on: cuda, cuda:N or cpu; trt (TensorRT) with modelopt.onnx only\n",
            id="unknown device",
        ),
        pytest.param(
            ["quantize.device=cuda:x"],
            "override quantize.device=cuda:x: quantize.device: unknown value 'cuda:x'\n"
            "hint: the field is: Device to quantize on: cuda, cuda:N or cpu; trt (TensorRT) with modelopt.onnx only\n",
            id="unknown GPU",
        ),
        pytest.param(
            ["quantize.backend_kwargs={1: true}"],
            "override quantize.backend_kwargs={{1: true}}: quantize.backend_kwargs: key 1 (int) is incompatible with"
            " (str)\n"
            "hint: the field is: Arguments for the library of the backend, checked against its signature\n",
            id="a number for an argument",
        ),
        pytest.param(
            ["quantize.backend_kwargs.use_external_data_format=3"],
            "override quantize.backend_kwargs.use_external_data_format=3:"
            " quantize.backend_kwargs.use_external_data_format: '3' is not true or false\n"
            "hint: write true or false\n",
            id="a number for true or false",
        ),
        pytest.param(
            ["quantize.calibration.num_samples=0"],
            "override quantize.calibration.num_samples=0: quantize.calibration.num_samples: 0 is less than 1\n"
            "hint: the field is: Number of images, sampled at random; all images if there are fewer\n",
            id="no images",
        ),
    ],
)
@every_onnx_backend
def test_a_spec_that_no_backend_can_follow_is_refused(
    onnx_file: Path, refused: Refused, backend: str, words: list[str], message: str
) -> None:
    assert refused("quantize", f"quantize.backend={backend}", *words) == (2, message.format(backend))
    assert not Path("results").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(
            ["quantize.layers.1.weights.dtype=fp8_e4m3fn"],
            "override quantize.layers.1.weights.dtype=fp8_e4m3fn: quantize.layers[1].weights.dtype: backend onnxruntime"
            " has no fp8_e4m3fn weights\n"
            "hint: choose one of int8, native\n",
            id="fp8 weights",
        ),
        pytest.param(
            ["quantize.layers.1.activations.dtype=fp8_e5m2"],
            "override quantize.layers.1.activations.dtype=fp8_e5m2: quantize.layers[1].activations.dtype: backend"
            " onnxruntime has no fp8_e5m2 activations\n"
            "hint: choose one of int8, native\n",
            id="fp8 activations",
        ),
        pytest.param(
            ["quantize.layers=[{module_name: fc, activations: {dtype: int8}}]"],
            "override quantize.layers=[{module_name: fc, activations: {dtype: int8}}]: quantize.layers[0]: rule 'fc' has"
            " activations only, onnxruntime quantizes them with the weights\n"
            "hint: write weights: {dtype: int8} as well\n",
            id="activations only",
        ),
        pytest.param(
            ["quantize.layers.1.weights.dtype=native"],
            "override quantize.layers.1.weights.dtype=native: quantize.layers[1]: rule 'fc' has activations only,"
            " onnxruntime quantizes them with the weights\n"
            "hint: write weights: {dtype: int8} as well\n",
            id="native weights",
        ),
        pytest.param(
            ["quantize.backend_kwargs={reduce_rang: true}"],
            "override quantize.backend_kwargs={reduce_rang: true}: quantize.backend_kwargs.reduce_rang: onnxruntime's"
            " quantize_static has no argument 'reduce_rang'\n"
            "hint: did you mean 'reduce_range'?\n",
            id="a misspelt argument",
        ),
        pytest.param(
            ["quantize.backend_kwargs={nonsense: 1}"],
            "override quantize.backend_kwargs={nonsense: 1}: quantize.backend_kwargs.nonsense: onnxruntime's"
            " quantize_static has no argument 'nonsense'\n"
            "hint: taoq takes reduce_range, use_external_data_format\n",
            id="an unknown argument",
        ),
        pytest.param(
            ["quantize.backend_kwargs={per_channel: true}"],
            "override quantize.backend_kwargs={per_channel: true}: quantize.backend_kwargs.per_channel: 'per_channel' of"
            " onnxruntime's quantize_static is decided by taoq\n"
            "hint: taoq takes reduce_range, use_external_data_format\n",
            id="an argument that is the plan's",
        ),
        pytest.param(
            ["quantize.backend_kwargs={reduce_range: 1}"],
            "override quantize.backend_kwargs={reduce_range: 1}: quantize.backend_kwargs.reduce_range: '1' is not true or"
            " false\n"
            "hint: write true or false\n",
            id="a wrong value",
        ),
    ],
)
def test_a_spec_that_onnxruntime_cannot_follow_is_refused(
    onnx_file: Path, refused: Refused, words: list[str], message: str
) -> None:
    assert refused("quantize", *words) == (2, message)
    assert not Path("results").exists()


ARGUMENTS = (
    "use_external_data_format, calibrate_per_node, op_types_to_quantize, op_types_to_exclude, high_precision_dtype"
)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("use_external_data: true", "ModelOpt's quantize has no argument 'use_external_data'\nhint: did you mean 'use_external_data_format'?\n"),
        ("nonsense: 1", f"ModelOpt's quantize has no argument 'nonsense'\nhint: taoq takes {ARGUMENTS}\n"),
        ("kwargs: 1", f"ModelOpt's quantize has no argument 'kwargs'\nhint: taoq takes {ARGUMENTS}\n"),
        ("calibrate_per_node: maybe", "'maybe' is not true or false\nhint: write true or false\n"),
        ("op_types_to_quantize: Conv", "'Conv' is not a list of op types\nhint: write a list of op types\n"),
        ("op_types_to_quantize: [Conf]", "taoq quantizes no op type 'Conf'\nhint: did you mean 'Conv'?\n"),
        ("op_types_to_exclude: [3]", "taoq quantizes no op type '3'\nhint: Conv, ConvTranspose, Gemm, MatMul\n"),
        ("high_precision_dtype: bf16", "'bf16' is not fp32 or fp16\nhint: write fp32 or fp16\n"),
        ("high_precision_dtype: [fp16]", "'['fp16']' is not fp32 or fp16\nhint: write fp32 or fp16\n"),
        ("nodes_to_quantize: [a]", "'nodes_to_quantize' of ModelOpt's quantize is decided by taoq\nhint: write rules in quantize.layers\n"),
        ("nodes_to_exclude: [a]", "'nodes_to_exclude' of ModelOpt's quantize is decided by taoq\nhint: write patterns in quantize.skip_names\n"),
        ("quantize_mode: fp8", "'quantize_mode' of ModelOpt's quantize is decided by taoq\nhint: give dtypes in quantize.layers\n"),
        ("calibration_method: max", "'calibration_method' of ModelOpt's quantize is decided by taoq\nhint: set quantize.algorithm\n"),
        ("output_path: x", "'output_path' of ModelOpt's quantize is decided by taoq\nhint: set quantize.results_dir\n"),
        ("onnx_path: x", "'onnx_path' of ModelOpt's quantize is decided by taoq\nhint: set quantize.model_path\n"),
        ("dq_only: true", "'dq_only' of ModelOpt's quantize is decided by taoq\nhint: leave it out: weights are stored quantized, always\n"),
        ("simplify: true", f"'simplify' of ModelOpt's quantize is decided by taoq\nhint: leave it out: taoq takes only {ARGUMENTS}\n"),
    ],
    ids=lambda value: value.partition(":")[0] if ": " in value and "\n" not in value else "",
)  # fmt: skip
def test_an_argument_that_modelopt_does_not_take_is_refused(
    onnx_file: Path, refused: Refused, argument: str, message: str
) -> None:
    override = f"quantize.backend_kwargs={{{argument}}}"
    assert refused("quantize", "quantize.backend=modelopt.onnx", override) == (
        2,
        f"override {override}: quantize.backend_kwargs.{argument.partition(':')[0]}: {message}",
    )
    assert not Path("results").exists()


def test_an_onnx_file_is_refused_by_a_backend_of_torch(onnx_file: Path, refused: Refused) -> None:
    assert refused("quantize", "quantize.backend=torchao", "quantize.mode=weight_only_ptq") == (
        2,
        "spec.yaml:22: quantize.model_path: float.onnx is an ONNX file, backend torchao quantizes a torch checkpoint\n"
        "hint: set quantize.backend to modelopt.onnx (GPUs) or onnxruntime (CPUs)\n",
    )


def test_a_backend_of_torch_keeps_no_ranges(onnx_file: Path, refused: Refused) -> None:
    words = ["quantize.backend=torchao", "quantize.mode=weight_only_ptq", *TORCH_OVERRIDES]
    assert refused("quantize", *words, "quantize.calibration.cache=ranges.json") == (
        2,
        "override quantize.calibration.cache=ranges.json: quantize.calibration.cache: backend torchao keeps no ranges\n"
        "hint: leave it out: this backend calibrates in every run\n",
    )


@pytest.mark.parametrize(
    ("action", "override", "message"),
    [
        (
            "evaluate",
            "evaluate.device=gpu",
            "unknown value 'gpu'\n"
            "hint: the field is: Where to run: cuda, cuda:N or cpu; trt (TensorRT) for ONNX files\n",
        ),
        (
            "evaluate",
            "evaluate.is_quantized=true",
            "is true, but float.onnx is not quantized\nhint: leave the field out: the file knows\n",
        ),
        (
            "evaluate",
            "evaluate.num_gpus=2",
            "num_gpus is 2, gpu_ids is [0]: taoq runs on one device\n"
            "hint: write num_gpus: 1 and one entry in gpu_ids\n",
        ),
    ],
    ids=["unknown device", "not quantized", "two GPUs"],
)
def test_a_run_of_a_file_is_refused(
    onnx_file: Path, refused: Refused, action: str, override: str, message: str
) -> None:
    assert refused(action, override) == (2, f"override {override}: {override.partition('=')[0]}: {message}")


def test_a_run_of_an_artifact_that_is_called_float_is_refused(onnx_artifact: Path, refused: Refused) -> None:
    override = "inference.is_quantized=false"
    assert refused("inference", override, f"inference.checkpoint={onnx_artifact}") == (
        2,
        f"override {override}: inference.is_quantized: is false, but {onnx_artifact} is a quantized artifact\n"
        "hint: leave the field out: it is read from the artifact\n",
    )
