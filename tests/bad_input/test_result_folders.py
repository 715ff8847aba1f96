"""Where results cannot be written, the fault is named; nothing is replaced that taoq did not write."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.commands import Taoq
from support.damage import cut
from support.small_spec import CALIBRATION_NOTICES, PURPOSE, STATIC_OVERRIDES, Refused
from taoq.pipeline.artifacts import MANIFEST, read_artifact


@pytest.mark.parametrize("action", ["quantize", "evaluate", "inference"])
@pytest.mark.parametrize(
    ("words", "folder", "reason"),
    [
        (["results_dir=weights.safetensors/new"], "weights.safetensors/new/", "Not a directory"),
        (["results_dir=weights.safetensors"], "weights.safetensors/", "Not a directory"),
        (["{}.results_dir=weights.safetensors"], "", "File exists"),
    ],
    ids=["below a file", "a file", "a file as the action's own"],
)
def test_a_results_dir_that_cannot_be_a_folder_is_refused(
    work: Path, refused: Refused, action: str, words: list[str], folder: str, reason: str
) -> None:
    assert refused(action, *(word.format(action) for word in words)) == (
        1,
        f"{folder + action if folder else 'weights.safetensors'}: cannot be a results folder: {reason}\n"
        "hint: choose another folder with results_dir=...\n",
    )


@pytest.mark.parametrize("name", ["log.txt", "status.json"])
def test_a_folder_in_the_place_of_a_log_is_refused(work: Path, taoq: Taoq, name: str) -> None:
    Path("results/quantize", name).mkdir(parents=True)
    assert taoq("classification_pyt", "quantize", "-e", "spec.yaml") == (
        1,
        "",
        "results/quantize: cannot be a results folder: Is a directory\n"
        "hint: choose another folder with results_dir=...\n",
    )
    assert not list(Path("results").rglob("*.pth"))
    assert not Path("results/quantize/status.json").is_file()  # it would say that the run goes on


@pytest.mark.parametrize(
    ("action", "words", "name", "notices"),
    [
        ("quantize", (), "quantized_model_torchao.pth", PURPOSE["torchao"]),
        ("quantize", STATIC_OVERRIDES, MANIFEST, CALIBRATION_NOTICES["modelopt.pytorch"]),
        ("evaluate", (), "results.json", ""),
        ("inference", (), "result.csv", ""),
    ],
    ids=["payload", "manifest", "results.json", "result.csv"],
)
def test_a_folder_in_the_place_of_a_result_is_not_replaced(
    work: Path, refused: Refused, action: str, words: tuple[str, ...], name: str, notices: str
) -> None:
    mine = Path("results", action, name, "mine.txt")
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert refused(action, *words) == (
        1,
        f"{notices}{mine.parent}: a folder is in the place of this file\nhint: move it away, or name another folder\n",
    )


def test_a_file_in_the_place_of_a_folder_of_results_is_not_replaced(work: Path, refused: Refused) -> None:
    mine = Path("results/inference/visualize")
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert refused("inference") == (
        1,
        f"{mine}: a file is in the place of this folder\nhint: move it away, or name another folder\n",
    )


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """Let writing fail at a size, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("action", "words", "size", "notices"),
    [
        ("quantize", (), 100_000, PURPOSE["torchao"]),
        ("quantize", STATIC_OVERRIDES, 100_000, CALIBRATION_NOTICES["modelopt.pytorch"]),
        ("quantize", (), 20_000, PURPOSE["torchao"]),
        ("evaluate", (), 20_000, ""),
        ("inference", ("inference.vis_after_n_batches=0",), 2_000, ""),
    ],
    ids=["torchao", "modelopt", "torchao, at once", "evaluate", "inference"],
)
def test_a_full_disk_is_named_as_the_fault(
    work: Path, refused: Refused, action: str, words: tuple[str, ...], size: int, notices: str
) -> None:
    with no_file_larger_than(size):
        answer = refused(action, *words)
    assert answer == (
        1,
        f"{notices}results/{action}: cannot be written: File too large\n"
        "hint: free some space, or name another folder\n",
    )


def test_an_earlier_artifact_stays_when_later_runs_are_refused(artifact: Path, taoq: Taoq, refused: Refused) -> None:
    manifest = read_artifact(artifact).manifest
    cut(min(Path("data/calibration/6").iterdir()), 150)
    assert refused("quantize", "quantize.layers.0.module_name=Liner")[0] == 2
    assert refused("quantize", "dataset.num_classes=12")[0] == 1
    assert refused("quantize", *STATIC_OVERRIDES)[0] == 1
    with no_file_larger_than(100_000):
        assert refused("quantize")[0] == 1
    with no_file_larger_than(20_000):
        assert refused("quantize", "quantize.layers.0.weights.dtype=fp8_e4m3fn")[0] == 1
    assert read_artifact(artifact).manifest == manifest
    assert taoq("classification_pyt", "evaluate", "-e", "spec.yaml", f"evaluate.checkpoint={artifact}")[0] == 0


def test_an_artifact_does_not_replace_its_source(work: Path, refused: Refused) -> None:
    Path("models").mkdir()
    torch.save(load_file("weights.safetensors"), "models/quantized_model_torchao.pth")
    words = ["quantize.model_path=models/quantized_model_torchao.pth", "quantize.results_dir=data/../models"]
    assert refused("quantize", *words) == (
        2,
        "override quantize.results_dir=data/../models: quantize.results_dir: the artifact would replace"
        " models/quantized_model_torchao.pth\n"
        "hint: name another folder\n",
    )
