"""On which device an action runs, and what says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support.commands import Taoq, Words, read_json


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_evaluate_runs_an_onnx_file_on_the_cpu_where_there_is_no_gpu(
    taoq: Taoq, digits_words: Words, resnet: Path, tmp_path: Path
) -> None:
    words = digits_words("evaluate", "resnet_18", f"evaluate.checkpoint={resnet}", "evaluate.device=trt")
    code, out, err = taoq(*words)
    assert (code, err) == (
        0,
        "warning: override evaluate.device=trt: evaluate.device: TensorRT needs a GPU, and this machine has none;"
        " running on the CPU\n",
    )
    assert f"{resnet}: 597 images on cpu\n" in out
    assert read_json(tmp_path / "results" / "evaluate" / "results.json")["device"] == "cpu"
