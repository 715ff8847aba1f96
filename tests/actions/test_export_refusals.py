"""What `export` refuses: fields that do not fit, checkpoints that are none, and files that it must not replace."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from support.commands import Taoq, Words, rules
from support.examples import CHECKPOINTS
from support.exported import files_of, properties_of

pytestmark = pytest.mark.usefixtures("one_thread")

REFUSALS = {
    "not square": (
        ["export.input_height=64"],
        "override export.input_height=64: export.input_height: the input is 64 x 32 (height x width),"
        " classification_pyt has square inputs\n"
        "hint: write the same input_height and input_width\n",
    ),
    "one channel": (
        ["export.input_channel=1"],
        "override export.input_channel=1: export.input_channel: the input has 1 channels, every network here has 3\n"
        "hint: leave it out\n",
    ),
    "no images": (
        ["export.batch_size=0"],
        "override export.batch_size=0: export.batch_size: 0 images are no batch\n"
        "hint: write -1 for any number of images\n",
    ),
    "a file of torch": (
        ["export.onnx_file=model.pth"],
        "override export.onnx_file=model.pth: export.onnx_file: model.pth does not end in .onnx\n"
        "hint: write model.onnx\n",
    ),
    "opset 8": (
        ["export.opset_version=8"],
        "override export.opset_version=8: export.opset_version: torch's exporter writes opset 9 to 23, not 8\n"
        "hint: write 17, which every network here takes\n",
    ),
    "opset 99": (
        ["export.opset_version=99"],
        "override export.opset_version=99: export.opset_version: torch's exporter writes opset 9 to 23, not 99\n"
        "hint: write 17, which every network here takes\n",
    ),
}
"""Overrides, and what is said about them."""


@pytest.mark.parametrize("case", REFUSALS)
def test_a_wrong_section_is_refused_before_anything_starts(
    taoq: Taoq, export_network: Words, tmp_path: Path, case: str
) -> None:
    overrides, message = REFUSALS[case]
    code, out, err = taoq(*export_network("resnet_18", *overrides))
    assert (code, out, err) == (2, "", message)
    assert not (tmp_path / "results").exists()


def test_an_opset_that_is_too_old_for_the_network_is_refused(taoq: Taoq, export_network: Words, tmp_path: Path) -> None:
    code, _, err = taoq(*export_network("vit_tiny", "export.opset_version=13"))
    assert (code, err) == (
        2,
        "override export.opset_version=13: export.opset_version: the network cannot be written with opset 13:"
        " Exporting the operator 'aten::scaled_dot_product_attention' to ONNX opset version 13 is not supported."
        " Support for this operator was added in version 14, try exporting with this version\n"
        "hint: write 17, which every network here takes\n",
    )
    assert not files_of(tmp_path / "results" / "export")


def test_a_network_of_a_single_size_is_refused_another(taoq: Taoq, export_network: Words, tmp_path: Path) -> None:
    code, _, err = taoq(*export_network("vit_tiny", "export.input_height=64", "export.input_width=64"))
    assert (code, err) == (
        2,
        "override export.input_height=64: export.input_height: is 64, but vit_tiny_patch16_224 takes images of 32"
        " pixels\n"
        "hint: write 32; for a checkpoint of a network for 64 pixels, write model.backbone.args: {img_size: 64}\n",
    )
    assert not (tmp_path / "results" / "export").exists()


def test_a_checkpoint_that_is_not_there_or_is_onnx_already_is_refused(
    taoq: Taoq, export_network: Words, resnet: Path, tmp_path: Path
) -> None:
    assert taoq(*export_network("resnet_18", f"export.checkpoint={resnet}")) == (
        2,
        "",
        f"override export.checkpoint={resnet}: export.checkpoint: {resnet} is an ONNX file already\n"
        "hint: name the checkpoint it was made from\n",
    )
    assert taoq(*export_network("resnet_18", "export.checkpoint=nowhere.pth")) == (
        1,
        "",
        "override export.checkpoint=nowhere.pth: export.checkpoint: there is no nowhere.pth\n"
        "hint: name a checkpoint or an artifact\n",
    )
    assert not (tmp_path / "results").exists()


def test_is_quantized_must_not_contradict_the_checkpoint(taoq: Taoq, export_network: Words) -> None:
    code, _, err = taoq(*export_network("resnet_18", "export.is_quantized=true"))
    assert (code, err) == (
        2,
        "override export.is_quantized=true: export.is_quantized: is true, but"
        f" {CHECKPOINTS['resnet_18']} is not an artifact\n"
        "hint: leave the field out: it is read from the artifact\n",
    )
    assert taoq(*export_network("resnet_18", "export.is_quantized=false", "export.check_images=1"))[0] == 0


def test_a_file_made_from_something_else_is_not_replaced(taoq: Taoq, export_network: Words, tmp_path: Path) -> None:
    checkpoint, file = CHECKPOINTS["resnet_18"], tmp_path / "model.onnx"
    other, same = tmp_path / "other.safetensors", tmp_path / "same.safetensors"
    other.write_bytes(checkpoint.read_bytes() + b" ")
    shutil.copy(checkpoint, same)
    assert taoq(*export_network("resnet_18", f"export.onnx_file={file}"))[0] == 0
    data = file.read_bytes()
    code, _, err = taoq(*export_network("resnet_18", f"export.onnx_file={file}", f"export.checkpoint={other}"))
    assert (code, err) == (
        1,
        f"override export.onnx_file={file}: export.onnx_file: {file} is there already, made from {checkpoint}\n"
        "hint: name another file, or set export.overwrite: true\n",
    )
    assert file.read_bytes() == data
    # the bytes count, not the name
    assert taoq(*export_network("resnet_18", f"export.onnx_file={file}", f"export.checkpoint={same}"))[0] == 0
    assert properties_of(file)["source"]["path"].endswith("same.safetensors")


@pytest.mark.parametrize("content", [b"no ONNX file\n", b""])
def test_a_file_of_someone_else_is_replaced_only_with_overwrite(
    taoq: Taoq, export_network: Words, tmp_path: Path, content: bytes
) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(content)
    words = export_network("resnet_18", f"export.onnx_file={file}")
    code, _, err = taoq(*words)
    assert (code, err) == (
        1,
        f"override export.onnx_file={file}: export.onnx_file: {file} is there already, made from something else\n"
        "hint: name another file, or set export.overwrite: true\n",
    )
    assert file.read_bytes() == content
    assert taoq(*words, "export.overwrite=true")[0] == 0
    assert properties_of(file)["task"] == "classification_pyt"


def test_the_payload_of_an_artifact_is_never_overwritten(
    taoq: Taoq, digits_words: Words, export_network: Words, resnet: Path, tmp_path: Path
) -> None:
    options = [
        "quantize.backend=onnxruntime",
        f"quantize.model_path={resnet}",
        rules("int8", "Gemm", activations=False),
    ]
    assert taoq(*digits_words("quantize", "resnet_18", *options))[0] == 0
    payload = tmp_path / "results" / "quantize" / "quantized_model.onnx"
    before = files_of(payload.parent)
    code, _, err = taoq(*export_network("resnet_18", f"export.onnx_file={payload}", "export.overwrite=true"))
    assert (code, err) == (
        2,
        f"override export.onnx_file={payload}: export.onnx_file: {payload} is the payload of an artifact\n"
        "hint: name another file\n",
    )
    assert files_of(payload.parent) == before
    code, _, err = taoq(*export_network("resnet_18", f"export.checkpoint={payload.parent}"))
    assert (code, err) == (
        2,
        f"{payload.parent}: quantized by onnxruntime, 1 layers\n"
        f"override export.checkpoint={payload.parent}: export.checkpoint: {payload.parent} is an artifact of"
        " onnxruntime: its payload is an ONNX file\n"
        f"hint: take {payload} as it is\n",
    )
