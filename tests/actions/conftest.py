"""What more than one test file of the actions needs: exported networks, and command lines on any network."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from support.commands import Taoq, Words, export_words, read_json
from support.examples import CHECKPOINTS
from taoq.cli import main


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Networks this small run slower on more, and far slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def export_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the exported example networks lie."""
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="session")
def classifier_file(digits_words_into: Callable[[Path], Words], export_folder: Path) -> Callable[[str], Path]:
    """The ONNX file of an example classifier, exported once."""

    @functools.cache
    def file_of(network: str) -> Path:
        file = export_folder / f"{network}.onnx"
        assert main(export_words(digits_words_into(export_folder / "results"), network, file)) == 0
        return file

    return file_of


@pytest.fixture
def float_file(
    classifier_file: Callable[[str], Path], export_folder: Path, request: pytest.FixtureRequest
) -> Callable[[str], Path]:
    """The ONNX file of any example network, exported once."""

    def file_of(network: str) -> Path:
        if network != "detector":
            return classifier_file(network)
        file = export_folder / "detector.onnx"
        if not file.exists():
            scenes_words: Words = request.getfixturevalue("scenes_words")
            options = [f"export.checkpoint={CHECKPOINTS[network]}", f"export.onnx_file={file}", "export.on_cpu=true"]
            assert main(scenes_words("export", *options, f"export.results_dir={export_folder / 'results'}")) == 0
        return file

    return file_of


@pytest.fixture
def resnet(float_file: Callable[[str], Path]) -> Path:
    """The ONNX file of the example ResNet."""
    return float_file("resnet_18")


@pytest.fixture
def network_words(request: pytest.FixtureRequest) -> Words:
    """Words of a command line on any example network: (action, network, *overrides)."""

    def words(action: str, network: str, *overrides: str) -> list[str]:
        if network == "detector":
            scenes_words: Words = request.getfixturevalue("scenes_words")
            return scenes_words(action, *overrides)
        digits_words: Words = request.getfixturevalue("digits_words")
        return digits_words(action, network, *overrides)

    return words


@pytest.fixture
def export_network(network_words: Words) -> Words:
    """Words of an export of an example checkpoint: (network, *overrides)."""

    def words(network: str, *overrides: str) -> list[str]:
        checkpoint = f"export.checkpoint={CHECKPOINTS[network]}"
        return network_words("export", network, "export.on_cpu=true", checkpoint, *overrides)

    return words


@pytest.fixture
def metrics(taoq: Taoq, network_words: Words, tmp_path: Path) -> Callable[[str, Path], dict[str, float]]:
    """The metrics of a checkpoint by `evaluate`: (network, checkpoint)."""

    def metrics_of(network: str, checkpoint: Path) -> dict[str, float]:
        options = [f"evaluate.checkpoint={checkpoint}", f"evaluate.results_dir={tmp_path / 'evaluate'}"]
        code, _, err = taoq(*network_words("evaluate", network, *options))
        assert code == 0, err
        return read_json(tmp_path / "evaluate" / "results.json")["metrics"]

    return metrics_of
