"""Reading a COCO json: every spelling that pycocotools accepts, any ids, one read a run, little memory."""

from __future__ import annotations

import contextlib
import io
import json
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from support.coco import detector_outputs, detector_spec, write_coco
from support.commands import Taoq, read_json
from taoq.tasks.rtdetr import coco_reader, json_stream
from taoq.tasks.rtdetr.coco import Coco, read_coco
from taoq.tasks.rtdetr.data import Targets, calibration_batches, evaluation_batches
from taoq.tasks.rtdetr.json_stream import NotJson, read_lists
from taoq.tasks.rtdetr.metric import CocoMetric

TESTS = Path(__file__).parents[2]
TWO = [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}]
BOXES = [
    {"id": 1, "image_id": 2, "category_id": 7, "bbox": [1, 2, 30, 20]},
    {"id": 2, "image_id": 1, "category_id": 3, "bbox": [5, 6, 7.5, 8]},
]


def read(path: Path, **dataset: Any) -> Coco:
    return read_coco(str(path), "json_file", detector_spec(path.parent, dataset=dataset))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    path = write_coco(tmp_path, TWO, BOXES, [{"id": 3, "name": "été"}, {"id": 7, "name": "猫"}])
    data = read_json(path)
    path.write_bytes(json.dumps(data, ensure_ascii=False, indent=1).encode(encoding))
    coco = read(path)
    assert coco.names == ("été", "猫")
    assert coco.annotations.boxes.tolist() == [[1, 2, 30, 20], [5, 6, 7.5, 8]]


def random_value(draw: random.Random, depth: int = 0) -> Any:
    kind = draw.randrange(4 if depth > 2 else 6)
    if kind == 5:
        return {draw.choice('abé\\"'): random_value(draw, depth + 1) for _ in range(draw.randrange(3))}
    if kind == 4:
        return [random_value(draw, depth + 1) for _ in range(draw.randrange(4))]
    text = "".join(draw.choices('a"\\é猫😀]},\n', k=draw.randrange(6)))
    return [draw.randrange(10**6), draw.uniform(-9, 9), text, draw.choice([None, True, False])][kind]


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_lists_are_those_of_json_wherever_the_file_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(json_stream, "_CHUNK", chunk)
    path = tmp_path / "any.json"
    for seed in range(30):
        draw = random.Random(seed)
        data = {key: random_value(draw) for key in "abcdé"} | {"x": [random_value(draw) for _ in range(9)], "y": []}
        text = json.dumps(data, ensure_ascii=bool(seed % 2), indent=seed % 3 or None)
        path.write_text(text, encoding="utf-8")
        found: dict[str, list[Any]] = {"x": [], "y": [], "a": []}
        are_lists = read_lists(path, {key: found[key].append for key in found})
        assert are_lists == {key: isinstance(value, list) for key, value in data.items()}
        assert found == {key: data[key] if isinstance(data[key], list) else [] for key in found}
        path.write_text(text[: draw.randrange(len(text))], encoding="utf-8")
        with pytest.raises(NotJson):
            read_lists(path, {})


def test_values_that_are_no_object(tmp_path: Path) -> None:
    path = tmp_path / "any.json"
    for text in ("[]", "[1, [2]]", "12", '"text"', "null"):
        path.write_text(text, encoding="utf-8")
        assert read_lists(path, {}) is None
    path.write_text(" { } ", encoding="utf-8")
    assert read_lists(path, {}) == {}


IDS: dict[str, Callable[[int], Any]] = {
    "above 2^53": lambda number: 2**53 + number,
    "up to 2^63": lambda number: 2**63 - 4 + number,
    "above 2^64": lambda number: 2**64 + number,
    "negative": lambda number: -number,
    "texts": lambda number: f"{number}.jpg",
    "texts of numbers": str,
    "with a decimal point": float,
}


def scenes(ids: Callable[[int], Any], order: Sequence[int]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Images 1 to 3 with one box each, at different places."""
    images = [{"id": ids(number), "file_name": f"{number}.png"} for number in order]
    boxes = [
        {"id": number, "image_id": ids(number), "category_id": 3, "bbox": [100 * number, 9, 80, 60], "area": 4800,
         "iscrowd": 0}
        for number in order
    ]  # fmt: skip
    return images, boxes


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_image_ids_are_kept_exactly(tmp_path: Path, ids: Callable[[int], Any]) -> None:
    """Each image has one right and one wrong detection of the same score, so that the order of images matters."""
    images, boxes = scenes(ids, [2, 3, 1])
    path = write_coco(tmp_path, images, boxes, [{"id": 3, "name": "a"}, {"id": 7, "name": "b"}])
    metric = CocoMetric(detector_spec(tmp_path))
    for number in (3, 1, 2):
        right = [(100 * number + 40) / 500, 39 / 100, 80 / 500, 60 / 100]
        logits = {1: (0.0, 1.0), 2: (1.0, 1.0), 3: (2.0, 1.0)}[number]
        outputs = detector_outputs([(0, logits[0], right), (0, logits[1], [0.9, 0.5, 0.1, 0.9])])
        metric.update(outputs, Targets((ids(number),), torch.tensor([[500.0, 100.0]])))
    figures = metric.compute()
    metric.write(tmp_path)
    results = read_json(tmp_path / "detections.json")
    assert {row["image_id"] for row in results} == {ids(number) for number in (1, 2, 3)}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert 0.2 < evaluation.stats[0] < 1
    assert figures["val_mAP"] == pytest.approx(evaluation.stats[0], abs=1e-9)


def test_category_ids_are_written_as_in_the_json(tmp_path: Path) -> None:
    write_coco(tmp_path, TWO, [{**BOXES[0], "category_id": "7"}], [{"id": "7", "name": "a"}, {"id": "3"}])
    metric = CocoMetric(detector_spec(tmp_path, dataset={"eval_class_ids": [7]}))
    metric.update(detector_outputs([(1, 4.0, [0.5] * 4)]), Targets((2,), torch.tensor([[64.0, 64.0]])))
    metric.compute()
    assert set(metric.write(tmp_path)["classes"]) == {"a"}
    assert read_json(tmp_path / "detections.json")[0]["category_id"] == "7"


def test_a_run_reads_each_json_once(taoq: Taoq, detector_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_paths: list[Path] = []

    def read_and_record(path: Path, take: Any) -> Any:
        read_paths.append(path)
        return read_lists(path, take)

    monkeypatch.setattr(coco_reader, "read_lists", read_and_record)
    (detector_folder / "few.json").write_text(json.dumps({"images": [{"id": 1, "file_name": "0001.jpg"}]}))
    overrides = ("dataset.quant_calibration_data_sources.json_file=few.json", "quantize.evaluate=true")
    code, _, err = taoq("rtdetr", "quantize", "-e", "spec.yaml", *overrides)
    assert code == 0, err
    assert sorted(read_paths) == [Path("few.json"), Path("val.json")]


def test_a_json_that_changes_is_read_again(tmp_path: Path) -> None:
    path = write_coco(tmp_path, TWO, BOXES[:1])
    assert len(read(path).annotations) == 1
    write_coco(tmp_path, TWO, BOXES)
    assert len(read(path).annotations) == 2


def test_calibration_ignores_faults_of_annotations(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for image in TWO:
        Image.new("RGB", (80, 40)).save(tmp_path / "images" / str(image["file_name"]))
    path = write_coco(tmp_path, TWO, [{"image_id": 1}], [{"name": "no id"}])
    source = {"image_dir": str(tmp_path / "images"), "json_file": str(path)}
    spec = detector_spec(tmp_path, dataset={"quant_calibration_data_sources": source})
    assert len(calibration_batches(spec).paths) == 2
    with pytest.raises(Exception, match=r"categories\[0\] has no 'id'"):
        evaluation_batches(spec)


MEMORY = """
import sys
from pathlib import Path
from support.coco import detector_spec
from taoq.pipeline.memory import peak_resident
from taoq.tasks.rtdetr.metric import CocoMetric
spec = detector_spec(Path(sys.argv[1]), classes=80)
before = peak_resident()
metric = CocoMetric(spec)
print((peak_resident() - before) / (Path(sys.argv[1]) / "val.json").stat().st_size)
"""


@pytest.mark.soak
def test_a_json_takes_less_memory_than_its_size(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    numbers = range(40_000)
    annotations = [
        {"id": number, "image_id": number % 5000, "category_id": number % 80, "bbox": [1.5, 2.5, 30.25, 40.75],
         "area": 900.5, "iscrowd": 0, "segmentation": [draw.integers(0, 640, 40).tolist()]}
        for number in numbers
    ]  # fmt: skip
    images = [{"id": number, "file_name": f"{number:012}.jpg", "width": 640, "height": 480} for number in range(5000)]
    path = write_coco(tmp_path, images, annotations, [{"id": id_, "name": str(id_)} for id_ in range(80)])
    assert path.stat().st_size > 13e6
    process = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], cwd=TESTS, capture_output=True, text=True, check=True
    )
    assert float(process.stdout) < 1.5  # json.load takes 5 times the size
