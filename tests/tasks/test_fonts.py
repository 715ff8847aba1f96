"""Names of classes in pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from taoq.tasks import fonts
from taoq.tasks.classification.predict import annotate
from taoq.tasks.fonts import drawn_names

CJK = ("猫", "犬", "dog")


def test_plain_names_need_no_font_of_the_machine(caplog: pytest.LogCaptureFixture) -> None:
    drawn = drawn_names(["cat", "dog_1"], "x")
    assert (drawn.names, drawn.file) == (("cat", "dog_1"), None)
    assert caplog.messages == []


def test_accents_greek_and_cyrillic_are_drawn_with_a_font_that_has_them() -> None:
    """DejaVu Sans, which matplotlib brings, has all of them."""
    names = ("café", "γάτα", "кошка")
    drawn = drawn_names(names, "x")
    assert drawn.names == names
    assert drawn.file is not None
    pictures = [
        np.asarray(annotate(Image.new("RGB", (224, 50)), name, drawn.font, correct=True)) for name in drawn.names
    ]
    assert all((one != other).any() for one in pictures for other in pictures if one is not other)


def test_names_without_a_font_become_numbers(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(fonts, "_best_font", lambda needed: (None, frozenset("dog")))  # noqa: ARG005
    drawn = drawn_names(CJK, "dataset.classes_file")
    assert drawn.names == ("class 0", "class 1", "dog")
    assert caplog.messages == [
        "dataset.classes_file: no font of this machine draws 猫, 犬: pictures show the number of the class; a font such"
        " as Noto Sans CJK draws them"
    ]


def test_the_font_with_most_characters_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from matplotlib.font_manager import FontEntry, fontManager

    entries = [FontEntry(fname=str(tmp_path / name), name=name, style="normal", weight=400) for name in "abc"]
    has = {"a": frozenset("猫"), "b": frozenset("猫犬"), "c": frozenset()}
    monkeypatch.setattr(fontManager, "ttflist", entries)
    monkeypatch.setattr(fonts, "_characters", lambda file: has[Path(file).name])
    fonts._best_font.cache_clear()
    assert drawn_names(CJK, "x").file == tmp_path / "b"
    assert drawn_names(CJK, "x").names == CJK
    fonts._best_font.cache_clear()


def test_a_damaged_font_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "x.ttf").write_bytes(b"no font")
    assert fonts._characters(str(tmp_path / "x.ttf")) == frozenset()
    assert fonts._characters(str(tmp_path / "nothing.ttf")) == frozenset()


def test_boxes_in_place_of_characters_are_no_font() -> None:
    """matplotlib brings a font with a box for every character. Whatever this machine has, it is not that."""
    file = drawn_names(CJK, "x").file
    assert file is None or "lastresort" not in file.name.lower()


def test_a_long_name_leaves_room_for_its_score() -> None:
    for size in ((224, 50), (30, 10), (3000, 10)):
        picture = annotate(Image.new("RGB", size), "a" * 300 + "  97.0 %", drawn_names(["a"], "x").font, correct=True)
        assert picture.height < 2 * max(size[1] * (224 // size[0] + 1), 64)
