"""`quantize` of the example classifiers: the folder of the artifact, the plan, the data that is opened."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision

from support.commands import Taoq, Words, read_json, rules, status_lines
from taoq.files import sha256
from taoq.pipeline.artifacts import read_artifact

TORCHAO = ("quantize.backend=torchao", "quantize.mode=weight_only_ptq")
LINEAR = rules("int8", "Linear", activations=False)
NO_DATA = "dataset.quant_calibration_dataset.images_dir=nowhere"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Where `quantize` writes."""
    return tmp_path / "results" / "quantize"


def test_the_artifact_folder(taoq: Taoq, digits_words: Words, directory: Path) -> None:
    code, out, _ = taoq(*digits_words("quantize", "resnet_18", "quantize.skip_names=[conv1]"))
    assert code == 0
    assert out.rstrip().endswith(f"artifact: {directory}")
    assert sorted(path.name for path in directory.iterdir()) == [
        "experiment.yaml",
        "log.txt",
        "manifest.json",
        "quantization_report.html",
        "quantization_report.json",
        "quantized_model_modelopt.pytorch.pth",
        "status.json",
    ]
    manifest = read_artifact(directory).manifest
    payload = directory / "quantized_model_modelopt.pytorch.pth"
    assert (manifest.task, manifest.backend, manifest.format) == ("classification_pyt", "modelopt.pytorch", "torch")
    assert (manifest.sha256, manifest.size) == (sha256(payload), payload.stat().st_size)
    assert manifest.size < 0.32 * manifest.float_size
    assert manifest.calibration == {"num_samples": 200, "seed": 0}
    assert (manifest.preprocessing["resize"], manifest.preprocessing["resize_to"]) == ("squash", 32)
    assert manifest.source["sha256"] == sha256(Path(manifest.source["path"]))
    assert set(manifest.versions) == {"python", "torch", "nvidia-modelopt", "timm", "torchvision"}
    rows = {row["layer"]: row for row in manifest.plan}
    assert len(rows) == 22
    assert rows["conv1"] == {
        "layer": "conv1",
        "alias": "",
        "type": "Conv2d",
        "weights": None,
        "activations": None,
        "rule": "quantize.skip_names[0]",
        "reason": "skipped",
    }
    assert rows["fc"]["weights"] == {"dtype": "int8", "axis": 0, "asked": "int8"}
    report = read_json(directory / "quantization_report.json")
    assert (report["layers_quantized"], report["layers_quantizable"]) == (21, 22)
    assert [{key: row[key] for key in manifest.plan[0]} for row in report["layers"]] == list(manifest.plan)


def test_status_json_has_tao_s_lines(taoq: Taoq, digits_words: Words, directory: Path) -> None:
    taoq(*digits_words("quantize", "vit_tiny", *TORCHAO, LINEAR))
    lines = status_lines(directory)
    assert [(line["status"], line["verbosity"], line["message"]) for line in lines] == [
        ("STARTED", "INFO", "Starting classification_pyt quantize."),
        ("RUNNING", "INFO", "Quantized."),
        ("SUCCESS", "INFO", "Quantize finished successfully."),
    ]
    assert lines[1]["kpi"]["layers_quantized"] == 25
    assert set(lines[0]) == {"date", "time", "status", "verbosity", "message"}


def test_a_dry_run_prints_the_plan_and_writes_nothing(taoq: Taoq, digits_words: Words, tmp_path: Path) -> None:
    code, out, err = taoq(*digits_words("quantize", "vit_tiny", NO_DATA, "quantize.skip_names=[head]"), "--dry-run")
    assert code == 0
    assert "25 of 26 quantizable layers are quantized" in out
    assert "quantize.skip_names[0] 'head' (skipped)" in out
    assert err.endswith("dry run: nothing was calibrated, nothing was written\n")
    assert not (tmp_path / "results").exists()


def test_every_quantize_prints_the_plan(taoq: Taoq, digits_words: Words) -> None:
    _, out, _ = taoq(*digits_words("quantize", "resnet_18", *TORCHAO, LINEAR))
    plan, errors = out.split("largest errors of 1 quantized layers")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in plan.splitlines() if line.startswith("│")]
    assert "│ fc " in errors
    assert rows[0] == ["conv1", "Conv2d", "float", "float", "torchao does not quantize Conv2d"]
    assert rows[-1] == ["fc", "Linear", "int8 axis 0", "float", "quantize.layers[0] 'Linear'"]


def test_weight_only_opens_no_data(taoq: Taoq, digits_words: Words) -> None:
    assert taoq(*digits_words("quantize", "vit_tiny", *TORCHAO, LINEAR, NO_DATA))[0] == 0


def test_static_rules_of_weights_alone_open_no_data(taoq: Taoq, digits_words: Words) -> None:
    assert taoq(*digits_words("quantize", "vit_tiny", LINEAR, NO_DATA))[0] == 0


@pytest.mark.parametrize("algorithm", ["minmax", "entropy"])
def test_the_same_seed_gives_the_same_artifact(taoq: Taoq, digits_words: Words, tmp_path: Path, algorithm: str) -> None:
    def scales(name: str, seed: int) -> dict[str, torch.Tensor]:
        directory = tmp_path / name
        words = digits_words(
            "quantize",
            "resnet_18",
            f"quantize.results_dir={directory}",
            f"quantize.algorithm={algorithm}",
            "quantize.calibration.num_samples=16",
            f"quantize.calibration.seed={seed}",
            "quantize.layers=[{module_name: fc, weights: {dtype: int8}, activations: {dtype: int8}}]",
        )
        assert taoq(*words)[0] == 0
        state = torch.load(directory / "quantized_model_modelopt.pytorch.pth", weights_only=True)["model_state_dict"]
        return {key: value for key, value in state.items() if key.endswith("_amax")}

    first, again, other = scales("a", 1), scales("b", 1), scales("c", 2)
    assert len(first) == 2
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["fc.input_quantizer._amax"], other["fc.input_quantizer._amax"])


def test_quantizing_again_replaces_the_artifact_as_a_whole(taoq: Taoq, digits_words: Words, directory: Path) -> None:
    taoq(*digits_words("quantize", "vit_tiny", *TORCHAO, LINEAR))
    first = read_artifact(directory).manifest
    taoq(*digits_words("quantize", "vit_tiny", *TORCHAO, LINEAR.replace("int8", "fp8_e5m2")))
    second = read_artifact(directory).manifest
    assert first.sha256 != second.sha256
    assert len(status_lines(directory)) == 6


def test_a_fallback_to_the_cpu_gets_a_warning(taoq: Taoq, digits_words: Words) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    words = digits_words("quantize", "vit_tiny", *TORCHAO, LINEAR, "quantize.device=cuda:1")
    code, out, err = taoq(*words)
    assert code == 0
    assert (
        "warning: override quantize.device=cuda:1: quantize.device: cuda:1 is not available on this machine;"
        " running on the CPU\n"
    ) in err
    assert " s on cpu; " in out


def test_layers_that_a_network_goes_past_stay_float(taoq: Taoq, tmp_path: Path) -> None:
    """torchvision's Swin uses `attn.qkv.weight` without calling `attn.qkv`: ModelOpt's weight would be int8 there."""
    torch.save(torchvision.models.swin_t(num_classes=10).state_dict(), tmp_path / "swin.pth")
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        f"results_dir: {tmp_path}/results\n"
        "model: {backbone: {type: torchvision/swin_t}}\n"
        "dataset: {num_classes: 10, img_size: 64}\n"
        "quantize:\n"
        f"  {{model_path: {tmp_path}/swin.pth, backend: modelopt.pytorch, mode: static_ptq, device: cpu,\n"
        "   layers: [{module_name: Linear, weights: {dtype: int8}}]}\n"
    )
    words = ["classification_pyt", "quantize", "-e", str(spec)]
    reason = "the network does not call it: it uses the weight in another way, or not at all"
    code, _, err = taoq(*words, "quantize.strict=true")
    assert code == 1
    what, hint = err.splitlines()[-2:]
    assert what.startswith(f"{spec}:6: quantize.layers[0]: features.1.0.attn.qkv, features.1.0.attn.proj, ")
    assert what.endswith(f"cannot be quantized: {reason}")
    assert hint == "hint: put them into quantize.skip_names, or set quantize.strict: false to leave them float"
    assert not list((tmp_path / "results" / "quantize").glob("*.pth"))
    assert taoq(*words)[0] == 0
    plan = read_artifact(tmp_path / "results" / "quantize").manifest.plan
    assert {row["reason"] for row in plan if row["layer"].endswith("attn.qkv")} == {reason}
