"""Names of classes and labels of images: tables of labels, encodings of text, and how names are spelled."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from taoq.errors import SpecError, TaoqError
from taoq.spec.load import spec_from_dict
from taoq.tasks.classification.classes import class_names
from taoq.tasks.classification.data import evaluation_batches, inference_batches
from taoq.tasks.classification.spec import ClassificationSpec

NAMES = ("a.png", "b.png", "deep/c.jpg")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name in NAMES:
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    return tmp_path / "images"


def table(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    path = folder.parent / "labels.csv"
    path.write_bytes(text.encode(encoding))
    return path


def spec(folder: Path, file: Path | str, **dataset: Any) -> ClassificationSpec:
    labelled = {"images_dir": str(folder), "labels_file": str(file)}
    data = {"num_classes": 2, "img_size": 4, "workers": 0, "val_dataset": labelled, "test_dataset": labelled, **dataset}
    return spec_from_dict({"dataset": data}, ClassificationSpec)


def labels(batches: Any, folder: Path) -> dict[str, int]:
    return {
        str(Path(path).relative_to(folder)): int(label)
        for batch in batches
        for path, label in zip(batch.paths, batch.targets, strict=True)
    }


@pytest.mark.parametrize(
    "text",
    [
        "filename,label\na.png,dog\nb.png,cat\ndeep/c.jpg,dog\n",
        "a.png,dog\nb.png,cat\ndeep/c.jpg,dog",
        "b.png;cat\r\na.png;dog\r\n\r\ndeep/c.jpg;dog\r\n",
        "a.png\tdog\nb.png\tcat\ndeep/c.jpg\tdog\n",
        "id,breed,class\na,x,dog\nb,x,cat\ndeep/c,x,dog\n",  # as on Kaggle: without the suffix
        "label , Image\ndog , a.png\ncat,b.png\ndog,./deep/c.jpg\n",
        "filename,label\na.png,1\nb.png,0\ndeep/c.jpg,1\n",
    ],
    ids=["header", "no header", "semicolons", "tabs", "stems", "other order", "indices"],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_table_labels_the_images(text: str, encoding: str, images: Path) -> None:
    own = spec(images, table(images, text, encoding))
    expected = {"a.png": 1, "b.png": 0, "deep/c.jpg": 1}
    assert labels(evaluation_batches(own), images) == expected
    assert labels(inference_batches(own), images) == expected
    assert class_names(own) == (["0", "1"] if "1" in text else ["cat", "dog"])


def test_classes_txt_gives_the_order_of_a_table(images: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("dog\ncat\n", encoding="utf-8-sig")
    own = spec(images, table(images, "a.png,dog\nb.png,cat\ndeep/c.jpg,dog\n"), root_dir=str(tmp_path))
    assert labels(evaluation_batches(own), images) == {"a.png": 0, "b.png": 1, "deep/c.jpg": 0}


def test_images_without_a_row_are_counted(images: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = table(images, "a.png,dog\nb.png,cat\n")
    assert evaluation_batches(spec(images, file)).num_samples == 2
    assert caplog.messages == [
        f"dataset.val_dataset.labels_file: 1 image(s) in {images} are left out: they have no row in {file}"
    ]


@pytest.mark.parametrize(
    ("text", "where", "what", "hint"),
    [
        ("a.png,dog\nx.png,cat\n", ":2", "there is no image x.png in {images}",
         "did you mean 'b.png' or 'a.png'?"),
        ("a.png,dog\na.png,cat\n", ":2", "a.png is labelled 'cat', and 'dog' in an earlier row",
         "an image has one label: delete one of the rows"),
        ("a.png,dog\n./a.png,cat\n", ":2", "./a.png is labelled 'cat', and otherwise in an earlier row",
         "an image has one label: delete one of the rows"),
        ("a,dog\na.png,cat\n", ":2", "a.png is labelled 'cat', and otherwise in an earlier row",
         "an image has one label: delete one of the rows"),
        ("twice,dog\n", ":1", "twice can be twice.jpg or twice.png", "write the name with its suffix"),
        ("a.png,dog\nb.png\n", ":2", "has 1 column(s): 'b.png'", "give a CSV file with the columns filename and label"),
        ("a.png,\n", ":1", "has no label: 'a.png,'", "complete or delete the row"),
        ("a.png,dog,3\n", "", "has 3 columns, and its first row does not name those of images and labels",
         "give a CSV file with the columns filename and label"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_named(text: str, where: str, what: str, hint: str, images: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    for suffix in (".jpg", ".png") if "twice" in text else ():
        Image.new("RGB", (4, 4)).save(images / f"twice{suffix}")
    file = table(images, text)
    with pytest.raises(TaoqError) as error:
        evaluation_batches(spec(images, file, root_dir=str(tmp_path)))
    assert str(error.value) == f"{file}{where}: {what.format(images=images)}\nhint: {hint}"


def test_an_unknown_class_is_named(images: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    file = table(images, "a.png,dogs\n")
    with pytest.raises(TaoqError) as error:
        evaluation_batches(spec(images, file, root_dir=str(tmp_path)))
    assert str(error.value) == f"{file}:1: there is no class 'dogs'\nhint: did you mean 'dog'?"


@pytest.mark.parametrize(
    ("content", "what", "hint"),
    [
        (None, "cannot be read", "give a CSV file with the columns filename and label"),
        (b"\n\n", "has no rows", "give a CSV file with the columns filename and label"),
        ("a.png,dog\n".encode("utf-16"), "is text in UTF-16", "save it as UTF-8"),
        (b"a.png,\xff\xfa\n", "cannot be read", "give a CSV file with the columns filename and label"),
    ],
)
def test_a_file_that_is_no_table_is_refused(content: bytes | None, what: str, hint: str, images: Path) -> None:
    file = images.parent / "labels.csv"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(TaoqError) as error:
        evaluation_batches(spec(images, file))
    assert str(error.value) == f"dataset.val_dataset.labels_file: {file} {what}\nhint: {hint}"


def test_letters_with_accents_are_the_same_in_both_forms(tmp_path: Path) -> None:
    """classes.txt is composed, folders that macOS made are decomposed."""
    composed = unicodedata.normalize("NFC", "café")
    image = tmp_path / "data" / unicodedata.normalize("NFD", composed) / "1.png"
    image.parent.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(image)
    (tmp_path / "classes.txt").write_text(f"tea\n{composed}\n", encoding="utf-8")
    own = spec(tmp_path / "data", "", root_dir=str(tmp_path))
    assert labels(evaluation_batches(own), image.parent.parent).popitem()[1] == 1


def test_classes_in_utf_16_are_refused(images: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("dog\ncat\n", encoding="utf-16")
    with pytest.raises(TaoqError) as error:
        class_names(spec(images, "", root_dir=str(tmp_path)))
    assert str(error.value) == (
        f"dataset.root_dir: {tmp_path / 'classes.txt'} is text in UTF-16\nhint: save it as UTF-8"
    )


def test_numbers_of_classes_are_not_sorted_as_text(images: Path) -> None:
    own = spec(images, table(images, "a.png,2\nb.png,10\ndeep/c.jpg,0\n"), num_classes=12)
    assert labels(evaluation_batches(own), images) == {"a.png": 2, "b.png": 10, "deep/c.jpg": 0}
    assert class_names(own) == [str(number) for number in range(12)]


def test_a_table_without_the_folder_of_its_images_is_refused(images: Path) -> None:
    own = spec(images, "labels.csv", val_dataset={"labels_file": "labels.csv"})
    with pytest.raises(SpecError) as error:
        evaluation_batches(own)
    assert str(error.value) == (
        "dataset.val_dataset.images_dir: missing: the images of labels_file are in a folder\n"
        "hint: name the folder that the names in the table are relative to"
    )
