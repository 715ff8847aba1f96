"""Bad files and data: two lines, exit code 1, no half-written artifact, and an earlier one stays as it was."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from taoq.checkpoint import read_state_dict
from taoq.errors import TaoqError
from taoq.pipeline.artifacts import MANIFEST, read_artifact

Taoq = Callable[..., tuple[int, str, str]]
Edit = Callable[[Mapping[str, str]], None]
Refused = Callable[..., tuple[int, str]]

STATIC = (
    "quantize.backend=modelopt.pytorch",
    "quantize.mode=static_ptq",
    "quantize.layers=[{module_name: Linear, weights: {dtype: int8}, activations: {dtype: int8}}]",
)
TORCHAO_IS_FOR = "torchao is for smaller files and less memory; on a CPU in eager mode slower than float\n"
MODELOPT_IS_FOR = (
    "modelopt.pytorch is for accuracy studies in torch (quantization is simulated, it brings no speed) and smaller"
    " files\n"
)
ALL_ARE_USED = "quantize.calibration.num_samples is 512, there are 20 images: all are used\n"

DAMAGED = "is cut off, or is not a checkpoint of torch\nhint: copy the file again, or give another one\n"
CODE = (
    "holds objects besides tensors, which taoq does not load: they could run code\n"
    "hint: save the tensors alone where you trust the file: torch.save(model.state_dict(), 'weights.pth')\n"
)
NO_STATE = "holds no state dict\nhint: give a file that torch.save wrote of a state dict\n"
GIT_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 1453316\n"


class Code:
    """Unpickled, it makes a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("ran", "w")


def weights() -> dict[str, Tensor]:
    return load_file("weights.safetensors")


def cut(path: str, size: int) -> None:
    Path(path).write_bytes(Path(path).read_bytes()[:size])


def save_and_cut(size: int, *, zipped: bool) -> None:
    torch.save(weights(), "bad.pth", _use_new_zipfile_serialization=zipped)
    cut("bad.pth", size)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(
            lambda: None, "there is no such checkpoint\nhint: give a .pth, .ckpt or .safetensors file\n", id="missing"
        ),
        pytest.param(lambda: save_and_cut(700_000, zipped=True), DAMAGED, id="cut off"),
        pytest.param(lambda: save_and_cut(9, zipped=True), DAMAGED, id="cut off in the header"),
        pytest.param(lambda: save_and_cut(700_000, zipped=False), DAMAGED, id="of old torch, cut off"),
        pytest.param(lambda: save_and_cut(5_000, zipped=False), DAMAGED, id="of old torch, cut off in the names"),
        pytest.param(lambda: save_and_cut(18, zipped=False), DAMAGED, id="of old torch, cut off in the header"),
        pytest.param(lambda: save_and_cut(2, zipped=True), DAMAGED, id="cut off after two bytes"),
        pytest.param(lambda: Path("bad.pth").write_bytes(b""), DAMAGED, id="empty"),
        pytest.param(lambda: Path("bad.pth").write_bytes(b"a text\n"), DAMAGED, id="a text"),
        pytest.param(lambda: Path("bad.pth").write_bytes(b"<html></html>\n"), DAMAGED, id="a web page"),
        pytest.param(lambda: Path("bad.pth").write_bytes(GIT_LFS), DAMAGED, id="a pointer of git-lfs"),
        pytest.param(lambda: torch.save({"state_dict": weights(), "code": Code()}, "bad.pth"), CODE, id="with code"),
        pytest.param(
            lambda: torch.save([weights(), Code()], "bad.pth", _use_new_zipfile_serialization=False),
            CODE,
            id="of old torch, with code",
        ),
        pytest.param(lambda: Path("bad.pth").write_bytes(pickle.dumps(Code())), DAMAGED, id="a pickle with code"),
        pytest.param(
            lambda: Path("bad.pth").write_bytes(pickle.dumps(Code(), protocol=0)), DAMAGED, id="an old pickle with code"
        ),
        pytest.param(lambda: torch.save(nn.Linear(2, 2), "bad.pth"), CODE, id="a whole network"),
        pytest.param(lambda: torch.save({"epoch": 3}, "bad.pth"), NO_STATE, id="without tensors"),
        pytest.param(lambda: torch.save([torch.zeros(2)], "bad.pth"), NO_STATE, id="a list"),
    ],
)
def test_a_checkpoint_is_refused(work: Path, refused: Refused, make: Callable[[], None], message: str) -> None:
    make()
    assert refused("quantize", "quantize.model_path=bad.pth") == (1, f"bad.pth: {message}")
    assert refused("evaluate", "evaluate.checkpoint=bad.pth") == (1, f"bad.pth: {message}")
    assert not Path("ran").exists()


def test_a_folder_that_is_no_artifact_is_refused(work: Path, refused: Refused) -> None:
    assert refused("quantize", "quantize.model_path=data") == (
        1,
        "data: is a folder, not a checkpoint\nhint: give a .pth, .ckpt or .safetensors file\n",
    )
    assert refused("evaluate", "evaluate.checkpoint=data") == (
        1,
        "data: is a folder without a manifest.json: no artifact, or not all of it\n"
        "hint: quantize again, or give a checkpoint file\n",
    )


@pytest.mark.parametrize("zipped", [True, False], ids=["a zip archive", "of old torch"])
def test_whatever_is_damaged_in_a_checkpoint_is_a_fault(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "bad.pth"
    torch.save({f"layer{n}.weight": torch.ones(4, 4) for n in range(9)}, path, _use_new_zipfile_serialization=zipped)
    good = path.read_bytes()
    random = Random(0)
    for size in random.sample(range(len(good)), 300):
        path.write_bytes(good[:size])
        with pytest.raises(TaoqError) as error:
            read_state_dict(str(path))
        # half the name of an allowed object is the name of another one
        assert f"{error.value}\n" in (f"{path}: {DAMAGED}", f"{path}: {CODE}")
    for _ in range(600):
        bad = bytearray(good)
        bad[random.randrange(len(bad))] = random.randrange(256)
        path.write_bytes(bad)
        with suppress(TaoqError):  # a changed number is none
            read_state_dict(str(path))


@pytest.mark.parametrize(
    ("make", "what"),
    [
        pytest.param(
            lambda: cut("weights.safetensors", 700_000), "incomplete metadata, file not fully covered", id="cut"
        ),
        pytest.param(lambda: cut("weights.safetensors", 100), "invalid header length", id="cut in the header"),
        pytest.param(lambda: cut("weights.safetensors", 0), "header too small", id="empty"),
        pytest.param(
            lambda: Path("weights.safetensors").write_bytes(GIT_LFS), "header too large", id="a pointer of git-lfs"
        ),
        pytest.param(
            lambda: Path("weights.safetensors").write_bytes(pickle.dumps(Code())), "header too large", id="a pickle"
        ),
    ],
)
def test_a_damaged_safetensors_file_is_refused(
    work: Path, refused: Refused, make: Callable[[], None], what: str
) -> None:
    make()
    assert refused("quantize") == (
        1,
        f"weights.safetensors: is not a whole safetensors file: Error while deserializing header: {what}\n"
        "hint: copy the file again\n",
    )
    assert not Path("ran").exists()


def test_the_checkpoint_of_another_network_is_refused(work: Path, refused: Refused) -> None:
    vit = Path(__file__).parent.parent / "examples" / "digits" / "checkpoints" / "vit_tiny.safetensors"
    shutil.copy(vit, "weights.safetensors")
    assert refused("quantize") == (
        1,
        "weights.safetensors: does not fit the network: tensors 128 missing (conv1.weight, bn1.weight, bn1.bias, ...),"
        " 80 unknown (blocks.0.attn.proj.bias, blocks.0.attn.proj.weight, blocks.0.attn.qkv.bias, ...)\n"
        "hint: check model.backbone.type, model.backbone.args and dataset.num_classes\n",
    )


def test_a_checkpoint_with_other_classes_is_refused(work: Path, refused: Refused) -> None:
    assert refused("quantize", "dataset.num_classes=12") == (
        1,
        "weights.safetensors: does not fit the network: tensors 2 of another shape (fc.weight [10, 128] for [12, 128],"
        " fc.bias [10] for [12])\n"
        "hint: check model.backbone.type, model.backbone.args and dataset.num_classes\n",
    )


@pytest.mark.parametrize(
    ("make", "words", "message"),
    [
        pytest.param(
            lambda: shutil.rmtree("data/val"),
            (),
            "spec.yaml:16: dataset.val_dataset.images_dir: there is no folder data/val\n"
            "hint: name a folder of images\n",
            id="there is no folder",
        ),
        pytest.param(
            lambda: None,
            ("dataset.root_dir=nowhere",),
            "override dataset.root_dir=nowhere: dataset.root_dir: there is no folder nowhere\n"
            "hint: name the folder of classes.txt, or leave the field out\n",
            id="there is no root folder",
        ),
        pytest.param(
            lambda: (shutil.rmtree("data/val"), Path("data/val").write_bytes(b"")),
            (),
            "spec.yaml:16: dataset.val_dataset.images_dir: data/val is a file, not a folder\n"
            "hint: name a folder of images\n",
            id="a file in the place of the folder",
        ),
        pytest.param(
            lambda: (shutil.rmtree("data/val"), Path("data/val").mkdir()),
            (),
            "spec.yaml:16: dataset.val_dataset.images_dir: data/val has no images\n"
            "hint: image files end in .bmp, .gif, .jpeg, .jpg, .png, .tif, .tiff, .webp\n",
            id="empty folder",
        ),
        pytest.param(
            lambda: (Path("data/classes.txt").unlink(), shutil.rmtree("data/val"), Path("data/val").mkdir()),
            (),
            "spec.yaml:16: dataset.val_dataset.images_dir: data/val has no images\n"
            "hint: image files end in .bmp, .gif, .jpeg, .jpg, .png, .tif, .tiff, .webp\n",
            id="empty folder that should name the classes",
        ),
        pytest.param(
            lambda: [image.unlink() for image in Path("data/val").rglob("*.png")],
            (),
            "spec.yaml:16: dataset.val_dataset.images_dir: data/val has no images\n"
            "hint: image files end in .bmp, .gif, .jpeg, .jpg, .png, .tif, .tiff, .webp\n",
            id="empty class folders",
        ),
        pytest.param(
            lambda: [folder.rename(folder.with_name(f"class {folder.name}")) for folder in Path("data/val").iterdir()],
            (),
            "spec.yaml:16: dataset.val_dataset.images_dir: data/val has no folder of a known class\n"
            "hint: labelled data has one folder per class\n",
            id="class folders of other names",
        ),
        pytest.param(
            lambda: None,
            ("dataset.num_classes=12",),
            "override dataset.num_classes=12: dataset.num_classes: data/classes.txt names 10 classes,"
            " dataset.num_classes is 12\n"
            "hint: set it to 10, or name the classes in dataset.classes_file\n",
            id="num_classes against classes.txt",
        ),
        pytest.param(
            lambda: (Path("data/classes.txt").unlink(), shutil.rmtree("data/val/3")),
            (),
            "spec.yaml:11: dataset.num_classes: data/val has 9 classes, dataset.num_classes is 10\n"
            "hint: set it to 9, or name the classes in dataset.classes_file\n",
            id="num_classes against the folders",
        ),
        pytest.param(
            lambda: None,
            ("dataset.classes_file=names.txt",),
            "override dataset.classes_file=names.txt: dataset.classes_file: names.txt cannot be read\n"
            "hint: give a text file, one class a line\n",
            id="there is no file of classes",
        ),
        pytest.param(
            lambda: Path("data/classes.txt").write_bytes(b"\xff\xfe0\x00"),
            (),
            "spec.yaml:10: dataset.root_dir: data/classes.txt cannot be read\n"
            "hint: give a text file, one class a line\n",
            id="binary file of classes",
        ),
        pytest.param(
            lambda: Path("data/classes.txt").write_text("one\ntwo\none\n"),
            (),
            "data/classes.txt: names the class 'one' twice\nhint: write each class once\n",
            id="a class twice",
        ),
    ],
)
def test_evaluation_data_is_refused(
    work: Path, refused: Refused, make: Callable[[], None], words: tuple[str, ...], message: str
) -> None:
    make()
    assert refused("evaluate", *words) == (1, message)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(
            lambda: shutil.rmtree("data/calibration"),
            "there is no folder data/calibration\nhint: name a folder of images\n",
            id="there is no folder",
        ),
        pytest.param(
            lambda: (shutil.rmtree("data/calibration"), Path("data/calibration").write_bytes(b"")),
            "data/calibration is a file, not a folder\nhint: name a folder of images\n",
            id="a file in the place of the folder",
        ),
        pytest.param(
            lambda: (shutil.rmtree("data/calibration"), Path("data/calibration").mkdir()),
            "data/calibration has no images\n"
            "hint: image files end in .bmp, .gif, .jpeg, .jpg, .png, .tif, .tiff, .webp\n",
            id="empty folder",
        ),
    ],
)
def test_calibration_data_is_refused(work: Path, refused: Refused, make: Callable[[], None], message: str) -> None:
    make()
    assert refused("quantize", *STATIC) == (
        1,
        f"{MODELOPT_IS_FOR}spec.yaml:20: dataset.quant_calibration_dataset.images_dir: {message}",
    )


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("action", "words", "split", "before"),
    [
        ("quantize", STATIC, "calibration", MODELOPT_IS_FOR + ALL_ARE_USED),
        ("evaluate", (), "val", ""),
        ("inference", (), "test", ""),
    ],
    ids=["calibration", "evaluation", "inference"],
)
@pytest.mark.parametrize(
    ("keep", "what"), [(150, "image file is truncated"), (0, "its content is of no image format")], ids=["cut", "empty"]
)
def test_a_corrupt_image_is_named(
    work: Path,
    refused: Refused,
    action: str,
    words: tuple[str, ...],
    split: str,
    before: str,
    keep: int,
    what: str,
    workers: int,
) -> None:
    image = min(Path("data", split, "6").iterdir())
    cut(str(image), keep)
    assert refused(action, *words, f"dataset.workers={workers}") == (
        1,
        f"{before}{image}: cannot be read as an image: {what}\nhint: replace the file, or take it out of the folder\n",
    )


@pytest.mark.parametrize("action", ["quantize", "evaluate", "inference"])
@pytest.mark.parametrize(
    ("words", "folder", "why"),
    [
        (["results_dir=weights.safetensors/new"], "weights.safetensors/new/", "Not a directory"),
        (["results_dir=weights.safetensors"], "weights.safetensors/", "Not a directory"),
        (["{}.results_dir=weights.safetensors"], "", "File exists"),
    ],
    ids=["below a file", "a file", "a file as the action's own"],
)
def test_a_results_dir_that_cannot_be_a_folder_is_refused(
    work: Path, refused: Refused, action: str, words: list[str], folder: str, why: str
) -> None:
    assert refused(action, *(word.format(action) for word in words)) == (
        1,
        f"{folder + action if folder else 'weights.safetensors'}: cannot be a results folder: {why}\n"
        "hint: choose another folder with results_dir=...\n",
    )


@pytest.mark.parametrize("name", ["log.txt", "status.json"])
def test_a_folder_in_the_place_of_a_log_is_refused(work: Path, taoq: Taoq, name: str) -> None:
    Path("results/quantize", name).mkdir(parents=True)
    assert taoq("classification_pyt", "quantize", "-e", "spec.yaml") == (
        1,
        "",
        "results/quantize: cannot be a results folder: Is a directory\n"
        "hint: choose another folder with results_dir=...\n",
    )
    assert not list(Path("results").rglob("*.pth"))
    assert not Path("results/quantize/status.json").is_file()  # it would say that the run goes on


@pytest.mark.parametrize(
    ("action", "words", "name", "before"),
    [
        ("quantize", (), "quantized_model_torchao.pth", TORCHAO_IS_FOR),
        ("quantize", STATIC, MANIFEST, MODELOPT_IS_FOR + ALL_ARE_USED),
        ("evaluate", (), "results.json", ""),
        ("inference", (), "result.csv", ""),
    ],
    ids=["payload", "manifest", "results.json", "result.csv"],
)
def test_a_folder_in_the_place_of_a_result_is_not_replaced(
    work: Path, refused: Refused, action: str, words: tuple[str, ...], name: str, before: str
) -> None:
    mine = Path("results", action, name, "mine.txt")
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert refused(action, *words) == (
        1,
        f"{before}{mine.parent}: a folder is in the place of this file\nhint: move it away, or name another folder\n",
    )


def test_a_file_in_the_place_of_a_folder_of_results_is_not_replaced(work: Path, refused: Refused) -> None:
    mine = Path("results/inference/visualize")
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert refused("inference") == (
        1,
        f"{mine}: a file is in the place of this folder\nhint: move it away, or name another folder\n",
    )


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """What a full disk is to a program, at a size of our choice."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("action", "words", "size", "before"),
    [
        ("quantize", (), 100_000, TORCHAO_IS_FOR),
        ("quantize", STATIC, 100_000, MODELOPT_IS_FOR + ALL_ARE_USED),
        ("quantize", (), 20_000, TORCHAO_IS_FOR),
        ("evaluate", (), 20_000, ""),
        ("inference", ("inference.vis_after_n_batches=0",), 2_000, ""),
    ],
    ids=["torchao", "modelopt", "torchao, at once", "evaluate", "inference"],
)
def test_a_full_disk_is_named(
    work: Path, refused: Refused, action: str, words: tuple[str, ...], size: int, before: str
) -> None:
    with no_file_larger_than(size):
        answer = refused(action, *words)
    assert answer == (
        1,
        f"{before}results/{action}: cannot be written: File too large\nhint: free some space, or name another folder\n",
    )


@pytest.fixture
def artifact(taoq: Taoq, work: Path) -> Path:
    """A good artifact, results/quantize."""
    assert taoq("classification_pyt", "quantize", "-e", "spec.yaml")[0] == 0
    return Path("results/quantize")


def test_an_earlier_artifact_stays_as_it_was(artifact: Path, taoq: Taoq, refused: Refused) -> None:
    manifest = read_artifact(artifact).manifest
    cut(str(min(Path("data/calibration/6").iterdir())), 150)
    assert refused("quantize", "quantize.layers.0.module_name=Liner")[0] == 2
    assert refused("quantize", "dataset.num_classes=12")[0] == 1
    assert refused("quantize", *STATIC)[0] == 1
    with no_file_larger_than(100_000):
        assert refused("quantize")[0] == 1
    with no_file_larger_than(20_000):
        assert refused("quantize", "quantize.layers.0.weights.dtype=fp8_e4m3fn")[0] == 1
    assert read_artifact(artifact).manifest == manifest
    assert taoq("classification_pyt", "evaluate", "-e", "spec.yaml", f"evaluate.checkpoint={artifact}")[0] == 0


def change_manifest(**fields: Any) -> None:
    path = Path("results/quantize", MANIFEST)
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_payload() -> None:
    path = Path("results/quantize/quantized_model_torchao.pth")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("make", "message"),
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
            "results/quantize: is a folder without a manifest.json: no artifact, or not all of it\n"
            "hint: quantize again, or give a checkpoint file\n",
            id="manifest missing",
        ),
    ],
)
def test_a_damaged_artifact_is_refused(
    artifact: Path, refused: Refused, make: Callable[[], None], message: str
) -> None:
    make()
    assert refused("evaluate", f"evaluate.checkpoint={artifact}") == (1, message)
    assert refused("inference", f"inference.checkpoint={artifact}") == (1, message)


@pytest.mark.parametrize("words", [(), STATIC], ids=["torchao", "modelopt"])
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
            "hint: leave the field out: the artifact knows\n",
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


def test_an_artifact_does_not_replace_its_source(work: Path, refused: Refused) -> None:
    Path("models").mkdir()
    torch.save(weights(), "models/quantized_model_torchao.pth")
    words = ["quantize.model_path=models/quantized_model_torchao.pth", "quantize.results_dir=data/../models"]
    assert refused("quantize", *words) == (
        2,
        "override quantize.results_dir=data/../models: quantize.results_dir: the artifact would replace"
        " models/quantized_model_torchao.pth\n"
        "hint: name another folder\n",
    )


@pytest.mark.parametrize(
    ("number", "action", "words", "split", "code", "message"),
    [
        (signal.SIGINT, "quantize", STATIC, "calibration", 130, MODELOPT_IS_FOR + ALL_ARE_USED + "interrupted\n"),
        (signal.SIGTERM, "inference", (), "test", 143, ""),
    ],
    ids=["Ctrl-C", "SIGTERM"],
)
def test_an_interrupted_run_says_so_and_leaves_nothing_behind(
    artifact: Path,
    number: int,
    action: str,
    words: tuple[str, ...],
    split: str,
    code: int,
    message: str,
) -> None:
    manifest = read_artifact(artifact).manifest
    before = {path for path in Path().rglob("*") if path.is_file()}
    pipe = min(Path("data", split, "6").iterdir())
    pipe.unlink()
    os.mkfifo(pipe)  # an image that whoever reads it waits for
    command = [sys.executable, "-m", "taoq", "classification_pyt", action, "-e", "spec.yaml", *words]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a test run in the background ignores Ctrl-C, and so would what it starts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as run:
        try:
            writer = wait_for_reader(pipe, run)
            status = Path("results", action, "status.json")
            assert json.loads(status.read_text().splitlines()[-1])["status"] == "STARTED"
            run.send_signal(number)
            _, err = run.communicate(timeout=60)
            os.close(writer)
        finally:
            run.kill()  # a run that does not end would keep a failed test waiting
    assert (run.returncode, err) == (code, message)
    last = json.loads(status.read_text().splitlines()[-1])
    assert (last["status"], last["message"]) == ("FAILURE", f"{action.capitalize()} failed: interrupted")
    logs = {status, status.with_name("log.txt")}
    assert {path for path in Path().rglob("*") if path.is_file()} == (before - {pipe}) | logs
    assert not list(Path().rglob("*.partial"))
    assert read_artifact(artifact).manifest == manifest


def wait_for_reader(pipe: Path, run: subprocess.Popen[str]) -> int:
    """Open a pipe for writing as soon as a process reads it."""
    while run.poll() is None:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO:  # nobody reads it yet
                raise
            time.sleep(0.02)
    raise AssertionError(run.communicate()[1])
