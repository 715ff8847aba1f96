"""Bad calibration data, files of ranges and results folders of ONNX backends; an earlier artifact stays."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from support.commands import Taoq, unchanged
from support.damage import Damage, cut
from support.onnx_files import change_file, remove_properties, set_classes
from support.small_spec import ALL_IMAGES_USED, CALIBRATION_NOTICES, ONNX_BACKENDS, PURPOSE, Refused, every_onnx_backend
from taoq.pipeline.artifacts import MANIFEST, read_artifact


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(
            lambda: shutil.rmtree("data/calibration"),
            "{purpose}"
            "spec.yaml:20: dataset.quant_calibration_dataset.images_dir: there is no folder data/calibration\n"
            "hint: name a folder of images\n",
            id="missing",
        ),
        pytest.param(
            lambda: [path.unlink() for path in Path("data/calibration").rglob("*.png")],
            "{purpose}"
            "spec.yaml:20: dataset.quant_calibration_dataset.images_dir: data/calibration has no images\n"
            "hint: image files end in .jpg, .png, .webp, .tif or another suffix that Pillow reads\n",
            id="empty",
        ),
        pytest.param(
            lambda: min(Path("data/calibration/6").iterdir()).write_bytes(b"\x89PNG\r\n"),
            f"{{purpose}}{ALL_IMAGES_USED}"
            "{image}: cannot be read as an image: its content is not in a known image format\n"
            "hint: replace the file, or take it out of the folder\n",
            id="a damaged image",
        ),
    ],
)
@every_onnx_backend
def test_calibration_images_that_cannot_be_read_are_refused(
    onnx_file: Path, refused: Refused, backend: str, damage: Damage, message: str
) -> None:
    image = min(Path("data/calibration/6").iterdir())
    damage()
    assert refused("quantize", f"quantize.backend={backend}") == (
        1,
        message.format(purpose=PURPOSE[backend], image=image),
    )


@every_onnx_backend
def test_a_normalisation_that_makes_infinite_images_is_refused(onnx_file: Path, refused: Refused, backend: str) -> None:
    change_file(remove_properties)
    assert refused("quantize", f"quantize.backend={backend}", "dataset.augmentation.std=[1e-45, 1, 1]") == (
        1,
        f"{CALIBRATION_NOTICES[backend]}"
        "spec.yaml:21: quantize.calibration: the calibration images have values that are not finite\n"
        "hint: look at the normalisation of the dataset section\n",
    )


@pytest.mark.parametrize(
    ("damage", "path"),
    [
        pytest.param(lambda: Path("ranges.json").write_text("a text"), "ranges.json", id="a text"),
        pytest.param(lambda: Path("ranges.json").write_text(""), "ranges.json", id="empty"),
        pytest.param(lambda: Path("ranges.json").write_bytes(b"\xff\x00"), "ranges.json", id="binary"),
        pytest.param(lambda: Path("ranges.json").write_text("[]"), "ranges.json", id="a list"),
        pytest.param(
            lambda: Path("ranges.json").write_text('{"key": {}, "ranges": {"a": 3}}'), "ranges.json", id="other data"
        ),
        pytest.param(unchanged, "float.onnx", id="the model"),
    ],
)
@every_onnx_backend
def test_a_file_that_is_no_cache_is_refused(
    onnx_file: Path, refused: Refused, backend: str, damage: Damage, path: str
) -> None:
    damage()
    override = f"quantize.calibration.cache={path}"
    assert refused("quantize", f"quantize.backend={backend}", override) == (
        1,
        f"{CALIBRATION_NOTICES[backend]}"
        f"override {override}: quantize.calibration.cache: {path} is not a file of calibration ranges\n"
        "hint: delete it, or name another file\n",
    )


@pytest.mark.parametrize(
    ("path", "code", "notices", "fault"),
    [
        ("data", 2, "", "data is a folder\nhint: name a file\n"),
        (
            "/proc/ranges.json",
            1,
            CALIBRATION_NOTICES["onnxruntime"],
            "/proc/ranges.json cannot be written: No such file or directory\n"
            "hint: free some space, or name another file\n",
        ),
    ],
    ids=["a folder", "where nothing can be written"],
)
def test_a_cache_that_cannot_be_written_is_refused(
    onnx_file: Path, refused: Refused, path: str, code: int, notices: str, fault: str
) -> None:
    override = f"quantize.calibration.cache={path}"
    assert refused("quantize", override) == (
        code,
        f"{notices}override {override}: quantize.calibration.cache: {fault}",
    )


@every_onnx_backend
def test_an_artifact_does_not_replace_its_source(onnx_file: Path, refused: Refused, backend: str) -> None:
    Path("models").mkdir()
    onnx_file.replace("models/quantized_model.onnx")
    words = ["quantize.model_path=models/quantized_model.onnx", "quantize.results_dir=data/../models"]
    assert refused("quantize", f"quantize.backend={backend}", *words) == (
        2,
        "override quantize.results_dir=data/../models: quantize.results_dir: the artifact would replace"
        " models/quantized_model.onnx\n"
        "hint: name another folder\n",
    )


def test_a_folder_that_cannot_be_written_is_refused(onnx_file: Path, refused: Refused) -> None:
    for place, why in (("weights.safetensors", "Not a directory"), ("/proc", "No such file or directory")):
        assert refused("quantize", f"results_dir={place}/new") == (
            1,
            f"{place}/new/quantize: cannot be a results folder: {why}\n"
            "hint: choose another folder with results_dir=...\n",
        )
    Path("results/quantize/quantized_model.onnx").mkdir(parents=True)
    assert refused("quantize") == (
        1,
        f"{CALIBRATION_NOTICES['onnxruntime']}"
        "results/quantize/quantized_model.onnx: a folder is in the place of this file\n"
        "hint: move it away, or name another folder\n",
    )


def test_an_earlier_artifact_stays_when_a_later_run_is_refused(
    onnx_artifact: Path, taoq: Taoq, refused: Refused
) -> None:
    manifest = read_artifact(onnx_artifact).manifest
    good = Path("float.onnx").read_bytes()
    for backend in ONNX_BACKENDS:
        words = [f"quantize.backend={backend}"]
        assert refused("quantize", *words, "quantize.layers.0.module_name=Conf")[0] == 2
        assert refused("quantize", *words, "dataset.num_classes=12")[0] == 2
        cut("float.onnx", -1)
        assert refused("quantize", *words)[0] == 1
        Path("float.onnx").write_bytes(good)
        change_file(remove_properties, set_classes(12))
        assert refused("quantize", *words)[0] == 1  # seen when the new artifact is run, at the latest
        Path("float.onnx").write_bytes(good)
    assert read_artifact(onnx_artifact).manifest == manifest
    assert taoq("classification_pyt", "evaluate", "-e", "spec.yaml", f"evaluate.checkpoint={onnx_artifact}")[0] == 0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(
            lambda path: path.write_bytes(path.read_bytes()[:1000]),
            "results/quantize/quantized_model.onnx: is not the file that its manifest names (sha256 differs)\n"
            "hint: the file was changed or cut off after it was written: quantize again\n",
            id="cut off",
        ),
        pytest.param(
            lambda path: path.unlink(),
            "results/quantize/quantized_model.onnx: the payload of this artifact is missing\nhint: quantize again\n",
            id="missing",
        ),
        pytest.param(
            lambda path: path.with_name(MANIFEST).unlink(),
            "results/quantize: is a folder without a manifest.json: it is not an artifact, or not a complete one\n"
            "hint: quantize again, or give a checkpoint file\n",
            id="without a manifest",
        ),
    ],
)
def test_a_damaged_artifact_is_refused(
    onnx_artifact: Path, refused: Refused, damage: Callable[[Path], object], message: str
) -> None:
    damage(onnx_artifact / "quantized_model.onnx")
    assert refused("evaluate", f"evaluate.checkpoint={onnx_artifact}") == (1, message)
    assert refused("inference", f"inference.checkpoint={onnx_artifact}") == (1, message)
