"""An export that cannot be made, or would replace a file of someone else, is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import pytest
from safetensors.torch import load_file, save_file

from support.commands import Taoq
from support.onnx_files import change_file, remove_properties
from support.small_spec import Refused
from taoq.quantization.formats.onnx.file import read_properties
from taoq.quantization.formats.onnx.graph import Graph

SCENES = Path(__file__).parents[2] / "examples" / "digit_scenes"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        pytest.param(
            ["export.checkpoint=no.pth"],
            1,
            "override export.checkpoint=no.pth: export.checkpoint: there is no no.pth\n"
            "hint: name a checkpoint or an artifact\n",
            id="no such checkpoint",
        ),
        pytest.param(
            ["export.checkpoint=''"],
            2,
            "override export.checkpoint='': export.checkpoint: missing\nhint: name a checkpoint or an artifact\n",
            id="no checkpoint",
        ),
        pytest.param(
            ["export.checkpoint=float.onnx"],
            2,
            "override export.checkpoint=float.onnx: export.checkpoint: float.onnx is an ONNX file already\n"
            "hint: name the checkpoint it was made from\n",
            id="an ONNX file",
        ),
        pytest.param(
            ["export.checkpoint=data"],
            1,
            "data: is a folder, not a checkpoint\nhint: give a .pth, .ckpt or .safetensors file\n",
            id="a folder",
        ),
        pytest.param(
            ["export.checkpoint=spec.yaml"],
            1,
            "spec.yaml: is cut off, or is not a checkpoint of torch\nhint: copy the file again, or give another one\n",
            id="a text",
        ),
        pytest.param(
            ["export.onnx_file=out"],
            2,
            "override export.onnx_file=out: export.onnx_file: out does not end in .onnx\nhint: write out.onnx\n",
            id="no .onnx",
        ),
        pytest.param(
            ["export.onnx_file=weights.safetensors/out.onnx"],
            1,
            "weights.safetensors: cannot be written: Not a directory\nhint: free some space, or name another folder\n",
            id="below a file",
        ),
        pytest.param(
            ["export.onnx_file=foreign.onnx"],
            1,
            "override export.onnx_file=foreign.onnx: export.onnx_file: foreign.onnx is there already, made from"
            " something else\n"
            "hint: name another file, or set export.overwrite: true\n",
            id="over the file of someone else",
        ),
        pytest.param(
            ["export.checkpoint=other.safetensors", "export.onnx_file=float.onnx"],
            1,
            "override export.onnx_file=float.onnx: export.onnx_file: float.onnx is there already, made from {checkpoint}\n"
            "hint: name another file, or set export.overwrite: true\n",
            id="over the file of another checkpoint",
        ),
        pytest.param(
            ["export.opset_version=0"],
            2,
            "override export.opset_version=0: export.opset_version: 0 is less than 1\n"
            "hint: the field is: Version of the ONNX operator set\n",
            id="opset 0",
        ),
        pytest.param(
            ["export.batch_size=0"],
            2,
            "override export.batch_size=0: export.batch_size: 0 images are no batch\n"
            "hint: write -1 for any number of images\n",
            id="an empty batch",
        ),
        pytest.param(
            ["export.batch_size=-2"],
            2,
            "override export.batch_size=-2: export.batch_size: -2 is less than -1\n"
            "hint: the field is: Images per batch; -1 is a dynamic batch\n",
            id="a negative batch",
        ),
        pytest.param(
            ["export.input_channel=1"],
            2,
            "override export.input_channel=1: export.input_channel: the input has 1 channels, every network here has 3\n"
            "hint: leave it out\n",
            id="one channel",
        ),
        pytest.param(
            ["export.input_height=33"],
            2,
            "override export.input_height=33: export.input_height: the input is 33 x 32 (height x width),"
            " classification_pyt has square inputs\n"
            "hint: write the same input_height and input_width\n",
            id="not square",
        ),
        pytest.param(
            ["export.tolerance=small"],
            2,
            "override export.tolerance=small: export.tolerance: value 'small' of type 'str' could not be converted to"
            " Float\n"
            "hint: the field is: Largest accepted difference between these outputs, as a fraction of the largest output\n",
            id="a text for a number",
        ),
        pytest.param(
            ["export.check_images=0"],
            2,
            "override export.check_images=0: export.check_images: 0 is less than 1\n"
            "hint: the field is: Number of images on which the outputs of the file are compared with those of the torch model\n",
            id="no images",
        ),
        pytest.param(
            ["export.format=xdl"],
            2,
            "override export.format=xdl: export.format: unknown value 'xdl'\nhint: one of onnx\n",
            id="another format",
        ),
        pytest.param(
            ["export.is_quantized=true"],
            2,
            "override export.is_quantized=true: export.is_quantized: is true, but weights.safetensors is not an artifact\n"
            "hint: leave the field out: it is read from the artifact\n",
            id="not quantized",
        ),
        pytest.param(
            ["dataset.num_classes=12"],
            1,
            "weights.safetensors: does not fit the network: tensors 2 of another shape (fc.weight [10, 128] for"
            " [12, 128], fc.bias [10] for [12])\n"
            "hint: check model.backbone.type, model.backbone.args and dataset.num_classes\n",
            id="other classes",
        ),
    ],
)
def test_an_export_that_cannot_be_made_is_refused(
    onnx_file: Path, refused: Refused, words: list[str], code: int, message: str
) -> None:
    shutil.copy("float.onnx", "foreign.onnx")
    change_file(remove_properties, path="foreign.onnx")
    save_file({name: tensor + 1 for name, tensor in load_file("weights.safetensors").items()}, "other.safetensors")
    properties = read_properties(Graph(onnx.load("float.onnx")), onnx_file)
    assert properties is not None
    assert refused("export", "export.on_cpu=true", "export.checkpoint=weights.safetensors", *words) == (
        code,
        message.format(checkpoint=properties["source"]["path"]),
    )


def test_an_artifact_of_an_onnx_backend_is_not_exported(onnx_artifact: Path, refused: Refused) -> None:
    assert refused("export", "export.on_cpu=true", f"export.checkpoint={onnx_artifact}") == (
        2,
        f"{onnx_artifact}: quantized by onnxruntime, 22 layers\n"
        f"override export.checkpoint={onnx_artifact}: export.checkpoint: {onnx_artifact} is an artifact of onnxruntime: its payload"
        " is an ONNX file\n"
        f"hint: take {onnx_artifact}/quantized_model.onnx as it is\n",
    )
    words = ["export.checkpoint=weights.safetensors", f"export.onnx_file={onnx_artifact}/quantized_model.onnx"]
    assert refused("export", *words, "export.overwrite=true") == (
        2,
        f"override {words[1]}: export.onnx_file: {onnx_artifact}/quantized_model.onnx is the payload of an artifact\n"
        "hint: name another file\n",
    )


@pytest.mark.parametrize(
    ("version", "operator"), [(11, "scaled_dot_product_attention"), (15, "grid_sampler")], ids=["11", "15"]
)
def test_an_opset_without_the_operators_of_a_detector_is_refused(
    work: Path, taoq: Taoq, version: int, operator: str
) -> None:
    words = [f"export.checkpoint={SCENES / 'checkpoints' / 'rtdetr_small'}", f"export.opset_version={version}"]
    words += ["export.on_cpu=true", "results_dir=results"]
    code, _, err = taoq("rtdetr", "export", "-e", str(SCENES / "rtdetr.yaml"), *words)
    fault, hint = err.splitlines()[-2:]
    assert code == 2
    assert fault.startswith(
        f"override export.opset_version={version}: export.opset_version: the network cannot be written with opset"
        f" {version}: Exporting the operator 'aten::{operator}' to ONNX opset version {version} is not supported."
    )
    assert hint == "hint: write 17, which every network here takes"
    assert {path.name for path in Path("results").rglob("*") if path.is_file()} == {"log.txt", "status.json"}
