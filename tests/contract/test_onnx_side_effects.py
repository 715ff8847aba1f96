"""Quantizing a graph prints nothing and leaves no file and no log handler. Real libraries, small graphs."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import pytest

from support.graphs import (
    branches,
    every_onnx_backend,
    feed,
    pictures,
    quantize,
    rule,
    tied,
)
from taoq.errors import TaoqError


@every_onnx_backend
@pytest.mark.parametrize("options", [{}, {"use_external_data_format": True}], ids=["whole", "external"])
def test_nothing_is_printed_and_no_file_is_left(
    backend: str,
    options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name in ("temporary", "current"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path / "current")
    for algorithm in ("max", "entropy"):
        quantize(backend, branches(), [rule("*")], feed(pictures()), options, algorithm=algorithm)
    assert capfd.readouterr() == ("", "")
    assert [path for folder in ("temporary", "current") for path in (tmp_path / folder).rglob("*")] == []
    assert tempfile.gettempdir() == str(tmp_path / "temporary")


@every_onnx_backend
def test_a_failure_leaves_no_file_either(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(TaoqError, match="not finite"):
        quantize(backend, branches(), [rule("*")], feed(pictures() * float("nan")))
    assert list(tmp_path.iterdir()) == []


@every_onnx_backend
def test_the_root_logger_gets_no_handler_that_prints(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    quantize(backend, tied(2), [rule("*")], feed(pictures()))
    assert logging.getLogger().handlers == []
