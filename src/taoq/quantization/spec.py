# SPDX-License-Identifier: Apache-2.0
"""The `quantize:` section: the one vocabulary of backends, modes, formats and algorithms."""

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
    """What a rule says about the weights or the activations of a layer."""

    dtype: str = option(
        REQUIRED,
        "Numeric format: int8, fp8_e4m3fn, fp8_e5m2, or native to stay float; float8_* is the same as fp8_*",
        options=_DTYPES,
        aliases=ALIASES,
    )
    quant_axis: int | None = option(
        None,
        "Axis with one scale per index; without it weights have one per output channel, activations one per tensor",
    )


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One rule. The last rule that matches a layer decides the whole layer."""

    module_name: str = option(
        REQUIRED,
        "Pattern (* ? [seq]) on the layer's name, else on its type (Linear, Conv2d; in ONNX Gemm, Conv)",
        example="Linear",
    )
    weights: TensorSpec | None = option(None, "Format of the weights; without it they stay float")
    activations: TensorSpec | None = option(
        None, "Format of the layer's inputs; without it they stay float; torchao has none"
    )


@dataclass(frozen=True, kw_only=True)
class CalibrationSpec:
    """How much calibration data static quantization sees."""

    num_samples: int = option(512, "Number of images, drawn at random; all of them if there are fewer", minimum=1)
    batch_size: int | None = option(None, "Images per batch; without it dataset.batch_size", minimum=1)
    seed: int = option(
        0, "Seed of the draw: the same seed gives the same images, in the same order, and the same scales"
    )
    cache: str = option(
        "",
        "File that keeps the ranges, and gives them back where model, images and settings are the same; ONNX backends",
        example="ranges.json",
    )


@dataclass(frozen=True, kw_only=True)
class AccuracySpec:
    """How much accuracy quantization may cost."""

    max_drop: float = option(
        REQUIRED,
        "Largest loss of the metric that is accepted, as a part of 1: 0.005 is half a point",
        minimum=0,
        maximum=1,
        example=0.005,
    )
    metric: str = option("auto", "Figure of evaluate that counts; auto is its first: val_acc_1, val_mAP")
    action: str = option(
        "check",
        "check refuses (exit code 4) what loses more; search looks for the layers that can be quantized within it",
        options=ACCURACY_ACTIONS,
    )
    maximize: str = option(
        "macs", "What search quantizes most of: multiply-accumulates, or bytes of weights", options=MAXIMIZE
    )
    dtypes: list[str] = option(
        list,
        "Formats that search may choose from for each layer; without it those of the rules",
        options=IN_RULES,
        aliases=ALIASES,
        example=["int8"],
    )
    max_evaluations: int = option(20, "Plans that search may evaluate; what comes out is evaluated besides", minimum=1)
    analysis: str = option("", "analysis.json of the analyze action; without it search makes one")


@dataclass(frozen=True, kw_only=True)
class QuantizeSpec:
    """ModelQuantizationConfig of TAO, and `calibration`, which is ours."""

    backend: str = option("torchao", "The quantization backend to use", options=BACKENDS.names())
    mode: str = option("weight_only_ptq", "The quantization mode to use", options=MODES)
    algorithm: str = option(
        "minmax",
        "How activation ranges come from calibration data; minmax and max are the same; entropy takes int8 only;"
        " smoothquant also moves outliers of inputs into the weights: int8 Linear of modelopt.pytorch",
        options=ALGORITHMS,
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
    layers: list[LayerSpec] = option(list, "The rules: which layers are quantized, and to what")
    skip_names: list[str] = option(list, "Patterns of layers that stay float, whatever the rules say")
    model_path: str = option(
        "",
        "The trained checkpoint to quantize (.pth, .ckpt or .safetensors); for ONNX backends the .onnx file",
        example="model.pth",
    )
    results_dir: str = option("", "Folder of the artifact; without it results_dir/quantize")
    backend_kwargs: JsonObject = option(dict, "Arguments of the library behind the backend, checked against it")
    device: str = option(
        "cuda", "Where to quantize: cuda, cuda:N or cpu; trt (TensorRT) is for modelopt.onnx", pattern=DEVICE_PATTERN
    )
    strict: bool = option(False, "Whether a layer that a rule names and the library leaves out is an error")
    bias_correction: bool = option(
        False,
        "Add to the biases of quantized layers what quantization shifts their mean output by, measured on calibration"
        " data",
    )
    calibration: CalibrationSpec = option(CalibrationSpec, "Calibration data of static quantization")
    evaluate: bool = option(False, "Measure float and quantized on the evaluation data, and how sure the difference is")
    accuracy: AccuracySpec | None = option(None, "How much accuracy it may cost; measured, so evaluate is implied")
