"""Folders of images that are missing, empty or of other classes, and damaged images, are named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from support.commands import unchanged
from support.damage import Damage, cut
from support.small_spec import CALIBRATION_NOTICES, PURPOSE, STATIC_OVERRIDES, Refused


@pytest.mark.parametrize(
    ("damage", "words", "message"),
    [
        pytest.param(
            lambda: shutil.rmtree("data/val"),
            (),
            "spec.yaml:16: dataset.val_dataset.images_dir: there is no folder data/val\n"
            "hint: name a folder of images\n",
            id="there is no folder",
        ),
        pytest.param(
            unchanged,
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
            "hint: image files end in .jpg, .png, .webp, .tif or another suffix that Pillow reads\n",
            id="empty folder",
        ),
        pytest.param(
            lambda: (Path("data/classes.txt").unlink(), shutil.rmtree("data/val"), Path("data/val").mkdir()),
            (),
            "spec.yaml:16: dataset.val_dataset.images_dir: data/val has no images\n"
            "hint: image files end in .jpg, .png, .webp, .tif or another suffix that Pillow reads\n",
            id="empty folder that should name the classes",
        ),
        pytest.param(
            lambda: [image.unlink() for image in Path("data/val").rglob("*.png")],
            (),
            "spec.yaml:16: dataset.val_dataset.images_dir: data/val has no images\n"
            "hint: image files end in .jpg, .png, .webp, .tif or another suffix that Pillow reads\n",
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
            unchanged,
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
            unchanged,
            ("dataset.classes_file=names.txt",),
            "override dataset.classes_file=names.txt: dataset.classes_file: names.txt cannot be read\n"
            "hint: give a text file, one class a line\n",
            id="there is no file of classes",
        ),
        pytest.param(
            lambda: Path("data/classes.txt").write_bytes(b"\xff\xfe0\x00"),
            (),
            "spec.yaml:10: dataset.root_dir: data/classes.txt is text in UTF-16\nhint: save it as UTF-8\n",
            id="file of classes in UTF-16",
        ),
        pytest.param(
            lambda: Path("data/classes.txt").write_bytes(b"\xff\xfe0"),
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
def test_a_folder_of_labelled_images_that_does_not_fit_is_refused(
    work: Path, refused: Refused, damage: Damage, words: tuple[str, ...], message: str
) -> None:
    damage()
    assert refused("evaluate", *words) == (1, message)


@pytest.mark.parametrize(
    ("damage", "message"),
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
            "hint: image files end in .jpg, .png, .webp, .tif or another suffix that Pillow reads\n",
            id="empty folder",
        ),
    ],
)
def test_a_folder_without_calibration_images_is_refused(
    work: Path, refused: Refused, damage: Damage, message: str
) -> None:
    damage()
    assert refused("quantize", *STATIC_OVERRIDES) == (
        1,
        f"{PURPOSE['modelopt.pytorch']}spec.yaml:20: dataset.quant_calibration_dataset.images_dir: {message}",
    )


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("action", "words", "split", "notices"),
    [
        ("quantize", STATIC_OVERRIDES, "calibration", CALIBRATION_NOTICES["modelopt.pytorch"]),
        ("evaluate", (), "val", ""),
        ("inference", (), "test", ""),
    ],
    ids=["calibration", "evaluation", "inference"],
)
@pytest.mark.parametrize(
    ("size", "reason"),
    [(150, "image file is truncated"), (0, "its content is not in a known image format")],
    ids=["cut", "empty"],
)
def test_a_damaged_image_is_named(
    work: Path,
    refused: Refused,
    action: str,
    words: tuple[str, ...],
    split: str,
    notices: str,
    size: int,
    reason: str,
    workers: int,
) -> None:
    image = min(Path("data", split, "6").iterdir())
    cut(image, size)
    assert refused(action, *words, f"dataset.workers={workers}") == (
        1,
        f"{notices}{image}: cannot be read as an image: {reason}\n"
        "hint: replace the file, or take it out of the folder\n",
    )
