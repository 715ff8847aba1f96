"""Reading the data of a classifier: class folders, transforms, calibration images, images of inference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from taoq.errors import TaoqError
from taoq.spec.load import spec_from_dict
from taoq.tasks.classification.classes import class_names, class_names_or_numbers
from taoq.tasks.classification.data import (
    calibration_batches,
    evaluation_batches,
    inference_batches,
)
from taoq.tasks.classification.spec import ClassificationSpec
from taoq.tasks.pixels import read_image


def spec(images: Path, **dataset: Any) -> ClassificationSpec:
    data = {
        "num_classes": 2,
        "img_size": 8,
        "batch_size": 2,
        "workers": 0,
        "val_dataset": {"images_dir": str(images)},
        "test_dataset": {"images_dir": str(images)},
        "quant_calibration_dataset": {"images_dir": str(images)},
        **dataset,
    }
    return spec_from_dict({"dataset": data}, ClassificationSpec)


def write_image(path: Path, size: tuple[int, int] = (16, 12), **options: Any) -> None:
    """Write a red image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path, **options)


def write_flat_folder(folder: Path, count: int) -> Path:
    """Write a folder of images without class folders."""
    for number in range(count):
        write_image(folder / "flat" / f"{number:02}.png")
    return folder / "flat"


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    folder = tmp_path / "pets"
    for name in ("dog/b.png", "dog/a.JPG", "cat/c.jpeg", "cat/deep/d.bmp", "cat/e.WEBP"):
        write_image(folder / name)
    (folder / "cat" / "notes.txt").write_text("not an image")
    (folder / "cat" / ".hidden.png").write_bytes(b"")
    (folder / ".cache").mkdir()
    return folder


def paths_and_labels(batches: Any, folder: Path) -> list[tuple[str, int]]:
    """Path relative to the folder, and label of each image of the batches."""
    return [
        (str(Path(path).relative_to(folder)), int(label))
        for batch in batches
        for path, label in zip(batch.paths, batch.targets, strict=True)
    ]


def test_class_folders_in_sorted_order_and_images_in_any_case(pets: Path) -> None:
    batches = evaluation_batches(spec(pets))
    assert batches.num_samples == 5
    assert paths_and_labels(batches, pets) == [
        ("cat/c.jpeg", 0),
        ("cat/e.WEBP", 0),
        ("cat/deep/d.bmp", 0),
        ("dog/a.JPG", 1),
        ("dog/b.png", 1),
    ]


def test_batches_can_be_gone_through_again(pets: Path) -> None:
    batches = evaluation_batches(spec(pets))
    assert paths_and_labels(batches, pets) == paths_and_labels(batches, pets)


def test_reader_processes_change_nothing(pets: Path) -> None:
    without, with_processes = evaluation_batches(spec(pets)), evaluation_batches(spec(pets, workers=2))
    for expected, batch in zip(without, with_processes, strict=True):
        assert batch.paths == expected.paths
        assert torch.equal(batch.inputs["input"], expected.inputs["input"])


def test_classes_txt_gives_the_order(pets: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("dog\n\ncat\n")
    assert class_names(spec(pets, root_dir=str(tmp_path))) == ["dog", "cat"]
    assert dict(paths_and_labels(evaluation_batches(spec(pets, root_dir=str(tmp_path))), pets))["dog/a.JPG"] == 0


def test_nothing_is_written_into_the_data(pets: Path) -> None:
    before = sorted(pets.rglob("*"))
    list(evaluation_batches(spec(pets, root_dir=str(pets))))
    assert sorted(pets.rglob("*")) == before


def test_images_of_an_unknown_class_are_left_out_with_a_warning(
    pets: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_image(pets / "stray" / "x.png")
    write_image(pets / "loose.png")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    assert evaluation_batches(spec(pets, root_dir=str(tmp_path))).num_samples == 5
    where = "dataset.val_dataset.images_dir"
    assert caplog.messages == [
        f"{where}: 1 file(s) are not read: 1 .txt",
        f"{where}: 1 image(s) in '.' are left out: it is not the folder of a class",
        f"{where}: 1 image(s) in 'stray' are left out: it is not the folder of a class",
    ]


def test_the_number_of_classes_must_fit(pets: Path) -> None:
    with pytest.raises(TaoqError) as error:
        evaluation_batches(spec(pets, num_classes=3))
    assert str(error.value) == (
        f"dataset.num_classes: {pets} has 2 classes, dataset.num_classes is 3\n"
        "hint: set it to 2, or name the classes in dataset.classes_file"
    )


def test_exif_orientation_turns_the_image(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    write_image(tmp_path / "a.jpg", size=(20, 10), exif=exif)
    assert read_image(tmp_path / "a.jpg").size == (10, 20)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16"])
def test_every_mode_of_image_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new(mode, (4, 4)).save(path)
    assert read_image(path).mode == "RGB"


def test_the_transform_is_tao_s(pets: Path) -> None:
    batch = next(iter(evaluation_batches(spec(pets))))
    image = batch.inputs["input"]
    assert (image.shape, image.dtype) == ((2, 3, 8, 8), torch.float32)
    # red, JPEG: 254 of 255, less the mean, divided by the deviation
    assert image[0, 0, 0, 0].item() == pytest.approx((254 / 255 - 0.485) / 0.229, abs=0.01)


def test_calibration_takes_a_flat_folder(tmp_path: Path) -> None:
    assert calibration_batches(spec(write_flat_folder(tmp_path, 6))).num_samples == 6


def test_the_same_seed_draws_the_same_calibration_images(tmp_path: Path) -> None:
    flat = write_flat_folder(tmp_path, 20)

    def draw(seed: int) -> list[str]:
        data = {"dataset": {"quant_calibration_dataset": {"images_dir": str(flat)}, "img_size": 8}}
        section = {"quantize": {"calibration": {"num_samples": 5, "batch_size": 2, "seed": seed}}}
        batches = calibration_batches(spec_from_dict({**data, **section}, ClassificationSpec))
        return [Path(path).name for batch in batches for path in batch.paths]

    assert draw(0) == draw(0)
    assert len(set(draw(0))) == 5
    assert draw(0) != draw(1)


def test_calibration_without_a_folder_is_an_error(pets: Path) -> None:
    with pytest.raises(TaoqError) as error:
        calibration_batches(spec(pets, quant_calibration_dataset={"images_dir": ""}))
    assert str(error.value) == (
        "dataset.quant_calibration_dataset.images_dir: missing: weight_only_ptq with activations needs calibration"
        " images\nhint: name a folder of a few hundred images like those the model will see"
    )


def test_evaluation_takes_the_test_images_where_there_are_no_others(pets: Path) -> None:
    assert evaluation_batches(spec(pets, val_dataset={"images_dir": ""})).num_samples == 5


def test_inference_knows_labels_only_where_folders_are_classes(pets: Path, tmp_path: Path) -> None:
    assert [label for _, label in paths_and_labels(inference_batches(spec(pets)), pets)] == [0, 0, 0, 1, 1]
    flat = write_flat_folder(tmp_path, 1)
    assert paths_and_labels(inference_batches(spec(flat)), flat) == [("00.png", -1)]
    assert class_names_or_numbers(spec(flat)) == ["0", "1"]


def test_memory_holds_one_batch_of_images(tmp_path: Path, opened_images: list[Path]) -> None:
    batches = iter(calibration_batches(spec(write_flat_folder(tmp_path, 8))))
    next(batches)
    assert len(opened_images) == 2
