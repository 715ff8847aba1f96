"""A damaged artifact, or one that the spec contradicts, is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from support.commands import Taoq
from support.damage import Damage, cut
from support.small_spec import STATIC_OVERRIDES, Refused
from taoq.pipeline.artifacts import MANIFEST


def change_manifest(**fields: Any) -> None:
    path = Path("results/quantize", MANIFEST)
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_payload() -> None:
    path = Path("results/quantize/quantized_model_torchao.pth")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(
            lambda: cut("results/quantize/manifest.json", 500),
            "results/quantize/manifest.json: is not readable as a manifest\nhint: quantize again\n",
            id="manifest cut off",
        ),
        pytest.param(
            lambda: Path("results/quantize/manifest.json").write_bytes(b"\x00\xff"),
            "results/quantize/manifest.json: is not readable as a manifest\nhint: quantize again\n",
            id="binary manifest",
        ),
        pytest.param(
            lambda: Path("results/quantize/manifest.json").write_text("[]"),
            "results/quantize/manifest.json: is not readable as a manifest\nhint: quantize again\n",
            id="manifest of another kind",
        ),
        pytest.param(
            lambda: change_manifest(schema_version=2),
            "results/quantize/manifest.json: its schema_version is 2, this taoq reads 1\n"
            "hint: read it with the taoq that wrote it, or quantize again\n",
            id="newer manifest",
        ),
        pytest.param(
            lambda: change_manifest(payload=3, plan=None, owner="me"),
            "results/quantize/manifest.json: is not a manifest of taoq:"
            " owner, payload, plan missing, unknown or of a wrong type\n"
            "hint: quantize again\n",
            id="manifest with other fields",
        ),
        pytest.param(
            lambda: change_manifest(backend="openvino"),
            "results/quantize/manifest.json: this taoq has no backend openvino\nhint: read it with taoq 0.1.0\n",
            id="manifest of an unknown backend",
        ),
        pytest.param(
            lambda: change_manifest(task="segmentation"),
            "results/quantize: is an artifact of segmentation\nhint: run it with: taoq segmentation ...\n",
            id="manifest of another task",
        ),
        pytest.param(
            lambda: change_manifest(spec={"dataset": {"classes": 10}}),
            "results/quantize/manifest.json: its spec does not fit this taoq: Key 'classes' not in 'DatasetSpec'."
            " Did you mean one of: 'num_classes', 'classes_file'?\n"
            "hint: read it with taoq 0.1.0\n",
            id="manifest with another spec",
        ),
        pytest.param(
            change_payload,
            "results/quantize/quantized_model_torchao.pth: is not the file that its manifest names (sha256 differs)\n"
            "hint: the file was changed or cut off after it was written: quantize again\n",
            id="payload changed",
        ),
        pytest.param(
            lambda: cut("results/quantize/quantized_model_torchao.pth", 100_000),
            "results/quantize/quantized_model_torchao.pth: is not the file that its manifest names (sha256 differs)\n"
            "hint: the file was changed or cut off after it was written: quantize again\n",
            id="payload cut off",
        ),
        pytest.param(
            lambda: Path("results/quantize/quantized_model_torchao.pth").unlink(),
            "results/quantize/quantized_model_torchao.pth: the payload of this artifact is missing\n"
            "hint: quantize again\n",
            id="payload missing",
        ),
        pytest.param(
            lambda: Path("results/quantize/manifest.json").unlink(),
            "results/quantize: is a folder without a manifest.json: it is not an artifact, or not a complete one\n"
            "hint: quantize again, or give a checkpoint file\n",
            id="manifest missing",
        ),
    ],
)
def test_a_damaged_artifact_is_refused(artifact: Path, refused: Refused, damage: Damage, message: str) -> None:
    damage()
    assert refused("evaluate", f"evaluate.checkpoint={artifact}") == (1, message)
    assert refused("inference", f"inference.checkpoint={artifact}") == (1, message)


@pytest.mark.parametrize("words", [(), STATIC_OVERRIDES], ids=["torchao", "modelopt"])
def test_a_payload_without_its_manifest_is_refused(
    work: Path, taoq: Taoq, refused: Refused, words: tuple[str, ...]
) -> None:
    assert taoq("classification_pyt", "quantize", "-e", "spec.yaml", *words)[0] == 0
    Path("results/quantize", MANIFEST).unlink()
    (payload,) = Path("results/quantize").glob("*.pth")
    message = (
        f"{payload}: is the payload of a quantized model, without the manifest.json that belongs to it\n"
        "hint: give the folder that quantize wrote, or quantize again\n"
    )
    assert refused("evaluate", f"evaluate.checkpoint={payload}") == (1, message)
    assert refused("quantize", f"quantize.model_path={payload}", "quantize.results_dir=new") == (1, message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(
            ["dataset.img_size=64"],
            "override dataset.img_size=64: dataset.img_size: is 64, the artifact was made with 32\n"
            "hint: use the spec that it was quantized with\n",
            id="img_size",
        ),
        pytest.param(
            ["dataset.num_classes=2", "dataset.classes_file=two.txt", "model.head.topk=[1]"],
            "override dataset.num_classes=2: dataset.num_classes: is 2, the artifact was made with 10\n"
            "hint: use the spec that it was quantized with\n",
            id="num_classes",
        ),
        pytest.param(
            ["model.backbone.type=resnet_34", "dataset.augmentation.mean=[0, 0, 0]"],
            "override dataset.augmentation.mean=[0, 0, 0]: dataset.augmentation.mean: is [0.0, 0.0, 0.0], the artifact"
            " was made with [0.485, 0.456, 0.406]\n"
            "hint: use the spec that it was quantized with\n"
            "override model.backbone.type=resnet_34: model.backbone.type: is resnet_34, the artifact was made with"
            " resnet_18\n"
            "hint: use the spec that it was quantized with\n",
            id="network and normalisation",
        ),
        pytest.param(
            ["evaluate.is_quantized=false"],
            "override evaluate.is_quantized=false: evaluate.is_quantized: is false, but results/quantize is a quantized"
            " artifact\n"
            "hint: leave the field out: it is read from the artifact\n",
            id="is_quantized",
        ),
    ],
)
def test_a_spec_that_contradicts_the_artifact_is_refused(
    artifact: Path, refused: Refused, words: list[str], message: str
) -> None:
    Path("two.txt").write_text("0\n1\n")
    for digit in range(2, 10):
        shutil.rmtree(f"data/val/{digit}")
    if len(words) != 3:
        Path("data/classes.txt").write_text("".join(f"{digit}\n" for digit in range(10)))
    assert refused("evaluate", f"evaluate.checkpoint={artifact}", *words) == (2, message)


@pytest.mark.parametrize("path", ["results/quantize", "results/quantize/quantized_model_torchao.pth"])
def test_an_artifact_is_not_quantized_again(artifact: Path, refused: Refused, path: str) -> None:
    assert refused("quantize", f"quantize.model_path={path}", "quantize.results_dir=again") == (
        2,
        f"override quantize.model_path={path}: quantize.model_path: {path} is quantized already\n"
        "hint: give the float checkpoint it was made from\n",
    )
