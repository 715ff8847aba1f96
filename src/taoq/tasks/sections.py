# SPDX-License-Identifier: Apache-2.0
"""The sections that every task's spec has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from taoq.plain import JsonObject
from taoq.plugins import RUNTIMES
from taoq.quantization.spec import DEVICE_PATTERN, QuantizeSpec
from taoq.spec.fields import option

UNUSED = {
    "model_name": "a label of TAO's",
    "encryption_key": "taoq reads and writes plain files",
    "wandb": "experiment tracking",
    "train": "another job",
    "distill": "another job",
    "gen_trt_engine": "a job of TAO Deploy",
    "evaluate.trt_engine": "TensorRT engines are run by TAO Deploy",
    "inference.trt_engine": "TensorRT engines are run by TAO Deploy",
    "evaluate.num_nodes": "one machine",
    "inference.num_nodes": "one machine",
    "quantize.layers[[]*].*.observer_or_fake_quant*": "no backend reads it, in TAO neither",
}
"""Fields of TAO's specs of any task that are accepted and not used, with the reason."""


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """What the sections that run a model share."""

    checkpoint: str = option(
        "", "Artifact folder or its payload, a float checkpoint, or an ONNX file", example="results/quantize"
    )
    is_quantized: bool | None = option(None, "TAO's flag; not needed, the artifact knows; a contradiction is an error")
    results_dir: str = option("", "Folder of the results; without it results_dir/evaluate or results_dir/inference")
    batch_size: int = option(-1, "Images per batch; -1 is dataset.batch_size", minimum=-1)
    device: str = option(
        "cuda", "Where to run: cuda, cuda:N or cpu; trt (TensorRT) for ONNX files", pattern=DEVICE_PATTERN
    )
    num_gpus: int = option(1, "Number of GPUs; only 1 is possible", minimum=0)
    gpu_ids: list[int] = option(lambda: [0], "Index of the GPU that `device: cuda` means; one entry")
    runtime: str = option(
        "auto",
        "Library that runs the model; auto is taoq's own for its format",
        options=("auto", *RUNTIMES.names()),
        omit_default=True,
    )
    runtime_kwargs: JsonObject = option(
        dict, "Options of the runtime, checked against those that it has", omit_default=True
    )


def batch_size(section: RunSpec, of_dataset: int) -> int:
    """Images per batch of a section that runs a model: its own, or that of the data set."""
    return section.batch_size if section.batch_size > 0 else of_dataset


@dataclass(frozen=True, kw_only=True)
class EvaluateSpec(RunSpec):
    """The `evaluate:` section."""


@dataclass(frozen=True, kw_only=True)
class InferenceSpec(RunSpec):
    """The `inference:` section."""

    vis_after_n_batches: int = option(1, "Draw the pictures of every n-th batch; 0 draws none", minimum=0)


@dataclass(frozen=True, kw_only=True)
class BenchmarkSpec(RunSpec):
    """The `benchmark:` section."""

    baseline: str = option("", "The float model to compare with; without it what the artifact was made from")
    batch_sizes: list[int] = option(lambda: [1, 8], "Images per run", example=[1, 8])
    warmup: int = option(3, "Runs of each model before it is measured", minimum=0)
    runs: int = option(30, "Measured runs of each model", minimum=1)
    compile: bool = option(False, "Measure torch models through torch.compile as well")
    min_speedup: float | None = option(
        None, "Exit code 4 if the quantized model is not this many times as fast, at any batch size", minimum=0
    )


@dataclass(frozen=True, kw_only=True)
class AnalyzeSpec:
    """The `analyze:` section; what is analyzed is what the `quantize:` section would quantize."""

    results_dir: str = option("", "Folder of the results; without it results_dir/analyze")
    num_samples: int = option(32, "Calibration images that outputs are compared on; they are kept in memory", minimum=1)
    groups: list[str] = option(
        list, "Patterns of layers that are switched together; other layers one by one", example=["layer1.*"]
    )
    confirm: int = option(5, "Worst layers or groups whose true metric is measured, alone and left out", minimum=0)
    metric: str = option("auto", "Figure of evaluate that counts; auto is its first: val_acc_1, val_mAP")


@dataclass(frozen=True, kw_only=True)
class ExportSpec:
    """The `export:` section."""

    checkpoint: str = option("", "A float checkpoint, or an artifact of a torch backend", example="model.pth")
    onnx_file: str = option(
        "", "The ONNX file to write; without it model.onnx in the folder of the log", example="model.onnx"
    )
    results_dir: str = option("", "Folder of the log; without it results_dir/export")
    is_quantized: bool | None = option(None, "TAO's flag; not needed, the artifact knows")
    input_channel: int = option(3, "Channels of the input; only 3 is possible", minimum=1)
    input_width: int | None = option(None, "Width of the input, pixels; without it the data set's", minimum=1)
    input_height: int | None = option(None, "Height of the input, pixels; without it the data set's", minimum=1)
    opset_version: int = option(17, "Version of the ONNX operator set", minimum=1)
    batch_size: int = option(-1, "Images per batch; -1 is a dynamic batch", minimum=-1)
    overwrite: bool = option(False, "Replace the file even if it was made from something else")
    check_images: int = option(8, "Images on which the file must agree with the torch model", minimum=1)
    tolerance: float = option(
        1e-3, "Largest difference between both that is accepted, as a part of the largest output", minimum=0
    )
    dequantize: bool = option(False, "Write the weights of an artifact as plain float32, without its quantization")
    on_cpu: bool = option(False, "Export on the CPU")
    gpu_id: int = option(0, "Index of the GPU to export on", minimum=0)
    verbose: bool = option(False, "Show what torch's exporter prints; log.txt has it always")
    format: str = option("onnx", "File format; TAO's xdl has no public reader", options=("onnx",))
    serialize_nvdsinfer: bool = option(False, "Also write nvdsinfer_config.yaml and labels.txt for DeepStream")


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """The spec of a task: a subclass gives `model` and `dataset` their types, and other fields where it needs more."""

    results_dir: str = option(
        "", "Folder of all results; an action without a folder of its own writes below it", example="results"
    )
    model: Any | None = option(None, "The network")
    dataset: Any | None = option(None, "The data")
    quantize: QuantizeSpec = option(QuantizeSpec, "What to quantize, and how")
    evaluate: EvaluateSpec = option(EvaluateSpec, "What to evaluate")
    inference: InferenceSpec = option(InferenceSpec, "What to run on new images")
    export: ExportSpec = option(ExportSpec, "What to export to ONNX")
    analyze: AnalyzeSpec = option(AnalyzeSpec, "How to rank the layers that quantize would quantize")
    benchmark: BenchmarkSpec = option(BenchmarkSpec, "What to measure the speed of")
