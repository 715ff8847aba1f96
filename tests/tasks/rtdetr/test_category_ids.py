"""Which category each output is: every reading is said, and two readings that fit are refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from support.coco import detector_spec, write_coco
from support.commands import Refusal, Taoq, Words, edit_json, read_json
from taoq.errors import SpecError, TaoqError
from taoq.tasks.rtdetr.coco import Coco, read_coco
from taoq.tasks.rtdetr.data import class_names

ROOT = Path(__file__).parents[3]
COCO_IDS = tuple(number for number in range(1, 91) if number not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83))
IMAGE = {"id": 1, "file_name": "a.png"}


def read(folder: Path, ids: Sequence[Any], classes: int, names: Sequence[str] | None = None, **dataset: Any) -> Coco:
    """Read a json with these categories, named a, b, c, ..., for a network with this number of outputs."""
    categories = [{"id": id_, "name": (names or "abcdefghij")[index % 10]} for index, id_ in enumerate(ids)]
    path = write_coco(folder, [IMAGE], (), categories)
    sections = {key: dataset.pop(key) for key in ("evaluate", "quantize") if key in dataset}
    return read_coco(str(path), "json_file", detector_spec(folder, classes=classes, dataset=dataset, **sections))


def as_ids(ids: Sequence[int], classes: int) -> tuple[int | None, ...]:
    return tuple(index if index in ids else None for index in range(classes))


@pytest.mark.parametrize(
    ("ids", "classes", "dataset", "expected", "said"),
    [
        pytest.param(
            [3, 7], 2, {}, (3, 7),
            "ordered, the only reading that fits: output 0 is 'a' (id 3) and output 1 is 'b' (id 7)",
            id="as many as outputs",
        ),
        pytest.param(
            [2, 1], 2, {}, (1, 2),
            "ordered, the only reading that fits: output 0 is 'b' (id 1) and output 1 is 'a' (id 2)",
            id="in another order in the file",
        ),
        pytest.param(
            [0, 1], 2, {}, (0, 1),
            "ordered, which is the same as as_ids here: output 0 is 'a' (id 0) and output 1 is 'b' (id 1)",
            id="from 0",
        ),
        pytest.param(
            [-1, 2**60], 2, {}, (-1, 2**60),
            f"ordered, the only reading that fits: output 0 is 'a' (id -1) and output 1 is 'b' (id {2**60})",
            id="negative and huge",
        ),
        pytest.param(
            ["10", "9"], 2, {}, (9, 10),
            "ordered, the only reading that fits: output 0 is 'b' (id 9) and output 1 is 'a' (id 10)",
            id="whole numbers as texts",
        ),
        pytest.param(
            ["x", "k"], 2, {}, ("k", "x"),
            "ordered, the only reading that fits: output 0 is 'b' (id k) and output 1 is 'a' (id x)",
            id="texts",
        ),
        pytest.param(
            [3.0, 7.0], 2, {}, (3, 7),
            "ordered, the only reading that fits: output 0 is 'a' (id 3) and output 1 is 'b' (id 7)",
            id="with a decimal point",
        ),
        pytest.param(
            [0, 1, 4], 80, {}, as_ids([0, 1, 4], 80),
            "as_ids, because the ids start at 0: output 0 is 'a' (id 0) and output 4 is 'c' (id 4);"
            " 77 of 80 outputs are no category of {json}",
            id="from 0, more outputs",
        ),
        pytest.param(
            [1, 2], 3, {"category_ids": "as_ids"}, (None, 1, 2),
            "as_ids, as the spec says: output 1 is 'a' (id 1) and output 2 is 'b' (id 2);"
            " 1 of 3 outputs are no category of {json}",
            id="as_ids",
        ),
        pytest.param(
            [1, 4], 9, {"remap_mscoco_category": False}, as_ids([1, 4], 9),
            "as_ids, because of dataset.remap_mscoco_category: false: output 1 is 'a' (id 1) and output 4 is 'b' (id 4)"
            "; 7 of 9 outputs are no category of {json}",
            id="TAO's, with gaps and more outputs",
        ),
        pytest.param(
            [1, 2], 3, {"category_ids": "ordered"}, (1, 2, None),
            "ordered, as the spec says: output 0 is 'a' (id 1) and output 1 is 'b' (id 2);"
            " 1 of 3 outputs are no category of {json}: it must lack those with the largest ids",
            id="ordered",
        ),
        pytest.param(
            [1, 3], 4, {"category_ids": [3, None, 2, -1]}, (3, None, 2, None),
            "list, as the spec says: output 0 is 'b' (id 3); 3 of 4 outputs are no category of {json}",
            id="list",
        ),
        pytest.param(
            COCO_IDS, 80, {}, COCO_IDS,
            "ordered, the only reading that fits: output 0 is 'a' (id 1) and output 79 is 'j' (id 90)",
            id="COCO's 80",
        ),
        pytest.param(
            COCO_IDS, 91, {}, as_ids(COCO_IDS, 91),
            "as_ids, the only reading that fits: output 1 is 'a' (id 1) and output 90 is 'j' (id 90);"
            " 11 of 91 outputs are no category of {json}",
            id="COCO's 91",
        ),
        pytest.param(
            [1, 3, 90], 80, {"remap_mscoco_category": True}, COCO_IDS,
            "ordered, because of dataset.remap_mscoco_category: true: output 0 is 'a' (id 1) and output 79 is 'c'"
            " (id 90); 77 of 80 outputs are no category of {json}",
            id="some of COCO's",
        ),
    ],
)  # fmt: skip
def test_outputs_mean_categories(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    ids: Sequence[Any],
    classes: int,
    dataset: Mapping[str, Any],
    expected: tuple[Any, ...],
    said: str,
) -> None:
    with caplog.at_level(logging.INFO, "taoq"):
        coco = read(tmp_path, ids, classes, **dataset)
    assert coco.category_ids == expected
    text = "dataset.category_ids: " + said.format(json=tmp_path / "val.json")
    if dataset.get("category_ids") == [3, None, 2, -1]:
        without = (
            f"dataset.category_ids: 1 categories of {tmp_path / 'val.json'} are no output, and are not evaluated: a"
        )
        assert caplog.messages[-2:] == [text, without]
    else:
        assert caplog.messages[-1] == text


OR_BOTH = "write as_ids if output 1 is 'a' (as in TAO), ordered if output 0 is 'a', or a list of all ids"


@pytest.mark.parametrize(
    ("ids", "classes", "dataset", "message"),
    [
        pytest.param(
            [1, 2], 3, {},
            "dataset.category_ids: missing, and needed: the 2 categories of {json}, with ids from 1 to 2, can be two"
            " things in 3 outputs\n"
            f"hint: {OR_BOTH}",
            id="the last may be missing",
        ),
        pytest.param(
            [1, 4], 5, {},
            "dataset.category_ids: missing, and needed: the 2 categories of {json}, with ids from 1 to 4, can be two"
            " things in 5 outputs\n"
            f"hint: {OR_BOTH}",
            id="several may be missing",
        ),
        pytest.param(
            [1, 3], 80, {},
            "dataset.category_ids: missing, and needed: the 2 categories of {json}, with ids from 1 to 3, can be two"
            " things in 80 outputs\n"
            f"hint: {OR_BOTH}; or dataset.remap_mscoco_category: true if the outputs are COCO's 80 categories",
            id="COCO's may be meant",
        ),
        pytest.param(
            [3, 7], 4, {},
            "dataset.num_classes: is 4; {json} has 2 categories with ids up to 7\n"
            "hint: write 2, or 8 if the network was trained with TAO's largest id + 1; or list the category id of each"
            " output in dataset.category_ids",
            id="neither fits",
        ),
        pytest.param(
            [1, 90], 80, {},
            "dataset.num_classes: is 80; {json} has 2 categories with ids up to 90\n"
            "hint: write dataset.remap_mscoco_category: true if the outputs are COCO's 80 categories; or list the"
            " category id of each output in dataset.category_ids",
            id="COCO's, but not all",
        ),
        pytest.param(
            ["x", "k"], 3, {},
            "dataset.num_classes: is 3; {json} has 2 categories with ids up to x\n"
            "hint: write 2; or list the category id of each output in dataset.category_ids",
            id="texts that are too few",
        ),
        pytest.param(
            [3, 7], 8, {"remap_mscoco_category": True},
            "dataset.num_classes: is 8; {json} has 2 categories with ids up to 7\n"
            "hint: write 2, or dataset.remap_mscoco_category: false if the outputs are category ids",
            id="remapped and yet the ids",
        ),
        pytest.param(
            [0, 12], 80, {"remap_mscoco_category": True},
            "dataset.remap_mscoco_category: is true, but {json} has categories with other ids than COCO's: 0, 12\n"
            "hint: leave it out",
            id="remapped, but not COCO",
        ),
        pytest.param(
            [1, 2], 3, {"remap_mscoco_category": True, "category_ids": "as_ids"},
            "dataset.category_ids: dataset.remap_mscoco_category: true says what the outputs are, too\n"
            "hint: write one of the two",
            id="said twice",
        ),
        pytest.param(
            [1, 3], 3, {"category_ids": "as_ids"},
            "dataset.category_ids: as_ids does not fit: {json} has 2 categories with ids up to 3, dataset.num_classes"
            " is 3\n"
            "hint: correct dataset.num_classes, or list the category id of each output",
            id="an id that is no output",
        ),
        pytest.param(
            [1, 2, 3], 2, {"category_ids": "ordered"},
            "dataset.category_ids: ordered does not fit: {json} has 3 categories with ids up to 3, dataset.num_classes"
            " is 2\n"
            "hint: correct dataset.num_classes, or list the category id of each output",
            id="more than outputs",
        ),
        pytest.param(
            [1, 2], 3, {"category_ids": [1, 2]},
            "dataset.category_ids: has 2 entries, dataset.num_classes is 3\n"
            "hint: list the category id of each output, null for an output that is none",
            id="a list that is too short",
        ),
        pytest.param(
            [1, 2], 3, {"category_ids": [1, 2, 1]},
            "dataset.category_ids: has 1 twice\n"
            "hint: list the category id of each output, null for an output that is none",
            id="a list with an id twice",
        ),
        pytest.param(
            [1, 2], 2, {"category_ids": [3, None]},
            "dataset.category_ids: has no category id of {json}: 1, 2\n"
            "hint: list the category id of each output, null for an output that is none",
            id="a list of other ids",
        ),
        pytest.param([], 1, {}, "{json}: names no categories\nhint: name a COCO json with categories", id="none"),
    ],
)  # fmt: skip
def test_categories_that_do_not_fit_are_refused(
    tmp_path: Path, ids: Sequence[Any], classes: int, dataset: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(TaoqError) as error:
        read(tmp_path, ids, classes, **dataset)
    assert str(error.value) == message.format(json=tmp_path / "val.json")


def write_labels(folder: Path, *names: str) -> dict[str, Any]:
    """Write a config.json with names of outputs. Returns sections of a spec that names the folder as checkpoint."""
    labels = {str(index): name for index, name in enumerate(names)}
    (folder / "config.json").write_text(json.dumps({"id2label": labels}), encoding="utf-8")
    return {"quantize": {"model_path": str(folder)}, "evaluate": {"checkpoint": str(folder)}}


@pytest.mark.parametrize(
    ("labels", "reading"),
    [(("A ", "b", "c"), "ordered"), (("background", "a", "b"), "as_ids"), (("N/A", "a", "z"), "as_ids")],
)
def test_names_in_config_json_decide(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, labels: Sequence[str], reading: str
) -> None:
    with caplog.at_level(logging.INFO, "taoq"):
        coco = read(tmp_path, [1, 2], 3, **write_labels(tmp_path, *labels))
    assert coco.category_ids == ((1, 2, None) if reading == "ordered" else (None, 1, 2))
    assert f"{reading}, by the names in {tmp_path / 'config.json'}: output" in caplog.messages[-1]


@pytest.mark.parametrize("labels", [("LABEL_0", "LABEL_1", "LABEL_2"), ("0", "1", "2"), ("x", "y", "z"), ("a", "b")])
def test_names_that_say_nothing_decide_nothing(tmp_path: Path, labels: Sequence[str]) -> None:
    with pytest.raises(SpecError, match="missing, and needed: the 2 categories"):
        read(tmp_path, [1, 2], 3, **write_labels(tmp_path, *labels))


def test_names_in_a_classmap_decide(tmp_path: Path) -> None:
    classmap = tmp_path / "names.txt"
    for text, expected in (("a\nb\nc\n", (1, 2, None)), ("a\nb\n", (None, 1, 2))):
        classmap.write_text(text, encoding="utf-8")
        assert read(tmp_path, [1, 2], 3, infer_data_sources={"classmap": str(classmap)}).category_ids == expected


def test_categories_in_another_order_than_the_names_of_the_outputs_are_refused(tmp_path: Path) -> None:
    sections = write_labels(tmp_path, "b", "x", "a")
    with pytest.raises(SpecError) as error:
        read(tmp_path, [5, 6, 9], 3, **sections)
    assert str(error.value) == (
        f"dataset.category_ids: missing, and needed: output 0 is 'b' in {tmp_path / 'config.json'}, but 'a' by the ids"
        f" of {tmp_path / 'val.json'}\n"
        "hint: write [6, null, 5] for the names in config.json, or ordered"
    )
    assert read(tmp_path, [5, 6, 9], 3, category_ids=[6, None, 5], **sections).names == ("b", "class 1", "a")
    assert read(tmp_path, [5, 6, 9], 3, category_ids="ordered", **sections).names == ("a", "b", "c")


def test_a_checkpoint_of_tao_or_of_the_original_code_decides(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = tmp_path / "model.pth"
    sections = {"quantize": {"model_path": str(checkpoint)}, "evaluate": {"checkpoint": str(tmp_path / "artifact")}}
    torch.save({"state_dict": {"model.model.decoder.dec_score_head.0.weight": torch.zeros(3, 4)}}, checkpoint)
    with caplog.at_level(logging.INFO, "taoq"):
        assert read(tmp_path, [1, 2], 3, **sections).category_ids == (None, 1, 2)
    assert caplog.messages[-1].startswith(
        f"dataset.category_ids: as_ids, as in TAO and the original code, which made {checkpoint}: output 1 is 'a'"
    )
    with pytest.raises(SpecError, match="two things in 80 outputs"):  # a network for COCO may be meant
        read(tmp_path, [1, 2], 80, **sections)
    torch.save({"model.decoder.class_embed.0.weight": torch.zeros(3, 4)}, checkpoint)
    with pytest.raises(SpecError, match="two things in 3 outputs"):
        read(tmp_path, [1, 2], 3, **sections)


def test_names_for_inference_follow_the_reading(tmp_path: Path) -> None:
    read(tmp_path, [1, 2], 2)
    for reading, names in (("as_ids", ("class 0", "a", "b")), ("ordered", ("a", "b", "class 2"))):
        assert class_names(detector_spec(tmp_path, classes=3, dataset={"category_ids": reading})) == names
    listed = detector_spec(tmp_path, classes=3, dataset={"category_ids": [2, 7, 1]})
    assert class_names(listed) == ("b", "category 7", "a")


def drop_the_last_category(data: dict[str, Any]) -> None:
    data["categories"].pop()
    data["annotations"] = [entry for entry in data["annotations"] if entry["category_id"] != 10]


def test_annotations_without_the_last_category_are_not_shifted(
    taoq: Taoq, scenes_words: Words, scenes: Path, tmp_path: Path
) -> None:
    path = tmp_path / "val.json"
    path.write_bytes((scenes / "val_24.json").read_bytes())
    edit_json(path, drop_the_last_category)
    model = ROOT / "examples" / "digit_scenes" / "checkpoints" / "rtdetr_small"
    words = scenes_words(
        "evaluate",
        f"dataset.test_data_sources.json_file={path}",
        f"evaluate.checkpoint={model}",
    )
    code, _, err = taoq(*words)
    assert code == 2
    assert err.splitlines()[-2:] == [
        f"{ROOT}/examples/digit_scenes/rtdetr.yaml:23: dataset.category_ids: missing, and needed: the 9 categories of"
        f" {path}, with ids from 1 to 9, can be two things in 10 outputs",
        "hint: write as_ids if output 1 is '0' (as in TAO), ordered if output 0 is '0', or a list of all ids",
    ]
    for reading in ("ordered", str(list(range(1, 11)))):
        code, _, err = taoq(*words, f"dataset.category_ids={reading}")
        assert code == 0
        assert "warning: " not in err
        assert read_json(tmp_path / "results" / "evaluate" / "results.json")["metrics"]["val_mAP"] > 0.8
    code, _, err = taoq(*words, "dataset.category_ids=as_ids")
    assert code == 0
    assert "only 0 with its category: are the outputs those of dataset.category_ids?" in err
    assert read_json(tmp_path / "results" / "evaluate" / "results.json")["metrics"]["val_mAP"] < 0.1


@pytest.mark.parametrize(
    ("value", "text", "hint"),
    [
        ("ascending", "unknown value 'ascending'", "one of ordered, as_ids, or a list of whole numbers"),
        ("as_id", "unknown value 'as_id'", "did you mean 'as_ids'?"),
        ("3", "unknown value '3'", "one of ordered, as_ids, or a list of whole numbers"),
        ("{a: 1}", "is a section, not a single value", "one of ordered, as_ids, or a list of whole numbers"),
    ],
)
def test_a_value_that_is_no_reading_is_refused(refusal: Refusal, value: str, text: str, hint: str) -> None:
    assert refusal("evaluate", f"dataset.category_ids={value}") == (
        2,
        [f"override dataset.category_ids={value}: dataset.category_ids: {text}", f"hint: {hint}"],
    )


def test_an_entry_that_is_no_id_is_refused(refusal: Refusal) -> None:
    code, lines = refusal("evaluate", "dataset.category_ids=[1, a, 2.5, true]")
    assert code == 2
    assert [line.partition("dataset.category_ids[")[2] for line in lines if "hint" not in line] == [
        "1]: is the value 'a', not a whole number",
        "2]: is the value '2.5', not a whole number",
        "3]: is the value 'True', not a whole number",
    ]
