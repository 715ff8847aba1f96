"""ONNX files through quantize, evaluate and inference: taoq's own, anyone's, and the user document's examples."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import yaml
from onnx import helper, numpy_helper

from taoq.files import sha256
from taoq.pipeline.artifacts import read_artifact
from taoq.quantization.formats.onnx import qdq
from taoq.spec.source import read_spec
from taoq.tasks import load_task

Taoq = Callable[..., tuple[int, str, str]]
Words = Callable[..., list[str]]

EXAMPLES = Path(__file__).parents[2] / "examples"
RESNET = EXAMPLES / "digits" / "checkpoints" / "resnet_18.safetensors"
DETECTOR = EXAMPLES / "digit_scenes" / "checkpoints" / "rtdetr_small"
INT8 = "weights: {dtype: int8}, activations: {dtype: int8}"
CONV_AND_GEMM = f"quantize.layers=[{{module_name: Conv, {INT8}}}, {{module_name: Gemm, {INT8}}}]"
FEW = "quantize.calibration.num_samples=16"
MODELOPT, ONNXRUNTIME = "quantize.backend=modelopt.onnx", "quantize.backend=onnxruntime"
SAID = {
    "modelopt.onnx": "modelopt.onnx is for NVIDIA GPUs through TensorRT; on a CPU its graph is slower than float,"
    " backend onnxruntime is for CPUs\n",
    "onnxruntime": "onnxruntime is for CPUs, through onnxruntime; for NVIDIA GPUs take backend modelopt.onnx\n",
}
every_backend = pytest.mark.parametrize("backend", SAID)
ARTIFACT = [
    "experiment.yaml",
    "log.txt",
    "manifest.json",
    "quantization_report.html",
    "quantization_report.json",
    "quantized_model.onnx",
    "status.json",
]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def float_file(
    taoq: Taoq, digits_words: Words, scenes_words: Words, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The exported ResNet ("resnet_18") or detector ("detector"), made once."""
    folder = tmp_path_factory.getbasetemp() / "exported"

    def of(network: str) -> Path:
        file = folder / f"{network}.onnx"
        if not file.exists():
            options = ("export.on_cpu=true", f"export.onnx_file={file}")
            words = (
                scenes_words("export", f"export.checkpoint={DETECTOR}", *options)
                if network == "detector"
                else digits_words("export", network, f"export.checkpoint={RESNET}", *options)
            )
            code, _, err = taoq(*words)
            assert code == 0, err
        return file

    return of


@pytest.fixture
def resnet(float_file: Callable[[str], Path]) -> Path:
    return float_file("resnet_18")


@pytest.fixture
def metrics(taoq: Taoq, digits_words: Words, scenes_words: Words, tmp_path: Path) -> Callable[..., dict[str, float]]:
    """What evaluate says of a checkpoint: (network, checkpoint)."""

    def of(network: str, checkpoint: Path) -> dict[str, float]:
        options = (f"evaluate.checkpoint={checkpoint}", f"evaluate.results_dir={tmp_path}/evaluate")
        words = (
            scenes_words("evaluate", *options)
            if network == "detector"
            else digits_words("evaluate", network, *options)
        )  # fmt: skip
        code, _, err = taoq(*words)
        assert code == 0, err
        return read(tmp_path / "evaluate" / "results.json")["metrics"]

    return of


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def quantized(folder: Path) -> list[str]:
    """Quantized layers of an artifact, from its manifest, which must be those of its graph."""
    manifest = read_artifact(folder).manifest
    found = [row["layer"] for row in manifest.plan if row["weights"] or row["activations"]]
    assert sorted(found) == sorted(qdq.read(onnx.load(str(folder / manifest.payload))))
    return found


@every_backend
def test_a_classifier_from_quantize_to_evaluate(
    taoq: Taoq, digits_words: Words, resnet: Path, metrics: Any, tmp_path: Path, backend: str
) -> None:
    folder = tmp_path / "results" / "quantize"
    options = (f"quantize.backend={backend}", f"quantize.model_path={resnet}")
    code, out, err = taoq(*digits_words("quantize", "resnet_18", *options, CONV_AND_GEMM))
    assert (code, err) == (0, SAID[backend])  # and nothing of the libraries
    titles = [line.strip() for line in out.splitlines() if not re.match(r"[│┏┃┡└]", line)]
    titles = [title for title in titles if not title.startswith(("largest errors of", "worse", "report: "))]
    assert titles[:2] == [
        f"{backend}, static_ptq, minmax",
        "22 of 22 quantizable layers are quantized; 28 layers without a weight matrix are not listed",
    ]
    assert re.fullmatch(
        r"quantized 22 of 22 layers with 200 calibration images in [0-9.]+ s on cpu;"
        r" 2\.88 MB as float32, 0\.7\d+ MB now",
        titles[2],
    )
    assert titles[3:] == [f"artifact: {folder}"]
    assert names(folder) == ARTIFACT
    onnx.checker.check_model(str(folder / "quantized_model.onnx"), full_check=True)

    manifest, payload = read_artifact(folder).manifest, folder / "quantized_model.onnx"
    assert (manifest.task, manifest.backend, manifest.format) == ("classification_pyt", backend, "onnx")
    assert (manifest.payload, manifest.sha256, manifest.size) == (
        payload.name, sha256(payload), payload.stat().st_size,
    )  # fmt: skip
    assert manifest.source == {"path": str(resnet), "sha256": sha256(resnet)}
    assert manifest.calibration == {"num_samples": 200, "seed": 0}
    assert set(manifest.versions) >= {"python", "onnx", "onnxruntime-gpu", "timm"}
    assert len(quantized(folder)) == 22
    rows = {row["layer"]: row for row in manifest.plan}
    assert rows["/layer1/0/downsample/0/Conv"] == {
        "layer": "/layer1/0/downsample/0/Conv",
        "alias": "layer1.0.downsample.0",
        "type": "Conv",
        "weights": {"dtype": "int8", "axis": 0, "asked": "int8"},
        "activations": {"dtype": "int8", "axis": None, "asked": "int8"},
        "rule": "quantize.layers[0]",
        "reason": "",
    }
    assert (rows["/fc/Gemm"]["alias"], rows["/fc/Gemm"]["rule"]) == ("fc", "quantize.layers[1]")
    report = read(folder / "quantization_report.json")
    assert (report["layers_quantized"], report["layers_quantizable"], report["warnings"]) == (22, 22, [])
    assert [{key: row[key] for key in manifest.plan[0]} for row in report["layers"]] == list(manifest.plan)
    assert yaml.safe_load((folder / "experiment.yaml").read_text())["quantize"]["backend"] == backend

    figures = metrics("resnet_18", folder)
    assert metrics("resnet_18", payload) == figures
    assert abs(figures["val_acc_1"] - metrics("resnet_18", RESNET)["val_acc_1"]) <= 0.003


@every_backend
def test_a_detector_from_quantize_to_evaluate(
    taoq: Taoq,
    scenes_words: Words,
    float_file: Callable[[str], Path],
    metrics: Any,
    tmp_path: Path,
    backend: str,
) -> None:
    file, folder = float_file("detector"), tmp_path / "results" / "quantize"
    rules = (f"quantize.layers=[{{module_name: Conv, {INT8}}}]", "quantize.skip_names=['decoder.*']")
    options = (f"quantize.backend={backend}", f"quantize.model_path={file}")
    code, out, err = taoq(*scenes_words("quantize", *options, *rules))
    assert (code, err) == (0, SAID[backend])
    assert "quantized 46 of 106 layers with 40 calibration images in " in out
    assert names(folder) == ARTIFACT
    rows = {row["layer"]: row for row in read_artifact(folder).manifest.plan}
    first = rows["/model/backbone/model/embedder/embedder/0/convolution/Conv"]
    assert (first["alias"], first["rule"]) == ("backbone.conv1.conv1_1.conv", "quantize.layers[0]")
    skipped = [row for row in rows.values() if row["rule"] == "quantize.skip_names[0]"]
    assert skipped
    assert all(row["alias"].startswith("decoder.") and not row["weights"] for row in skipped)
    assert set(quantized(folder)) == {row["layer"] for row in rows.values() if row["rule"] == "quantize.layers[0]"}
    figures = metrics("detector", folder)
    assert figures["val_mAP"] > 0.8
    assert abs(figures["val_mAP"] - metrics("detector", file)["val_mAP"]) < 0.01


@pytest.mark.parametrize("network", ["resnet_18", "detector"])
def test_a_float_file_has_the_metrics_of_torch(float_file: Callable[[str], Path], metrics: Any, network: str) -> None:
    torchs = metrics(network, DETECTOR if network == "detector" else RESNET)
    assert metrics(network, float_file(network)) == pytest.approx(torchs, abs=1e-3)


def test_a_new_process_gives_the_same_metrics(
    taoq: Taoq, digits_words: Words, resnet: Path, metrics: Any, tmp_path: Path
) -> None:
    options = (MODELOPT, f"quantize.model_path={resnet}", CONV_AND_GEMM, FEW)
    assert taoq(*digits_words("quantize", "resnet_18", *options))[0] == 0
    folder = tmp_path / "results" / "quantize"
    here = metrics("resnet_18", folder)
    words = digits_words("evaluate", "resnet_18", f"evaluate.checkpoint={folder}")
    process = subprocess.run([sys.executable, "-m", "taoq", *words], capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, f"{folder}: quantized by modelopt.onnx, 22 layers\n")
    assert read(tmp_path / "results" / "evaluate" / "results.json")["metrics"] == here


def test_inference_writes_what_torch_writes(
    taoq: Taoq, digits_words: Words, digits: Path, resnet: Path, tmp_path: Path
) -> None:
    for digit in ("3", "8"):
        (tmp_path / "images" / digit).mkdir(parents=True)
        for image in sorted((digits / "val" / digit).iterdir())[:2]:
            (tmp_path / "images" / digit / image.name).write_bytes(image.read_bytes())
    words = (ONNXRUNTIME, f"quantize.model_path={resnet}", CONV_AND_GEMM, FEW)
    assert taoq(*digits_words("quantize", "resnet_18", *words))[0] == 0
    written, rows = {}, {}
    for kind, checkpoint in {"torch": RESNET, "float": resnet, "int8": tmp_path / "results" / "quantize"}.items():
        options = (f"inference.checkpoint={checkpoint}", f"inference.results_dir={tmp_path / kind}")
        images = f"dataset.test_dataset.images_dir={tmp_path / 'images'}"
        assert taoq(*digits_words("inference", "resnet_18", *options, images))[0] == 0
        written[kind] = names(tmp_path / kind)
        with (tmp_path / kind / "result.csv").open(newline="") as file:
            rows[kind] = [row[:2] for row in csv.reader(file)]
    assert written["torch"] == written["float"] == written["int8"]
    assert rows["torch"] == rows["float"] == rows["int8"]
    assert len(rows["torch"]) in (4, 5)  # with or without a header


def test_inference_of_a_detector_writes_what_torch_writes(
    taoq: Taoq, scenes_words: Words, scenes: Path, float_file: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    for number in (1, 2):
        (tmp_path / "images" / f"{number}.jpg").write_bytes((scenes / "val" / f"000{number}.jpg").read_bytes())
    written, found = {}, {}
    for kind, checkpoint in {"torch": DETECTOR, "onnx": float_file("detector")}.items():
        options = (f"inference.checkpoint={checkpoint}", f"inference.results_dir={tmp_path / kind}")
        images = f"dataset.infer_data_sources.image_dir=[{tmp_path / 'images'}]"
        assert taoq(*scenes_words("inference", *options, images))[0] == 0
        written[kind] = names(tmp_path / kind)
        annotations = read(tmp_path / kind / "detections.json")["annotations"]
        found[kind] = [(entry["image_id"], entry["category_id"]) for entry in annotations]
    assert written["torch"] == written["onnx"]
    assert "detections.json" in written["onnx"]
    assert found["torch"] == found["onnx"]


def test_the_network_s_own_names_are_patterns_of_nodes(
    taoq: Taoq, digits_words: Words, resnet: Path, tmp_path: Path
) -> None:
    layers = f"quantize.layers=[{{module_name: 'layer1.*', {INT8}}}, {{module_name: fc, {INT8}}}]"
    options = (ONNXRUNTIME, f"quantize.model_path={resnet}", layers, "quantize.skip_names=[fc]", FEW)
    code, _, err = taoq(*digits_words("quantize", "resnet_18", *options))
    assert (code, err) == (0, SAID["onnxruntime"])
    assert sorted(quantized(tmp_path / "results" / "quantize")) == [
        f"/layer1/{block}/conv{number}/Conv" for block in (0, 1) for number in (1, 2)
    ][:2] + ["/layer1/0/downsample/0/Conv"] + [f"/layer1/1/conv{number}/Conv" for number in (1, 2)]  # fmt: skip


@every_backend
@pytest.mark.parametrize("slash", ["", "/"])
def test_a_node_is_named_with_or_without_the_first_slash(
    taoq: Taoq, digits_words: Words, resnet: Path, backend: str, slash: str
) -> None:
    layers = f"quantize.layers=[{{module_name: '{slash}layer[12]/*', {INT8}}}, {{module_name: Gemm, {INT8}}}]"
    options = (f"quantize.backend={backend}", f"quantize.model_path={resnet}", layers)
    skip = f"quantize.skip_names=['{slash}layer2/*/Conv', '{slash}fc/Gemm']"
    code, out, err = taoq(*digits_words("quantize", "resnet_18", *options, skip), "--dry-run")
    assert (code, err) == (0, SAID[backend] + "dry run: nothing was calibrated, nothing was written\n")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert len(rows) == 22
    assert [row[0].split("/")[1] for row in rows if row[3] != "float"] == ["layer1"] * 5
    assert "5 of 22 quantizable layers are quantized" in out


@every_backend
def test_a_dry_run_opens_no_data_and_writes_nothing(
    taoq: Taoq, digits_words: Words, resnet: Path, tmp_path: Path, backend: str
) -> None:
    before = sorted(path.name for path in resnet.parent.iterdir())
    options = (f"quantize.backend={backend}", f"quantize.model_path={resnet}", CONV_AND_GEMM)
    more = ("dataset.quant_calibration_dataset.images_dir=nowhere", f"quantize.calibration.cache={tmp_path}/ranges")
    code, out, err = taoq(*digits_words("quantize", "resnet_18", *options, *more), "--dry-run")
    assert (code, err) == (0, SAID[backend] + "dry run: nothing was calibrated, nothing was written\n")
    assert "22 of 22 quantizable layers are quantized" in out
    assert list(tmp_path.iterdir()) == []
    assert sorted(path.name for path in resnet.parent.iterdir()) == before


DOCUMENT = {
    "5.3": """
        quantize:
          model_path: "/path/to/model.onnx"
          results_dir: "/path/to/output"
          backend: "modelopt.onnx"
          mode: "static_ptq"
          algorithm: "minmax"
          layers:
            - module_name: "Conv"
              weights: { dtype: "int8" }
              activations: { dtype: "int8" }
            - module_name: "Gemm"
              weights: { dtype: "int8" }
              activations: { dtype: "int8" }
        """,
    "5.4 useful examples": """
        quantize:
          backend: "modelopt.onnx"
          backend_kwargs:
            use_external_data_format: true # For large models >2GB
            op_types_to_quantize: ["Conv", "Gemm"] # Limit quantized op types
            calibrate_per_node: true # Per-node calibration
            high_precision_dtype: "fp16" # Keep some ops in FP16
        """,
    "5.4 large model": """
        quantize:
          model_path: "/path/to/model.onnx"
          results_dir: "/path/to/output"
          backend: "modelopt.onnx"
          mode: "static_ptq"
          algorithm: "max"
          layers:
            - module_name: "*"
              weights: { dtype: "fp8_e5m2" }
              activations: { dtype: "fp8_e5m2" }
          skip_names: ["/head/*"]
          backend_kwargs:
            use_external_data_format: true # For models >2GB
            op_types_to_quantize: ["Conv", "Gemm"] # Only these ops
        """,
}


@pytest.fixture
def document(digits: Path, resnet: Path, tmp_path: Path) -> Callable[..., Path]:
    """A spec: the network and the data of the example, and the quantize section of the document with our paths."""

    def of(example: str, **more: Any) -> Path:
        section = yaml.safe_load(DOCUMENT[example])["quantize"]
        spec = yaml.safe_load((EXAMPLES / "digits" / "resnet_18.yaml").read_text())
        paths = {"model_path": str(resnet), "results_dir": str(tmp_path / "results" / "quantize")}
        spec["quantize"] = {**section, **paths, **more}
        spec["dataset"].update(
            root_dir=str(digits),
            val_dataset={"images_dir": str(digits / "val")},
            test_dataset={"images_dir": str(digits / "val")},
            quant_calibration_dataset={"images_dir": str(digits / "calibration")},
        )
        spec["results_dir"] = str(tmp_path / "results")
        path = tmp_path / "spec.yaml"
        path.write_text(yaml.safe_dump(spec, sort_keys=False))
        return path

    return of


def said(err: str) -> list[str]:
    """What was said, without where; nor of the device, which differs by machine."""
    lines = [re.sub(r"^(warning: )?(?:\S+:\d+: )?", r"\1", line) for line in err.splitlines()]
    return [line for line in lines if "running on the CPU" not in line]


def test_the_first_example_of_the_document(taoq: Taoq, document: Any, metrics: Any, tmp_path: Path) -> None:
    code, out, err = taoq("classification_pyt", "quantize", "-e", str(document("5.3")))
    few = "quantize.calibration.num_samples is 512, there are 200 images: all are used"
    assert (code, said(err)) == (0, [SAID["modelopt.onnx"].strip(), few])
    assert "quantized 22 of 22 layers with 200 calibration images" in out
    assert metrics("resnet_18", tmp_path / "results" / "quantize")["val_acc_1"] > 0.99


def test_the_second_example_of_the_document_lacks_rules_and_a_mode(
    taoq: Taoq, document: Any, metrics: Any, tmp_path: Path
) -> None:
    spec = document("5.4 useful examples")
    code, _, err = taoq("classification_pyt", "quantize", "-e", str(spec))
    assert (code, said(err)) == (
        2,
        [
            "quantize.mode: backend modelopt.onnx has no mode weight_only_ptq",
            "hint: write mode: static_ptq, or choose a backend that has weight_only_ptq",
            "quantize.layers: empty: nothing would be quantized",
            "hint: write at least one rule: {module_name: Linear, weights: {dtype: int8}}",
        ],
    )
    rules = yaml.safe_load(DOCUMENT["5.3"])["quantize"]
    spec = document(
        "5.4 useful examples", mode="static_ptq", layers=rules["layers"], calibration={"num_samples": 16}
    )  # fmt: skip
    code, _, err = taoq("classification_pyt", "quantize", "-e", str(spec))
    assert (code, said(err)) == (0, [SAID["modelopt.onnx"].strip()])
    folder = tmp_path / "results" / "quantize"
    assert names(folder) == sorted([*ARTIFACT, "quantized_model.onnx_data"])
    assert len(read_artifact(folder).manifest.plan) == 22
    kinds = {tensor.data_type for tensor in onnx.load(str(folder / "quantized_model.onnx")).graph.initializer}
    assert {onnx.TensorProto.FLOAT16, onnx.TensorProto.INT8} <= kinds
    assert metrics("resnet_18", folder)["val_acc_1"] > 0.99


def test_the_third_example_of_the_document(taoq: Taoq, document: Any, metrics: Any, tmp_path: Path) -> None:
    """Its E5M2 is E4M3, its `/head/*` is not in this network, TensorRT has no FP8 for narrow layers: all said."""
    spec = document("5.4 large model", calibration={"num_samples": 16})
    code, _, err = taoq("classification_pyt", "quantize", "-e", str(spec))
    assert (code, said(err)) == (
        0,
        [
            "warning: quantize.layers[0].weights.dtype: modelopt.onnx has no static fp8_e5m2 and realises it as"
            " fp8_e4m3fn",
            "warning: quantize.layers[0].activations.dtype: modelopt.onnx has no static fp8_e5m2 and realises it as"
            " fp8_e4m3fn",
            "warning: quantize.skip_names[0]: '/head/*' matches no layer",
            SAID["modelopt.onnx"].strip(),
            "warning: quantize.layers[0]: 8 layer(s) stay float (/conv1/Conv, /layer1/0/conv1/Conv,"
            " /layer1/0/downsample/0/Conv, ...): ModelOpt leaves it out: TensorRT has no fast fp8 kernel for its shape",
        ],
    )
    folder = tmp_path / "results" / "quantize"
    assert names(folder) == sorted([*ARTIFACT, "quantized_model.onnx_data"])
    assert len(quantized(folder)) == 14
    assert metrics("resnet_18", folder)["val_acc_1"] > 0.98

    spec = document("5.4 large model", strict=True, results_dir=str(tmp_path / "strict"))
    code, _, err = taoq("classification_pyt", "quantize", "-e", str(spec))
    assert (code, said(err)[-2:]) == (
        1,
        [
            "quantize.layers[0]: /conv1/Conv, /layer1/0/conv1/Conv, /layer1/0/downsample/0/Conv, ... cannot be"
            " quantized: ModelOpt leaves it out: TensorRT has no fast fp8 kernel for its shape",
            "hint: put them into quantize.skip_names, or set quantize.strict: false to leave them float",
        ],
    )
    assert names(tmp_path / "strict") == ["log.txt", "status.json"]


def plain(file: Path, **options: Any) -> onnx.ModelProto:
    """The example ResNet by torch's own exporter: its names, batch norms as they are."""
    task = load_task("classification_pyt")
    from taoq.spec.load import load_spec

    spec = load_spec(read_spec(str(EXAMPLES / "digits" / "resnet_18.yaml"), []), task.spec, unused=task.unused)
    net = task.build_model(spec, str(RESNET)).eval()
    names = {"input_names": ["pixels"], "output_names": ["scores"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(net, (torch.zeros(1, 3, 32, 32),), str(file), dynamo=False, **names, **options)
    return onnx.load(str(file))


def bare(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph by hand: unnamed nodes, every weight a Constant node, one image a batch."""
    constants = [
        helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in model.graph.initializer
    ]  # fmt: skip
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in model.graph.node]
    for node in nodes:
        node.name = ""
    graph = helper.make_graph([*constants, *nodes], "by hand", model.graph.input, model.graph.output)
    return helper.make_model(graph, opset_imports=list(model.opset_import), ir_version=8)


FOREIGN = {
    "torch's exporter": ({"opset_version": 17, "dynamic_axes": {"pixels": {0: "n"}, "scores": {0: "n"}}}, False),
    "an old opset": ({"opset_version": 11, "dynamic_axes": {"pixels": {0: "n"}, "scores": {0: "n"}}}, False),
    "batch norms": (
        {"opset_version": 17, "training": torch.onnx.TrainingMode.PRESERVE, "do_constant_folding": False},
        False,
    ),
    "no names, one image": ({"opset_version": 17}, True),
}


@pytest.mark.parametrize(
    ("backend", "kind"),
    [
        ("onnxruntime", "torch's exporter"),
        ("modelopt.onnx", "an old opset"),
        ("onnxruntime", "batch norms"),
        ("modelopt.onnx", "no names, one image"),
        ("onnxruntime", "no names, one image"),
    ],
)
def test_the_file_of_another_exporter(
    taoq: Taoq, digits_words: Words, metrics: Any, tmp_path: Path, backend: str, kind: str
) -> None:
    file, folder = tmp_path / "foreign.onnx", tmp_path / "results" / "quantize"
    options, by_hand = FOREIGN[kind]
    model = plain(file, **options)
    if by_hand:
        onnx.save(bare(model), str(file))
    words = (f"quantize.backend={backend}", f"quantize.model_path={file}", CONV_AND_GEMM, FEW)
    code, out, err = taoq(*digits_words("quantize", "resnet_18", *words))
    assert (code, err) == (0, SAID[backend])
    assert "quantized 22 of 22 layers with 16 calibration images" in out
    found = quantized(folder)
    assert len(set(found)) == 22
    if by_hand:
        assert found[0].startswith("Conv")
    assert abs(metrics("resnet_18", folder)["val_acc_1"] - 0.9966) < 0.005
    if by_hand:
        assert metrics("resnet_18", file)["val_acc_1"] == pytest.approx(0.9966, abs=1e-3)


@every_backend
def test_ranges_are_kept_for_the_next_run(
    taoq: Taoq, digits_words: Words, resnet: Path, tmp_path: Path, backend: str
) -> None:
    cache, payload = tmp_path / "cache" / "ranges.json", tmp_path / "results" / "quantize" / "quantized_model.onnx"
    options = (f"quantize.backend={backend}", f"quantize.model_path={resnet}", CONV_AND_GEMM, FEW)
    where = f"quantize.calibration.cache={cache}"
    field = f"override {where}: quantize.calibration.cache: "

    def run(*more: str) -> str:
        code, _, err = taoq(*digits_words("quantize", "resnet_18", *options, where, *more))
        assert code == 0
        assert err.startswith(SAID[backend])
        return err.removeprefix(SAID[backend])

    assert run() == ""
    first, ranges = payload.read_bytes(), cache.read_bytes()
    tensors = len(json.loads(ranges)["ranges"])
    assert run() == f"{field}ranges of {tensors} tensors taken from {cache}; nothing was calibrated\n"
    assert (payload.read_bytes(), cache.read_bytes()) == (first, ranges)
    assert run("quantize.calibration.seed=1") == f"{field}{cache} is of another images: calibrating again\n"
    assert payload.read_bytes() != first
    assert run("quantize.calibration.seed=1", "quantize.algorithm=entropy") == (
        f"{field}{cache} is of another algorithm: calibrating again\n"
    )
    assert names(cache.parent) == ["ranges.json"]
    log = (payload.parent / "log.txt").read_text()
    assert "DEBUG taoq.library: Finding optimal threshold for each tensor using 'entropy' algorithm ..." in log
    assert "nothing was calibrated\n" in log


def test_weights_beside_the_file(taoq: Taoq, digits_words: Words, resnet: Path, metrics: Any, tmp_path: Path) -> None:
    folder = tmp_path / "results" / "quantize"
    words = digits_words(
        "quantize",
        "resnet_18",
        MODELOPT,
        f"quantize.model_path={resnet}",
        CONV_AND_GEMM,
        FEW,
    )
    beside = "quantize.backend_kwargs={use_external_data_format: true}"
    assert taoq(*words, beside)[0] == 0
    assert names(folder) == sorted([*ARTIFACT, "quantized_model.onnx_data"])
    payload, data = folder / "quantized_model.onnx", folder / "quantized_model.onnx_data"
    manifest = read_artifact(folder).manifest
    assert manifest.size == payload.stat().st_size + data.stat().st_size
    assert data.stat().st_size > 0.8 * manifest.size
    figures = metrics("resnet_18", folder)
    assert figures["val_acc_1"] > 0.99

    good = data.read_bytes()
    data.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    evaluate = digits_words("evaluate", "resnet_18", f"evaluate.checkpoint={folder}")
    changed = (
        f"{payload}: is not the file that its manifest names (sha256 differs)\n"
        "hint: the file was changed or cut off after it was written: quantize again\n"
    )
    code, _, err = taoq(*evaluate)
    assert (code, err) == (1, changed)
    data.unlink()
    assert taoq(*evaluate)[::2] == (1, changed)

    data.write_bytes(good)
    assert taoq(*words)[0] == 0
    assert names(folder) == ARTIFACT
    assert metrics("resnet_18", folder) == figures


def test_a_float_file_with_its_weights_beside_it(
    taoq: Taoq, digits_words: Words, resnet: Path, metrics: Any, tmp_path: Path
) -> None:
    file = tmp_path / "large.onnx"
    onnx.save(
        onnx.load(str(resnet)), str(file), save_as_external_data=True, location="elsewhere.bin", size_threshold=0
    )  # fmt: skip
    words = digits_words(
        "quantize", "resnet_18", ONNXRUNTIME, f"quantize.model_path={file}", CONV_AND_GEMM, FEW
    )  # fmt: skip
    assert taoq(*words)[0] == 0
    folder = tmp_path / "results" / "quantize"
    assert names(folder) == ARTIFACT
    assert metrics("resnet_18", file) == pytest.approx(metrics("resnet_18", resnet))
    (tmp_path / "elsewhere.bin").unlink()
    code, _, err = taoq(*words)
    assert code == 1
    assert err.startswith(f"{file}: its weights beside it cannot be read: ")
    assert err.endswith("\nhint: copy elsewhere.bin beside it\n")
    assert len(quantized(folder)) == 22  # the artifact of the first run is whole


REFUSALS = {
    "a torch checkpoint": (
        f"quantize.model_path={RESNET}",
        f"{RESNET} is not an ONNX file\n"
        "hint: backend onnxruntime quantizes ONNX files: taoq classification_pyt export makes one of a checkpoint\n",
    ),
    "nothing": (
        "quantize.model_path=''",
        "missing: the .onnx file\n"
        "hint: backend onnxruntime quantizes ONNX files: taoq classification_pyt export makes one of a checkpoint\n",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_backend_of_graphs_takes_graphs(taoq: Taoq, digits_words: Words, tmp_path: Path, case: str) -> None:
    override, text = REFUSALS[case]
    code, _, err = taoq(*digits_words("quantize", "resnet_18", ONNXRUNTIME, CONV_AND_GEMM, override))
    assert (code, err) == (2, f"override {override}: quantize.model_path: {text}")
    assert not (tmp_path / "results").exists()


def test_a_backend_of_torch_takes_no_graph(taoq: Taoq, digits_words: Words, resnet: Path) -> None:
    override = f"quantize.model_path={resnet}"
    code, _, err = taoq(*digits_words("quantize", "resnet_18", override))
    assert (code, err) == (
        2,
        f"override {override}: quantize.model_path: {resnet} is an ONNX file, backend modelopt.pytorch quantizes torch"
        " checkpoints\n"
        "hint: set quantize.backend to modelopt.onnx (GPUs) or onnxruntime (CPUs)\n",
    )


def test_a_quantized_graph_is_not_quantized_again(
    taoq: Taoq, digits_words: Words, resnet: Path, metrics: Any, tmp_path: Path
) -> None:
    """Neither the payload of an artifact, nor a copy of it; a copy runs as any file."""
    words = (MODELOPT, CONV_AND_GEMM, FEW)
    assert taoq(*digits_words("quantize", "resnet_18", *words, f"quantize.model_path={resnet}"))[0] == 0
    payload, copy = tmp_path / "results" / "quantize" / "quantized_model.onnx", tmp_path / "copy.onnx"
    copy.write_bytes(payload.read_bytes())
    hint = "hint: give the float checkpoint it was made from\n"
    for file, text in (
        (payload, f"{payload} is quantized already\n{hint}"),
        (
            copy,
            f"{copy} is quantized already: it has QuantizeLinear or DequantizeLinear nodes\n"
            "hint: give the float file it was made from\n",
        ),
    ):
        override = f"quantize.model_path={file}"
        code, _, err = taoq(*digits_words("quantize", "resnet_18", *words, override, "quantize.results_dir=" + str(tmp_path / "again")))  # fmt: skip  # noqa: E501
        assert (code, err) == (2, f"override {override}: quantize.model_path: {text}")
    assert metrics("resnet_18", copy) == metrics("resnet_18", payload)
    override = "evaluate.is_quantized=false"
    code, _, err = taoq(*digits_words("evaluate", "resnet_18", f"evaluate.checkpoint={copy}", override))
    assert (code, err) == (
        2,
        f"override {override}: evaluate.is_quantized: is false, but {copy} is quantized\n"
        "hint: leave the field out: the file knows\n",
    )


def test_a_file_is_for_the_task_and_the_network_it_was_exported_from(
    taoq: Taoq, digits_words: Words, scenes_words: Words, resnet: Path
) -> None:
    code, _, err = taoq(*scenes_words("evaluate", f"evaluate.checkpoint={resnet}"))
    assert (code, err) == (
        1,
        f"{resnet}: was exported by classification_pyt\nhint: run it with: taoq classification_pyt ...\n",
    )
    code, _, err = taoq(*digits_words("evaluate", "vit_tiny", f"evaluate.checkpoint={resnet}"))
    assert code == 2
    assert err.startswith(f"{EXAMPLES / 'digits' / 'vit_tiny.yaml'}:")
    assert "model.backbone.type: is vit_tiny_patch16, " in err
    assert err.count("\n") == 2


def test_weights_with_values_that_are_no_numbers_are_refused(
    taoq: Taoq, digits_words: Words, resnet: Path, tmp_path: Path
) -> None:
    model = onnx.load(str(resnet))
    (name,) = (node.input[1] for node in model.graph.node if node.name == "/fc/Gemm")
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    values = numpy_helper.to_array(weight).copy()
    values[0, 0] = float("nan")
    weight.CopyFrom(numpy_helper.from_array(values, name))
    file = tmp_path / "bad.onnx"
    onnx.save(model, str(file))
    words = (ONNXRUNTIME, CONV_AND_GEMM, FEW, f"quantize.model_path={file}")
    code, _, err = taoq(*digits_words("quantize", "resnet_18", *words))
    assert (code, err) == (
        1,
        SAID["onnxruntime"] + "/fc/Gemm: its weight is not finite\n"
        "hint: look for NaN or infinite values in the checkpoint\n",
    )
