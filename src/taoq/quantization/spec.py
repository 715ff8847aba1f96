# SPDX-License-Identifier: Apache-2.0
"""The `quantize:` section of a spec, and the allowed values of its fields."""

from __future__ import annotations

from dataclasses import dataclass

from taoq.plain import JsonObject
from taoq.plugins import BACKENDS
from taoq.quantization.dtypes import ALIASES, IN_RULES, NATIVE
from taoq.spec.fields import REQUIRED, option

MODES = ("weight_only_ptq", "static_ptq")
ALGORITHMS = ("minmax", "max", "entropy", "smoothquant")
ACCURACY_ACTIONS = ("check", "search")
MAXIMIZE = ("macs", "bytes")
_DTYPES = (*IN_RULES, NATIVE)
DEVICE_PATTERN = r"cuda|cpu|trt|cuda:[0-9]+"


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """How a rule quantizes the weights or the activations of a layer."""

    dtype: str = option(
        REQUIRED,
        "Numeric format: int8, fp8_e4m3fn, fp8_e5m2, or native to stay float; float8_* is an alias of fp8_*",
        options=_DTYPES,
        aliases=ALIASES,
    )
    quant_axis: int | None = option(
        None,
        "Axis with one scale per index; default: one scale per output channel for weights, one per tensor for"
        " activations",
    )


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """A rule. The last rule that matches a layer decides the whole layer."""

    module_name: str = option(
        REQUIRED,
        "Pattern (* ? [seq]) that matches the layer's name or its type (Linear, Conv2d; in ONNX Gemm, Conv)",
        example="Linear",
    )
    weights: TensorSpec | None = option(
        None, "How to quantize the weights; without it they stay float", one_or_list=True
    )
    activations: TensorSpec | None = option(
        None,
        "How to quantize the layer's inputs; without it they stay float; no effect with torchao",
        one_or_list=True,
    )


@dataclass(frozen=True, kw_only=True)
class CalibrationSpec:
    """The calibration data of static quantization."""

    num_samples: int = option(512, "Number of images, sampled at random; all images if there are fewer", minimum=1)
    batch_size: int | None = option(None, "Images per calibration batch; default: dataset.batch_size", minimum=1)
    seed: int = option(
        0, "Random seed of the sample: the same seed gives the same images in the same order, and the same scales"
    )
    cache: str = option(
        "",
        "File to store the ranges in; a later run with the same model, images and settings reads them instead of"
        " calibrating; ONNX backends only",
        example="ranges.json",
    )


@dataclass(frozen=True, kw_only=True)
class AccuracySpec:
    """The accuracy that quantization may cost."""

    max_drop: float = option(
        REQUIRED,
        "Largest accepted drop of the metric, as a fraction: 0.005 is half a percentage point",
        minimum=0,
        maximum=1,
        example=0.005,
    )
    metric: str = option("auto", "Metric of evaluate to compare; auto is the first one: val_acc_1, val_mAP")
    action: str = option(
        "check",
        "check fails with exit code 4 if the drop is larger than max_drop; search looks for the layers that can be"
        " quantized within max_drop",
        options=ACCURACY_ACTIONS,
    )
    maximize: str = option(
        "macs",
        "What search maximizes in the quantized layers: multiply-accumulates, or bytes of weights",
        options=MAXIMIZE,
    )
    dtypes: list[str] = option(
        list,
        "Formats that search may choose from for each layer; default: those of the rules",
        options=IN_RULES,
        aliases=ALIASES,
        example=["int8"],
    )
    max_evaluations: int = option(
        20, "Largest number of plans that search evaluates, not counting the evaluation of its result", minimum=1
    )
    analysis: str = option("", "analysis.json of the analyze action; without it search analyzes the model first")


@dataclass(frozen=True, kw_only=True)
class QuantizeSpec:
    """TAO's ModelQuantizationConfig, with additional fields."""

    backend: str = option(
        "torchao",
        "The quantization backend to use; modelopt, as in TAO 6.25.10, is modelopt.pytorch",
        options=BACKENDS.names(),
        aliases={"modelopt": "modelopt.pytorch"},
    )
    mode: str = option(
        "weight_only_ptq",
        "The quantization mode to use",
        options=MODES,
        aliases={name.upper(): name for name in MODES},
    )
    algorithm: str = option(
        "minmax",
        "How activation ranges are computed from calibration data: minmax and max are the same; entropy is for int8,"
        " with modelopt.onnx also for FP8; smoothquant also moves outliers of the inputs into the weights, for int8"
        " Linear layers with modelopt.pytorch",
        options=ALGORITHMS,
        aliases={name.upper(): name for name in ALGORITHMS},
    )
    default_layer_dtype: str | None = option(
        None, "Deprecated, no effect: set weights.dtype in each rule", options=_DTYPES, aliases=ALIASES
    )
    default_activation_dtype: str | None = option(
        None,
        "Deprecated, no effect: set activations.dtype in each rule",
        options=_DTYPES,
        aliases=ALIASES,
    )
    layers: list[LayerSpec] = option(list, "The rules: which layers to quantize, and to which formats")
    skip_names: list[str] = option(list, "Patterns of layers that stay float regardless of the rules")
    model_path: str = option(
        "",
        "The trained checkpoint to quantize (.pth, .ckpt or .safetensors); for ONNX backends the .onnx file",
        example="model.pth",
    )
    results_dir: str = option("", "Directory of the artifact; default: results_dir/quantize")
    backend_kwargs: JsonObject = option(dict, "Arguments for the library of the backend, checked against its signature")
    device: str = option(
        "cuda",
        "Device to quantize on: cuda, cuda:N or cpu; trt (TensorRT) with modelopt.onnx only",
        pattern=DEVICE_PATTERN,
    )
    strict: bool = option(False, "Fail if the library cannot quantize a layer of a rule; otherwise it stays float")
    bias_correction: bool = option(
        False,
        "Correct the biases of quantized layers for the shift of their mean outputs, measured on calibration data",
    )
    calibration: CalibrationSpec = option(CalibrationSpec, "Calibration data of static quantization")
    evaluate: bool = option(
        False, "Evaluate the float and the quantized model, and report the difference with a confidence interval"
    )
    accuracy: AccuracySpec | None = option(None, "How much accuracy quantization may cost; implies evaluate")
