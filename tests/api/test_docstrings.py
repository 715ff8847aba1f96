"""The examples in the docstrings of the public functions run as they are written."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest
import torch
from torch import nn

import taoq

RUN_ELSEWHERE = "run"
"""Its example needs a task's spec and data, which tests/actions/ have."""
IN_ORDER = ["quantize", "load", "evaluate", "compare", "benchmark", "analyze", "export"]
"""Later examples load the artifacts of earlier ones."""


def source(name: str) -> str:
    """The example of a function as a program."""
    examples = doctest.DocTestParser().get_examples(getattr(taoq, name).__doc__)
    assert examples, name
    return "".join(example.source for example in examples)


def test_every_function_has_an_example() -> None:
    functions = {name for name in taoq.__all__ if name[0].islower()}
    assert functions == {*IN_ORDER, RUN_ELSEWHERE}
    compile(source(RUN_ELSEWHERE), RUN_ELSEWHERE, "exec")


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    images = list(torch.rand(2, 8, 3, 8, 8))
    with torch.inference_mode():
        labelled_images = [(batch, network(batch).argmax(1)) for batch in images]
    names = {"network": network, "images": images, "labelled_images": labelled_images}
    for name in IN_ORDER:
        exec(source(name), names)
        if name == "quantize":  # a second artifact to compare with
            exec(source(name).replace("results/int8", "results/fp8").replace('"int8"', '"fp8_e4m3fn"'), names)
