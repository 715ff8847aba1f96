# SPDX-License-Identifier: Apache-2.0
"""The spec sections that all tasks share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from taoq.plain import JsonObject
from taoq.plugins import RUNTIMES
from taoq.quantization.spec import DEVICE_PATTERN, QuantizeSpec
from taoq.spec.fields import option

UNUSED = {
    "model_name": "only a label in TAO",
    "encryption_key": "taoq does not encrypt files",
    "wandb": "taoq does not track experiments",
    "train": "taoq does not train",
    "distill": "taoq does not train",
    "gen_trt_engine": "TensorRT engines are built by TAO Deploy",
    "evaluate.trt_engine": "TensorRT engines are run by TAO Deploy",
    "inference.trt_engine": "TensorRT engines are run by TAO Deploy",
    "evaluate.num_nodes": "taoq runs on one machine",
    "inference.num_nodes": "taoq runs on one machine",
    "quantize.layers[[]*].*.observer_or_fake_quant*": "no backend reads it, not even in TAO",
}
"""Fields of TAO's specs, for any task, that are accepted but not used, with the reason."""


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """The fields of all sections that run a model."""

    checkpoint: str = option(
        "", "Artifact folder or its payload, a float checkpoint, or an ONNX file", example="results/quantize"
    )
    is_quantized: bool | None = option(
        None, "Whether the checkpoint is quantized; not needed, because taoq detects it; an error if it is wrong"
    )
    results_dir: str = option("", "Folder of the results; the default is a subfolder of the top-level results_dir")
    batch_size: int = option(-1, "Images per batch; -1 means dataset.batch_size", minimum=-1)
    device: str = option(
        "cuda", "Where to run: cuda, cuda:N or cpu; trt (TensorRT) for ONNX files", pattern=DEVICE_PATTERN
    )
    num_gpus: int = option(1, "Number of GPUs; only 1 is supported", minimum=0)
    gpu_ids: list[int] = option(lambda: [0], "A list with one entry: the index of the GPU that `device: cuda` means")
    runtime: str = option(
        "auto",
        "Library that runs the model; auto chooses torch or onnxruntime by the format of the model",
        options=("auto", *RUNTIMES.names()),
        omit_default=True,
    )
    runtime_kwargs: JsonObject = option(
        dict, "Options of the runtime; an option that it does not have is an error", omit_default=True
    )


def batch_size(section: RunSpec, dataset_batch_size: int) -> int:
    """Return the images per batch of a section that runs a model: its own value, or that of the data set."""
    return section.batch_size if section.batch_size > 0 else dataset_batch_size


@dataclass(frozen=True, kw_only=True)
class EvaluateSpec(RunSpec):
    """The `evaluate:` section."""


@dataclass(frozen=True, kw_only=True)
class InferenceSpec(RunSpec):
    """The `inference:` section."""

    vis_after_n_batches: int = option(1, "Draw the predictions of every n-th batch; 0 draws none", minimum=0)


@dataclass(frozen=True, kw_only=True)
class BenchmarkSpec(RunSpec):
    """The `benchmark:` section."""

    baseline: str = option(
        "", "The float model to compare with; the default is the checkpoint that the artifact was made from"
    )
    batch_sizes: list[int] = option(lambda: [1, 8], "Batch sizes to measure", example=[1, 8])
    warmup: int = option(3, "Runs of each model that are not measured, before those that are", minimum=0)
    runs: int = option(30, "Measured runs of each model", minimum=1)
    compile: bool = option(False, "Measure torch models with torch.compile as well")
    min_speedup: float | None = option(
        None,
        "Required speed-up of the quantized model over the float model, at each batch size; otherwise exit code 4",
        minimum=0,
    )


@dataclass(frozen=True, kw_only=True)
class AnalyzeSpec:
    """The `analyze:` section. The layers that are analyzed are those that the `quantize:` section would quantize."""

    results_dir: str = option("", "Folder of the results; the default is results_dir/analyze")
    num_samples: int = option(
        32, "Number of calibration images on which outputs are compared; they are kept in memory", minimum=1
    )
    groups: list[str] = option(
        list,
        "Patterns of layers that are quantized together, as one group; all others are analyzed one by one",
        example=["layer1.*"],
    )
    confirm: int = option(
        5,
        "Number of the most sensitive layers or groups to confirm with the metric: each alone, and all except it",
        minimum=0,
    )
    metric: str = option(
        "auto", "Metric that is measured, by its name in evaluate; auto is the first: val_acc_1, val_mAP"
    )


@dataclass(frozen=True, kw_only=True)
class ExportSpec:
    """The `export:` section."""

    checkpoint: str = option("", "A float checkpoint, or an artifact of a torch backend", example="model.pth")
    onnx_file: str = option(
        "", "The ONNX file to write; the default is model.onnx in the folder of the log", example="model.onnx"
    )
    results_dir: str = option("", "Folder of the log; the default is results_dir/export")
    is_quantized: bool | None = option(
        None, "Whether the checkpoint is quantized; not needed, because taoq detects it; an error if it is wrong"
    )
    input_channel: int = option(3, "Channels of the input; only 3 is supported", minimum=1)
    input_width: int | None = option(
        None, "Width of the input, pixels; the default is that of the dataset section", minimum=1
    )
    input_height: int | None = option(
        None, "Height of the input, pixels; the default is that of the dataset section", minimum=1
    )
    opset_version: int = option(17, "Version of the ONNX operator set", minimum=1)
    batch_size: int = option(-1, "Images per batch; -1 is a dynamic batch", minimum=-1)
    overwrite: bool = option(False, "Replace an existing file even if it was not exported from the same checkpoint")
    check_images: int = option(
        8, "Number of images on which the outputs of the file are compared with those of the torch model", minimum=1
    )
    tolerance: float = option(
        1e-3, "Largest accepted difference between these outputs, as a fraction of the largest output", minimum=0
    )
    dequantize: bool = option(False, "Write the weights of an artifact as plain float32, without its quantization")
    on_cpu: bool = option(False, "Export on the CPU")
    gpu_id: int = option(0, "Index of the GPU to export on", minimum=0)
    verbose: bool = option(False, "Show the output of torch's exporter; log.txt has it in any case")
    format: str = option("onnx", "File format; no public library reads TAO's xdl", options=("onnx",))
    serialize_nvdsinfer: bool = option(False, "Also write nvdsinfer_config.yaml and labels.txt for DeepStream")
    postprocess: bool = option(
        False,
        "Append the post-processing of evaluate to the network; in rtdetr the inputs are images and orig_target_sizes"
        " (width, height), the outputs labels, boxes and scores",
        omit_default=True,
    )


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """The spec of a task. A subclass defines the types of `model` and `dataset`, and of other sections as needed."""

    results_dir: str = option(
        "",
        "Folder of all results; each action writes into a subfolder, unless its section has a results_dir",
        example="results",
    )
    model: Any | None = option(None, "The network")
    dataset: Any | None = option(None, "The data")
    quantize: QuantizeSpec = option(QuantizeSpec, "What to quantize, and how")
    evaluate: EvaluateSpec = option(EvaluateSpec, "What to evaluate")
    inference: InferenceSpec = option(InferenceSpec, "What to run on new images")
    export: ExportSpec = option(ExportSpec, "What to export to ONNX")
    analyze: AnalyzeSpec = option(AnalyzeSpec, "How to rank layers by their sensitivity to quantization")
    benchmark: BenchmarkSpec = option(BenchmarkSpec, "Which models to time, and how")


def checkpoints(spec: TaskSpec) -> list[str]:
    """Return the different paths that a spec names where it can name a float checkpoint."""
    paths = (spec.evaluate.checkpoint, spec.quantize.model_path, spec.inference.checkpoint, spec.export.checkpoint)
    return [path for path in dict.fromkeys(paths) if path and path != "???"]
