"""An interrupted run says so, leaves nothing half-written behind, and an earlier artifact whole."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.commands import status_lines
from support.small_spec import CALIBRATION_NOTICES, STATIC_OVERRIDES
from taoq.pipeline.artifacts import read_artifact


@pytest.mark.parametrize(
    ("number", "action", "overrides", "split", "answer"),
    [
        (
            signal.SIGINT,
            "quantize",
            STATIC_OVERRIDES,
            "calibration",
            (130, CALIBRATION_NOTICES["modelopt.pytorch"] + "interrupted\n"),
        ),
        (signal.SIGTERM, "inference", (), "test", (143, "")),
    ],
    ids=["Ctrl-C", "SIGTERM"],
)
def test_an_interrupted_run_says_so_and_leaves_nothing_behind(
    artifact: Path, number: int, action: str, overrides: tuple[str, ...], split: str, answer: tuple[int, str]
) -> None:
    manifest = read_artifact(artifact).manifest
    before = files()
    image = min(Path("data", split, "6").iterdir())
    assert interrupt(number, image, action, *overrides) == answer
    assert without_logs(files(), action) == without_logs({**before, image: b""}, action)
    assert read_artifact(artifact).manifest == manifest


def test_an_interrupted_run_on_a_graph_leaves_the_earlier_artifact_whole(
    onnx_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_artifact(onnx_artifact).manifest
    before = files()
    image = min(Path("data/calibration/6").iterdir())
    overrides = ["quantize.backend=modelopt.onnx", "quantize.calibration.cache=ranges.json"]
    monkeypatch.setenv("TMPDIR", str(Path("temporary").resolve()))
    assert interrupt(signal.SIGTERM, image, "quantize", *overrides) == (143, CALIBRATION_NOTICES["modelopt.onnx"])
    assert without_logs(files(), "quantize") == without_logs({**before, image: b""}, "quantize")
    assert not list(Path("temporary").iterdir())
    assert read_artifact(onnx_artifact).manifest == manifest


def interrupt(number: int, image: Path, action: str, *overrides: str) -> tuple[int, str]:
    """Interrupt a run while it reads an image, which is empty afterwards; returns exit code and stderr."""
    image.unlink()
    os.mkfifo(image)  # whoever reads it waits
    with subprocess.Popen(
        [sys.executable, "-m", "taoq", "classification_pyt", action, "-e", "spec.yaml", *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # tests that run in the background ignore Ctrl-C, and so would what they start
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as run:
        try:
            writer = wait_for_reader(image, run)
            assert status_lines(Path("results", action))[-1]["status"] == "STARTED"
            run.send_signal(number)
            _, err = run.communicate(timeout=60)
            os.close(writer)
        finally:
            run.kill()  # a run that does not end would keep a failed test waiting
    image.unlink()
    image.touch()
    last = status_lines(Path("results", action))[-1]
    assert (last["status"], last["message"]) == ("FAILURE", f"{action.capitalize()} failed: interrupted")
    return run.returncode, err


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


def files() -> dict[Path, bytes]:
    """The files of the current folder."""
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def without_logs(contents: dict[Path, bytes], action: str) -> dict[Path, bytes]:
    """Files besides the two that every run writes."""
    logs = {Path("results", action, name) for name in ("status.json", "log.txt")}
    return {path: data for path, data in contents.items() if path not in logs}
