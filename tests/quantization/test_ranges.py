"""Calibration ranges and the file that keeps them: when it is used, when it is written, when it is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from taoq.errors import TaoqError
from taoq.quantization.ranges import RangeCache, Ranges, cached_ranges

KEY = {"model": "abc", "images": "def", "settings": "minmax", "versions": "1"}
RANGES = {"a": (-1.0, 2.5), "b": (0.0, 1 / 3), "c": (-1e-30, 3.4e38)}


def calibrate() -> Ranges:
    return RANGES


def must_not_run() -> Ranges:
    raise AssertionError("it calibrated")


def cache_in(folder: Path, **changed: str) -> RangeCache:
    return RangeCache(folder / "ranges.json", {**KEY, **changed})


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_without_a_cache_it_calibrates_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cached_ranges(None, ["a"], calibrate) == RANGES
    assert files_in(tmp_path) == []


def test_the_first_run_writes_one_file_and_the_folders_above_it(tmp_path: Path) -> None:
    assert cached_ranges(RangeCache(tmp_path / "of" / "mine" / "ranges.json", KEY), ["a"], calibrate) == RANGES
    assert files_in(tmp_path) == ["of", "of/mine", "of/mine/ranges.json"]


def test_the_second_run_takes_the_same_numbers_to_the_last_bit(tmp_path: Path) -> None:
    cached_ranges(cache_in(tmp_path), RANGES, calibrate)
    assert cached_ranges(cache_in(tmp_path), RANGES, must_not_run) == RANGES


def test_ranges_of_more_layers_serve_fewer(tmp_path: Path) -> None:
    cached_ranges(cache_in(tmp_path), RANGES, calibrate)
    assert cached_ranges(cache_in(tmp_path), ["b"], must_not_run)["b"] == RANGES["b"]


def test_ranges_of_fewer_layers_are_found_again_and_replaced(tmp_path: Path) -> None:
    cached_ranges(cache_in(tmp_path), ["a"], lambda: {"a": (0.0, 9.0)})
    assert cached_ranges(cache_in(tmp_path), ["a", "b"], calibrate) == RANGES
    assert cached_ranges(cache_in(tmp_path), ["a", "b"], must_not_run) == RANGES


@pytest.mark.parametrize("part", sorted(KEY))
def test_another_value_of_any_part_of_the_key_calibrates_again(part: str, tmp_path: Path) -> None:
    cached_ranges(cache_in(tmp_path), ["a"], lambda: {"a": (0.0, 9.0)})
    assert cached_ranges(cache_in(tmp_path, **{part: "other"}), ["a"], calibrate) == RANGES
    with pytest.raises(AssertionError, match="it calibrated"):
        cached_ranges(cache_in(tmp_path), ["a"], must_not_run)  # the file is of the other key now


def test_a_part_that_only_one_of_the_keys_has_calibrates_again(tmp_path: Path) -> None:
    cached_ranges(cache_in(tmp_path), ["a"], lambda: {"a": (0.0, 9.0)})
    assert cached_ranges(cache_in(tmp_path, device="cpu"), ["a"], calibrate) == RANGES
    assert cached_ranges(cache_in(tmp_path), ["a"], lambda: {"a": (0.0, 7.0)}) == {"a": (0.0, 7.0)}


@pytest.mark.parametrize(
    ("tensors", "changed", "message"),
    [
        (["a"], {}, "ranges of 3 tensors taken from {path}; nothing was calibrated"),
        (["a"], {"model": "x", "images": "y"}, "{path} differs in model, images: calibrating again"),
        (["a", "z"], {}, "{path} lacks ranges of planned layers: calibrating again"),
    ],
    ids=["taken", "key", "layers"],
)
def test_it_logs_whether_the_file_was_used(
    tensors: list[str],
    changed: dict[str, str],
    message: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cached_ranges(cache_in(tmp_path), RANGES, calibrate)
    caplog.set_level(logging.INFO, "taoq")
    cached_ranges(cache_in(tmp_path, **changed), tensors, calibrate)
    path = tmp_path / "ranges.json"
    assert caplog.messages == ["quantize.calibration.cache: " + message.format(path=path)]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x89PNG\xff",
        b"null",
        b"[]",
        b'{"key": {}}',
        b'{"ranges": {}}',
        b'{"key": [], "ranges": {}}',
        b'{"key": {}, "ranges": {"a": [1]}}',
        b'{"key": {}, "ranges": {"a": ["low", "high"]}}',
        b'{"key": {}, "ranges": {"a": 1}}',
        b'{"key": {}, "ranges": {"a": [0.0, NaN]}}',
        b'{"key": {}, "ranges": {"a": [0.0, Infinity]}}',
        b'{"key": {}, "ranges": {"a": [2.0, 1.0]}}',
        b'{"key": {}, "ranges": {"a": [0.0, 1.0',
    ],
)
def test_a_damaged_file_is_an_error_and_is_not_replaced(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "ranges.json"
    path.write_bytes(content)
    with pytest.raises(TaoqError) as error:
        cached_ranges(cache_in(tmp_path), ["a"], must_not_run)
    assert str(error.value) == (
        f"quantize.calibration.cache: {path} is not a file of calibration ranges\nhint: delete it, or name another file"
    )
    assert path.read_bytes() == content
    assert files_in(tmp_path) == ["ranges.json"]


def test_a_folder_of_that_name_is_an_error_and_leaves_no_partial_file(tmp_path: Path) -> None:
    (tmp_path / "ranges.json").mkdir()
    with pytest.raises(TaoqError) as error:
        cached_ranges(cache_in(tmp_path), ["a"], calibrate)
    assert str(error.value) == (
        f"quantize.calibration.cache: {tmp_path / 'ranges.json'} cannot be written: Is a directory\n"
        "hint: free some space, or name another file"
    )
    assert files_in(tmp_path) == ["ranges.json"]


def test_a_file_in_the_place_of_its_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    path = tmp_path / "file" / "ranges.json"
    with pytest.raises(TaoqError) as error:
        cached_ranges(RangeCache(path, KEY), ["a"], calibrate)
    assert str(error.value) == (
        f"quantize.calibration.cache: {path} cannot be written: File exists\n"
        "hint: free some space, or name another file"
    )
    assert (tmp_path / "file").read_text() == "kept"


def test_a_name_that_is_too_long_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 300)
    with pytest.raises(TaoqError) as error:
        cached_ranges(RangeCache(path, KEY), ["a"], calibrate)
    assert str(error.value) == (
        f"quantize.calibration.cache: {path} cannot be written: File name too long\n"
        "hint: free some space, or name another file"
    )


def test_a_calibration_that_fails_leaves_the_file_of_before(tmp_path: Path) -> None:
    cached_ranges(cache_in(tmp_path), ["a"], calibrate)
    before = (tmp_path / "ranges.json").read_bytes()
    with pytest.raises(AssertionError, match="it calibrated"):
        cached_ranges(cache_in(tmp_path, model="other"), ["a"], must_not_run)
    assert (tmp_path / "ranges.json").read_bytes() == before
    assert files_in(tmp_path) == ["ranges.json"]


def test_the_file_is_plain_json(tmp_path: Path) -> None:
    cached_ranges(cache_in(tmp_path), ["a"], lambda: {"a": (-1.0, 2.5)})
    assert json.loads((tmp_path / "ranges.json").read_text()) == {"key": KEY, "ranges": {"a": [-1.0, 2.5]}}
